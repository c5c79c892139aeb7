"""Everything that an engine generates, whichever route it came through: tokens counted by mask, submitted in turn."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from crane_serve.common.masks import MaskError, MaskLibrary
from crane_serve.engine.admission import requested_mask
from crane_serve.engine.wrapping import wrap

_SUBMITTED_TOGETHER = 8


def meter(engine: Any, library: MaskLibrary, on_tokens: Callable[[str | None, int, int], object]) -> None:
    """Call `on_tokens(name of the mask or None, prompt tokens, completion tokens)` when a request of `engine` ends.

    A request that ends early counts with the tokens that it had received by then. Requests are submitted 8 at a time,
    so that a thousand prompts in one request do not hold the event loop.
    """
    submitting = asyncio.Semaphore(_SUBMITTED_TOGETHER)

    async def generate(
        original: Callable[..., AsyncGenerator[Any]], prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any]:
        prompt_tokens = completion_tokens = 0
        try:
            request = requested_mask(sampling_params)
            name = None if request is None else _name(library, request.expression)
        except MaskError:
            name = None  # the engine refuses the request, and says why
        async with submitting:
            await asyncio.sleep(0)
        try:
            async with aclosing(original(prompt, sampling_params, *args, **kwargs)) as results:
                async for result in results:
                    prompt_tokens = prompt_tokens or len(result.prompt_token_ids or ())
                    completion_tokens += sum(len(output.token_ids) for output in result.outputs)
                    yield result
        finally:
            if prompt_tokens:
                on_tokens(name, prompt_tokens, completion_tokens)

    wrap(engine, "generate", generate)


def _name(library: MaskLibrary, expression: str) -> str | None:
    resolved = library.resolve_wire(expression)
    return None if resolved is None else resolved.name
