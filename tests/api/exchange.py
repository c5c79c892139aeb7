"""Exchange: one ASGI call, message by message, as a server makes it."""

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Scope


class Exchange:
    """A request whose body the test gives piece by piece; `sent` is what the application has answered so far.

    stuck: the client takes nothing, so that `send` blocks until it hangs up. received: how often the application has
    asked for a message before it has answered anything.
    """

    def __init__(
        self,
        method: str = "GET",
        path: str = "/",
        headers: Iterable[tuple[bytes, bytes]] = (),
        *,
        kind: str = "http",
        query: bytes = b"",
    ) -> None:
        self.scope: Scope = {
            "type": kind,
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "root_path": "",
            "headers": list(headers),
        }
        self.sent: list[Message] = []
        self.received = 0
        self.stuck = False
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._gone = asyncio.Event()
        self.answering = asyncio.Event()

    def give(self, body: bytes = b"", *, more: bool = False) -> "Exchange":
        self._inbox.put_nowait({"type": "http.request", "body": body, "more_body": more})
        return self

    def hang_up(self) -> "Exchange":
        self._gone.set()
        self._inbox.put_nowait({"type": "http.disconnect"})
        return self

    async def call(self, app: ASGIApp) -> None:
        async with asyncio.timeout(30):
            await app(self.scope, self._receive, self._send)

    async def _receive(self) -> Message:
        self.received += not self.sent
        if self._gone.is_set() and self._inbox.empty():
            return {"type": "http.disconnect"}
        return await self._inbox.get()

    async def _send(self, message: Message) -> None:
        if self.stuck:
            await self._gone.wait()
        self.sent.append(message)
        self.answering.set()
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.hang_up()  # what servers say to a `receive` after the end of the answer
        await asyncio.sleep(0)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> Headers:
        return Headers(raw=self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def is_complete(self) -> bool:
        return len(self.sent) > 1 and not self.sent[-1].get("more_body", False)

    @property
    def error(self) -> Any:
        """The error that was answered: the content, checked for its shape."""
        content = json.loads(self.body)
        assert content.keys() == {"error"}
        assert content["error"].keys() == {"message", "type", "param", "code"}
        return content["error"]
