"""The proofs at load: a model's logits are what its parts, as relevance uses them, make of a few tokens; and rules
miss nothing in between."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from crane_serve.common.models.decoder import Decoder, KnownDecoder
from crane_serve.common.models.errors import UnsupportedModelError
from relevance.model_passes import last_hidden
from relevance.rules import CP_LRP, PLAIN, propagation, soft_cap

_TOKENS = 32
_NATS = {torch.float64: 1e-6, torch.float32: 1e-3}
_ROUNDED_NATS = 0.05  # in dtypes of 16 bits
_CONSERVED_TOKENS = 8
_SHARE_LOST = {torch.float64: 1e-6, torch.float32: 1e-2}
_ROUNDED_SHARE = 0.5  # in dtypes of 16 bits


@torch.no_grad()
def prove_logits(model: nn.Module, decoder: Decoder) -> None:
    """Compare log-probabilities of the model's own forward pass with those of trunk, scale, unembedding and soft cap.

    Raises UnsupportedModelError where they differ by more than rounding, on average: the model does something with its
    logits, or with its token ids, that is not known, such as a scale of its own or embeddings of each layer; and where
    a hidden state depends on later tokens. A model whose own are not finite passes: the layer where it overflows is
    named when it is measured.
    """
    whole: Any = model
    name, device = type(model).__name__, decoder.unembedding.weight.device
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(decoder.vocabulary, (1, _TOKENS), generator=generator).to(device)
    other = token_ids.clone()
    other[0, -1] = (other[0, -1] + 1) % decoder.vocabulary
    try:
        hidden, of_other = (
            last_hidden(decoder, decoder.embedding(ids)) for ids in (token_ids, other)
        )  # [1, tokens, hidden]
    except Exception as error:  # whatever a trunk raises that needs more than embeddings
        raise UnsupportedModelError(f"{name} does not run on the embeddings of its tokens alone: {error}") from error
    own: Tensor = whole(token_ids, use_cache=False).logits  # [1, tokens, vocabulary]
    if not bool(own.isfinite().all()):
        return
    if not torch.allclose(hidden[:, :-1], of_other[:, :-1], rtol=1e-2, atol=1e-4):
        raise UnsupportedModelError(f"{name} lets a position see later tokens; expected a causal model")
    logits = hidden @ decoder.unembedding.weight.T
    if decoder.final_softcap is not None:
        logits = soft_cap(logits, decoder.final_softcap, PLAIN)
    size = min(own.shape[-1], logits.shape[-1])
    apart = [part[..., :size].double().log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)) for part in (own, logits)]
    difference = float((apart[0] - apart[1]).abs().mean())
    if not difference <= _NATS.get(logits.dtype, _ROUNDED_NATS):
        raise UnsupportedModelError(
            f"{name}: log-probabilities of its parts differ from its own by {difference:.2g} nats on average; "
            "something that it does to embeddings or logits is not known"
        )


def prove_conservation(model: nn.Module, decoder: KnownDecoder) -> None:
    """Send the logits of a few tokens back to their embeddings under CP-LRP, and compare the sums.

    Under these rules gates, attention weights and the factors of norms are constants and activation functions are
    ratios, so logits are linear in the embeddings but for what biases and learned positions add; that is known, and
    counted. Anything else that is lost or gained comes from a part that is not linear and has no rule. Raises
    UnsupportedModelError then. A model that overflows passes, as in `prove_logits`.
    """
    name, device = type(model).__name__, decoder.unembedding.weight.device
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(decoder.vocabulary, (1, _CONSERVED_TOKENS), generator=generator).to(device)
    added: list[Tensor] = []  # by biases
    inputs: list[Tensor] = []  # embeddings, and what learned positions add to them

    def with_bias(module: nn.Module, _: Any, output: Tensor) -> None:
        bias = module.get_parameter("bias").double()
        if output.requires_grad:
            output.register_hook(lambda gradient: added.append((gradient.double() * bias).sum()))  # type: ignore[no-untyped-call]

    def with_positions(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    norms = {norm.module for norm in decoder.norms}
    with torch.enable_grad(), ExitStack() as stack:

        def watch(module: nn.Module, hook: Any) -> None:
            stack.callback(module.register_forward_hook(hook).remove)

        biased = [of for of in decoder.trunk.modules() if "bias" in dict(of.named_parameters(recurse=False))]
        for module in decoder.trunk.modules():
            if isinstance(module, nn.Embedding) and module is not decoder.embedding:
                watch(module, with_positions)
        # Factors act behind a projection, so its bias is counted before them; a norm's rule takes its place.
        for module in biased:
            if module not in norms:
                watch(module, with_bias)
        stack.enter_context(propagation(model, CP_LRP))
        for module in biased:
            if module in norms:
                watch(module, with_bias)
        inputs.append(decoder.embedding(token_ids).detach().requires_grad_())  # [1, tokens, hidden]
        hidden = last_hidden(decoder, inputs[0])
        if decoder.unembedding.in_features > inputs[0].shape[-1]:  # its bias reads a constant
            hidden.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: added.append((gradient * hidden)[..., -1].double().sum().detach())
            )
        weight = decoder.unembedding.weight
        likeliest = (hidden.detach() @ weight.T).argmax(dim=-1)  # [1, tokens]
        logits = (hidden * weight[likeliest]).sum(dim=-1)  # [1, tokens]
        if decoder.final_softcap is not None:
            logits = soft_cap(logits, decoder.final_softcap, CP_LRP)
        gradients = torch.autograd.grad(logits.sum(), inputs)
    pairs = zip(gradients, inputs, strict=True)
    kept = torch.stack([(gradient.double() * of.double()).sum() for gradient, of in pairs] + added).sum()
    logits = logits.detach().double()
    lost = float((logits.sum() - kept.detach()).abs() / logits.abs().sum())
    if not lost <= _SHARE_LOST.get(inputs[0].dtype, _ROUNDED_SHARE) and bool(logits.isfinite().all()):
        raise UnsupportedModelError(
            f"{name}: the rules of relevance lose or gain {lost:.1%} of the logits between its parts; "
            "something in it is not linear and has no rule"
        )
