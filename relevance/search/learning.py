"""Learned masks: neurons selected by gradient descent on the desired effect of a mask.

Gates are binary from the first step, with straight-through gradients (Bengio et al. 2013, arXiv:1308.3432); which gates
are closed follows accumulated gradients, as movement pruning does with weights (Sanh et al. 2020, arXiv:2005.07683).
The objective is this project's own: the target language loses, the others keep their predictions. What the target
loses is the probability of its documents' tokens, or the share of the probability that goes to its own words.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from crane_serve.common.models.decoder import Decoder
from relevance.encoding import Batch
from relevance.method import Shape
from relevance.search.words import Effect, Unmasked, Words, effect

_NEVER = -torch.inf
_RECENT = 4  # steps
_REMEMBERED = 20  # steps, whose scores are averaged


class Target(StrEnum):
    """What the target language is to lose, in nats on average over the tokens of its documents.

    LOSS: log-probability of the next token. LANGUAGE: the log of the share of the next token's distribution that goes
    to the language's own words (`Words.of_language`); each document counts as a prompt that ends at each of its tokens.
    """

    LOSS = "loss"
    LANGUAGE = "language"


@dataclass(frozen=True)
class Learning:
    """How masks are learned.

    neurons: how many are switched off in the end; their number grows linearly over the first `growth` of the steps.
    target: what the target language should lose; effect: how many nats of it, a larger loss is not rewarded. hold:
    weight of the losses of the other languages. spare: a mask is done before its last step when the target has lost
    `effect` and the others no more than this on average, in nats per token, over the last few steps. documents: of each
    language in a step. momentum: of the gradients. trust: how far the scores that it starts from go, in steps.
    """

    neurons: int
    steps: int = 64
    growth: float = 0.4
    effect: float = 1.5
    hold: float = 1.0
    spare: float = 0.02
    documents: int = 2
    momentum: float = 0.9
    trust: float = 1.0
    seed: int = 0
    target: Target = Target.LOSS


@dataclass(frozen=True)
class Step:
    """The measurements of one step, before the gates changed. losses: nats per token by language, of the target what
    `Target` says."""

    target: str
    number: int
    neurons: int
    losses: Mapping[str, float]

    def __str__(self) -> str:
        losses = ", ".join(f"{language} {loss:.2f}" for language, loss in self.losses.items())
        return f"{self.target}: {self.neurons} neurons cost {losses}"


@dataclass(eq=False)
class _Search:
    """The search for one target's mask. scores, velocity: [layers, widest]; recent: losses of the last steps.

    mean: of the scores since all neurons are closed, later ones weighing more; [layers, widest]. At the end it says
    more than the scores do, which go on changing with the documents of each step (Polyak and Juditsky 1992). closed:
    in how many steps they were.
    """

    target: str
    scores: Tensor
    velocity: Tensor
    mean: Tensor
    closed: int = 0
    recent: deque[Mapping[str, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def move(self, gradient: Tensor, options: Learning, *, all_closed: bool) -> None:
        """One step. gradient: [layers, widest]; all_closed: whether all neurons were closed."""
        gradient = gradient / gradient.square().mean().sqrt().clamp_min(torch.finfo(gradient.dtype).tiny)
        self.velocity = options.momentum * self.velocity + (1 - options.momentum) * gradient
        # Closing a gate lowers its value, so the objective falls where its gradient is positive.
        self.scores = self.scores + self.velocity
        self.closed += all_closed
        share = 1 / max(1, min(self.closed, _REMEMBERED))
        self.mean = (1 - share) * self.mean + share * self.scores

    def done(self, options: Learning) -> bool:
        """Whether its aim is reached."""
        if len(self.recent) < _RECENT:
            return False
        own = sum(losses[self.target] for losses in self.recent) / _RECENT
        others = [max(0.0, loss) for losses in self.recent for name, loss in losses.items() if name != self.target]
        return own >= options.effect and sum(others) / len(others) <= options.spare


def learn_scores(
    decoder: Decoder,
    documents: Mapping[str, Sequence[list[int]]],
    options: Learning,
    starts: Mapping[str, Tensor] | None = None,
    report: Callable[[Step], None] = lambda step: None,
    values: Tensor | None = None,
) -> dict[str, Tensor]:
    """Scores of every language of `documents`: float32 [layers, widest] on the CPU, 0 in padding; the highest `neurons`
    are its mask. They are a mean of the last steps' scores, so `report` says what masks on the way to it cost.

    documents: token ids by language. If the languages have equally many, documents at the same place are used together,
    so that in a parallel corpus the topic cannot be mistaken for the language. starts: by language its neurons, best
    first, int64 [neurons, 2]; None for no preference. values: [layers, widest], what takes the place of a neuron whose
    gate is closed; None for 0. All languages are learned in the same passes.

    Raises ValueError for a language without own words, if these are the target, and NonFiniteError.
    """
    words = Words.of(decoder, documents)
    unmasked = Unmasked(decoder, words, documents)
    own: dict[str, Tensor] = {}
    if options.target is Target.LANGUAGE:
        own = {language: words.of_language(documents, language) for language in documents}
    device = decoder.unembedding.weight.device
    values = None if values is None else values.to(device)
    exists = Shape(tuple(documents), decoder.sizes).exists.to(device)
    searches = []
    for target in documents:
        start = _start(None if starts is None else starts[target], exists, options)
        searches.append(_Search(target, start, torch.zeros_like(start), start))
    running = searches
    for number, places in enumerate(_draws(documents, options)):
        count = options.neurons
        if starts is None:
            count = round(count * min(1.0, number / max(1.0, options.growth * options.steps)))
        gates = torch.stack([closed(search.scores, exists, count) for search in running]).requires_grad_()
        gradients = torch.zeros_like(gates)  # [targets, layers, widest]
        losses: dict[str, list[float]] = {}
        for language, of_language in places.items():
            batch = Batch.of([documents[language][place] for place in of_language], device)
            before = unmasked.log_probabilities(language, of_language)
            found = effect(decoder, words, batch, before, gates, values, own.get(language))
            aims = [
                _aim(found, index, search.target == language, len(documents) - 1, options)
                for index, search in enumerate(running)
            ]
            gradients += torch.autograd.grad(torch.stack(aims).sum(), gates)[0]
            is_target = torch.tensor([search.target == language for search in running], device=device)
            losses[language] = torch.where(is_target, _of_target(found), found.loss).tolist()
        for index, search in enumerate(running):
            search.move(gradients[index], options, all_closed=count == options.neurons)
            of_search = {language: of_language[index] for language, of_language in losses.items()}
            if count == options.neurons:
                search.recent.append(of_search)
            report(Step(search.target, number, count, of_search))
        running = [search for search in running if not search.done(options)]
        if not running:
            break
    return {search.target: search.mean.where(exists, 0).cpu() for search in searches}


def closed(scores: Tensor, exists: Tensor, count: int) -> Tensor:
    """Gates: 0 for the `count` highest scores, 1 for the others. All [layers, widest]."""
    gates = torch.ones_like(scores)
    if count:
        highest = scores.masked_fill(~exists, _NEVER).flatten().topk(count).indices
        gates.view(-1)[highest] = 0
    return gates


def _start(order: Tensor | None, exists: Tensor, options: Learning) -> Tensor:
    """Scores to begin with, [layers, widest]: from `trust` down to 0 over four times as many neurons as are wanted."""
    scores = torch.zeros(exists.shape, device=exists.device)
    if order is not None:
        first = order[: 4 * options.neurons].to(exists.device)
        scores[first[:, 0], first[:, 1]] = options.trust * torch.linspace(1, 0, len(first), device=exists.device)
    return scores


def _aim(found: Effect, index: int, is_target: bool, others: int, options: Learning) -> Tensor:
    """The part of the objective, to be minimised, of one mask in one language: minus the target's loss up to `effect`;
    of the others, their share of the mean of losses and changes."""
    if is_target:
        return -_of_target(found)[index].clamp_max(options.effect)
    return options.hold * (found.divergence[index] + found.loss[index].relu()) / 2 / others


def _of_target(found: Effect) -> Tensor:
    return found.loss if found.share is None else found.share


def _draws(documents: Mapping[str, Sequence[list[int]]], options: Learning) -> Iterator[dict[str, list[int]]]:
    """`steps` times places of documents of each language, going through them repeatedly, each time in a new random
    order."""
    generator = torch.Generator().manual_seed(options.seed)
    longest = max(map(len, documents.values()))
    pending: list[int] = []
    for _ in range(options.steps):
        if len(pending) < options.documents:
            pending += torch.randperm(longest, generator=generator).tolist()
        drawn, pending = pending[: options.documents], pending[options.documents :]
        yield {language: [index % len(of_language) for index in drawn] for language, of_language in documents.items()}
