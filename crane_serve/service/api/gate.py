"""Gate: limits what the engine gets at once, in total and per key. Requests over a limit are refused with a 429."""

from collections import Counter

from crane_serve.service.api.context import RequestContext
from crane_serve.service.api.errors import ApiError, TooBusy


class Gate:
    """Counts what has been admitted and not yet answered.

    max_sequences: prompts running or waiting in the engine; once there are so many, nothing more is admitted. The
    request that exceeds the number is still admitted. max_requests_per_key: HTTP requests of one API key at once.
    closed: nothing more is admitted.
    """

    def __init__(self, max_sequences: int, max_requests_per_key: int) -> None:
        self._max_sequences = max_sequences
        self._max_requests_per_key = max_requests_per_key
        self._requests_per_key: Counter[str] = Counter()
        self.closed = False
        self.sequences = 0

    def admit(self, context: RequestContext, sequences: int) -> None:
        """Admit and count a request for which the engine will run `sequences`.

        Called once for each request, which counts until `leave`. Raises TooBusy, and an ApiError of 503 once the gate
        is closed.
        """
        assert not context.admitted, "a request is admitted once"
        if self.closed:
            raise ApiError(503, "shutting_down", "the server is shutting down", headers={"Connection": "close"})
        if self.sequences >= self._max_sequences:
            raise TooBusy(
                "queue_full", f"{self.sequences} prompts are waiting or running; the limit is {self._max_sequences}"
            )
        if context.key is not None:
            name = context.key.name
            if self._requests_per_key[name] >= self._max_requests_per_key:
                raise TooBusy(
                    "too_many_requests",
                    f"this key has {self._max_requests_per_key} requests under way, which is its limit",
                )
            self._requests_per_key[name] += 1
        context.admitted = True
        self._count(context, sequences)

    def leave(self, context: RequestContext) -> None:
        """Forget an admitted request; does nothing for one that was not admitted."""
        if not context.admitted:
            return
        context.admitted = False
        if context.key is not None:
            self._requests_per_key[context.key.name] -= 1
            if not self._requests_per_key[context.key.name]:
                del self._requests_per_key[context.key.name]
        self._count(context, -context.sequences)

    def _count(self, context: RequestContext, sequences: int) -> None:
        context.sequences += sequences
        self.sequences += sequences
