"""Learned masks: neurons selected by gradient descent on the desired effect of a mask.

Gates are binary from the first step, with straight-through gradients (Bengio et al. 2013, arXiv:1308.3432); which gates
are closed follows accumulated gradients, as movement pruning does with weights (Sanh et al. 2020, arXiv:2005.07683).
The objective is this project's own: the target language loses, the others keep their predictions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crane_serve.common.models.families import Decoder
from relevance.encoding import Batch
from relevance.method import Shape
from relevance.search.words import Effect, Words, effect, unmasked

_NEVER = -torch.inf


@dataclass(frozen=True)
class Learning:
    """How a mask is learned.

    neurons: how many are switched off in the end; their number grows linearly over the first `growth` of the steps.
    effect: nats per token that the target language should lose; a larger loss is not rewarded. hold: weight of the
    losses of the other languages. documents: of each language in a step. momentum: of the gradients.
    """

    neurons: int
    steps: int = 60
    growth: float = 0.4
    effect: float = 1.5
    hold: float = 1.0
    documents: int = 6
    momentum: float = 0.9
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """The measurements of one step, before the gates changed. losses: nats per token by language."""

    target: str
    number: int
    neurons: int
    losses: Mapping[str, float]

    def __str__(self) -> str:
        losses = ", ".join(f"{language} {loss:.2f}" for language, loss in self.losses.items())
        return f"{self.target}: {self.neurons} neurons cost {losses}"


def learn_scores(
    decoder: Decoder,
    documents: Mapping[str, Sequence[list[int]]],
    options: Learning,
    report: Callable[[Step], None] = lambda step: None,
) -> dict[str, Tensor]:
    """`learn` for every language of `documents`, token ids by language: float32 [layers, widest] each."""
    words = Words.of(decoder, documents)
    return {target: learn(decoder, words, documents, target, options, report) for target in documents}


def learn(
    decoder: Decoder,
    words: Words,
    documents: Mapping[str, Sequence[list[int]]],
    target: str,
    options: Learning,
    report: Callable[[Step], None] = lambda step: None,
) -> Tensor:
    """Scores of `target`: float32 [layers, widest] on the CPU, 0 in padding; the highest `neurons` are the mask.

    documents: token ids by language. If the languages have equally many, documents at the same place are used together,
    so that in a parallel corpus the topic cannot be mistaken for the language.
    """
    device = decoder.unembedding.weight.device
    exists = Shape(tuple(documents), decoder.sizes).exists.to(device)
    scores = torch.zeros(exists.shape, device=device)  # [layers, widest]
    velocity = torch.zeros_like(scores)
    for number, batches in enumerate(_draws(documents, options, device)):
        count = round(options.neurons * min(1.0, number / max(1.0, options.growth * options.steps)))
        gates = closed(scores, exists, count).requires_grad_()
        effects = {
            language: effect(decoder, words, batch, unmasked(decoder, words, batch), gates)
            for language, batch in batches.items()
        }
        (gradient,) = torch.autograd.grad(_aim(effects, target, options), gates)
        # Closing a gate lowers its value, so the objective falls where its gradient is positive.
        gradient = gradient / gradient.square().mean().sqrt().clamp_min(torch.finfo(gradient.dtype).tiny)
        velocity = options.momentum * velocity + (1 - options.momentum) * gradient
        scores = scores + velocity
        report(Step(target, number, count, {language: float(of.loss.detach()) for language, of in effects.items()}))
    return scores.where(exists, 0).cpu()


def closed(scores: Tensor, exists: Tensor, count: int) -> Tensor:
    """Gates: 0 for the `count` highest scores, 1 for the others. All [layers, widest]."""
    gates = torch.ones_like(scores)
    if count:
        highest = scores.masked_fill(~exists, _NEVER).flatten().topk(count).indices
        gates.view(-1)[highest] = 0
    return gates


def _aim(effects: Mapping[str, Effect], target: str, options: Learning) -> Tensor:
    """The objective to be minimised: minus the target's loss up to `effect`, plus the losses and changes of the
    others."""
    others = [of for language, of in effects.items() if language != target]
    held = torch.stack([(of.divergence + of.loss.relu()) / 2 for of in others]).mean()
    return options.hold * held - effects[target].loss.clamp_max(options.effect)


def _draws(
    documents: Mapping[str, Sequence[list[int]]], options: Learning, device: torch.device
) -> Iterator[dict[str, Batch]]:
    """`steps` times a batch of each language, going through the documents repeatedly, each time in a new random
    order."""
    generator = torch.Generator().manual_seed(options.seed)
    longest = max(map(len, documents.values()))
    pending: list[int] = []
    for _ in range(options.steps):
        if len(pending) < options.documents:
            pending += torch.randperm(longest, generator=generator).tolist()
        drawn, pending = pending[: options.documents], pending[options.documents :]
        yield {
            language: Batch.of([of_language[index % len(of_language)] for index in drawn], device)
            for language, of_language in documents.items()
        }
