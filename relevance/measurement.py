"""The pass over the corpus that serves all methods at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from relevance.attnlrp import attnlrp
from relevance.encoding import Batch, EncodedDocuments, batches
from relevance.families import Decoder, take_apart
from relevance.method import Capture, Method, Needs
from relevance.statistics import NonFiniteError


def measure(
    model: nn.Module,
    documents: Mapping[str, EncodedDocuments],
    methods: Sequence[Method],
    batch_tokens: int,
    advance: Callable[[int], None] = lambda documents: None,
) -> None:
    """Run `model` over the documents of every language and let all `methods` accumulate what it does.

    The passes that are run are those that some method needs; `advance` hears of every few documents done. The model
    must be in evaluation mode (dropout would make the result random); it is left as it was.

    Raises UnsupportedModelError for an unknown family, NonFiniteError naming the layer that overflows.
    """
    needs = max(method.needs for method in methods)
    if needs is Needs.NOTHING:
        return
    decoder = take_apart(model)
    device = decoder.unembedding.weight.device
    with ExitStack() as stack:
        if needs is Needs.BACKWARD:
            stack.enter_context(attnlrp(model))
        for language, encoded in enumerate(documents.values()):
            for batch in batches(encoded.token_ids, batch_tokens, device):
                for capture in captures(decoder, batch, language, backward=needs is Needs.BACKWARD):
                    for method in methods:
                        method.accumulate(capture)
                advance(len(batch.lengths))


def captures(decoder: Decoder, batch: Batch, language: int, backward: bool) -> Iterator[Capture]:
    """What every layer does on `batch`, with gradients of each document's mean target logit if `backward`."""
    with _recorded(decoder) as record, torch.set_grad_enabled(backward):
        embeddings = decoder.embedding(batch.token_ids).detach()  # [documents, tokens, hidden]
        hidden = last_hidden(decoder, embeddings.requires_grad_(backward))
        _require_finite("activations", record.activations)
        gradients: Sequence[Tensor | None] = [None] * len(decoder.layers)
        if backward:
            # Documents do not see each other, so one sum gives every document its own gradients.
            total = mean_target_logits(decoder, hidden, batch).sum()
            found = torch.autograd.grad(total, record.activations)
            _require_finite("gradients", found, last_first=True)
            gradients = found
    for layer, gradient in enumerate(gradients):
        activation = record.activations[layer].detach()
        yield Capture(language, layer, batch.counted, record.gates[layer], activation, gradient)


def _require_finite(what: str, tensors: Sequence[Tensor], last_first: bool = False) -> None:
    """Raise NonFiniteError naming the first layer, in the order of computation, whose tensor is not finite."""
    layers = list(enumerate(tensors))
    for layer, tensor in reversed(layers) if last_first else layers:
        if not bool(torch.isfinite(tensor.detach().sum(dtype=torch.float32))):
            raise NonFiniteError(f"layer {layer}: {what} are not finite in {tensor.dtype}; try a wider dtype")


def last_hidden(decoder: Decoder, embeddings: Tensor) -> Tensor:
    """Final hidden states [documents, tokens, hidden] of input embeddings of the same shape.

    There is no attention mask: padding stands on the right, where causal attention never looks.
    """
    hidden: Tensor = decoder.trunk(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return hidden


def mean_target_logits(decoder: Decoder, hidden: Tensor, batch: Batch) -> Tensor:
    """Mean raw logit of the true next token, one per document: [documents].

    Only the targets' rows of the unembedding are used, h_t . W_U[y_(t+1)], never the whole vocabulary.
    """
    rows = nn.functional.embedding(
        batch.token_ids[:, 1:], decoder.unembedding.weight
    )  # [documents, tokens - 1, hidden]
    logits = torch.einsum("dth,dth->dt", hidden[:, :-1], rows)  # [documents, tokens - 1]
    return logits.where(batch.counted[:, 1:], 0).sum(dim=1) / (batch.lengths - 1)


class _Record:
    """Tensors of one forward pass, by layer: act(gate) and the input of down_proj, [documents, tokens, neurons]."""

    def __init__(self) -> None:
        self.gates: list[Tensor] = []
        self.activations: list[Tensor] = []

    def record_gate(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.gates.append(output.detach())

    def record_activation(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.activations.append(inputs[0])


@contextmanager
def _recorded(decoder: Decoder) -> Iterator[_Record]:
    record = _Record()
    with ExitStack() as stack:
        for layer in decoder.layers:
            stack.callback(layer.act_fn.register_forward_hook(record.record_gate).remove)
            stack.callback(layer.down_proj.register_forward_pre_hook(record.record_activation).remove)
        yield record
