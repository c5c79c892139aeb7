"""Run the parts of one request together."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

_T = TypeVar("_T")


async def run_all(parts: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Results of all parts in order. If one fails the others are cancelled, and its error is raised."""
    waiting = list(parts)
    if len(waiting) == 1:
        return [await waiting[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in waiting]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
