"""The identity of KV blocks: what was computed under one mask must never serve a request with another."""

import hashlib
from typing import Any

from crane_serve.common.masks import MaskError, Positions, ResolvedMask

_PREFIX = "crane-mask-"


def check_salt(client_salt: str | None) -> None:
    """Raise MaskError for a client's salt of the form used here, which could reach blocks computed under a mask."""
    if client_salt is not None and client_salt.startswith(_PREFIX):
        raise MaskError(f"cache_salt must not begin with {_PREFIX!r}")


def salted(mask: ResolvedMask | None, client_salt: str | None) -> str | None:
    """The cache salt of a request, which identifies its KV blocks from the first on.

    A prompt that is computed unmasked keeps the client's salt, and shares blocks as it would without masks. Raises
    MaskError like `check_salt`.
    """
    check_salt(client_salt)
    if mask is None or mask.positions is Positions.GENERATED:
        return client_salt
    return _PREFIX + _hash("request", mask.mask.digest, client_salt or "")


def generated_salt(mask: ResolvedMask | None, prompt_tokens: int, end: int) -> str | None:
    """A second salt, for a block that ends before token `end`; None if the first salt is enough.

    If only prompt tokens or only generated tokens are masked, the KV of the same tokens depends on where the prompt
    ended.
    """
    if mask is None or mask.positions is Positions.ALL or end <= prompt_tokens:
        return None
    return _PREFIX + _hash("block", mask.mask.digest, mask.positions.value, str(prompt_tokens))


def with_generated_salt(keys: tuple[Any, ...] | None, salt: str | None) -> tuple[Any, ...] | None:
    """vLLM's extra keys of a KV block, extended in the form that vLLM gives to cache salts."""
    return keys if salt is None else (*(keys or ()), ("cache_salt", salt))


def _hash(*parts: str) -> str:
    """Of parts with their lengths, so that no part can pass for several."""
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()
