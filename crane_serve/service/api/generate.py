"""POST /generate: continue prompts under a mask."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from crane_serve.common.masks import ResolvedMask
from crane_serve.engine.answers import SampledToken, Sampling, Step, TokenLogprob
from crane_serve.engine.service import EngineService
from crane_serve.service.api.activations import activation_request, activations_seen, require_listable
from crane_serve.service.api.concurrency import run_all
from crane_serve.service.api.dependencies import (
    Context,
    Engine,
    GenerateQuery,
    TheGate,
    choose_mask,
    choose_positions,
    named_masks,
)
from crane_serve.service.api.errors import ANY_ROUTE, describe, responses
from crane_serve.service.api.schemas import (
    Delta,
    ErrorAnswer,
    GenerateAnswer,
    GeneratedToken,
    GenerateRequest,
    MaskUsed,
    Output,
    Token,
    Usage,
)
from crane_serve.service.api.sequences import prompts_of
from crane_serve.service.api.strict_json import StrictJson

router = APIRouter(route_class=StrictJson)


_EVENT = {
    "type": "object",
    "description": "One server-sent event",
    "required": ["data"],
    "properties": {
        "data": {
            "type": "string",
            "description": "JSON of a piece of text, of the answer without its text, or of an error; then [DONE]",
        }
    },
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, events",
        "content": {"text/event-stream": {"schema": _EVENT}},  # OpenAPI 3.1 describes a stream by one of its events
    }
}


@router.post("/generate", response_model=GenerateAnswer, responses=_STREAM | responses(400, 404, 409, *ANY_ROUTE))
async def generate(
    body: GenerateRequest, engine: Engine, gate: TheGate, context: Context, query: GenerateQuery
) -> GenerateAnswer | StreamingResponse:
    """Continue each prompt. With `stream: true` the answer is server-sent events, ended by `data: [DONE]`."""
    named = named_masks(query.mask, body.mask)
    positions = choose_positions(query.positions, body.positions, masked=bool(named))
    context.mask = choose_mask(engine.library, named, positions)
    gate.admit(context, len(body.prompts), body.logprobs or 0)
    generation = Generation(engine, body, await engine.encode(body.prompts), context.mask)
    if body.stream:
        # The first event is awaited here, so that a refused request is an HTTP error and not a broken stream.
        events = generation.events()
        first = await anext(events)
        return _EventStream(first, events)
    return await generation.answer()


class Generation:
    """Runs the prompts of one request. Call `answer` or `events`, once.

    encoded: their token ids without special tokens. Raises BadRequest for a start token that the model lacks, and
    ActivationsError for activations that a body cannot ask for.
    """

    def __init__(
        self, engine: EngineService, body: GenerateRequest, encoded: list[list[int]], mask: ResolvedMask | None
    ) -> None:
        self._engine = engine
        self._mask = mask
        self._prompts = prompts_of(body, encoded, engine.start_tokens)
        self._sampling = Sampling(
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            stop=body.stops,
            logprobs=body.logprobs,
            repetition_penalty=body.repetition_penalty,
        )
        self._wanted = body.activations
        self._shown = activation_request(body.activations, len(self._prompts))
        tokens = min(len(self._prompts[0]) + body.max_tokens - 1, engine.max_model_tokens)
        require_listable(body.activations, self._shown, engine, tokens)
        self._outputs = [
            Output(index=index, text="", finish_reason=None, prompt_tokens=len(prompt_ids), completion_tokens=0)
            for index, prompt_ids in enumerate(self._prompts)
        ]

    async def answer(self) -> GenerateAnswer:
        """The whole answer. Raises what EngineService.generate does."""

        async def drain(index: int) -> None:
            async for _ in self._run(index, stream=False):
                pass

        await run_all(drain(index) for index in range(len(self._prompts)))
        return self._answer()

    async def events(self) -> AsyncGenerator[str]:
        """Server-sent events: a Delta per step, the whole answer without its text, and [DONE]."""
        steps: asyncio.Queue[tuple[int, Step] | Exception | None] = asyncio.Queue(maxsize=64)

        async def feed(index: int) -> None:
            async with aclosing(self._run(index, stream=True)) as run:
                async for step in run:
                    await steps.put((index, step))

        async def feed_all() -> None:
            try:
                await run_all(feed(index) for index in range(len(self._prompts)))
                await steps.put(None)
            except Exception as error:
                await steps.put(error)

        feeder = asyncio.create_task(feed_all())
        started = False
        try:
            while (item := await steps.get()) is not None:
                if isinstance(item, Exception):
                    if not started:
                        raise item
                    yield _event(ErrorAnswer(error=describe(item)[1]))
                    return
                started = True
                index, step = item
                logprobs = _tokens(step.logprobs)
                yield _event(Delta(index=index, text=step.text, finish_reason=step.finish_reason, logprobs=logprobs))
            answer = self._answer()
            for output in answer.outputs:
                output.text = ""
            yield _event(answer)
            yield "data: [DONE]\n\n"
        finally:
            feeder.cancel()  # the client may have gone: cancelling aborts what still runs in the engine
            await asyncio.gather(feeder, return_exceptions=True)

    async def _run(self, index: int, *, stream: bool) -> AsyncGenerator[Step]:
        output = self._outputs[index]
        prompt, sampling, shown = self._prompts[index], self._sampling, self._shown
        steps = self._engine.generate(prompt, sampling, self._mask, stream=stream, activations=shown)
        async with aclosing(steps):
            async for step in steps:
                output.text += step.text
                output.completion_tokens += step.tokens
                output.finish_reason = step.finish_reason
                output.activations = activations_seen(self._wanted, shown, step.activations)
                if step.logprobs is not None and not stream:  # in a stream they are in the deltas only
                    output.logprobs = [*(output.logprobs or []), *(_tokens(step.logprobs) or [])]
                yield step

    def _answer(self) -> GenerateAnswer:
        usage = Usage.of(
            sum(output.prompt_tokens for output in self._outputs),
            sum(output.completion_tokens for output in self._outputs),
        )
        return GenerateAnswer(
            model=self._engine.model_name, mask=MaskUsed.of(self._mask), outputs=self._outputs, usage=usage
        )


class _EventStream(StreamingResponse):
    """Server-sent events. However the connection ends, the iterator of events is closed, which ends the generation."""

    def __init__(self, first: str, rest: AsyncGenerator[str]) -> None:
        super().__init__(_chain(first, rest), media_type="text/event-stream")
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client that hangs up may cancel the sending of an event, outside the generator: it must be closed here.
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)


async def _chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in rest:
        yield event


def _event(content: BaseModel) -> str:
    return f"data: {content.model_dump_json()}\n\n"


def _tokens(sampled: tuple[SampledToken, ...] | None) -> list[GeneratedToken] | None:
    if sampled is None:
        return None
    return [
        GeneratedToken(**_fields(token.chosen), top=[Token(**_fields(candidate)) for candidate in token.top])
        for token in sampled
    ]


def _fields(token: TokenLogprob) -> dict[str, Any]:
    return {"token_id": token.token_id, "token": token.token, "logprob": token.logprob}
