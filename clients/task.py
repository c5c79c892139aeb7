"""Task: the questions to the model in each language, and the scoring of the answers. Each is a file of
`clients/tasks`."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from clients.answers import Score
from clients.calls import chosen
from crane_serve.common.models.prefix import AddBos, Join


@dataclass(frozen=True)
class ScoreText:
    """Ask for the log-probability of a whole text."""

    text: str
    add_bos: AddBos = "auto"


@dataclass(frozen=True)
class ScoreContinuations:
    """Ask for the log-probability of each continuation after one context."""

    context: str
    continuations: tuple[str, ...]
    add_bos: AddBos = "auto"
    join: Join = "shared"


@dataclass(frozen=True)
class Generate:
    """Ask for a greedy continuation. repetition_penalty: 1 for none; CRANE's published evaluation has 1.1."""

    prompt: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    add_bos: AddBos = "auto"


Request = ScoreText | ScoreContinuations | Generate


@dataclass(frozen=True)
class Item:
    """One question in one language.

    id: unique within its task and language; parallel items of several languages have the same one. reference: for the
    scoring of an answer, as JSON.
    """

    id: str
    language: str
    request: Request
    reference: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the request and of the reference."""
        content = [type(self.request).__name__, chosen(**asdict(self.request)), dict(self.reference)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def prompt(self) -> str:
        """The question as shown to readers."""
        match self.request:
            case ScoreText(text=prompt) | ScoreContinuations(context=prompt) | Generate(prompt=prompt):
                return prompt


class Scored(BaseModel):
    """Scores of a text, or of continuations in the order asked."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["scored"] = "scored"
    scores: tuple[Score, ...]


class Generated(BaseModel):
    """A generated text, how many tokens it has, and why it ended ("stop" or "length").

    judgement: a judge's reply about it, word for word; None without a judge.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal["generated"] = "generated"
    text: str
    tokens: int
    finish_reason: str | None
    judgement: str | None = None


Answer = Annotated[Scored | Generated, Field(discriminator="kind")]


class ScoreOf(StrEnum):
    """The score above 0, the higher the better, that LangSpec-F1 needs, from a metric. LEVEL: the level itself;
    EXP_NEGATIVE: exp(-level), which turns nats per token into the geometric mean probability of a token."""

    LEVEL = "level"
    EXP_NEGATIVE = "exp(-level)"


class Metric(BaseModel):
    """A metric of a task: the sum of its items' totals divided by the sum of their weights.

    name: in tables and files; unit: of its values; score: its LangSpec-F1 score, None if it has none.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    title: str
    unit: str
    higher_is_better: bool
    score: ScoreOf | None = None

    def damage(self, change: float) -> float:
        """A signed change with the sign that makes values above 0 worse."""
        return -change if self.higher_is_better else change


class Value(NamedTuple):
    """The contribution of one answer to a metric. A weight of 0 leaves the item out."""

    total: float
    weight: float = 1.0


class Task(BaseModel, ABC):
    """One task of a plan; its fields are the settings that a plan file may give.

    languages: those of the plan that it is asked in, None for all; masks: names or patterns (`attnlrp-*`) of the plan's
    masks that it is asked under, None for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]  # its name in plan files
    tells_languages: ClassVar[bool] = False  # whether `substitute` tells the languages of answers

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=64)]
    languages: tuple[str, ...] | None = None
    masks: tuple[str, ...] | None = None

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """Its metrics, the headline first."""

    @abstractmethod
    def load(self, language: str, base: Path) -> tuple[Item, ...]:
        """Its items in a language, in the order asked. base: what relative paths start from.

        Raises EvaluationError naming the file or data set, the row and what was expected.
        """

    async def finish(self, item: Item, answer: Scored | Generated) -> Scored | Generated:
        """Complete an answer before it is saved, for instance by asking a judge. A CraneError is retried."""
        return answer

    @abstractmethod
    def measure(self, item: Item, answer: Scored | Generated) -> dict[str, Value]:
        """The contribution of an answer to each metric, by its name."""

    def substitute(self, item: Item, answer: Scored | Generated) -> str | None:
        """The language that has taken the place of the expected one in an answer; None if that is right."""
        return None

    def shown(self, item: Item, answer: Scored | Generated) -> str:
        """The answer as shown to readers, such as the selected choice; empty if there is nothing to show."""
        return ""

    def expected(self, item: Item) -> str:
        """The right answer as shown to readers; empty if there is none."""
        return ""

    def chance(self, items: Sequence[Item]) -> dict[str, float]:
        """The expected score of guessing, for the metrics where that makes sense."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The settings in the form of a plan file."""
        return {"kind": self.kind, **self.model_dump(mode="json", exclude_defaults=True)}


@dataclass(frozen=True)
class Question:
    """One item under one mask: the unit that a run asks, and that an answer belongs to."""

    task: str
    language: str
    item: str
    mask: str

    @property
    def of_item(self) -> tuple[str, str, str]:
        """What it asks, whatever the mask."""
        return self.task, self.language, self.item


@dataclass(frozen=True)
class Answers:
    """The questions and answers of a run.

    tasks: by name; items: task -> language -> items, in the order of their source; answers: all so far.
    """

    tasks: Mapping[str, Task]
    items: Mapping[str, Mapping[str, tuple[Item, ...]]]
    answers: Mapping[Question, Scored | Generated]
