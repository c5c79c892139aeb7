"""Part: some lines of a batch, asked for until each has an answer."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, Required, TypedDict, TypeVar

from pydantic import ValidationError

from clients.answers import GenerationResult, ScoresResult
from clients.calls import Call, Sampling
from clients.errors import TRANSIENT_STATUS, CraneError
from clients.retries import RetryPolicy
from crane_serve.common.models.prefix import AddBos, Join

MOST_LINES, MOST_BYTES = 2000, 8 * 2**20  # of one call; a server buffers more, so it takes all before it is read
ResultType = TypeVar("ResultType", GenerationResult, ScoresResult)


class GenerateItem(Sampling, total=False):
    """One item of a batch of generations. id: comes back with its result."""

    prompt: Required[str]
    mask: str | None
    id: str | int


class ScoreItem(TypedDict, total=False):
    """One item of a batch of scores, `text` or `context` and `continuations`. id: comes back with its result."""

    text: list[str]
    context: str
    continuations: list[str]
    add_bos: AddBos
    join: Join
    mask: str | None
    id: str | int


class Part(Generic[ResultType]):
    """The lines of one call, by the position of their item.

    Send `call`, `feed` what comes, `end`; while `missing`, wait for `retry_wait_s` after a CraneError and send again:
    it asks only for the lines that have no answer. A line that got 429 or 503 counts as missing, except in the last
    attempt, where that is its result.
    """

    def __init__(self, route: str, lines: Mapping[int, bytes], result: type[ResultType], policy: RetryPolicy) -> None:
        self._route = route
        self._missing = dict(lines)
        self._result: type[ResultType] = result
        self._policy = policy
        self._attempt = 0
        self._asked: list[int] = []
        self._rest = b""
        self._done = False
        self._put_off: CraneError | None = None

    @property
    def missing(self) -> bool:
        """Whether lines have no answer yet."""
        return bool(self._missing)

    def call(self) -> Call[None]:
        """The request for what is missing."""
        self._attempt += 1
        self._asked = list(self._missing)
        self._rest, self._done, self._put_off = b"", False, None
        content = b"".join(self._missing.values())
        return Call("POST", self._route, lambda _: None, content=content, media_type="application/x-ndjson")

    def feed(self, chunk: bytes) -> Iterator[ResultType]:
        """Results completed by `chunk`. Raises CraneError for a line that is none, or says that the call has failed."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield from self._line(line)

    def end(self) -> None:
        """Say that no more bytes will come. Raises CraneError if it was cut off, or if lines must be asked again."""
        if not self._done:
            raise CraneError(None, "connection_lost", "the answer to a batch ended before its last line")
        if self._put_off is not None:
            raise self._put_off
        if self._missing:
            raise CraneError(200, "invalid_answer", f"{self._route} left {len(self._missing)} lines without an answer")

    def retry_wait_s(self, error: CraneError) -> float:
        """Seconds to wait before what is missing is asked for again. Raises `error` if it will not be."""
        if self._attempt >= self._policy.attempts or not self._policy.worth_retrying(error):
            raise error
        return self._policy.wait_s(self._attempt, error)

    def _line(self, line: bytes) -> Iterator[ResultType]:
        try:
            content: dict[str, Any] = json.loads(line)
            if "index" in content:
                yield from self._answer(self._result.model_validate(content))
            elif content.get("done") is True:
                self._done = True
            else:
                raise CraneError.of_body(content["error"], status=None)
        except (ValidationError, ValueError, TypeError, AttributeError, LookupError) as error:
            message = f"{self._route} answered with a line that is none: {line[:200].decode(errors='replace')}"
            raise CraneError(200, "invalid_answer", message) from error

    def _answer(self, result: ResultType) -> Iterator[ResultType]:
        if result.index < 0 or (result.answer is None) is (result.error is None):
            raise ValueError("neither an answer nor an error")
        position = self._asked[result.index]
        if result.error is not None and result.status in TRANSIENT_STATUS and self._attempt < self._policy.attempts:
            self._put_off = CraneError.of_body(result.error.model_dump(), result.status)
            return
        del self._missing[position]
        yield result.model_copy(update={"index": position})


def parts(items: Iterable[Mapping[str, Any]]) -> Iterator[dict[int, bytes]]:
    """The items as lines of JSON by position, cut so that no call is larger than a server's buffer."""
    lines: dict[int, bytes] = {}
    size = 0
    for position, item in enumerate(items):
        line = json.dumps(item, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if lines and (len(lines) >= MOST_LINES or size + len(line) > MOST_BYTES):
            yield lines
            lines, size = {}, 0
        lines[position] = line
        size += len(line)
    if lines:
        yield lines
