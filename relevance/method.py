"""Method: how activations and gradients of documents become a score for every neuron and language."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from crane_serve.common.models.decoder import Decoder, KnownLayer
from crane_serve.common.models.experts import Experts
from crane_serve.common.models.families import available
from relevance.accumulators import Statistic
from relevance.contrast import find_contrast
from relevance.encoding import Batch
from relevance.rules import PLAIN, Rules


class MethodError(ValueError):
    """A method does not exist, or cannot work with what it is given."""


class AttributionTarget(StrEnum):
    """The quantity that is differentiated: its mean over a document's predicted tokens."""

    TARGET_LOGIT = "target logit"
    LOG_PROBABILITY = "log-probability"


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: the rules that modify the gradients, and the target that is differentiated."""

    rules: Rules
    target: AttributionTarget


class ScoreSource(Enum):
    """The source of the scores of a method that needs no backward pass."""

    NOTHING = "no model at all"
    FORWARD = "any pass, or a forward pass"
    ELSEWHERE = "another command"


class Site(Enum):
    """A tensor of an MLP whose gradient a method may ask for.

    GATE, UP: raw outputs of those projections (of the first linear layer and nothing, where the MLP is not gated);
    NEURONS: the inputs of down_proj; OUTPUT: what the MLP adds to the residual stream, of layers without experts.
    """

    GATE = "gate"
    UP = "up"
    NEURONS = "neurons"
    OUTPUT = "output"


@dataclass(frozen=True)
class Shape:
    """The neurons that are scored. Score tensors are [languages, layers, widest]; their padding is 0.

    sizes: number of neurons of each layer.
    """

    languages: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def tensor(self) -> tuple[int, int, int]:
        """[languages, layers, widest], the shape of score tensors."""
        return len(self.languages), len(self.sizes), max(self.sizes)

    @property
    def neurons(self) -> int:
        """Number of neurons of all layers."""
        return sum(self.sizes)

    @cached_property
    def exists(self) -> Tensor:
        """bool [layers, widest]: whether a place is a neuron and not padding."""
        return torch.arange(max(self.sizes)) < torch.tensor(self.sizes).unsqueeze(1)


@dataclass(frozen=True)
class Units:
    """The units of a model that methods measure.

    sizes: number of neurons of each layer; hidden: width of the residual stream; gated: whether the MLPs have an up
    projection beside the gate; outputs: whether the dimensions of the MLPs' outputs are to be scored too; experts:
    which neurons are in experts, where it is known.
    """

    sizes: tuple[int, ...]
    hidden: int = 0
    gated: bool = True
    outputs: bool = False
    experts: Experts | None = None

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.sizes)

    @property
    def widest(self) -> int:
        """Number of neurons of the widest layer."""
        return max(self.sizes)

    @cached_property
    def exists(self) -> Tensor:
        """bool [layers, widest]: whether a place is a neuron and not padding."""
        return torch.arange(self.widest) < torch.tensor(self.sizes).unsqueeze(1)


@dataclass(frozen=True)
class Activations:
    """The activations of one layer on a batch of documents. All tensors but `batch` are [documents, tokens, neurons].

    neurons: the input of down_proj; act: act(gate), for methods that read it; up: raw output of the up projection (of
    the first linear layer where the MLP is not gated), for methods that read that.
    """

    layer: int
    batch: Batch
    neurons: Tensor
    act: Tensor | None = None
    up: Tensor | None = None


@dataclass(frozen=True)
class Reduced:
    """The neurons of one layer over the counted tokens of one document.

    tokens: how many were counted; key: the document's, as in `Batch.keys`. The others are float64 [neurons] on the CPU:
    mean, mean_abs: means of the neuron and of its absolute value; act_positive: the share of tokens at which act(gate)
    is above 0, for methods that read act; up_mean_abs: the mean of the absolute value of up, for methods that read it.
    """

    layer: int
    tokens: int
    key: int
    mean: Tensor
    mean_abs: Tensor
    act_positive: Tensor | None = None
    up_mean_abs: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """The gradient of each document's target at one site of one layer, under the rules of the method's pass.

    value, gradient: [documents, tokens, units], the tensor at the site and its gradient;
    input_sum: [documents, tokens], sum over the inputs of the linear layer whose output the site is; None at NEURONS.
    At padding the gradient is 0.
    """

    layer: int
    site: Site
    batch: Batch
    value: Tensor
    gradient: Tensor
    input_sum: Tensor | None


class Method(ABC):
    """Scores every neuron for every language. A subclass in a file of `relevance/methods` is found by its name.

    source: the pass that it needs, or the other source of its scores; languages_needed: the least number that makes
    sense; contrast: which of CONTRASTS turns its scores into a ranking per language unless another is asked for;
    matched_to: the method whose number of neurons in each layer a selection takes over unless told otherwise;
    of_experts: whether it says something of mixtures of experts only.
    """

    name: ClassVar[str]
    source: ClassVar[Pass | ScoreSource]
    languages_needed: ClassVar[int] = 2
    documents_needed: ClassVar[int] = 1
    contrast: ClassVar[str] = "none"
    matched_to: ClassVar[str | None] = None
    of_experts: ClassVar[bool] = False

    @classmethod
    def ranking(cls, scores: Tensor, shape: Shape, seed: int, contrast: str | None = None) -> Tensor:
        """[languages, layers, widest]: per language, the higher the sooner a neuron is selected.

        contrast: a key of CONTRASTS, or None for the method's own way. Raises ContrastError for any other.
        """
        return find_contrast(contrast or cls.contrast)(scores)

    @classmethod
    def published(cls, scores: Tensor, shape: Shape) -> Tensor:
        """bool [languages, layers, widest]: the neurons that the publication's own rule gives each language.

        Raises MethodError for a method that was published without such a rule.
        """
        raise MethodError(f"method {cls.name} was published without a rule of selection; choose a budget")


class ScoredMethod(Method):
    """A method whose scores `crane relevance` makes."""

    @classmethod
    @abstractmethod
    def score(cls, finalised: Sequence[Tensor], shape: Shape) -> Tensor:
        """float64 [languages, layers, widest], 0 in padding, from what every language's instance finalised to."""


class Measured(ScoredMethod):
    """A method that accumulates. An instance holds the statistics of ONE language as its attributes.

    sites: whose gradients it needs; empty for a method that listens to activations. of_one_language: whether what a
    language's instance finalises to is its score, whatever the other languages are.
    """

    sites: ClassVar[frozenset[Site]] = frozenset()
    of_one_language: ClassVar[bool] = True

    def __init__(self, units: Units, device: torch.device | None = None) -> None:
        self.units = units
        self.device = device or torch.device("cpu")

    @property
    def wanted(self) -> frozenset[Site]:
        """The sites that it needs of this model."""
        return self.sites

    @property
    def statistics(self) -> dict[str, Statistic]:
        """All accumulated statistics, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Statistic)}

    @abstractmethod
    def finalise(self) -> Tensor:
        """The result for this language's documents, float64 on the CPU: [layers, widest], unless a method says
        otherwise."""

    @classmethod
    def score(cls, finalised: Sequence[Tensor], shape: Shape) -> Tensor:
        return torch.stack(list(finalised)).where(shape.exists, 0)

    @classmethod
    def outputs(cls, finalised: Sequence[Tensor], shape: Shape) -> Tensor | None:
        """Scores of the MLPs' output dimensions, float64 [languages, layers, hidden], where the method has them."""
        return None

    def merge(self, other: "Measured") -> None:
        """Add the statistics of `other`, of the same kind, on other documents of the language."""
        for name, statistic in self.statistics.items():
            statistic.merge(other.statistics[name])


class OfActivations(Measured):
    """A method that listens to the forward pass. reads: which of act and up it reads beside the neurons."""

    source = ScoreSource.FORWARD
    reads: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def accumulate(self, activations: Activations) -> None:
        """Add one layer of a batch. It is called once per layer and batch; memory is bounded."""

    def take(self, reduced: Reduced) -> None:
        """Add one layer of one document, of which only means over tokens are known. Not every method can."""
        raise NotImplementedError(f"{self.name} is not computed from means over a document")


class OfGradients(Measured):
    """A method that listens to the backward pass."""

    @abstractmethod
    def accumulate(self, gradients: Gradients) -> None:
        """Add one of the wanted sites of one layer of a batch. Memory does not grow with the number of calls."""


def needs_family(method: type[Method]) -> str | None:
    """What a method needs that only a family says; None if the structure of a model is enough."""
    if isinstance(method.source, Pass) and method.source.rules != PLAIN:
        return "the places of norms, attention and MLP, at which its rules act"
    if issubclass(method, Measured) and method.sites - {Site.NEURONS, Site.OUTPUT}:
        return "the projections of the MLP"
    if issubclass(method, OfActivations) and "up" in method.reads:
        return "the up projection of the MLP"
    return None


def lacking(method: type[Method], decoder: Decoder) -> str | None:
    """What a method needs to know of a model beyond its neurons, and is not known; None if it can be measured."""
    if method.of_experts and not any(group.of_experts for layer in decoder.layers for group in layer.groups):
        return "which neurons are in experts, of which it found none"
    if all(isinstance(layer, KnownLayer) for layer in decoder.layers):
        return None
    reads = method.reads if issubclass(method, OfActivations) else frozenset()
    if "act" in reads and any(group.act_fn is None for layer in decoder.layers for group in layer.groups):
        return "the activation function of the MLP, as a module"
    return needs_family(method)


def require_known(methods: Sequence[type[Method]], decoder: Decoder, architecture: str) -> None:
    """Raise MethodError for a method that needs more of a model than is known."""
    for method in methods:
        needed = lacking(method, decoder)
        if needed is not None:
            of_all = f" Of {architecture} only the structure is known; all is known of {', '.join(available())}"
            known = all(isinstance(layer, KnownLayer) for layer in decoder.layers)
            raise MethodError(f"method {method.name} needs to know {needed}.{'' if known else of_all}")


def require_languages(methods: Sequence[type[Method]], languages: Sequence[str]) -> None:
    """Raise MethodError if a method compares languages and there are too few."""
    for method in methods:
        if len(languages) < method.languages_needed:
            raise MethodError(
                f"method {method.name} compares languages and needs at least {method.languages_needed}, "
                f"found {len(languages)}: {', '.join(languages)}"
            )


def require_documents(methods: Sequence[type[Method]], documents: dict[str, int]) -> None:
    """Raise MethodError if a method needs more documents than a language has."""
    for method in methods:
        for language, count in documents.items():
            if count < method.documents_needed:
                raise MethodError(
                    f"method {method.name} needs at least {method.documents_needed} documents of every language, "
                    f"found {count} of {language}"
                )
