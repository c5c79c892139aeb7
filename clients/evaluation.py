"""Evaluation: the results of a run, with everything that is needed to repeat it. Saved in results.json."""

import platform
from collections.abc import Iterable
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

import crane_serve
from clients.errors import EvaluationError
from clients.task import Metric
from crane_serve.common.atomic import write_atomically
from crane_serve.common.numbers.bootstrap import CONFIDENCE, RESAMPLES, Estimate
from crane_serve.common.numbers.langspec import Form

EVALUATION_FILE = "results.json"
UNMASKED = "none"
RANDOM = "random"  # the method of the control masks


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class PlannedMask(_Frozen):
    """A mask as the server described it when the run began; `none` has only a name.

    name: in the plan and the tables: a mask's name, or an expression (`zh,vi@0.5`); language: that it was made for,
    None for expressions; budget: the fraction of all neurons that it was allowed; seed: of methods that draw;
    neurons_per_layer: how many it scales in each layer.
    """

    name: str
    digest: str | None = None
    neurons: int = 0
    language: str | None = None
    method: str | None = None
    budget: float | None = None
    seed: int | None = None
    neurons_per_layer: tuple[int, ...] = ()


class TaskInfo(_Frozen):
    """A task as it was run.

    settings: of the plan file; digests: by language, of all items asked; items: by language; chance: by metric and
    language, the expected score of guessing.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    metrics: tuple[Metric, ...]
    languages: tuple[str, ...]
    masks: tuple[str, ...]
    items: dict[str, int]
    digests: dict[str, str]
    chance: dict[str, dict[str, float]] = {}

    def metric(self, name: str) -> Metric:
        """The metric of this name; KeyError if there is none."""
        return {metric.name: metric for metric in self.metrics}[name]


class Band(_Frozen):
    """The changes of the same cell by random masks: mean, lowest and highest over their draws."""

    mean: float
    low: float
    high: float
    draws: int


class Cell(_Frozen):
    """One metric of one task in one language under one mask.

    items: answered both with this mask and without; level: of the masked model over its own answers; change: masked
    minus unmasked, signed, over the items that have both; relative: that change as a share of the unmasked level
    (None where that is 0); p_value: two-sided sign-flip permutation test of no change; q_value: p_value after
    Benjamini and Hochberg over all cells of the evaluation but those of random controls; band: of random masks made
    for the same language with about as many neurons, where there are any; beyond_band: whether the change lies outside
    of it.
    """

    task: str
    metric: str
    language: str
    mask: str
    items: int
    level: Estimate | None = None
    change: Estimate | None = None
    relative: Estimate | None = None
    p_value: float | None = None
    q_value: float | None = None
    band: Band | None = None
    beyond_band: bool | None = None


class Effect(_Frozen):
    """The damage of a mask to the language that it was made for, compared with the others. Above 0 is damage, for every
    metric.

    own, others: damage to its own language, and on average to the others, in the metric's unit; selectivity: own minus
    others; index: (own - others) / (|own| + |others|), from -1 to 1; collateral: others / own, None where own is not
    above 0; f1: LangSpec-F1 at `beta` by form, if the metric has a score.
    """

    task: str
    metric: str
    mask: str
    language: str
    own: Estimate
    others: Estimate
    selectivity: Estimate
    index: Estimate
    collateral: Estimate | None = None
    f1: dict[Form, Estimate] = {}
    beta: float = 1.0


class MethodRank(_Frozen):
    """How a method compares with the others at one budget, by one measure, averaged over the languages it has masks
    for (and over the draws of methods that draw).

    measure: "selectivity", "index", "collateral", "f1 relative" or "f1 absolute"; value: its mean, None for a
    collateral if some mask does no damage to its own language; such a method ranks last; rank: from 1 for the best,
    with the middle 95 % of its ranks over resamples.
    """

    task: str
    metric: str
    measure: str
    budget: float | None
    method: str
    languages: tuple[str, ...]
    value: Estimate | None
    rank: Estimate


class MatchedEffect(_Frozen):
    """The loss of the others where the own language loses `effect`, interpolated between the budgets of one method.

    budget: where the own language loses `effect`, interpolated in the logarithm of the budget; collateral: the loss of
    the others there, for each unit that the own language loses. Both are None if no budget has so large an effect, or
    if the smallest already has a larger one. Resamples without a matched effect are left out of the intervals.
    """

    task: str
    metric: str
    method: str
    language: str
    effect: float
    seed: int | None = None
    budget: Estimate | None = None
    collateral: Estimate | None = None


class Substitution(_Frozen):
    """The languages of the answers of a task in one language under one mask that are not in it.

    answers: how many there are; languages: of failing answers, the language that took over -> how many, the commonest
    first; `unidentified` where it cannot be told.
    """

    task: str
    language: str
    mask: str
    answers: int
    languages: dict[str, int]

    @property
    def failing(self) -> int:
        """How many answers are not in the language."""
        return sum(self.languages.values())


class Failure(_Frozen):
    """An item without an answer, and the reason."""

    task: str
    mask: str
    language: str
    item: str
    error: str


class Intervals(_Frozen):
    """Parameters of the intervals and tests."""

    method: str = "paired percentile bootstrap over items"
    confidence: float = CONFIDENCE
    resamples: int = RESAMPLES
    seed: int = 0


class Throughput(_Frozen):
    """Work of all sessions of a run. answers: number of answered items; tokens: read and generated by the model."""

    answers: int
    tokens: int
    seconds: float
    sessions: int

    @property
    def answers_per_s(self) -> float:
        """Answers per second; 0 before the first answer."""
        return self.answers / self.seconds if self.seconds else 0.0


class Evaluation(_Frozen):
    """All results of a run.

    plan: the plan file's content; model: name and fingerprint; masks: `none` first; versions: of the software that
    computed the figures.
    """

    name: str
    plan: dict[str, Any]
    model: dict[str, JsonValue]
    server_version: str | None
    languages: tuple[str, ...]
    masks: dict[str, PlannedMask]
    tasks: tuple[TaskInfo, ...]
    cells: tuple[Cell, ...]
    effects: tuple[Effect, ...] = ()
    ranks: tuple[MethodRank, ...] = ()
    matched: tuple[MatchedEffect, ...] = ()
    substitutions: tuple[Substitution, ...] = ()
    failures: tuple[Failure, ...] = ()
    intervals: Intervals = Intervals()
    throughput: Throughput
    versions: dict[str, str] = {}
    created_by: str = f"crane-serve {crane_serve.__version__}"

    def task(self, name: str) -> TaskInfo:
        """The task of this name; KeyError if there is none."""
        return {task.name: task for task in self.tasks}[name]

    def cell(self, task: str, metric: str, language: str, mask: str) -> Cell | None:
        """One cell, None if it was not asked."""
        return self._by_place.get((task, metric, language, mask))

    @cached_property
    def _by_place(self) -> dict[tuple[str, str, str, str], Cell]:
        return {(cell.task, cell.metric, cell.language, cell.mask): cell for cell in self.cells}

    def write(self, directory: Path) -> Path:
        """Write `results.json` and return its path."""
        path = directory / EVALUATION_FILE
        write_atomically(path, self.model_dump_json(indent=1).encode() + b"\n")
        return path

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """The evaluation in a directory, or in its `results.json`. Raises EvaluationError if there is none."""
        file = path / EVALUATION_FILE if path.is_dir() else path
        try:
            return cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise EvaluationError(f"{file} cannot be read; expected an evaluation: {error.strerror}") from error
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "content"
            raise EvaluationError(f"{file} is not an evaluation: {where}: {problem['msg']}") from error


def versions_here(packages: Iterable[str] = ("numpy", "scipy", "httpx", "pydantic")) -> dict[str, str]:
    """Versions of Python, this project and what computed the figures."""
    versions = {"python": platform.python_version(), "crane-serve": crane_serve.__version__}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
