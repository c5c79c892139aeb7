"""SelectionOptions: which neurons a mask takes."""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from crane_serve.common.masks import NeuronMask
from relevance.contrast import RANDOM_TOKENS
from relevance.methods import find
from relevance.scores import Scores, ScoresInfo

GLOBAL, UNIFORM, LIKE = "global", "uniform", "like:"
ZERO = "zero"
_MEAN, _MEDIAN, _ADD = "mean", "median", "add:"


class SelectionError(ValueError):
    """A selection is not possible with these scores and options."""


class Rule(StrEnum):
    """How many neurons of the ranking are selected: a fixed number, those above a threshold, or as in the method's
    paper. Or a fixed number of experts, which routers may not choose any more."""

    BUDGET = "budget"
    Z = "z"
    PUBLISHED = "published"
    EXPERTS = "experts"


class Overlap(StrEnum):
    """Whether a neuron may be taken for several languages, or only for the one that ranks it best."""

    SHARED = "shared"
    EXCLUSIVE = "exclusive"


@dataclass(frozen=True)
class Intervention:
    """What becomes of a neuron's value a, with a strength x: (1 - x) a + x v, or a + x v. v: [layers, widest]; None for
    0; keeps: whether a stays whole.

    `zero` has v = 0; `mean` the mean over all languages of the neuron's mean activation (mean ablation), `mean:LANG`
    that of one language; `median` and `median:LANG` alike, of medians; `add:LANG-LANG2` adds the difference of two
    languages' means.
    """

    values: Tensor | None
    keeps: bool = False

    @classmethod
    def of(cls, text: str, scores: Scores) -> "Intervention":
        """As written, with what `scores` say that neurons typically are. Raises SelectionError, and ScoresError where
        that was not measured."""
        languages = scores.info.languages
        if text == ZERO:
            return cls(None)
        statistic, _, of_language = text.partition(":")
        known = (
            f"{ZERO}, {_MEAN}, {_MEAN}:LANG, {_MEDIAN}, {_MEDIAN}:LANG or {_ADD}LANG-LANG2, of {', '.join(languages)}"
        )
        pairs = {f"{_ADD}{one}-{other}": (one, other) for one in languages for other in languages if one != other}
        of_one = statistic in (_MEAN, _MEDIAN) and text == f"{statistic}:{of_language}" and of_language in languages
        if text not in (_MEAN, _MEDIAN, *pairs) and not of_one:
            raise SelectionError(f"intervention {text!r}; expected {known}")
        values = scores.typical(median=statistic == _MEDIAN)
        if text in pairs:
            one, other = (values[languages.index(language)] for language in pairs[text])
            return cls(one - other, keeps=True)
        return cls(values[languages.index(of_language)] if of_one else values.mean(dim=0))

    @classmethod
    def of_ablation(cls, text: str, scores: Scores) -> "Intervention":
        """As `of`, for what takes a value's place. Raises what that does, and SelectionError for what is added."""
        intervention = cls.of(text, scores)
        if intervention.keeps:
            raise SelectionError(f"intervention {text!r} adds to neurons; expected one that takes their place")
        return intervention

    def mask(
        self, off: Tensor, sizes: tuple[int, ...], strength: float = 1.0, output: Tensor | None = None
    ) -> NeuronMask:
        """Of the neurons `off`, bool [layers, widest]; output: [layers, hidden]."""
        scale = 1.0 if self.keeps else 1.0 - strength
        scales = torch.where(off, scale, 1.0)
        offset = None if self.values is None else torch.where(off, strength * self.values.float(), 0.0)
        return NeuronMask(scales, sizes, output, offset=offset)


@dataclass(frozen=True)
class SelectionOptions:
    """Which neurons a mask takes. See `select` for the definitions.

    budget: fraction of all neurons, 0 < budget <= 1, under Rule.BUDGET; count: a number of neurons instead, or of
    experts under Rule.EXPERTS;
    z: threshold under Rule.Z; contrast: a key of CONTRASTS or RANDOM_TOKENS, None for the method's own;
    quotas: "global", "uniform" or "like:METHOD", None for "like:" the method that a control is matched to, else global;
    seed: of methods that draw; output_dimensions: take dimensions of the MLPs' outputs as well. intervention, strength:
    what becomes of the neurons, see `Intervention`; None for the one that the scores were made for.

    Raises SelectionError for invalid values or combinations, and MethodError for an unknown method.
    """

    method: str
    rule: Rule = Rule.BUDGET
    budget: float = 0.01
    count: int | None = None
    z: float = 1.0
    contrast: str | None = None
    quotas: str | None = None
    overlap: Overlap = Overlap.SHARED
    seed: int = 0
    output_dimensions: bool = False
    intervention: str | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        known = self.quotas in (None, GLOBAL, UNIFORM)
        if not known and (self.quotas == LIKE or not self.effective_quotas.startswith(LIKE)):
            raise SelectionError(f"quotas are {self.quotas!r}; expected {GLOBAL}, {UNIFORM} or {LIKE}METHOD")
        if self.matched_to == self.method:
            raise SelectionError(f"{self.method} cannot be matched to itself; pass another method, or quotas {GLOBAL}")
        if self.rule is Rule.BUDGET and self.output_dimensions:
            raise SelectionError("a budget counts neurons; output dimensions need the rule z or published")
        if self.rule is not Rule.BUDGET and self.quotas == UNIFORM:
            raise SelectionError(f"uniform quotas spread a budget over the layers; the rule {self.rule} has none")
        if not math.isfinite(self.z):
            raise SelectionError(f"z is {self.z}; expected a finite number of standard deviations")
        if self.count is not None and self.count < 1:
            raise SelectionError(f"count is {self.count}; expected at least 1")
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise SelectionError(f"strength is {self.strength}; expected a number above 0")
        zero = self.intervention in (None, ZERO)
        if self.output_dimensions and not (zero and self.strength == 1):
            raise SelectionError("output dimensions can only be switched off; expected the intervention zero")
        whole = self.effective_quotas == GLOBAL and self.overlap is Overlap.SHARED and not self.output_dimensions
        whole = whole and zero and self.strength == 1
        if self.contrast == RANDOM_TOKENS and (self.rule is Rule.EXPERTS or self.output_dimensions):
            raise SelectionError(f"the contrast {RANDOM_TOKENS} knows neither experts nor output dimensions")
        if self.rule is Rule.EXPERTS and (self.count is None or not whole):
            raise SelectionError(
                "the rule experts needs a count, and knows neither quotas, overlap, outputs nor interventions"
            )

    @property
    def effective_quotas(self) -> str:
        """`quotas`, or what None means for this method."""
        if self.quotas is not None:
            return self.quotas
        model = find(self.method).matched_to
        return GLOBAL if model is None else f"{LIKE}{model}"

    @property
    def matched_to(self) -> str | None:
        """The method whose numbers of neurons per layer are used."""
        quotas = self.effective_quotas
        return quotas.removeprefix(LIKE) if quotas.startswith(LIKE) else None

    @property
    def effective_contrast(self) -> str:
        """`contrast`, or the method's own."""
        return self.contrast or find(self.method).contrast

    @property
    def threshold(self) -> dict[str, float]:
        """The parameters of the rule, except a budget that is a fraction."""
        if self.rule is Rule.Z:
            return {"z": self.z}
        return {} if self.rule is Rule.PUBLISHED or self.count is None else {"count": self.count}

    def settled(self, info: ScoresInfo) -> "SelectionOptions":
        """With an intervention: without one, that for which a search made the scores of the method, or of the method
        that a control is matched to; else zero.

        Raises SelectionError for another ablation than that for which a search made the scores of the method.
        """
        search = info.searches.get(self.method)
        if self.intervention is None:
            search = search or info.searches.get(self.matched_to or "")
            return replace(self, intervention=ZERO if search is None else search.intervention)
        if search is not None and self.intervention != search.intervention and not self.intervention.startswith(_ADD):
            raise SelectionError(
                f"the scores of {self.method} were made for the intervention {search.intervention}, not for "
                f"{self.intervention}: leave the intervention out, or make scores with `--intervention "
                f"{self.intervention} --replace`"
            )
        return self

    def neurons(self, of: int) -> int:
        """The number of neurons of the budget. of: the number of all neurons. Raises SelectionError."""
        if self.count is None:
            return neurons_of_budget(self.budget, of)
        if self.count > of:
            raise SelectionError(f"count is {self.count}; the model has {of} neurons")
        return self.count

    def __str__(self) -> str:
        return {
            Rule.BUDGET: f"budget {self.budget if self.count is None else self.count}",
            Rule.Z: f"z > {self.z:g}",
            Rule.PUBLISHED: "published",
            Rule.EXPERTS: f"{self.count} experts",
        }[self.rule]


def neurons_of_budget(budget: float, neurons: int) -> int:
    """Number of neurons in a fraction `budget` of all, at least one. Raises SelectionError outside 0 < budget <= 1."""
    if not (math.isfinite(budget) and 0 < budget <= 1):
        raise SelectionError(f"budget is {budget}; expected a fraction of all neurons, above 0 and at most 1")
    return max(1, round(budget * neurons))
