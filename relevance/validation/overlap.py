"""Overlap: the similarity of the sets of two languages, two methods or two halves of a corpus, and their layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from relevance.methods import find
from relevance.scores import Scores
from relevance.selection import order
from relevance.selection_options import neurons_of_budget
from relevance.validation.result import Overlap


def overlaps(scores: Scores, methods: Sequence[str], budget: float) -> list[Overlap]:
    """Jaccard overlap of every two sets of any of `methods` and languages at `budget`."""
    count = neurons_of_budget(budget, scores.shape.neurons)
    chosen = {
        (method, language): members(ordered[:count], scores.shape.tensor[1:])
        for method in methods
        for language, ordered in order(scores, method, seed=0).items()
    }
    names = list(chosen)
    return [
        Overlap(first=first, second=second, budget=budget, jaccard=jaccard(chosen[first], chosen[second]))
        for index, first in enumerate(names)
        for second in names[index + 1 :]
    ]


def stability(halves: Sequence[Scores], budget: float) -> dict[str, dict[str, float]]:
    """method -> language -> Jaccard overlap of the sets that the two `halves` select at `budget`; empty without
    halves."""
    if not halves:
        return {}
    first, second = halves
    count = neurons_of_budget(budget, first.shape.neurons)
    shape = first.shape.tensor[1:]
    by_method: dict[str, dict[str, float]] = {}
    for method in first.by_method:
        if method not in second.by_method or find(method).matched_to is not None:
            continue
        orders = order(first, method), order(second, method)
        by_method[method] = {
            language: jaccard(*(members(ordered[language][:count], shape) for ordered in orders))
            for language in first.info.languages
        }
    return by_method


def jaccard(first: Tensor, second: Tensor) -> float:
    """|intersection| / |union| of two bool tensors of one shape; 1 where both are empty."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def neurons_per_layer(scores: Scores, methods: Sequence[str], budget: float) -> dict[str, dict[str, list[int]]]:
    """method -> language -> how many of the neurons at `budget` lie in each layer."""
    count = neurons_of_budget(budget, scores.shape.neurons)
    layers = len(scores.shape.sizes)
    return {
        method: {
            language: torch.bincount(ordered[:count, 0], minlength=layers).tolist()
            for language, ordered in order(scores, method, seed=0).items()
        }
        for method in methods
    }


def members(places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """places: int64 [n, 2] -> bool of `shape` [layers, widest]."""
    members = torch.zeros(shape, dtype=torch.bool)
    members[places[:, 0], places[:, 1]] = True
    return members
