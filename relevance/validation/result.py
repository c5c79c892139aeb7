"""Validation: the plan, and its result as it is saved in a file."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

import crane_serve
from crane_serve.common.atomic import write_atomically
from crane_serve.common.masks import Fingerprint
from crane_serve.common.numbers.bootstrap import CONFIDENCE, RESAMPLES, Estimate
from crane_serve.common.numbers.langspec import Form

CHOICE, REPORT = "validation", "test"
MATCHED = "matched effect"
RESULT_FILE = "validation.json"


class ValidationError(ValueError):
    """A validation is not possible with this plan, or a file is not the result of one."""


class ValidationPlan(BaseModel):
    """The plan of a validation.

    methods: of which scores there are. budgets: fractions of all neurons. effect: nats per token that the target loses
    at matched effect, or None to leave that out. seeds: of methods that draw. matched_to: the method whose numbers of
    neurons per layer random controls use, too. published: whether the methods' own rules are tried. intervention: what
    becomes of the neurons; None for that for which a search made a method's scores (and of its controls), else zero.
    """

    model_config = ConfigDict(frozen=True)

    methods: tuple[str, ...]
    budgets: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05)
    effect: float | None = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)
    matched_to: str | None = None
    published: bool = True
    intervention: str | None = None


class MaskEffect(BaseModel):
    """The cost of one mask for every language on the texts for reporting.

    rule: "budget", "published", "like:METHOD" (a layer-matched control) or "matched effect"; budget: the fraction of
    all neurons that it has. changes: nats per token by language, above 0 for a loss. collateral: nats per token that
    the other languages lose, on average, for each that the target loses; None where the target loses nothing. f1:
    LangSpec-F1 at b = 1 by form, of the scores exp(-nats per token), the geometric mean probability of a token.
    intervention: what became of the neurons.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    language: str
    rule: str
    seed: int | None
    budget: float
    neurons: int
    digest: str
    changes: dict[str, Estimate]
    collateral: Estimate | None
    f1: dict[Form, float]
    intervention: str = "zero"

    @property
    def own(self) -> Estimate:
        """The change in the mask's own language."""
        return self.changes[self.language]

    @property
    def others(self) -> float:
        """Mean change of the other languages, nats per token."""
        others = [change.mean for language, change in self.changes.items() if language != self.language]
        return sum(others) / len(others)


class Overlap(BaseModel):
    """Jaccard overlap of two sets of neurons of equal budget: |intersection| / |union|."""

    model_config = ConfigDict(frozen=True)

    first: tuple[str, str]  # method, language
    second: tuple[str, str]
    budget: float
    jaccard: float


class Texts(BaseModel):
    """One part of the texts. documents, tokens, nats_per_token (of the whole model): by language."""

    model_config = ConfigDict(frozen=True)

    corpus_digest: str
    split: str | None
    documents: dict[str, int]
    tokens: dict[str, int]
    nats_per_token: dict[str, float]


class Validation(BaseModel):
    """The result.

    unreached: (method, language) whose whole ranking does not cost the target `effect` nats per token;
    empty: (method, language) whose published rule takes no neuron;
    stability: method -> language -> Jaccard overlap, at `overlap_budget`, of the sets from two halves of a corpus;
    layers: method -> language -> number of neurons of each layer at `overlap_budget`.
    """

    model_config = ConfigDict(frozen=True)

    fingerprint: Fingerprint
    languages: tuple[str, ...]
    dtype: str
    plan: ValidationPlan
    relevance_digest: str
    texts: dict[str, Texts]
    effects: list[MaskEffect]
    unreached: list[tuple[str, str]]
    empty: list[tuple[str, str]]
    overlap_budget: float
    overlaps: list[Overlap]
    stability: dict[str, dict[str, float]]
    layers: dict[str, dict[str, list[int]]]
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE
    created_by: str = f"crane-serve {crane_serve.__version__}"

    def save(self, directory: Path) -> Path:
        """Write `validation.json` into `directory` and return its path."""
        path = directory / RESULT_FILE
        write_atomically(path, self.model_dump_json(indent=1).encode())
        return path

    @classmethod
    def load(cls, directory: Path) -> "Validation":
        """Read it back. Raises ValidationError."""
        path = directory / RESULT_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValidationError(f"{path} is not the result of a validation: {str(error).splitlines()[0]}") from error

    def of_rule(self, rule: str) -> list[MaskEffect]:
        """The effects of one rule, in order."""
        return [effect for effect in self.effects if effect.rule == rule]

    def collateral_at_matched_effect(self, method: str) -> float | None:
        """Mean over the languages (and seeds) of `method`; None unless every language reaches the effect."""
        effects = [effect for effect in self.of_rule(MATCHED) if effect.method == method]
        values = [effect.collateral.mean for effect in effects if effect.collateral is not None]
        if {effect.language for effect in effects} != set(self.languages) or len(values) < len(effects):
            return None
        return sum(values) / len(values)
