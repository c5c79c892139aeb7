"""The measurements of searches for neurons: effects on short texts, over a part of the vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crane_serve.common.models.decoder import Decoder
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

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Log-softmax over the words: float32 [n, words], in nats. states: [n, hidden], of `predicting`."""
        logits = states @ self.rows.T  # [n, words]
        if self.cap is not None:
            logits = soft_cap(logits, self.cap, PLAIN)
        return logits.float().log_softmax(dim=1)

    def of_language(self, documents: Mapping[str, Sequence[list[int]]], language: str) -> Tensor:
        """bool [words]: the language's own words. Their share of its documents' tokens is larger than the sum of their
        shares in the other languages' documents; start tokens do not count.

        Raises ValueError for a language that has none.
        """
        shares = {}
        for name, of_language in documents.items():
            ids = torch.tensor([token for ids in of_language for token in ids[1:]], device=self.place.device)
            counts = torch.bincount(self.place[ids], minlength=len(self.rows))
            shares[name] = counts.double() / len(ids)
        own = shares.pop(language) > sum(shares.values(), torch.zeros(len(self.rows), device=self.place.device))
        if not bool(own.any()):
            raise ValueError(f"{language}: no token is more frequent in its documents than in all others together")
        return own

    def targets(self, batch: Batch) -> Tensor:
        """Indices among the words of the predicted tokens, in the order of `log_probabilities`: int64 [n, 1]."""
        return self.place[batch.token_ids[:, 1:][batch.counted[:, 1:]]].unsqueeze(1)


def predicting(decoder: Decoder, batch: Batch) -> Tensor:
    """Last hidden states at every position that predicts a counted token, document after document: [n, hidden]."""
    return hidden_states(decoder, batch)[:, :-1][batch.counted[:, 1:]]


class Unmasked:
    """Predictions of the whole model for documents, each computed once: its last hidden states are kept.

    documents: token ids by language.
    """

    def __init__(self, decoder: Decoder, words: Words, documents: Mapping[str, Sequence[list[int]]]) -> None:
        self._decoder = decoder
        self._words = words
        self._documents = documents
        self._states: dict[tuple[str, int], Tensor] = {}  # [tokens - 1, hidden] by language and place

    @torch.no_grad()
    def log_probabilities(self, language: str, places: Sequence[int]) -> Tensor:
        """Of the documents at `places`, one after another: float32 [n, words], in nats. Raises NonFiniteError."""
        missing = [place for place in dict.fromkeys(places) if (language, place) not in self._states]
        if missing:
            batch = Batch.of([self._documents[language][place] for place in missing], self._words.rows.device)
            states = predicting(self._decoder, batch)
            for place, of_document in zip(missing, torch.split(states, batch.predicted.tolist()), strict=True):
                self._states[language, place] = of_document
        values = self._words.log_probabilities(torch.cat([self._states[language, place] for place in places]))
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"log-probabilities are not finite in {self._words.rows.dtype}; {NON_FINITE_HINT}")
        return values


@dataclass(frozen=True)
class Effect:
    """The cost of masks for a language on one batch, [masks] each.

    loss: nats per token lost; divergence: KL from the whole model; share: nats lost, on average over the predicting
    positions, by the share of the probability that goes to the language's own words; None unless it was asked for.
    """

    loss: Tensor
    divergence: Tensor
    share: Tensor | None = None


def effect(
    decoder: Decoder,
    words: Words,
    batch: Batch,
    before: Tensor,
    neurons: Tensor,
    values: Tensor | None = None,
    own: Tensor | None = None,
) -> Effect:
    """Effect of factors on `batch`, of several masks in one pass. Differentiable.

    before: of `Unmasked`, [n, words]; neurons: [masks, layers, widest], from 1 to keep a neuron's value to 0 to replace
    it by its value in `values`, [layers, widest], or by 0; own: bool [words], of `Words.of_language`, for the share.
    """
    masks = len(neurons)
    repeated = Batch(batch.token_ids.repeat(masks, 1), batch.lengths.repeat(masks))
    of_documents = neurons.repeat_interleave(batch.documents, dim=0)
    with scaled(decoder, of_documents, offsets=None if values is None else (1 - of_documents) * values):
        after = words.log_probabilities(predicting(decoder, repeated)).view(masks, *before.shape)
    targets = words.targets(batch)  # [n, 1]
    lost = before.gather(1, targets) - after.gather(2, targets.expand(masks, -1, -1))  # [masks, n, 1]
    divergence = (before.exp() * (before - after)).sum(dim=2)  # [masks, n]
    share = None
    if own is not None:
        share = (before[:, own].logsumexp(dim=1) - after[..., own].logsumexp(dim=2)).mean(dim=1)
    return Effect(lost.mean(dim=(1, 2)), divergence.mean(dim=1), share)
