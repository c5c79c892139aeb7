"""Permissions: what a plan, or an evaluation that is replayed, may reach beside the server and the Hub."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from clients.errors import EvaluationError
from clients.judge import Judge
from clients.plan import Plan
from clients.sources import RowSource

_T = TypeVar("_T")


@dataclass(frozen=True)
class Permissions:
    """What was allowed by whoever runs a plan, who may not be whoever wrote it.

    judge_hosts: of judges, as in their addresses: `judge.example`, with a port if one is given there
    (`127.0.0.1:8001`); directories: which files of rows may be in, at any depth.
    """

    judge_hosts: frozenset[str] = frozenset()
    directories: tuple[Path, ...] = ()

    def require(self, plan: Plan, base: Path) -> None:
        """Raise EvaluationError naming the first host, or the first file, that a plan reaches without permission, and
        the option that allows it. base: what relative paths start from."""
        for task in plan.tasks:
            for judge in _within(task, Judge):
                self._require_judge(judge, task.name)
            for source in _within(task, RowSource):
                for language in task.languages or plan.languages:
                    for file in source.local(language, base):
                        self._require_file(file, task.name)

    def _require_judge(self, judge: Judge, task: str) -> None:
        judge.require_safe()
        if judge.host not in self.judge_hosts:
            key = f", with the key in {judge.key_variable}" if judge.key_variable else ""
            raise EvaluationError(
                f"task {task!r} would send its questions and the answers to {judge.host}{key}; "
                f"allow that with --judge-host {judge.host}"
            )

    def _require_file(self, file: Path, task: str) -> None:
        real = file.resolve()  # where a link leads to
        if not any(real.is_relative_to(directory.resolve()) for directory in self.directories):
            place = real if real.is_dir() else real.parent
            raise EvaluationError(
                f"task {task!r} would read {real}, which is outside of the plan's directory; "
                f"allow that with --data {place}"
            )


def _within(content: Any, kind: type[_T]) -> Iterator[_T]:
    """All of a kind in the fields of a task, at any depth."""
    if isinstance(content, kind):
        yield content
    elif isinstance(content, BaseModel):
        for _, value in content:
            yield from _within(value, kind)
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _within(value, kind)
    elif isinstance(content, tuple | list):
        for value in content:
            yield from _within(value, kind)
