"""Visits: what runs for the people who look at the page, by browser session, so that it ends when they leave."""

import asyncio
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class Visits:
    """The tasks of each session, which `leave` cancels."""

    def __init__(self) -> None:
        self._tasks: defaultdict[str, set[asyncio.Task[Any]]] = defaultdict(set)

    def run(self, session: str, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """A task of a session."""
        task = asyncio.create_task(work)
        self._tasks[session].add(task)
        task.add_done_callback(lambda _: self._discard(session, task))
        return task

    def leave(self, session: str) -> None:
        """Cancel what still runs for a session."""
        for task in tuple(self._tasks.get(session, ())):
            task.cancel()

    def _discard(self, session: str, task: asyncio.Task[Any]) -> None:
        self._tasks[session].discard(task)
        if not self._tasks[session]:
            del self._tasks[session]
