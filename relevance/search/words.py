"""The measurements of searches for neurons: effects on short texts, over a part of the vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crane_serve.common.models.families import Decoder
from relevance.accumulators import NonFiniteError
from relevance.causal import NON_FINITE_HINT, hidden_states, scaled
from relevance.encoding import Batch
from relevance.rules import PLAIN, soft_cap

EXTRA_WORDS = 2000


@dataclass(frozen=True, eq=False)
class Words:
    """A part of the vocabulary: every token of some documents and a random sample of the others.

    A softmax over this part replaces the one over the whole vocabulary while sets of neurons are compared. With a
    vocabulary of 262 k the latter would cost more than the model. Reported figures of a mask always use the whole
    vocabulary.

    place: int64 [vocabulary], index into `rows` or -1; rows: [words, hidden] of the unembedding; cap: final soft cap.
    """

    place: Tensor
    rows: Tensor
    cap: float | None

    @classmethod
    def of(cls, decoder: Decoder, documents: Mapping[str, Sequence[list[int]]], seed: int = 0) -> "Words":
        """The words of all `documents`, token ids by language, and `EXTRA_WORDS` others drawn by `seed`."""
        weight = decoder.unembedding.weight  # [vocabulary, hidden]
        present = torch.zeros(len(weight), dtype=torch.bool)
        for of_language in documents.values():
            for ids in of_language:
                present[torch.tensor(ids)] = True
        absent = (~present).nonzero().flatten()
        drawn = torch.randperm(len(absent), generator=torch.Generator().manual_seed(seed))[:EXTRA_WORDS]
        present[absent[drawn]] = True
        chosen = present.nonzero().flatten().to(weight.device)
        place = torch.full((len(weight),), -1, device=weight.device)
        place[chosen] = torch.arange(len(chosen), device=weight.device)
        return cls(place, weight[chosen], decoder.final_softcap)

    def log_probabilities(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Log-softmax over the words at every position that predicts a counted token: float32 [n, words], in nats.

        hidden: [documents, tokens, hidden], the last hidden states.
        """
        logits = hidden[:, :-1][batch.counted[:, 1:]] @ self.rows.T  # [n, words]
        if self.cap is not None:
            logits = soft_cap(logits, self.cap, PLAIN)
        return logits.float().log_softmax(dim=1)

    def targets(self, batch: Batch) -> Tensor:
        """Indices among the words of the predicted tokens, in the order of `log_probabilities`: int64 [n, 1]."""
        return self.place[batch.token_ids[:, 1:][batch.counted[:, 1:]]].unsqueeze(1)


@dataclass(frozen=True)
class Effect:
    """The cost of a mask for a language on one batch. loss: nats per token lost; divergence: KL from the whole
    model."""

    loss: Tensor
    divergence: Tensor


def unmasked(decoder: Decoder, words: Words, batch: Batch) -> Tensor:
    """Log-probabilities of the whole model, float32 [n, words]. Raises NonFiniteError."""
    with torch.no_grad():
        values = words.log_probabilities(hidden_states(decoder, batch), batch)
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"log-probabilities are not finite in {words.rows.dtype}; {NON_FINITE_HINT}")
    return values


def effect(decoder: Decoder, words: Words, batch: Batch, before: Tensor, neurons: Tensor) -> Effect:
    """Effect of the factors `neurons` [layers, widest] on `batch`; `before`: the result of `unmasked`.
    Differentiable."""
    with scaled(decoder, neurons):
        after = words.log_probabilities(hidden_states(decoder, batch), batch)  # [n, words]
    targets = words.targets(batch)
    loss = (before.gather(1, targets) - after.gather(1, targets)).mean()
    divergence = (before.exp() * (before - after)).sum(dim=1).mean()
    return Effect(loss, divergence)
