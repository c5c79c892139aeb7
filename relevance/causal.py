"""Causal effects: the loss of a model's predictions while MLP neurons are switched off."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crane_serve.common.masks import NeuronMask
from crane_serve.common.models.decoder import Decoder
from crane_serve.common.models.routers import find_routers, kept_from
from relevance.accumulators import NonFiniteError
from relevance.encoding import Batch, batches
from relevance.model_passes import last_hidden
from relevance.targets import log_probabilities

Values = NDArray[np.float64]

NON_FINITE_HINT = "the weights may hold values that are not finite, or a wider dtype may help"


@dataclass(frozen=True)
class Losses:
    """Negative log-likelihoods of documents under one mask.

    nats: [documents], summed over each document's predicted tokens; tokens: [documents], how many those are.
    """

    nats: Values
    tokens: Values

    @property
    def per_token(self) -> float:
        """Nats per token over all documents."""
        return float(self.nats.sum() / self.tokens.sum())


@contextmanager
def scaled(
    decoder: Decoder, neurons: Tensor, outputs: Tensor | None = None, offsets: Tensor | None = None
) -> Iterator[None]:
    """Multiply every MLP neuron (the inputs of down_proj), and perhaps the MLPs' outputs, while the context lasts.

    neurons: [layers, widest], or [documents, layers, widest] for factors of their own for each document of a batch;
    outputs: [layers, hidden]; offsets: of the shape of `neurons` or [layers, widest], added to the products. Gradients
    flow back to all. Layers whose factors are all 1 and offsets 0, and which need no gradient, are not changed.
    """
    with ExitStack() as stack:
        for index, layer in enumerate(decoder.layers):
            for group in layer.groups:
                factors = neurons[..., index, group.columns]  # [neurons] or [documents, neurons]
                if factors.requires_grad or bool((factors != 1).any()):
                    stack.callback(group.down_proj.register_forward_pre_hook(_input_hook(factors)).remove)
                added = None if offsets is None else offsets[..., index, group.columns]
                if added is not None and (added.requires_grad or bool(added.any())):
                    stack.callback(group.down_proj.register_forward_pre_hook(_adding_hook(added)).remove)
                if outputs is not None and bool((outputs[index] != 1).any()):
                    stack.callback(group.down_proj.register_forward_hook(_output_hook(outputs[index])).remove)
        yield


@contextmanager
def masked(decoder: Decoder, mask: NeuronMask | None) -> Iterator[None]:
    """Run the model under `mask` while the context lasts; None for the unmasked model.

    Raises UnsupportedModelError for a mask of routers that the model does not have.
    """
    if mask is None:
        yield
        return
    device = decoder.unembedding.weight.device
    outputs, offsets = (None if of is None else of.to(device) for of in (mask.output, mask.offset))
    with ExitStack() as stack:
        stack.enter_context(scaled(decoder, mask.intermediate.to(device), outputs, offsets))
        if mask.router is not None:
            for layer, router in find_routers(decoder.trunk).items():
                stack.enter_context(kept_from(router, mask.router[layer].to(device)))
        yield


@torch.no_grad()
def losses(decoder: Decoder, documents: Sequence[list[int]], batch_tokens: int) -> Losses:
    """Losses in nats of `documents` (token ids that begin with the start token), in their order, over the vocabulary.

    Raises NonFiniteError where the model gives no finite log-probabilities.
    """
    longest_first = sorted(range(len(documents)), key=lambda index: len(documents[index]), reverse=True)
    device = decoder.unembedding.weight.device
    nats: list[Tensor] = []
    for batch in batches(documents, batch_tokens, device):
        of_tokens = log_probabilities(decoder, hidden_states(decoder, batch), batch)  # [documents, tokens - 1]
        nats.append(-of_tokens.sum(dim=1, dtype=torch.float64))
    in_order = np.empty(len(documents))
    in_order[longest_first] = torch.cat(nats).cpu().numpy()
    if not np.isfinite(in_order).all():
        raise NonFiniteError(
            f"log-probabilities are not finite in {decoder.unembedding.weight.dtype}; {NON_FINITE_HINT}"
        )
    return Losses(in_order, np.array([len(ids) - 1 for ids in documents], dtype=np.float64))


def hidden_states(decoder: Decoder, batch: Batch) -> Tensor:
    """Last hidden states [documents, tokens, hidden]."""
    return last_hidden(decoder, decoder.embedding(batch.token_ids).detach())


def _input_hook(factors: Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        values: Tensor = inputs[0]  # [documents, tokens, neurons], the first two of them flattened in some families
        whole, own = _paired(values, factors)
        return ((whole * own).reshape(values.shape), *inputs[1:])

    return hook


def _adding_hook(offsets: Tensor) -> Any:
    """Of experts that a token does not have, whatever is added is not read."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        values: Tensor = inputs[0]  # as above
        whole, own = _paired(values, offsets)
        return ((whole + own).reshape(values.shape), *inputs[1:])

    return hook


def _paired(values: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """`values` and `numbers`, [neurons] or [documents, neurons], in shapes that go together."""
    numbers = numbers.to(values.dtype)
    if numbers.dim() == 1:
        return values, numbers
    return values.reshape(len(numbers), -1, numbers.shape[1]), numbers.unsqueeze(1)


def _output_hook(factors: Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * factors.to(output.dtype)

    return hook
