"""A server that others reach has keys, or its operator has said that it needs none."""

import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from crane_serve.cli import app
from crane_serve.service.exposure import is_loopback, require_keys
from crane_serve.service.settings import ServeSettings

KEY = "a-key-of-some-length"
NAMES = {"inside": ["127.0.0.1", "::1"], "outside": ["127.0.0.1", "192.0.2.7"], "scoped": ["fe80::1%1"]}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    original = socket.getaddrinfo

    def look_up(host: str, *arguments: Any, **options: Any) -> Any:
        if host == "unknown":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [found for one in NAMES.get(host, [host]) for found in original(one, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def settings(tmp_path: Path, **given: Any) -> ServeSettings:
    return ServeSettings(model="m", masks=str(tmp_path), **given)


PUBLIC = ["0.0.0.0", "::", "", "192.0.2.7", "2001:db8::1", "outside", "scoped"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "inside"])
def test_what_only_this_machine_reaches_needs_no_keys(tmp_path: Path, host: str) -> None:
    assert is_loopback(host)
    require_keys(settings(tmp_path, host=host))


@pytest.mark.parametrize("host", PUBLIC)
def test_what_others_reach_needs_keys(tmp_path: Path, host: str) -> None:
    with pytest.raises(ValueError, match=r"no API keys.*--api-keys-file.*CRANE_ADMIN_KEY.*--insecure"):
        require_keys(settings(tmp_path, host=host))
    for protection in ({"user_key": KEY}, {"admin_key": KEY}, {"api_keys_file": tmp_path / "x"}, {"insecure": True}):
        require_keys(settings(tmp_path, host=host, **protection))


def test_a_name_without_an_address(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="host 'unknown' has no address: Name or service not known"):
        require_keys(settings(tmp_path, host="unknown"))


@pytest.mark.parametrize("options", [("--host", "0.0.0.0"), ("--host", "::", "--no-insecure")])
def test_the_command_says_so_before_it_looks_for_the_model(tmp_path: Path, options: tuple[str, ...]) -> None:
    pytest.importorskip("torch")
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "missing"), "--masks", str(tmp_path), *options])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: host {options[1]!r} can be reached from other machines")
    result = CliRunner().invoke(
        app, ["serve", str(tmp_path / "missing"), "--masks", str(tmp_path), *options, "--insecure"]
    )
    assert "missing does not exist" in result.stderr


OWN = ("localhost", "127.0.0.1", "::1")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, OWN),
        ({"host": "0.0.0.0"}, (*OWN, "0.0.0.0")),
        ({"allowed_hosts": "a.example, b.example"}, (*OWN, "a.example", "b.example")),
        ({"allowed_hosts": "*"}, (*OWN, "*")),
        ({"admin_key": KEY}, ()),
        ({"admin_key": KEY, "allowed_hosts": ["a.example"]}, (*OWN, "a.example")),
    ],
)
def test_the_names_of_a_server(tmp_path: Path, given: dict[str, Any], names: tuple[str, ...]) -> None:
    assert settings(tmp_path, **given).allowed_hosts == names
