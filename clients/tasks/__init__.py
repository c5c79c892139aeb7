"""Tasks, one per file. A new file with a subclass of Task is a new task."""

import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from clients import presets
from clients.errors import EvaluationError
from clients.sources import PLACES
from clients.task import Task

_MERGED = ("source", "shots_source", "words")  # settings whose own keys override a preset's one by one
_OF_PLACE = ("config", "revision", "split", "codes")  # settings of a source that make no sense for another place
_FOUND_CHARACTERS = 60


@cache
def available() -> Mapping[str, type[Task]]:
    """All tasks of this package by kind, in alphabetical order."""
    kinds: dict[str, type[Task]] = {}
    for module_info in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        module = importlib.import_module(module_info.name)
        for member in vars(module).values():
            here = isinstance(member, type) and issubclass(member, Task) and member.__module__ == module.__name__
            if here and "kind" in vars(member):
                kinds[member.kind] = member
    return MappingProxyType(dict(sorted(kinds.items())))


def find(kind: str) -> type[Task]:
    """The task of this kind. Raises EvaluationError naming those that exist."""
    task = available().get(kind)
    if task is None:
        raise EvaluationError(f"unknown kind of task {kind!r}; there are {', '.join(available())}")
    return task


def parse_task(raw: Mapping[str, Any], where: str) -> Task:
    """A task from a plan file: a `kind` with its settings, or a `preset` with changes to it.

    Keys of `source`, `shots_source` and `words` override a preset's one by one; a source at another place (files
    instead of a dataset) takes over only columns and id, and drops a preset's shots_source. `name` defaults to the
    preset's or the kind's. Raises EvaluationError in one line that begins with `where`.
    """
    try:
        settings = _with_preset(raw)
        kind = settings.pop("kind", None)
        if not isinstance(kind, str):
            raise EvaluationError(
                f"expected a kind ({', '.join(available())}) or a preset ({', '.join(presets.names())})"
            )
        task = find(kind)
        return task.model_validate({"name": kind, **settings})
    except ValidationError as error:
        raise EvaluationError(f"{where}: {_problem(task, error)}") from error
    except EvaluationError as error:
        raise EvaluationError(f"{where}: {error}") from error


def _with_preset(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings, merged over those of the preset that they name, if any."""
    own_settings = dict(raw)
    name = own_settings.pop("preset", None)
    if name is None:
        return own_settings
    settings: dict[str, Any] = {"name": name, **presets.load(str(name))}
    if _moves(settings.get("source"), own_settings.get("source")):
        settings.pop("shots_source", None)
    for key, value in own_settings.items():
        before = settings.get(key)
        if key not in _MERGED or not isinstance(value, Mapping) or not isinstance(before, Mapping):
            settings[key] = value
        else:
            rest = {own: before[own] for own in before if own not in (*PLACES, *_OF_PLACE)}
            settings[key] = {**(rest if _moves(before, value) else before), **value}
    return settings


def _moves(before: Any, after: Any) -> bool:
    """Whether the source `after` names another place than the source `before`."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return False
    return any(before.get(place) != after[place] for place in PLACES if place in after)


def _problem(task: type[Task], error: ValidationError) -> str:
    """The first problem in one line: which setting, what was expected, what was found."""
    problem = error.errors(include_url=False)[0]
    path = [part for part in problem["loc"] if isinstance(part, int) or re.fullmatch(r"[a-z]\w*", part)]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = ", ".join(_model_at(task, path[:-1]).model_fields)
        return f"{'.'.join(map(str, path))}: unknown setting; there are {known}"
    if problem["type"] == "missing":
        return f"{'.'.join(map(str, path))}: missing, but {task.kind} needs it"
    value_text = repr(problem["input"])
    excerpt = value_text if len(value_text) <= _FOUND_CHARACTERS else f"{value_text[:_FOUND_CHARACTERS]}..."
    of_ours = problem["type"] == "value_error"  # its message has the value already
    return f"{'.'.join(map(str, path)) or task.kind}: {message}" + ("" if of_ours else f"; found {excerpt}")


def _model_at(model: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    """The pydantic model at the end of a path of fields."""
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        model = next(
            inner
            for inner in (annotation, *get_args(annotation))
            if isinstance(inner, type) and issubclass(inner, BaseModel)
        )
    return model
