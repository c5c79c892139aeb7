"""Method: how activations and relevances of documents become a score for every neuron and language."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from relevance.contrast import CONTRASTS


class MethodError(ValueError):
    """A method does not exist, or cannot work with what it is given."""


class Needs(IntEnum):
    """What a method needs of the model: nothing, a forward pass, or also the AttnLRP backward pass."""

    NOTHING = 0
    FORWARD = 1
    BACKWARD = 2


@dataclass(frozen=True)
class Shape:
    """The neurons that are scored. Score tensors are [languages, layers, widest]; their padding is 0.

    sizes: number of neurons of each layer.
    """

    languages: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def tensor(self) -> tuple[int, int, int]:
        return len(self.languages), len(self.sizes), max(self.sizes)

    @property
    def neurons(self) -> int:
        return sum(self.sizes)

    @cached_property
    def exists(self) -> Tensor:
        """bool [layers, widest]: which places hold a neuron and not padding."""
        return torch.arange(max(self.sizes)) < torch.tensor(self.sizes).unsqueeze(1)


@dataclass(frozen=True)
class Capture:
    """What one layer did on a batch of documents of one language.

    language, layer: indices into the shape.
    counted: bool [documents, tokens]; False at the start token and at padding, which statistics leave out.
    gate: [documents, tokens, neurons], act(gate_proj(x)).
    activation: [documents, tokens, neurons], the input of down_proj.
    gradient: the same shape, d(mean target logit of the document) / d(activation) under the AttnLRP rules;
        None when no method needs the backward pass.
    """

    language: int
    layer: int
    counted: Tensor
    gate: Tensor
    activation: Tensor
    gradient: Tensor | None


class Method(ABC):
    """Scores every neuron for every language. A subclass in a file of `relevance/methods` is found by its name.

    needs: what has to be run for it; languages_needed: fewer make no sense;
    contrast: which of CONTRASTS turns its scores into a ranking per language;
    matched_to: the method whose number of neurons in each layer a selection takes over unless told otherwise.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    languages_needed: ClassVar[int] = 2
    contrast: ClassVar[str] = "none"
    matched_to: ClassVar[str | None] = None

    def __init__(self, shape: Shape, device: torch.device | None = None) -> None:
        self.shape = shape
        self.device = device or torch.device("cpu")

    @abstractmethod
    def accumulate(self, capture: Capture) -> None:
        """Take in one layer of a batch. Memory does not grow with the number of calls."""

    @abstractmethod
    def scores(self) -> Tensor:
        """float64 [languages, layers, widest] on the CPU, 0 in padding."""

    @classmethod
    def ranking(cls, scores: Tensor, shape: Shape, seed: int) -> Tensor:
        """[languages, layers, widest]: per language, the higher the sooner a neuron is selected."""
        return CONTRASTS[cls.contrast](scores)


def require_languages(methods: Sequence[type[Method]], languages: Sequence[str]) -> None:
    """Raise MethodError if a method compares languages and there is none to compare with."""
    for method in methods:
        if len(languages) < method.languages_needed:
            raise MethodError(
                f"method {method.name} compares languages and needs at least {method.languages_needed}, "
                f"found {len(languages)}: {', '.join(languages)}"
            )
