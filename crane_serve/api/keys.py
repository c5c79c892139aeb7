"""API keys: who may call, and who may change masks."""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """USER may read and generate; ADMIN may also change masks."""

    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True)
class Key:
    """Who holds a key. The key itself is not kept."""

    name: str
    role: Role
