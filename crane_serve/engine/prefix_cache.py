"""The identity of KV blocks: what was computed under one mask must never serve a request with another."""

import hashlib
from typing import Any

from crane_serve.common.masks import MaskError, Positions, ResolvedMask
from crane_serve.engine.admission import MaskRequest

_PREFIX = "crane-mask-"


def check_salt(client_salt: str | None) -> None:
    """Raise MaskError for a client's salt of the form used here, which could reach blocks computed under a mask."""
    if client_salt is not None and client_salt.startswith(_PREFIX):
        raise MaskError(f"cache_salt must not begin with {_PREFIX!r}")


def salted(mask: ResolvedMask | None, client_salt: str | None) -> str | None:
    """The cache salt of a request, which identifies its KV blocks from the first on.

    A prompt that is computed unmasked keeps the client's salt, and shares blocks as it would without masks. So does one
    of which a window is masked; its blocks have `WindowSalts`. Raises MaskError like `check_salt`.
    """
    check_salt(client_salt)
    if mask is None or mask.positions not in (Positions.ALL, Positions.PROMPT):
        return client_salt
    return _PREFIX + _hash("request", mask.mask.digest, client_salt or "")


def generated_salt(mask: ResolvedMask | None, prompt_tokens: int, end: int) -> str | None:
    """A second salt, for a block that ends before token `end`; None if the first salt is enough.

    If only prompt tokens or only generated tokens are masked, the KV of the same tokens depends on where the prompt
    ended.
    """
    if mask is None or mask.positions not in (Positions.PROMPT, Positions.GENERATED) or end <= prompt_tokens:
        return None
    return _PREFIX + _hash("block", mask.mask.digest, str(mask.positions), str(prompt_tokens))


class WindowSalts:
    """Second salts for the blocks of a request whose mask is for windows of its tokens, or ends with a token.

    A block's salt says which of its tokens are masked, and its hash covers all blocks before it. So blocks before the
    first masked token are shared with those of unmasked requests, and others only where the same tokens are masked.
    """

    def __init__(self, request: MaskRequest, prompt_tokens: int) -> None:
        self._mask = _hash("mask", request.expression)  # which may be long, and every block needs it
        self._windows = request.positions.windows(prompt_tokens)
        self._until = ",".join(map(str, request.positions.until))

    @classmethod
    def of(cls, request: MaskRequest | None, prompt_tokens: int) -> "WindowSalts | None":
        """None for a request without a mask, or with one of the positions that the other salts are for."""
        if request is None or request.positions in (Positions.ALL, Positions.PROMPT, Positions.GENERATED):
            return None
        return cls(request, prompt_tokens)

    def salt(self, start: int, end: int) -> str | None:
        """Of the block of tokens from `start` to `end`, excluded; None if none of them is masked."""
        parts = ((max(start, each.start), min(end, each.stop)) for each in self._windows)
        masked = [f"{first}:{last}" for first, last in parts if first < last]
        return _PREFIX + _hash("window", self._mask, self._until, *masked) if masked else None


def with_second_salt(keys: tuple[Any, ...] | None, salt: str | None) -> tuple[Any, ...] | None:
    """vLLM's extra keys of a KV block, extended in the form that vLLM gives to cache salts."""
    return keys if salt is None else (*(keys or ()), ("cache_salt", salt))


def _hash(*parts: str) -> str:
    """Of parts with their lengths, so that no part can pass for several."""
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()
