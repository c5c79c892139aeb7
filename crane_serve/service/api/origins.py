"""Origins: middleware against web pages that have a visitor's browser ask a server which the visitor can reach."""

import ipaddress
import re
from collections.abc import Collection
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from crane_serve.service.api.authentication import refuse
from crane_serve.service.api.errors import ApiError

ANY = "*"
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^][:@/?#\\\s]+))(?::\d*)?")
_EVERY_ADDRESS = frozenset({"0.0.0.0", "::", ""})
_READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_PAGES = frozenset({"same-origin", "none"})
_SHOWN = 100  # characters of a header


class Origins:
    """Answers requests that name this server in Host and that no page of another origin has made.

    hosts: what Host may name, whatever its port: ANY or nothing for everything, and 0.0.0.0 or :: for every address,
    since only names can be made to lead here. pages: other origins whose pages may send more than GET, HEAD and
    OPTIONS; ANY for all. A request without Origin and Sec-Fetch-Site comes from no browser. What is refused is answered
    before its body is read.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], pages: Collection[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower().strip("[]") for host in hosts or (ANY,))
        self._pages = frozenset(page.lower() for page in pages)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                self._require_own_name(scope)
                self._require_own_page(scope)
            except ApiError as error:
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _require_own_name(self, scope: Scope) -> None:
        """Raises a 421 for another server's name: a page's own name, which its owner has made to lead here."""
        if ANY in self._hosts:
            return
        given = Headers(scope=scope).getlist("host")
        match = _HOST.fullmatch(given[0].lower()) if len(given) == 1 else None
        name = "" if match is None else match[1] or match[2]
        if name in self._hosts - _EVERY_ADDRESS or (self._hosts & _EVERY_ADDRESS and _is_address(name)):
            return
        named = ", ".join(given)[:_SHOWN]
        raise ApiError(421, "unknown_host", f"no server of the name {named!r} is here; --allowed-hosts names more")

    def _require_own_page(self, scope: Scope) -> None:
        """Raises a 403 for what a page of another origin sends, unless it only reads."""
        headers = Headers(scope=scope)
        origins = {origin.lower() for origin in headers.getlist("origin")}
        if scope.get("method") in _READING_METHODS or ANY in self._pages or (origins and origins <= self._pages):
            return
        host = headers.get("host", "").lower()
        own = {f"{scope['scheme']}://{host}", f"https://{host}"}  # TLS may end before this server
        if origins <= own and set(headers.getlist("sec-fetch-site")) <= _OWN_PAGES:
            return
        page = ", ".join(sorted(origins))[:_SHOWN] or "another site"
        message = f"a page of {page!r} may only read from this server; --cors-origins names those that may do more"
        raise ApiError(403, "cross_origin", message)


def _is_address(name: str) -> bool:
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return False
