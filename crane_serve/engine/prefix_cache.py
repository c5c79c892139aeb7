"""The prefix-cache salt: KV blocks computed under one mask must never serve a request with another."""

import hashlib

from crane_serve.masks import MaskError

_PREFIX = "crane-mask-"


def salted(digest: str | None, client_salt: str | None) -> str | None:
    """The cache salt of a request under the mask with content `digest` (None: unmasked).

    Unmasked requests keep the client's salt, so they share blocks as they would without masks. Raises MaskError for a
    client salt of the form used here, which could otherwise reach blocks computed under a mask.
    """
    if client_salt is not None and client_salt.startswith(_PREFIX):
        raise MaskError(f"cache_salt must not begin with {_PREFIX!r}")
    if digest is None:
        return client_salt
    return _PREFIX + hashlib.sha256(f"{digest}|{client_salt or ''}".encode()).hexdigest()
