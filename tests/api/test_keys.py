"""Key files: what is read from them, and that no fault shows a key."""

import hashlib
import hmac
import logging
import traceback
from pathlib import Path

import pytest
from pydantic import SecretStr

from crane_serve.service.api import keys
from crane_serve.service.api.keys import Key, KeyRing, Role

ALICE, BOB, CAROL = "alice-" + "k" * 20, "bob#" + "~" * 20, "carol-" + "!" * 20


def key_file(tmp_path: Path, content: str | bytes) -> Path:
    file = tmp_path / "keys"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    file.chmod(0o600)
    return file


def test_no_keys_at_all_is_an_open_server() -> None:
    assert KeyRing.load(None, None, None) is None


def test_a_file_of_keys(tmp_path: Path) -> None:
    hashed = hashlib.sha256(CAROL.encode()).hexdigest().upper()
    content = f"""# ours

  \t
alice user {ALICE}\r
bob-2_x\tadmin   {BOB} # the boss
#x admin y
carol user sha256:{hashed}"""
    ring = KeyRing.load(key_file(tmp_path, content))
    assert ring is not None
    assert ring.find(ALICE) == Key("alice", Role.USER)
    assert ring.find(BOB) == Key("bob-2_x", Role.ADMIN)
    assert ring.find(CAROL) == Key("carol", Role.USER)


def test_keys_given_one_by_one_stand_beside_the_file(tmp_path: Path) -> None:
    ring = KeyRing.load(key_file(tmp_path, f"alice user {ALICE}\n"), SecretStr(BOB), SecretStr(CAROL))
    assert ring is not None
    assert [ring.find(token) for token in (ALICE, BOB, CAROL)] == [
        Key("alice", Role.USER),
        Key("user", Role.USER),
        Key("admin", Role.ADMIN),
    ]
    alone = KeyRing.load(None, None, SecretStr(CAROL))
    assert alone is not None
    assert (alone.find(CAROL), alone.find(BOB)) == (Key("admin", Role.ADMIN), None)


@pytest.mark.parametrize(
    "token",
    [
        "",
        ALICE[:-1],
        ALICE + " ",
        ALICE.upper(),
        "sha256:" + hashlib.sha256(ALICE.encode()).hexdigest(),
        hashlib.sha256(ALICE.encode()).hexdigest(),
        "é" * 40,
        "\ud800" * 20,
        "x" * 100_000,
        ALICE + "\r\nx-admin: 1",
        ALICE + "\0",
    ],
)
def test_any_other_token_is_nobodys(tmp_path: Path, token: str) -> None:
    ring = KeyRing.load(key_file(tmp_path, f"alice user {ALICE}\n"))
    assert ring is not None
    assert ring.find(token) is None


SECRET = "do-not-show-this-anywhere"
FAULTS = [
    (f"a user {SECRET}\nb user", 2, "2 words; expected 'NAME user|admin KEY'"),
    (f"a user {SECRET} {SECRET}2", 1, "4 words"),
    (f"\n\n{SECRET}", 3, "1 words"),
    (f"{SECRET}! user a", 1, "the name is not"),
    (f"{'a' * 65} user {SECRET}", 1, "the name is not"),
    (f"Alice user {SECRET}", 1, "the name is not"),
    (f"a {SECRET} user", 1, "the role is neither user nor admin"),
    (f"a root {SECRET}", 1, "the role is neither"),
    (f"a ADMIN {SECRET}", 1, "the role is neither"),
    ("a user do-not-show-thi", 1, "at least 16 visible ASCII characters"),
    (f"a user {SECRET}é", 1, "at least 16 visible ASCII characters"),
    (f"a user sha256:{SECRET}", 1, "expected 64 hexadecimal digits"),
    (f"a user sha256:{'a' * 63}", 1, "expected 64 hexadecimal digits"),
    (f"a user {SECRET}\na user {SECRET}2", 2, "another key of this name"),
    (f"{SECRET} user {SECRET}1\n{SECRET} user {SECRET}2", 2, "another key of this name"),
    (f"a user {SECRET}\nb admin {SECRET}", 2, "this key is given twice"),
    (f"a user {SECRET}\nb user sha256:{hashlib.sha256(SECRET.encode()).hexdigest()}", 2, "this key is given twice"),
    (f"a user {SECRET}\nb user {SECRET}".encode() + b"\xff\n", 2, "not text in UTF-8"),
]


@pytest.mark.parametrize(("content", "line", "message"), FAULTS)
def test_a_fault_names_file_and_line_but_no_key(
    tmp_path: Path, content: str | bytes, line: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = key_file(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        KeyRing.load(file)
    assert str(caught.value).startswith(f"{file}:{line}: ")
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + caplog.text
    assert "do-not-show" not in shown


@pytest.mark.parametrize("content", ["", "\n# only a comment\n"])
def test_a_file_without_keys_is_a_fault(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match="keys: no keys; expected lines"):
        KeyRing.load(key_file(tmp_path, content), SecretStr(ALICE))


def test_a_file_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent: No such file or directory"):
        KeyRing.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("user", "admin", "message"),
    [
        (SECRET[:15], None, "user_key: a key is at least 16"),
        (None, "", "admin_key: a key is at least 16"),
        (f"{SECRET}\n", None, "user_key: a key is at least 16"),
        (SECRET, SECRET, "admin_key: this key is given twice"),
    ],
)
def test_faults_of_keys_given_one_by_one(user: str | None, admin: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        KeyRing.load(None, None if user is None else SecretStr(user), None if admin is None else SecretStr(admin))
    assert "do-not" not in str(caught.value)


@pytest.mark.parametrize("name", ["user", "admin"])
def test_a_key_given_alone_must_not_clash_with_the_file(tmp_path: Path, name: str) -> None:
    file = key_file(tmp_path, f"{name} user {ALICE}\n")
    with pytest.raises(ValueError, match=f"{name}_key: there is another key of this name"):
        KeyRing.load(file, **{f"{name}_key": SecretStr(BOB)})
    with pytest.raises(ValueError, match="admin_key: this key is given twice"):
        KeyRing.load(key_file(tmp_path, f"alice user {ALICE}\n"), None, SecretStr(ALICE))


def test_neither_keys_nor_digests_are_shown(tmp_path: Path) -> None:
    ring = KeyRing.load(key_file(tmp_path, f"alice user {ALICE}\n"), SecretStr(BOB))
    assert ring is not None
    digest = hashlib.sha256(ALICE.encode())
    for shown in (repr(ring), str(ring), f"{ring}", repr(ring.find(ALICE)), repr(vars(ring))):
        assert ALICE not in shown
        assert BOB not in shown
    for shown in (repr(ring), str(ring), repr(ring.find(ALICE))):
        assert digest.hexdigest() not in shown
        assert repr(digest.digest()) not in shown


def test_every_key_is_compared_whichever_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [f"{index:02}-{'k' * 20}" for index in range(7)]
    ring = KeyRing.load(key_file(tmp_path, "".join(f"n{index} user {token}\n" for index, token in enumerate(tokens))))
    assert ring is not None
    compared: list[int] = []
    original = hmac.compare_digest

    def compare(first: bytes, second: bytes) -> bool:
        compared.append(len(first))
        return original(first, second)

    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    for token in (*tokens, "nobody's", ""):
        compared.clear()
        ring.find(token)
        assert compared == [32] * 7


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_can_read_is_warned_of(
    tmp_path: Path, mode: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file = key_file(tmp_path, f"alice user {ALICE}\n")
    file.chmod(mode)
    with caplog.at_level(logging.WARNING, "crane.api"):
        KeyRing.load(file)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    assert (f"{file}: " in caplog.text and f"(mode {mode:o})" in caplog.text) is warned
    assert ALICE not in caplog.text
