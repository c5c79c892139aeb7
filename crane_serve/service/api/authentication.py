"""Authentication: middleware that lets a request pass only with a key whose role allows it."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from crane_serve.service.api.context import context_of, has_body
from crane_serve.service.api.errors import ApiError, error_response
from crane_serve.service.api.keys import Key, KeyRing, Role
from crane_serve.service.playground import is_of_page

_PUBLIC_PATHS = frozenset({"/health", "/ready"})
_READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_CHALLENGE = {"WWW-Authenticate": "Bearer"}
_POLICY_VIOLATION = 1008


class Authentication:
    """Every request needs a key, except GET and HEAD of /health and /ready. Requests that change masks need an admin's
    key.

    The files of the playground need none either, if there is one: they are the same everywhere.

    The key comes as `Authorization: Bearer KEY` or as `x-api-key: KEY`. keys: None lets everything pass. A request that
    is refused is answered before its body is read.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, *, playground: bool = False) -> None:
        self._app = app
        self._keys = keys
        self._playground = playground

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys is None or scope["type"] not in ("http", "websocket") or self._is_public(scope):
            await self._app(scope, receive, send)
            return
        try:
            context_of(scope).key = _authenticate(self._keys, scope)
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_public(self, scope: Scope) -> bool:
        if scope["type"] != "http":
            return False
        method, path = scope["method"], scope["path"]
        if path in _PUBLIC_PATHS:
            return method in ("GET", "HEAD")
        return self._playground and is_of_page(method, path)


def _needs_admin(scope: Scope) -> bool:
    """Whether a request may change masks, however its path is written: `//masks/x`, `/./masks`, `/masks%0A`."""
    return (
        scope["type"] == "http" and scope["method"] not in _READING_METHODS and "masks" in str(scope["path"]).casefold()
    )


def _authenticate(keys: KeyRing, scope: Scope) -> Key:
    """The key of a request. Raises ApiError, 401 or 403."""
    key = keys.find(_token(Headers(scope=scope)))
    if key is None:
        raise _unauthorized("unknown_api_key", "no such API key")
    if _needs_admin(scope) and key.role is not Role.ADMIN:
        raise ApiError(403, "admin_key_required", "only an admin's key may change masks")
    return key


def _token(headers: Headers) -> str:
    """The key that a request carries. Raises ApiError if it carries none, or more than one."""
    authorization, alone = headers.getlist("authorization"), headers.getlist("x-api-key")
    if len(authorization) > 1 or len(alone) > 1:
        raise _unauthorized("unknown_api_key", "several API keys; expected one Authorization header, or one x-api-key")
    tokens = {token.strip() for token in alone}
    for value in authorization:
        scheme, _, token = value.strip().partition(" ")
        if scheme.lower() != "bearer":
            raise _unauthorized("missing_api_key", "expected 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
        tokens.add(token.strip())
    if len(tokens) > 1:
        raise _unauthorized("unknown_api_key", "Authorization and x-api-key give different API keys")
    if not any(tokens):
        raise _unauthorized("missing_api_key", "no API key; expected 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
    return tokens.pop()


def _unauthorized(code: str, message: str) -> ApiError:
    return ApiError(401, code, message, headers=_CHALLENGE)


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request with an error before its body is read."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": str(error)})
        return
    if has_body(scope):
        error.headers["Connection"] = "close"  # otherwise the server would have to read the unwanted body
    await error_response(error)(scope, receive, send)
