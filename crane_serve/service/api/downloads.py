"""Downloads: answers that are made while they are sent, so that whole masks cost neither memory nor the event loop."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from crane_serve.service.api.context import context_of

AT_ONCE, AT_ONCE_PER_KEY = 8, 4
"""How many are under way; others wait, within the time that a request has."""

_T = TypeVar("_T")


class Downloads:
    """Makes the content of answers in one thread of its own, and lets few large ones be under way."""

    def __init__(self) -> None:
        self._maker = ThreadPoolExecutor(1, "downloads")
        self._all = asyncio.Semaphore(AT_ONCE)
        self._of_key: dict[str | None, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(AT_ONCE_PER_KEY))

    async def make(self, content: Callable[[], _T]) -> _T:
        """The result of `content`, which runs in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._maker, content)

    @asynccontextmanager
    async def _place(self, scope: Scope) -> AsyncIterator[None]:
        key = context_of(scope).key
        async with self._of_key[None if key is None else key.name], self._all:
            yield

    def answer(self, pieces: Iterator[bytes], media_type: str, headers: Mapping[str, str]) -> StreamingResponse:
        """An answer of these pieces, each made when the client has taken those before it."""
        return _Download(self, pieces, media_type, headers)


class _Download(StreamingResponse):
    def __init__(
        self, downloads: Downloads, pieces: Iterator[bytes], media_type: str, headers: Mapping[str, str]
    ) -> None:
        self._downloads = downloads
        super().__init__(self._made(pieces), media_type=media_type, headers=headers)

    async def _made(self, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
        while (piece := await self._downloads.make(lambda: next(pieces, None))) is not None:
            yield piece

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._downloads._place(scope):
            await super().__call__(scope, receive, send)
