"""Contrasts: turn scores of every language into scores that distinguish one language from the others."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

Contrast = Callable[[Tensor], Tensor]

RANDOM_TOKENS = "random-tokens"
"""The contrast with random token sequences: see `louder`. It takes away, and leaves the method's ranking as it is."""


class ContrastError(ValueError):
    """A contrast does not exist, or there is no second language to compare with."""


def as_it_is(scores: Tensor) -> Tensor:
    """No contrast: the scores [languages, layers, neurons] already rank the neurons of each language."""
    return scores


def minus_mean(scores: Tensor) -> Tensor:
    """Score in this language minus the mean score in the others. [languages >= 2, layers, neurons], as is the result.

    Compares scores as they are: a language whose scores are larger throughout dominates. Raises ContrastError.
    """
    others = _require_others("minus-mean", scores)
    return scores - (scores.sum(dim=0) - scores) / others


def minus_max(scores: Tensor) -> Tensor:
    """Score in this language minus the largest score in another. [languages >= 2, layers, neurons], as is the result.

    Positive only where this language scores highest. Raises ContrastError.
    """
    _require_others("minus-max", scores)
    contrasted = torch.empty_like(scores)
    for language in range(len(scores)):
        others = torch.cat((scores[:language], scores[language + 1 :]))  # [languages - 1, layers, neurons]
        contrasted[language] = scores[language] - others.amax(dim=0)
    return contrasted


def share(scores: Tensor) -> Tensor:
    """This language's share of the neuron's scores: R_g / sum over languages of |R|, and 0 where that sum is 0.

    scores: [languages >= 2, layers, neurons]; the result, of the same shape, lies between -1 and 1.
    The size of the scores cancels, so a ranking by share alone prefers tiny neurons: one with 1e-9 in one language and
    0 in the others has share 1, ahead of every neuron that matters in more than one. Raises ContrastError.
    """
    _require_others("share", scores)
    totals = scores.abs().sum(dim=0)  # [layers, neurons]
    return torch.where(totals > 0, scores / totals.where(totals > 0, 1), 0)


def margin(scores: Tensor) -> Tensor:
    """`minus_max` of scores that are divided by their language's total.

    R_g(l, i) is divided by the sum of |R_g| over all neurons of all layers, which makes languages comparable whose
    logits, and so whose relevances, differ in size. [languages >= 2, layers, neurons]. Raises ContrastError.
    """
    _require_others("margin", scores)
    totals = scores.abs().sum(dim=(1, 2), keepdim=True)  # [languages, 1, 1]
    return minus_max(scores / totals.clamp_min(torch.finfo(scores.dtype).tiny))


CONTRASTS: Mapping[str, Contrast] = MappingProxyType(
    {"none": as_it_is, "minus-mean": minus_mean, "minus-max": minus_max, "share": share, "margin": margin}
)


def find_contrast(name: str) -> Contrast:
    """The contrast called `name`. Raises ContrastError naming those that exist."""
    contrast = CONTRASTS.get(name)
    if contrast is None:
        raise ContrastError(f"unknown contrast {name!r}; contrasts are {', '.join(CONTRASTS)}, {RANDOM_TOKENS}")
    return contrast


def louder(scores: Tensor, on_random: Tensor) -> Tensor:
    """Which neurons score higher in a language than on random token sequences: bool [languages, layers, neurons].

    After LangFIR (arXiv:2604.03532), which leaves out what fires on random tokens. scores: [languages, layers,
    neurons]; on_random: [layers, neurons].
    """
    return scores > on_random


def _require_others(name: str, scores: Tensor) -> int:
    """The number of other languages that each language is compared with."""
    if len(scores) < 2:
        raise ContrastError(f"contrast {name} compares languages and needs at least 2, found {len(scores)}")
    return len(scores) - 1
