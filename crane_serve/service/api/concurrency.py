"""Run the parts of one request together, and long work on the event loop in short stretches."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

_T = TypeVar("_T")
_STARTED_TOGETHER = 16
_STRETCH_S = 0.005


async def paced(items: Iterable[_T]) -> AsyncIterator[_T]:
    """The items. Everything else has its turn whenever making them has held the event loop for 5 ms."""
    began = time.monotonic()
    for item in items:
        yield item
        if time.monotonic() - began > _STRETCH_S:
            await asyncio.sleep(0)
            began = time.monotonic()


async def run_all(parts: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Results of all parts in order. If one fails the others are cancelled, and its error is raised.

    Parts are started a few at a time, so that everything else has its turn between their first steps.
    """
    waiting = list(parts)
    if len(waiting) == 1:
        return [await waiting[0]]
    tasks: list[asyncio.Task[_T]] = []
    try:
        async with asyncio.TaskGroup() as group:
            for part in waiting:
                tasks.append(group.create_task(part))
                if len(tasks) % _STARTED_TOGETHER == 0:
                    await asyncio.sleep(0)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        for part in waiting[len(tasks) :]:
            part.close()
    return [task.result() for task in tasks]
