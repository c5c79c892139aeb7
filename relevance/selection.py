"""Selection: from scores to the neurons that a mask switches off."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crane_serve.masks import MaskInfo, NeuronMask, write_mask
from relevance.method import require_languages
from relevance.methods import find
from relevance.scores import Scores

UNMATCHED = "none"


class SelectionError(ValueError):
    """A selection is not possible with this budget, these scores or this match."""


@dataclass(frozen=True)
class Selection:
    """One mask per language, and how it was chosen.

    budget: fraction of all neurons; matched_to: the method whose neurons per layer were taken over, or None;
    seed: of methods that draw.
    """

    masks: Mapping[str, NeuronMask]
    method: str
    budget: float
    matched_to: str | None
    seed: int

    def write(self, directory: Path, scores: Scores) -> list[Path]:
        """Write `{method}-{language}.safetensors` for every language; returns the paths."""
        return [
            write_mask(
                directory,
                f"{self.method}-{language}",
                mask,
                MaskInfo(
                    language=language,
                    method=self.method,
                    fingerprint=scores.info.fingerprint,
                    budget=self.budget,
                    corpus_digest=scores.info.corpus_digest,
                    parameters={
                        "contrast": find(self.method).contrast,
                        "matched_to": self.matched_to,
                        "seed": self.seed,
                        "split": scores.info.split,
                        "languages": list(scores.info.languages),
                    },
                ),
            )
            for language, mask in self.masks.items()
        ]


def select(scores: Scores, method: str, budget: float, match: str | None = None, seed: int = 0) -> Selection:
    """The highest ranked `budget` (a fraction of all neurons) of `method`, for every language.

    A matched selection takes as many neurons from each layer as the method `match` does with this budget, and none of
    that method's own, so that it is a control for the choice within the layers. `match`: the name of a method, "none",
    or None for the method's own default.

    Raises MethodError for unknown methods and for a contrast without a second language, ScoresError for scores that
    are missing, SelectionError for an impossible budget, scores that are not finite, or too few neurons in a layer.
    """
    count = neurons_of_budget(budget, scores.shape.neurons)
    matched_to = find(method).matched_to if match is None else match
    if matched_to == method:
        raise SelectionError(f"{method} cannot be matched to itself; pass another method or {UNMATCHED!r}")
    ranking = _ranking(scores, method, seed)
    if matched_to is None or matched_to == UNMATCHED:
        matched_to = None
        chosen = {
            language: top(ranking[index], scores.shape.exists, count)
            for index, language in enumerate(scores.info.languages)
        }
    else:
        other = _ranking(scores, matched_to, seed)
        chosen = {
            language: matched_top(ranking[index], top(other[index], scores.shape.exists, count), scores.shape.exists)
            for index, language in enumerate(scores.info.languages)
        }
    sizes = scores.shape.sizes
    masks = {
        language: NeuronMask.switching_off([row.nonzero().flatten().tolist() for row in neurons], sizes)
        for language, neurons in chosen.items()
    }
    return Selection(masks, method, budget, matched_to, seed)


def neurons_of_budget(budget: float, neurons: int) -> int:
    """Number of neurons in a fraction `budget` of all, at least one. Raises SelectionError outside 0 < budget <= 1."""
    if not (math.isfinite(budget) and 0 < budget <= 1):
        raise SelectionError(f"budget is {budget}; expected a fraction of all neurons, above 0 and at most 1")
    return max(1, round(budget * neurons))


def top(ranking: Tensor, eligible: Tensor, count: int) -> Tensor:
    """The `count` highest of the eligible, ties going to the lower layer and index. All [layers, neurons]; bool."""
    order = torch.sort(ranking[eligible], descending=True, stable=True).indices
    places = eligible.flatten().nonzero().flatten()[order[:count]]
    chosen = torch.zeros(eligible.numel(), dtype=torch.bool)
    chosen[places] = True
    return chosen.view_as(eligible)


def matched_top(ranking: Tensor, model: Tensor, exists: Tensor) -> Tensor:
    """As many neurons of each layer as `model` has, the highest ranked that `model` leaves. All [layers, neurons].

    Raises SelectionError when a layer has too few left.
    """
    left = exists & ~model
    chosen = torch.zeros_like(model)
    for layer, count in enumerate(model.sum(dim=1).tolist()):
        if count > int(left[layer].sum()):
            raise SelectionError(
                f"layer {layer} has {int(exists[layer].sum())} neurons, of which the matched method takes {count}: "
                "too few are left for a control; choose a smaller budget"
            )
        chosen[layer] = top(ranking[layer], left[layer], count)
    return chosen


def _ranking(scores: Scores, method: str, seed: int) -> Tensor:
    """float64 [languages, layers, widest]."""
    kind = find(method)
    require_languages([kind], scores.info.languages)
    raw = scores.of(method).double()
    for language, of_language in zip(scores.info.languages, raw, strict=True):
        if not bool(torch.isfinite(of_language).all()):
            raise SelectionError(f"scores of {method} for {language} are not all finite")
    return kind.ranking(raw, scores.shape, seed)
