"""POST /generate/batch and POST /score/batch: many requests in one call, a line of JSON each, answered as they end."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any, Generic, TypeVar, cast

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from crane_serve.common.masks import ResolvedMask
from crane_serve.engine.service import EngineDead, EngineService
from crane_serve.service.api import generate, score
from crane_serve.service.api.concurrency import Seat
from crane_serve.service.api.context import RequestContext
from crane_serve.service.api.dependencies import (
    Context,
    Engine,
    GenerateQuery,
    MaskQuery,
    TheGate,
    asked_masks,
    choose_mask,
)
from crane_serve.service.api.errors import ANY_ROUTE, ApiError, describe, responses
from crane_serve.service.api.gate import Gate
from crane_serve.service.api.line_buffer import Line, LineBuffer
from crane_serve.service.api.schemas import (
    BatchEnd,
    GenerateLine,
    GenerateLineAnswer,
    LineError,
    LineId,
    ScoreLine,
    ScoreLineAnswer,
)
from crane_serve.service.settings import ApiSettings

WINDOW = 256  # of one call: lines started whose answer has not been sent, and sequences in the engine
MEDIA_TYPE = "application/x-ndjson"
_MEDIA_TYPES = (MEDIA_TYPE, "application/jsonl")
_L = TypeVar("_L", GenerateLine, ScoreLine)

router = APIRouter()


async def get_settings(request: Request) -> ApiSettings:
    """The settings of the application, as a dependency of routes."""
    return cast(ApiSettings, request.app.state.settings)


Settings = Annotated[ApiSettings, Depends(get_settings)]


class _Lines(Response):
    """A response of lines of JSON, for the description of the routes."""

    media_type = MEDIA_TYPE


def _described(line: type[BaseModel]) -> dict[str, Any]:
    """How a batch's route is described: its lines, and its refusals, which are plain JSON."""
    reference = "#/components/schemas/{model}"
    schema = {key: part for key, part in line.model_json_schema(ref_template=reference).items() if key != "$defs"}
    error = {"application/json": {"schema": {"$ref": reference.format(model="ErrorAnswer")}}}
    refusals = responses(400, 404, 409, *ANY_ROUTE)
    return {
        "response_class": _Lines,
        "responses": {
            status: {"description": refusal["description"], "content": error} for status, refusal in refusals.items()
        },
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "description": "A request in each line",
                "content": {media_type: {"schema": schema} for media_type in _MEDIA_TYPES},
            }
        },
    }


@router.post("/generate/batch", response_model=GenerateLineAnswer | LineError | BatchEnd, **_described(GenerateLine))
async def generate_batch(
    request: Request, engine: Engine, gate: TheGate, context: Context, settings: Settings, query: GenerateQuery
) -> Response:
    """Continue the prompt of each line. Every line is answered by one line, as soon as it is done.

    Lines may run under different masks; the query's mask is for those that name none, and a line that names another
    fails. Answers are numbered by the lines that they answer, in any order; a line that fails is answered with `error`.
    The last line has `done`. Lines are read while others are answered, and wait while the engine is full.
    """
    return _open(request, _Generations(engine, query), gate, context, settings)


@router.post("/score/batch", response_model=ScoreLineAnswer | LineError | BatchEnd, **_described(ScoreLine))
async def score_batch(
    request: Request, engine: Engine, gate: TheGate, context: Context, settings: Settings, query: MaskQuery
) -> Response:
    """Score the texts of each line. Lines, their masks and their answers are as those of /generate/batch."""
    return _open(request, _Scores(engine, query), gate, context, settings)


def _open(
    request: Request, kind: "_Kind[_L]", gate: Gate, context: RequestContext, settings: ApiSettings
) -> "_Batch[_L]":
    """Refuse a call that cannot be answered at all, while that can still be an HTTP error."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in _MEDIA_TYPES:
        expected = " or ".join(_MEDIA_TYPES)
        raise ApiError(415, "unsupported_media_type", f"Content-Type is {media_type!r}, expected {expected}")
    context.mask = choose_mask(kind.engine.library, asked_masks(kind.query.mask, None))
    if kind.engine.is_dead:
        raise EngineDead("the engine has died")
    gate.admit(context, 0)
    return _Batch(kind, gate, context, LineBuffer(settings.max_body_bytes, settings.max_batch_buffer_bytes))


@dataclass
class _Job(Generic[_L]):
    """A line on its way. error: why it cannot run; texts, encoded: what is tokenized, and its token ids."""

    index: int
    id: LineId = None
    body: _L | None = None
    mask: ResolvedMask | None = None
    texts: list[str] = field(default_factory=list)
    encoded: list[list[int]] = field(default_factory=list)
    error: Exception | None = None


class _Kind(ABC, Generic[_L]):
    """What differs between the two batches."""

    line: type[_L]

    def __init__(self, engine: EngineService, query: MaskQuery) -> None:
        self.engine = engine
        self.query = query

    @abstractmethod
    def prepare(self, body: _L) -> tuple[ResolvedMask | None, list[str]]:
        """The mask of a line, and the texts that are to be encoded. Raises MaskError, BadRequest."""

    @abstractmethod
    async def answer(self, job: _Job[_L], body: _L, seat: Seat) -> BaseModel:
        """The line of the answer. Each of its sequences is run in a `seat`."""


class _Generations(_Kind[GenerateLine]):
    line = GenerateLine

    def __init__(self, engine: EngineService, query: GenerateQuery) -> None:
        super().__init__(engine, query)
        self._query = query

    def prepare(self, body: GenerateLine) -> tuple[ResolvedMask | None, list[str]]:
        return generate.mask_of(self.engine.library, self._query, body), body.prompts

    async def answer(self, job: _Job[GenerateLine], body: GenerateLine, seat: Seat) -> BaseModel:
        async with seat():
            answer = await generate.Generation(self.engine, body, job.encoded, job.mask).answer()
        return GenerateLineAnswer(index=job.index, id=job.id, answer=answer)


class _Scores(_Kind[ScoreLine]):
    line = ScoreLine

    def prepare(self, body: ScoreLine) -> tuple[ResolvedMask | None, list[str]]:
        return score.mask_of(self.engine.library, self.query, body), body.texts

    async def answer(self, job: _Job[ScoreLine], body: ScoreLine, seat: Seat) -> BaseModel:
        answer = await score.Scoring(self.engine, body, job.encoded, job.mask).answer(seat)
        return ScoreLineAnswer(index=job.index, id=job.id, answer=answer)


class _Batch(_Lines, Generic[_L]):
    """Reads, runs and answers at the same time: the input is read on while the client does not take answers.

    However the call ends, what still runs in the engine is aborted, and the gate has its count back.
    """

    def __init__(self, kind: _Kind[_L], gate: Gate, context: RequestContext, lines: LineBuffer) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._kind: _Kind[_L] = kind
        self._gate = gate
        self._context = context
        self._lines = lines
        self._seats = asyncio.Semaphore(WINDOW)
        self._window = asyncio.Semaphore(WINDOW)
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()  # as many as the window lets through, and the end
        self._answered = 0
        self._failed = 0
        self._error: Exception | None = None  # why the rest of the input is not read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read(receive))
                group.create_task(self._run())
                await self._write(send)
                reader.cancel()
        except BaseExceptionGroup as errors:
            if errors.subgroup(ClientDisconnect) is None:
                raise _first(errors) from None

    async def _read(self, receive: Receive) -> None:
        """Feed the input to the lines, then wait for the client to go. Raises ClientDisconnect when it does."""
        while True:
            try:
                message = await receive()
            except Exception as error:
                self._stop(error)
                return
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            await self._lines.feed(message.get("body", b""))
            if not message.get("more_body", False):
                await self._lines.end()

    def _stop(self, error: Exception) -> None:
        """Read no more; the lines that were read are answered."""
        self._error = self._error or error
        self._lines.close()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as running:
            while lines := await self._lines.take():
                jobs = [self._parse(line) for line in lines]
                if usable := [job for job in jobs if job.error is None]:
                    await self._encode(usable)
                for line, job in zip(lines, jobs, strict=True):
                    await self._window.acquire()
                    self._lines.release(line)
                    running.create_task(self._answer(job))
        self._answers.put_nowait(None)

    def _parse(self, line: Line) -> _Job[_L]:
        job = _Job[_L](line.index)
        try:
            if line.content is None:
                raise ApiError(413, "line_too_long", f"a line may have {self._lines.max_line_bytes} bytes at most")
            job.body = self._kind.line.model_validate_json(line.content)
            job.id = job.body.id
            job.mask, job.texts = self._kind.prepare(job.body)
        except ValidationError as error:
            job.id, job.error = _id_in(line.content or b""), _malformed(error)
        except Exception as error:
            job.error = error
        return job

    async def _encode(self, jobs: Sequence[_Job[_L]]) -> None:
        """Encode the texts of all jobs together; if that fails, one by one, to know whose fault it is."""
        try:
            texts = [text for job in jobs for text in job.texts]
            encoded = iter(await self._kind.engine.encode(texts))
            for job in jobs:
                job.encoded = list(islice(encoded, len(job.texts)))
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].error = error
                return
            for job in jobs:
                await self._encode([job])

    async def _answer(self, job: _Job[_L]) -> None:
        try:
            if job.error is not None or job.body is None:
                raise job.error or AssertionError("a line without an error has a body")
            answer = await self._kind.answer(job, job.body, self._seat)
        except Exception as error:
            if isinstance(error, EngineDead):
                self._stop(error)
            status, body, _ = describe(error)
            self._failed += 1
            answer = LineError(index=job.index, id=job.id, status=status, error=body)
        self._answered += 1
        self._answers.put_nowait(answer.model_dump_json().encode() + b"\n")

    @asynccontextmanager
    async def _seat(self) -> AsyncIterator[None]:
        async with self._seats:
            await self._gate.wait(self._context)
            try:
                yield
            finally:
                self._gate.give_back(self._context)

    async def _write(self, send: Send) -> None:
        """Send answers as they come, several at once if they are there; then the end.

        Raises what ended the input, if no line was answered before.
        """
        started = ended = False
        while not ended:
            answers = [await self._answers.get()]
            while not self._answers.empty():
                answers.append(self._answers.get_nowait())
            ended = answers[-1] is None
            if ended and not self._answered and self._error is not None:
                raise self._error
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                started = True
            lines = [self._end() if answer is None else answer for answer in answers]
            await send({"type": "http.response.body", "body": b"".join(lines), "more_body": not ended})
            for _ in lines:
                self._window.release()

    def _end(self) -> bytes:
        end = BatchEnd(done=self._error is None, lines=self._answered, failed=self._failed)
        if self._error is not None:
            end.error = describe(self._error)[1]
        return end.model_dump_json(exclude={"error"} if end.done else None).encode() + b"\n"


def _malformed(error: ValidationError) -> RequestValidationError:
    """The error that FastAPI raises for the same content as a body."""
    return RequestValidationError(
        [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors(include_url=False)]
    )


def _id_in(content: bytes) -> LineId:
    """The id in a line that cannot be used, if it has one."""
    try:
        found = from_json(content).get("id")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, str | int) and not isinstance(found, bool) else None


def _first(error: BaseException) -> BaseException:
    """The first error in a group of groups."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
