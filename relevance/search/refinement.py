"""Ablation-refined sets: a score proposes neurons, and the effect of switching them off decides.

Attribution is a first-order estimate of the effect of ablation (arXiv:2508.21258 measures its error). Here every group
of proposed neurons is really switched off, in forward passes only, and kept only if the target language loses more than
the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crane_serve.common.models.decoder import Decoder
from relevance.encoding import Batch
from relevance.search.words import Unmasked, Words, effect

# Factors [layers, widest] of the neurons -> nats per token lost, by language.
Measure = Callable[[Tensor], Mapping[str, float]]


@dataclass(frozen=True)
class Refinement:
    """Options of the refinement.

    candidates: how many of the best ranked neurons are tried; group: how many at a time.
    price: nats that the target must lose for each nat that the others lose. documents: of each language, drawn by
    `seed`, to measure on.
    """

    candidates: int = 512
    group: int = 8
    price: float = 2.0
    documents: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Refined:
    """order: int64 [neurons, 2], (layer, index), best first: the kept neurons, then the rest in the proposed order.

    kept: number of kept neurons.
    """

    order: Tensor
    kept: int


def refine_scores(
    decoder: Decoder,
    documents: Mapping[str, Sequence[list[int]]],
    proposed: Mapping[str, Tensor],
    options: Refinement,
    advance: Callable[[int], None] = lambda groups: None,
    values: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """`refine` for every language: scores float32 [layers, widest], the higher the better, and how many were kept.

    documents: token ids by language; from languages with equally many documents, the same places are drawn; proposed:
    int64 [neurons, 2] by language, best first; values: [layers, widest], what takes the place of a neuron that is
    switched off; None for 0.
    """
    words = Words.of(decoder, documents)
    device = decoder.unembedding.weight.device
    generator = torch.Generator().manual_seed(options.seed)
    drawn = torch.randperm(max(map(len, documents.values())), generator=generator)[: options.documents].tolist()
    places = {language: [index % len(of_language) for index in drawn] for language, of_language in documents.items()}
    batches = {
        language: Batch.of([documents[language][place] for place in of_language], device)
        for language, of_language in places.items()
    }
    unmasked = Unmasked(decoder, words, documents)
    values = None if values is None else values.to(device)
    before = {language: unmasked.log_probabilities(language, of_language) for language, of_language in places.items()}

    @torch.no_grad()
    def measure(neurons: Tensor) -> dict[str, float]:
        return {
            language: float(
                effect(decoder, words, batch, before[language], neurons.to(device).unsqueeze(0), values).loss
            )
            for language, batch in batches.items()
        }

    shape = (len(decoder.sizes), max(decoder.sizes))
    scores: dict[str, Tensor] = {}
    kept: dict[str, int] = {}
    for target, order in proposed.items():
        refined = refine(measure, order, shape, target, options, advance)
        scores[target] = by_rank(refined.order, shape)
        kept[target] = refined.kept
    return scores, kept


def by_rank(order: Tensor, shape: tuple[int, int]) -> Tensor:
    """Scores that rank neurons as `order` (int64 [neurons, 2]) does: float32 `shape`, from 1 down, 0 in padding."""
    scores = torch.zeros(shape)
    scores[order[:, 0], order[:, 1]] = torch.arange(len(order), 0, -1, dtype=torch.float32) / len(order)
    return scores


def refine(
    measure: Measure,
    order: Tensor,
    shape: tuple[int, int],
    target: str,
    options: Refinement,
    advance: Callable[[int], None] = lambda groups: None,
) -> Refined:
    """Put first in `order` (int64 [neurons, 2], best first) the neurons whose removal hurts `target` most selectively.

    Every group is first switched off alone. Then, in the order of the gains, it is switched off together with all
    groups kept so far, and kept if the gain increases. The gain is the target's loss minus `price` times the mean loss
    of the other languages that lose anything; a loss below 0 counts as 0.

    shape: (layers, widest); advance: called after every measurement, of which there are two for each group.
    """
    groups = list(torch.split(order[: options.candidates], options.group))
    gains = []
    for group in groups:
        gains.append(_gain(measure(_without([group], shape)), target, options.price))
        advance(1)
    kept: list[Tensor] = []
    best = 0.0
    for index in sorted(range(len(groups)), key=lambda index: gains[index], reverse=True):
        gain = _gain(measure(_without([*kept, groups[index]], shape)), target, options.price)
        advance(1)
        if gain > best:
            best = gain
            kept.append(groups[index])
    return Refined(_first(kept, order, shape), sum(map(len, kept)))


def _gain(losses: Mapping[str, float], target: str, price: float) -> float:
    others = [max(0.0, loss) for language, loss in losses.items() if language != target]
    return losses[target] - price * sum(others) / len(others)


def _without(groups: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Factors [layers, widest]: 0 at the neurons of `groups`, 1 elsewhere."""
    factors = torch.ones(shape)
    for group in groups:
        factors[group[:, 0], group[:, 1]] = 0
    return factors


def _first(kept: Sequence[Tensor], order: Tensor, shape: tuple[int, int]) -> Tensor:
    """`order` with the neurons of `kept` moved to the front. int64 [neurons, 2]."""
    if not kept:
        return order
    rest = _without(kept, shape)[order[:, 0], order[:, 1]].bool()
    return torch.cat([*kept, order[rest]])
