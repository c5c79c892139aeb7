"""Plan: masks x languages x tasks, from a YAML file or from flags, checked before any request is sent."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from clients.answers import MaskSummary
from clients.errors import EvaluationError
from clients.task import Item, Task
from clients.tasks import parse_task

_TASKS = "tasks"
_ENTRIES = 100_000
_Fraction = Annotated[float, Field(gt=0, le=1)]


class MaskChoice(BaseModel):
    """Masks of the server by provenance; a field that is None does not restrict the choice.

    methods, languages: names; budgets: fractions of all neurons that the masks were allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[str, ...] | None = None
    languages: tuple[str, ...] | None = None
    budgets: tuple[_Fraction, ...] | None = None

    def fits(self, mask: MaskSummary) -> bool:
        """Whether a mask fits all fields."""
        return (
            (self.methods is None or mask.method in self.methods)
            and (self.languages is None or mask.language in self.languages)
            and has_budget(mask, self.budgets)
        )


class Plan(BaseModel):
    """What is to be evaluated.

    languages: in the order of the tables; masks: names, patterns (`lape-*`), expressions (`zh,vi@0.5`) or choices by
    provenance, None for all masks of the server; `none` is always evaluated. budgets: restrict patterns and choices to
    masks that were allowed one of these fractions; None for any. model: the name under which the server must serve,
    None for any. seed: of the bootstrap and of tests. beta: of LangSpec-F1. matched_effects: metric -> the damage to
    the own language at which methods are compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1)] = "evaluation"
    languages: Annotated[tuple[str, ...], Field(min_length=1)]
    masks: tuple[str | MaskChoice, ...] | None = None
    budgets: Annotated[tuple[_Fraction, ...], Field(min_length=1)] | None = None
    tasks: Annotated[tuple[SerializeAsAny[Task], ...], Field(min_length=1)]
    model: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    beta: Annotated[float, Field(gt=0)] = 1.0
    matched_effects: dict[str, Annotated[float, Field(gt=0)]] = {"nats_per_token": 1.0}

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """The plan in a YAML file. Raises EvaluationError naming the file, the place in it, and what was expected."""
        try:
            content = yaml.safe_load(path.read_bytes())
        except OSError as error:
            raise EvaluationError(f"{path} cannot be read; expected a plan: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = "" if mark is None else f" in line {mark.line + 1}"
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise EvaluationError(f"{path} is not YAML{where}: {problem}") from error
        except RecursionError as error:
            raise EvaluationError(f"{path} is not a plan: it is nested too deeply") from error
        _require_few(content, path)
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: Any, where: str) -> "Plan":
        """The plan that a plan file's content describes. where: begins error messages.

        Raises EvaluationError naming the field and what was expected.
        """
        if not isinstance(content, Mapping):
            raise EvaluationError(f"{where}: expected a mapping with languages, masks and {_TASKS}")
        listed = content.get(_TASKS)
        if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
            raise EvaluationError(f"{where}: {_TASKS}: expected a list of at least one task")
        tasks = [_task(raw, f"{where}: task {number}") for number, raw in enumerate(listed, start=1)]
        _check_distinct((task.name for task in tasks), f"{where}: {_TASKS}")
        try:
            plan = cls.model_validate({**content, _TASKS: tasks})
        except ValidationError as error:
            raise EvaluationError(f"{where}: {_problem(error, cls)}") from error
        _check_distinct(plan.languages, f"{where}: languages")
        for task in plan.tasks:
            for language in task.languages or ():
                if language not in plan.languages:
                    raise EvaluationError(
                        f"{where}: task {task.name!r} has language {language!r}; "
                        f"the plan has {', '.join(plan.languages)}"
                    )
        return plan

    def content(self) -> dict[str, Any]:
        """The plan in the form of a plan file; `parse` reads it back."""
        plain = self.model_dump(mode="json", exclude={_TASKS}, exclude_defaults=True)
        return {**plain, "languages": list(self.languages), _TASKS: [task.settings() for task in self.tasks]}

    def load(self, base: Path) -> dict[str, dict[str, tuple[Item, ...]]]:
        """The items of every task by language. base: what relative paths start from.

        Raises EvaluationError for what cannot be read, and for tasks without items or with two of one id.
        """
        return {task.name: self._load(task, base) for task in self.tasks}

    def _load(self, task: Task, base: Path) -> dict[str, tuple[Item, ...]]:
        loaded = {}
        for language in task.languages or self.languages:
            items = task.load(language, base)
            if not items:
                raise EvaluationError(f"task {task.name!r} has no items in {language!r}; expected at least one")
            _check_distinct((item.id for item in items), f"task {task.name!r}: items in {language!r}")
            loaded[language] = items
        return loaded


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of `names` that fit a pattern, in their order."""
    wanted = tuple(patterns)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]


def has_budget(mask: MaskSummary, budgets: Sequence[float] | None) -> bool:
    """Whether a mask was allowed one of these fractions of all neurons; None for any."""
    return budgets is None or (
        mask.budget is not None and any(math.isclose(mask.budget, budget, rel_tol=1e-6) for budget in budgets)
    )


def _task(raw: Any, where: str) -> Task:
    if not isinstance(raw, Mapping):
        raise EvaluationError(f"{where}: expected a mapping with the settings of a task")
    return parse_task(raw, where)


def _require_few(content: Any, path: Path) -> None:
    """Refuse a file whose references (`*name`) stand for more than could be gone through, or for themselves."""
    waiting, entries = [content], 0
    while waiting:
        entry = waiting.pop()
        entries += 1
        if entries > _ENTRIES:
            raise EvaluationError(f"{path} is not a plan: with its references it has more than {_ENTRIES:,} entries")
        if isinstance(entry, Mapping):
            waiting.extend(entry.values())
        elif isinstance(entry, list):
            waiting.extend(entry)


def _check_distinct(names: Iterable[str], where: str) -> None:
    distinct = set()
    for name in names:
        if name in distinct:
            raise EvaluationError(f"{where}: {name!r} is given twice; expected each once")
        distinct.add(name)


def _problem(error: ValidationError, model: type[BaseModel]) -> str:
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"])) or "plan"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown field; a plan has {', '.join(model.model_fields)}"
    return f"{where}: {problem['msg']}"
