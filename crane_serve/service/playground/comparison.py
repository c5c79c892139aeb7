"""Comparison: one prompt continued under several masks at once."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clients import AsyncCraneClient, Generation
from crane_serve.common.masks.library import UNMASKED
from crane_serve.common.text.languages import identify
from crane_serve.service.playground.service import explained

_REFRESH_S = 0.12
_GROWN = 24  # characters after which the language of a text is looked at again


@dataclass
class Column:
    """What one mask makes of the prompt. language: None while or where it cannot be told; end: once it is there."""

    mask: str
    text: str = ""
    language: str | None = None
    error: str | None = None
    end: Generation | None = None
    is_over: bool = False
    _identified: int = field(default=0, repr=False)

    @property
    def tokens(self) -> int:
        """How many tokens were made, as far as that is known."""
        return 0 if self.end is None else self.end.usage.completion_tokens

    @property
    def finish_reason(self) -> str | None:
        """Why it ended: "stop" or "length"."""
        return None if self.end is None else self.end.outputs[0].finish_reason

    def add(self, text: str) -> None:
        """A piece of the completion."""
        self.text += text
        if len(self.text) - self._identified >= _GROWN:
            self.identify()

    def identify(self) -> None:
        """Find the language of the text so far."""
        self._identified = len(self.text)
        self.language = identify(self.text)


class Comparison:
    """sampling: options of /generate. Each mask is a request of its own."""

    def __init__(self, prompt: str, masks: Sequence[str], sampling: Mapping[str, Any], positions: str) -> None:
        self.columns = [Column(mask) for mask in masks]
        self._prompt = prompt
        self._sampling = sampling
        self._positions = positions

    @property
    def failed(self) -> int:
        """How many masks have no completion."""
        return sum(column.error is not None for column in self.columns)

    @property
    def is_stopped(self) -> bool:
        """Whether it ended before its completions did."""
        return any(column.end is None and column.error is None for column in self.columns)

    async def run(
        self, client: AsyncCraneClient, start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    ) -> AsyncGenerator[None]:
        """Yields whenever the columns have changed, until all are over.

        start: makes a task for each mask; cancelling one stops its column. Closing the generator cancels all of them,
        and with them the requests.
        """
        tasks = [start(self._fill(column, client)) for column in self.columns]
        seen: list[tuple[str, bool]] = []
        try:
            while not all(task.done() for task in tasks):
                state = [(column.text, column.is_over) for column in self.columns]
                if state != seen:
                    seen = state
                    yield
                await asyncio.wait(tasks, timeout=_REFRESH_S)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fill(self, column: Column, client: AsyncCraneClient) -> None:
        sampling = dict(self._sampling)
        if column.mask != UNMASKED:
            sampling["positions"] = self._positions
        try:
            async with await client.generate_stream(self._prompt, mask=column.mask, **sampling) as stream:
                async for delta in stream:
                    column.add(delta.text)
                column.end = stream.end
        except Exception as error:
            column.error = explained(error)
        finally:
            column.is_over = True
        column.identify()
