"""API keys: who may call, and who may change masks."""

import hashlib
import hmac
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import SecretStr

_log = logging.getLogger("crane.api")

MIN_KEY_CHARACTERS = 16
_NAME = re.compile(r"[a-z0-9_-]{1,64}")
_KEY = re.compile(rf"[!-~]{{{MIN_KEY_CHARACTERS},}}")  # visible ASCII, which is what fits into a header
_HASHED = "sha256:"
_HASH = re.compile(r"[0-9a-fA-F]{64}")
_READABLE_BY_OTHERS = 0o044


class Role(StrEnum):
    """USER may read and generate; ADMIN may also change masks."""

    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True)
class Key:
    """The holder of a key. The key itself is not stored."""

    name: str
    role: Role


class KeyRing:
    """The accepted keys, as SHA-256 digests."""

    def __init__(self) -> None:
        self._keys: list[tuple[bytes, Key]] = []

    @classmethod
    def load(
        cls, file: Path | None, user_key: SecretStr | None = None, admin_key: SecretStr | None = None
    ) -> "KeyRing | None":
        """The keys of a file, and those given one by one, which are named "user" and "admin"; None if there are none.

        file: lines `NAME ROLE KEY`, blank lines, and comments from a word that begins with `#` to the end of the line.
        A key is at least 16 visible ASCII characters, or `sha256:` and the digest of one, in hexadecimal.
        Raises ValueError, which names the file and the line but never a key.
        """
        ring = cls()
        if file is not None:
            for place, words in _lines(file):
                ring._add_line(place, words)
            if not ring._keys:
                raise ValueError(f"{file}: no keys; expected lines 'NAME user|admin KEY'")
        for role, secret in ((Role.USER, user_key), (Role.ADMIN, admin_key)):
            if secret is not None:
                ring._add(f"{role}_key", Key(role.value, role), secret.get_secret_value())
        return ring if ring._keys else None

    def find(self, token: str) -> Key | None:
        """The holder of this key, None if there is none. Takes the same time for every token of the same length."""
        digest = _digest(token)
        match = None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                match = key
        return match

    def _add_line(self, place: str, words: list[str]) -> None:
        if len(words) != 3:
            raise ValueError(f"{place}: {len(words)} words; expected 'NAME user|admin KEY'")
        name, role, secret = words
        if not _NAME.fullmatch(name):
            raise ValueError(f"{place}: the name is not 1 to 64 of a-z, 0-9, _ and -")
        if role not in set(Role):
            raise ValueError(f"{place}: the role is neither user nor admin")
        self._add(place, Key(name, Role(role)), secret)

    def _add(self, place: str, key: Key, secret: str) -> None:
        # The message does not repeat the name: it could be a key, if the columns are swapped.
        if any(key.name == other.name for _, other in self._keys):
            raise ValueError(f"{place}: there is another key of this name")
        digest = _parse(place, secret)
        if any(digest == other for other, _ in self._keys):
            raise ValueError(f"{place}: this key is given twice")
        self._keys.append((digest, key))


def _lines(file: Path) -> Iterator[tuple[str, list[str]]]:
    """The place of each line that is not blank, for messages, and its words without comments."""
    try:
        mode = file.stat().st_mode
        content = file.read_bytes().decode()
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}:{number}: not text in UTF-8") from None  # the original error would show the content
    if mode & _READABLE_BY_OTHERS:
        _log.warning("%s: other users than its owner can read the keys (mode %o); run chmod 600", file, mode & 0o777)
    for number, line in enumerate(content.split("\n"), 1):
        words = line.split()
        comment = next((index for index, word in enumerate(words) if word.startswith("#")), len(words))
        if comment:
            yield f"{file}:{number}", words[:comment]


def _parse(place: str, secret: str) -> bytes:
    """The digest of a key that is written out or given by its digest."""
    if secret.startswith(_HASHED):
        if not _HASH.fullmatch(secret.removeprefix(_HASHED)):
            raise ValueError(f"{place}: expected 64 hexadecimal digits after {_HASHED}")
        return bytes.fromhex(secret.removeprefix(_HASHED))
    if not _KEY.fullmatch(secret):
        raise ValueError(f"{place}: a key is at least {MIN_KEY_CHARACTERS} visible ASCII characters")
    return _digest(secret)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()
