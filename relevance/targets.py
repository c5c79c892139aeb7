"""The attribution targets: logits or log-probabilities of the true next tokens, without storing all logits of the
vocabulary."""

from typing import Any

import torch
from torch import Tensor, nn

from crane_serve.common.models.decoder import Decoder
from relevance.encoding import Batch
from relevance.rules import PLAIN, Rules, soft_cap

VOCABULARY_BLOCK = 4096


def target_logits(decoder: Decoder, hidden: Tensor, batch: Batch, rules: Rules = PLAIN) -> Tensor:
    """Raw logit of the true next token at each position, 0 where the token is not counted: [documents, tokens - 1].

    hidden: [documents, tokens, hidden], the last hidden states. Only the targets' rows of the unembedding are used,
    h_t . W_U[y_(t+1)], in float32 (float64 for a model in float64) whatever the model's dtype.
    """
    counted, states, targets = _predictions(hidden, batch)
    return _place(_logits_of(decoder, states, targets, rules), counted)


def log_probabilities(decoder: Decoder, hidden: Tensor, batch: Batch, rules: Rules = PLAIN) -> Tensor:
    """Log-probability in nats of the true next token, 0 where the token is not counted: [documents, tokens - 1].

    hidden: [documents, tokens, hidden], the last hidden states. Exact; the vocabulary is taken in blocks, so
    [tokens, vocabulary] never exists. Products are made in the model's dtype, sums over the vocabulary and the targets'
    own logits in float32 (float64 for a model in float64).
    """
    counted, states, targets = _predictions(hidden, batch)
    weight = decoder.unembedding.weight
    identity = rules.activation
    normaliser: Tensor = LogSumExp.apply(states, weight, decoder.final_softcap, identity)  # type: ignore[no-untyped-call]
    return _place(_logits_of(decoder, states, targets, rules) - normaliser, counted)


def per_document(values: Tensor, batch: Batch) -> Tensor:
    """Mean over the predicted tokens of each document. values: [documents, tokens - 1], 0 where not counted."""
    return values.sum(dim=1) / (batch.lengths - 1)


class LogSumExp(torch.autograd.Function):
    """log sum over the vocabulary of exp(cap(h . W_U[v])), in blocks of the vocabulary that the backward pass repeats.

    hidden: [n, hidden]; weight: [vocabulary, hidden]; cap: c of the final soft cap c * tanh(z / c), or None;
    identity: whether the cap's backward factor is f(z) / z (the identity rule) instead of its derivative.
    The gradient is softmax(cap(h W_U^T)) W_U, each term times the cap's factor; the weight gets none.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, cap: float | None, identity: bool) -> Tensor:
        """[n], in nats."""
        wide = _wide(hidden)
        total = hidden.new_full(hidden.shape[:1], -torch.inf, dtype=wide)  # [n]
        for rows in torch.split(weight, VOCABULARY_BLOCK):
            logits, _ = _capped((hidden @ rows.T).to(wide), cap, identity)  # [n, block]
            total = torch.logaddexp(total, logits.logsumexp(dim=1))
        ctx.save_for_backward(hidden, weight, total)
        ctx.cap, ctx.identity = cap, identity
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """gradient: [n]; returns that of `hidden`, [n, hidden]."""
        hidden, weight, total = ctx.saved_tensors
        result = torch.zeros_like(hidden, dtype=total.dtype)  # [n, hidden]
        for rows in torch.split(weight, VOCABULARY_BLOCK):
            logits, factor = _capped((hidden @ rows.T).to(total.dtype), ctx.cap, ctx.identity)  # [n, block]
            shares = logits.sub_(total.unsqueeze(1)).exp_()
            if factor is not None:
                shares *= factor
            result += shares.to(rows.dtype) @ rows
        return (result * gradient.unsqueeze(1)).to(hidden.dtype), None, None, None


def _capped(logits: Tensor, cap: float | None, identity: bool) -> tuple[Tensor, Tensor | None]:
    """Soft-capped logits and the factor of their gradient, of one shape; no factor without a cap."""
    if cap is None:
        return logits, None
    values = (logits / cap).tanh()
    if not identity:
        return values * cap, 1 - values.square()
    near_zero = logits.abs() < 1e-6 * cap
    return values * cap, torch.where(near_zero, 1.0, values * cap / logits.masked_fill(near_zero, 1.0))


def _predictions(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Which positions predict a counted token [documents, tokens - 1], their states [n, hidden] and targets [n]."""
    counted = batch.counted[:, 1:]
    return counted, hidden[:, :-1][counted], batch.token_ids[:, 1:][counted]


def _logits_of(decoder: Decoder, states: Tensor, targets: Tensor, rules: Rules) -> Tensor:
    """states: [n, hidden]; targets: [n] token ids -> [n] in the wide dtype."""
    rows = nn.functional.embedding(targets, decoder.unembedding.weight)  # [n, hidden]
    logits = (states.to(_wide(states)) * rows).sum(dim=1)
    return logits if decoder.final_softcap is None else soft_cap(logits, decoder.final_softcap, rules)


def _place(values: Tensor, counted: Tensor) -> Tensor:
    """values: [n] -> [documents, tokens - 1] with zeros elsewhere."""
    return values.new_zeros(counted.shape).masked_scatter(counted, values)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
