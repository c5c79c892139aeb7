"""Gate: limits what the engine gets at once, in total and per key. Requests over a limit are refused with a 429."""

from collections import Counter

from crane_serve.service.api.context import RequestContext
from crane_serve.service.api.errors import ApiError, BadRequest, TooBusy

MAX_LOGPROBS = 20 * 1024
"""Most log-probabilities for one position that a request may ask for, over all its sequences: 20 of 1,024 prompts."""

MAX_MASK_CHARACTERS = 2**24
"""Most characters of a mask, counted once for each sequence that carries it into the engine."""


class Gate:
    """Counts what has been admitted and not yet answered.

    max_sequences: running or waiting in the engine; max_sequences_per_key: of these, for requests of one API key, half
    of them if None. A request that would exceed one of them is not admitted. max_requests_per_key: HTTP requests of one
    API key at once. closed: nothing more is admitted.
    """

    def __init__(self, max_sequences: int, max_requests_per_key: int, max_sequences_per_key: int | None = None) -> None:
        self._max_sequences = max_sequences
        self._max_requests_per_key = max_requests_per_key
        self._max_sequences_per_key = min(max_sequences_per_key or -(-max_sequences // 2), max_sequences)
        self._requests_per_key: Counter[str] = Counter()
        self._sequences_per_key: Counter[str] = Counter()
        self.closed = False
        self.sequences = 0

    def admit(self, context: RequestContext, sequences: int, logprobs: int = 0) -> None:
        """Admit and count a request for which the engine will run `sequences`, each with `logprobs` for a position.

        Called once for each request, which counts until `leave`. Raises TooBusy for what fits later, ApiError of 400
        for what never does, and of 503 once the gate is closed.
        """
        assert not context.admitted, "a request is admitted once"
        if self.closed:
            raise ApiError(503, "shutting_down", "the server is shutting down", headers={"Connection": "close"})
        name = None if context.key is None else context.key.name
        most = self._max_sequences if name is None else self._max_sequences_per_key
        self._require_possible(sequences, logprobs, most, 0 if context.mask is None else len(context.mask.wire))
        asked = max(sequences, 1)
        if self.sequences + asked > self._max_sequences:
            raise TooBusy("queue_full", _full(self.sequences, sequences, self._max_sequences))
        if name is not None:
            if self._sequences_per_key[name] + asked > self._max_sequences_per_key:
                own = _full(self._sequences_per_key[name], sequences, self._max_sequences_per_key)
                raise TooBusy("key_queue_full", f"of this key, {own}")
            if self._requests_per_key[name] >= self._max_requests_per_key:
                raise TooBusy(
                    "too_many_requests",
                    f"this key has {self._max_requests_per_key} requests under way, which is its limit",
                )
            self._requests_per_key[name] += 1
        context.admitted = True
        self._count(context, sequences)

    @staticmethod
    def _require_possible(sequences: int, logprobs: int, most: int, mask_characters: int) -> None:
        if sequences > most:
            message = f"the request asks for {sequences} sequences, its prompts times n; at most {most} can run at once"
            raise BadRequest("too_many_sequences", message)
        if sequences * logprobs > MAX_LOGPROBS:
            message = (
                f"the request asks for {sequences} sequences with {logprobs} log-probabilities for each position; at "
                f"most {MAX_LOGPROBS} together are allowed"
            )
            raise BadRequest("too_many_logprobs", message, "logprobs")
        carried = sequences * mask_characters
        if carried > MAX_MASK_CHARACTERS:
            message = f"{sequences} sequences under a mask in the body come to {carried} characters of it"
            raise BadRequest("too_many_sequences", f"{message}; at most {MAX_MASK_CHARACTERS} can be run", "mask")

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
        if context.key is not None:
            self._sequences_per_key[context.key.name] += sequences
            if not self._sequences_per_key[context.key.name]:
                del self._sequences_per_key[context.key.name]


def _full(running: int, asked: int, most: int) -> str:
    return f"{running} prompts are waiting or running, and {asked} more are asked for; the limit is {most}"
