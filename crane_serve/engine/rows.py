"""Rows: whose turn it is to have a row of the mask table, where there are fewer rows than masks that are asked for."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Rows:
    """The rows of an engine's table. Requests under one mask share a row; others wait for one, in their order.

    count: how many rows there are, None if there is one for every request that can run.
    """

    def __init__(self, count: int | None) -> None:
        self._count = count
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()
        self.running: Counter[str] = Counter()
        """By digest of their mask: requests that have a row."""

    @property
    def waiting(self) -> int:
        """How many requests wait for a row."""
        return len(self._waiting)

    @asynccontextmanager
    async def taken(self, digest: str) -> AsyncIterator[None]:
        """A row for the mask of this digest while the context lasts; waits for it.

        Whoever comes while somebody waits, waits behind him, also for a mask that has a row: else nobody might ever get
        it. Who is cancelled loses his turn.
        """
        await self._take(digest)
        try:
            yield
        finally:
            self._give_back(digest)

    async def _take(self, digest: str) -> None:
        if not self._waiting and self._fits(digest):
            self.running[digest] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (digest, turn)
        self._waiting.append(place)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the row came at the same time
                self._give_back(digest)
            else:
                with suppress(ValueError):  # it may have been passed over already
                    self._waiting.remove(place)
                self._next()
            raise

    def _fits(self, digest: str) -> bool:
        return self._count is None or digest in self.running or len(self.running) < self._count

    def _give_back(self, digest: str) -> None:
        self.running[digest] -= 1
        if not self.running[digest]:
            del self.running[digest]
        self._next()

    def _next(self) -> None:
        while self._waiting:
            digest, turn = self._waiting[0]
            if not turn.cancelled() and not self._fits(digest):
                return
            self._waiting.popleft()
            if not turn.cancelled():
                self.running[digest] += 1
                turn.set_result(None)
