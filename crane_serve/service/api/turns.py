"""Turns: work that holds the event loop, one piece at a time and with pauses between pieces."""

import asyncio

_SHORT_S = 0.005
_LONGEST_REST_S = 0.1


class Turns:
    """Turns at the event loop, in the order in which they are asked for.

    A thread would not do: `json.loads` and pydantic keep the interpreter for as long as they run. So whatever reads a
    body waits for its turn, and after a turn that was long the next begins only when the loop has had as much time for
    everything else. How long a turn can be is bounded by the bounds of bodies.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def take(self) -> None:
        """Wait for a turn. It ends by itself when the caller waits for something else."""
        await self._lock.acquire()
        loop = asyncio.get_running_loop()
        loop.call_soon(self._rest, loop, loop.time())

    def _rest(self, loop: asyncio.AbstractEventLoop, began: float) -> None:
        took = loop.time() - began
        if took < _SHORT_S:
            self._lock.release()
        else:
            loop.call_later(min(took, _LONGEST_REST_S), self._lock.release)
