"""RequestContext: what is known of a request beside its body, from the first middleware to the last line of the log."""

from dataclasses import dataclass
from typing import cast

from starlette.datastructures import Headers
from starlette.types import Scope

from crane_serve.common.masks import ResolvedMask
from crane_serve.service.api.keys import Key

_SCOPE_KEY = "crane"


@dataclass
class RequestContext:
    """One HTTP request.

    key: of the client, None where no keys are required. mask: that it runs under, for the log and the metrics; while it
    is referenced here, its content stays in memory. admitted: whether the gate counts it; sequences: how many the
    engine runs for it.
    """

    request_id: str
    key: Key | None = None
    mask: ResolvedMask | None = None
    admitted: bool = False
    sequences: int = 0


def context_of(scope: Scope) -> RequestContext:
    """The context of a request; a new one if no middleware has made one, as in tests of a single part."""
    return cast(RequestContext, scope.setdefault(_SCOPE_KEY, RequestContext(request_id="-")))


def has_body(scope: Scope) -> bool:
    """Whether a request says that it has a body."""
    headers = Headers(scope=scope)
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
