"""Contrasts: from scores of every language to what sets one language apart."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

Contrast = Callable[[Tensor], Tensor]


def as_it_is(scores: Tensor) -> Tensor:
    """No contrast: the scores already rank the neurons of each language."""
    return scores


def share_margin(scores: Tensor) -> Tensor:
    """Share of this language minus the largest share of another. scores: [languages >= 2, layers, neurons].

    The share of neuron i of layer l in language g is R_g(l, i) / sum of |R_g| over all neurons of all layers, which
    makes languages comparable whose logits, and so whose relevances, differ in size.
    """
    languages = scores.shape[0]
    shares = scores / scores.abs().sum(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    margins = torch.empty_like(shares)
    for language in range(languages):
        others = torch.cat((shares[:language], shares[language + 1 :]))  # [languages - 1, layers, neurons]
        margins[language] = shares[language] - others.amax(dim=0)
    return margins


CONTRASTS: Mapping[str, Contrast] = MappingProxyType({"none": as_it_is, "share-margin": share_margin})
