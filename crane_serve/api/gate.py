"""Gate: how much the engine is given at once, in all and per key; what is too much is refused with a 429."""

import asyncio
from collections import Counter

from crane_serve.api.context import RequestContext
from crane_serve.api.errors import ApiError, TooBusy


class Gate:
    """Counts what has been admitted and not yet answered.

    max_sequences: prompts, running or waiting in the engine, from which on nothing more is admitted; the request that
    goes over it may. max_requests_per_key: HTTP requests of one API key at once.
    """

    def __init__(self, max_sequences: int, max_requests_per_key: int) -> None:
        self._max_sequences = max_sequences
        self._max_requests_per_key = max_requests_per_key
        self._requests_per_key: Counter[str] = Counter()
        self._room = asyncio.Event()
        self._room.set()
        self.closed = False
        self.sequences = 0

    def admit(self, context: RequestContext, sequences: int) -> None:
        """Count a request that will have the engine run `sequences`, 0 if it asks for each with `wait`.

        Once for each request, and never taken back before `leave`. Raises TooBusy, and a 503 once the gate is closed.
        """
        if self.closed:
            raise ApiError(503, "shutting_down", "the server is shutting down", headers={"Connection": "close"})
        if self.sequences >= self._max_sequences:
            raise TooBusy(
                "queue_full", f"{self.sequences} prompts are waiting or running; at most {self._max_sequences} may"
            )
        if context.key is not None:
            name = context.key.name
            if self._requests_per_key[name] >= self._max_requests_per_key:
                raise TooBusy(
                    "too_many_requests",
                    f"this key has {self._max_requests_per_key} requests under way, as many as it may",
                )
            self._requests_per_key[name] += 1
        context.admitted = True
        context.sequences += sequences
        self._add(sequences)

    def leave(self, context: RequestContext) -> None:
        """Forget an admitted request; does nothing for one that was not admitted."""
        if not context.admitted:
            return
        context.admitted = False
        if context.key is not None:
            self._requests_per_key[context.key.name] -= 1
            if not self._requests_per_key[context.key.name]:
                del self._requests_per_key[context.key.name]
        self._add(-context.sequences)
        context.sequences = 0

    async def wait(self, context: RequestContext) -> None:
        """Wait until there is room for one sequence more, and take it; give it back with `give_back` or `leave`."""
        while self.sequences >= self._max_sequences:
            await self._room.wait()
        context.sequences += 1
        self._add(1)

    def give_back(self, context: RequestContext) -> None:
        """End of a sequence that `wait` has let in."""
        context.sequences -= 1
        self._add(-1)

    def _add(self, sequences: int) -> None:
        self.sequences += sequences
        if self.sequences >= self._max_sequences:
            self._room.clear()
        else:
            self._room.set()
