"""Relevance as modified gradients: inside `propagation(model, rules)` the relevance of an activation is activation *
gradient.

AttnLRP: Achtibat et al. 2024, "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers",
arXiv:2402.05602. A rule that maps relevance R_j to R_i becomes a factor, by which the gradient R / activation is
multiplied in the backward pass. The forward values are untouched; linear layers (epsilon rule with a vanishing epsilon,
equation 8) and the softmax (its Taylor expansion, proposition 3.1) keep their ordinary gradients. Relevance of a bias
is not passed on.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crane_serve.common.models.decoder import KnownGroup, KnownLayer, Norm, Projection
from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.families import take_apart

_Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


@dataclass(frozen=True)
class Rules:
    """The modifications of gradients in the backward pass.

    norms: the reciprocal standard deviation of a normalisation is a constant. activation: f(z) has the gradient f(z)/z
    at the MLP's activation function and at tanh soft caps. The others are factors of the gradient: query_key at
    queries and keys, value at values, and, where the MLP is gated, gate at act(gate) and up at up. A factor of 0 makes
    its tensor a constant; query_key = 0 makes the attention weights constants. shares: what the outputs of shared
    experts are multiplied by is a constant, as the weights of routers are under all rules.
    """

    name: str
    norms: bool
    activation: bool
    query_key: float
    value: float
    gate: float
    up: float
    shares: bool = True


# The ordinary gradient.
PLAIN = Rules("plain", norms=False, activation=False, query_key=1.0, value=1.0, gate=1.0, up=1.0, shares=False)
# arXiv:2402.05602. The uniform rule (equation 7; for products, propositions 3.2 and 3.3) gives each of the two factors
# of a product half of its relevance. Values are a factor of one product, queries and keys of a product inside another.
ATTNLRP = Rules("attnlrp", norms=True, activation=True, query_key=0.25, value=0.5, gate=0.5, up=0.5)
# Ali et al. 2022, "XAI for Transformers: Better Explanations through Conservative Propagation", arXiv:2202.07304:
# attention weights are constants, and so, of a gated MLP, is the gate.
CP_LRP = Rules("cp-lrp", norms=True, activation=True, query_key=0.0, value=1.0, gate=0.0, up=1.0)
# Relevance patching, arXiv:2508.21258: attention weights are constants, products are halved.
RELP = Rules("relp", norms=True, activation=True, query_key=0.0, value=1.0, gate=0.5, up=0.5)


class IdentityRule(torch.autograd.Function):
    """Identity rule for an element-wise activation: R_z = R_f(z), so the gradient is multiplied by f(z) / z.

    arXiv:2402.05602, equation 9. `z` and `value` = f(z) have one shape; `value` is returned as is. Where z is 0 the
    ratio is its limit `slope` = f'(0). The gradient is also multiplied by `factor`, for the rule of a product behind.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, slope: float, factor: float) -> Tensor:
        """z, value: of one shape. Returns `value` unchanged, of the same shape."""
        ratio = (value / z).masked_fill_(z == 0, slope)
        ctx.save_for_backward(ratio if factor == 1 else ratio.mul_(factor))
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """gradient: of the shape of z; times value / z and the factor."""
        (ratio,) = ctx.saved_tensors
        return gradient * ratio, None, None, None


class ScaledGradient(torch.autograd.Function):
    """The identity on x [..., width], with its gradient multiplied by `factor`, a number or a tensor [width].

    With 0.5, the uniform rule for a factor of a product (arXiv:2402.05602, equation 7 and propositions 3.2 and 3.3).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float | Tensor) -> Tensor:
        """x: [..., width], returned unchanged."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """gradient: [..., width]; times the factor."""
        return gradient * ctx.factor, None


class NormRule(torch.autograd.Function):
    """Identity rule for normalisation: the reciprocal standard deviation counts as a constant, the centring does not.

    arXiv:2402.05602, proposition 3.4. `value` = scale * x' / sqrt(mean(x'^2) + epsilon), perhaps plus a bias, is
    returned as is; x' is x, minus its mean if `centred`. x, value: [..., width]; scale: [width].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, scale: Tensor, epsilon: float, centred: bool) -> Tensor:
        """x, value: [..., width]; scale: [width]. Returns `value` unchanged."""
        exact = _wide(x)
        if centred:
            mean_square = exact.var(-1, correction=0, keepdim=True)  # [..., 1]
        else:
            mean_square = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square() / x.shape[-1]  # [..., 1]
        ctx.save_for_backward((mean_square + epsilon).rsqrt(), _wide(scale))
        ctx.centred = centred
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """gradient: [..., width]; times scale / sqrt(mean(x'^2) + epsilon), centred if x was."""
        reciprocal, scale = ctx.saved_tensors
        result = (gradient * scale).mul_(reciprocal)
        if ctx.centred:
            result.sub_(result.mean(-1, keepdim=True))
        return result.to(gradient.dtype), None, None, None, None


def identity_rule(z: Tensor, value: Tensor, slope: float, factor: float = 1.0) -> Tensor:
    """`value` = f(z), of any shape that z has too, with the gradient of IdentityRule; slope: f'(0)."""
    return _apply(IdentityRule, z, value.detach(), slope, factor)


def scaled_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """`x` [..., width] with the gradient of ScaledGradient; factor: a number or a tensor [width]."""
    return _apply(ScaledGradient, x, factor)


def norm_rule(x: Tensor, value: Tensor, scale: Tensor, epsilon: float, centred: bool = False) -> Tensor:
    """`value` [..., width], the normalised x [..., width], with the gradient of NormRule; scale: [width]."""
    return _apply(NormRule, x, value.detach(), scale.detach(), epsilon, centred)


def soft_cap(z: Tensor, cap: float, rules: Rules) -> Tensor:
    """cap * tanh(z / cap), any shape, with the gradient that `rules` give an activation function."""
    value = torch.tanh(z / cap) * cap
    return identity_rule(z, value, slope=1.0) if rules.activation and z.requires_grad else value


def slope_at_zero(activation: Callable[[Tensor], Tensor]) -> float:
    """f'(0) of an element-wise function, which is the limit of f(z) / z.

    Raises UnsupportedModelError naming the function if f(0) is not 0, since there is no limit then.
    """
    with torch.enable_grad():
        z = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value = activation(z)
        if value.item() != 0:
            name = getattr(activation, "__name__", type(activation).__name__)
            raise UnsupportedModelError(f"activation {name} is {value.item()} at 0; the identity rule expects 0")
        return torch.autograd.grad(value, z)[0].item()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _apply(rule: type[torch.autograd.Function], *arguments: object) -> Tensor:
    result: Tensor = rule.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


@contextmanager
def propagation(model: nn.Module, rules: Rules) -> Iterator[None]:
    """Give `model`, a Hugging Face causal language model, the backward pass of `rules`.

    The rules are forward hooks on this model's own modules, which are removed at the end, also after an exception.
    Hooks that were registered before see outputs before the rules do, so their gradients are those that the rules have
    modified. A backward step is linear in the gradient that it receives, so factors at queries, keys and values may act
    at the outputs of the projections, behind query and key norms and rotary embeddings, whatever attention kernel runs.
    Parameters of normalisations receive no gradient.

    Raises UnsupportedModelError for a model of an unknown family.
    """
    decoder = take_apart(model)
    with ExitStack() as stack:

        def install(module: nn.Module, hook: _Hook | None) -> None:
            if hook is not None:
                stack.callback(module.register_forward_hook(hook).remove)

        if rules.norms:
            for norm in decoder.norms:
                install(norm.module, _norm_hook(norm))
        for layer in decoder.layers:
            for group in layer.groups:
                install(group.act_fn, _activation_hook(group, rules))
            if layer.shared_gate is not None and rules.shares:
                install(layer.shared_gate, _factor_hook(0.0))
            for module, factor in _factors(layer, rules).items():
                install(module, _factor_hook(factor))
        if decoder.attention_softcap is not None and rules.activation and rules.query_key:
            stack.enter_context(_identity_rule_at_attention_softcaps(model))
        yield


def _norm_hook(norm: Norm) -> _Hook:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        if not inputs[0].requires_grad:
            return None
        return norm_rule(inputs[0], output, norm.scale, norm.epsilon, norm.centred)

    return hook


def _activation_hook(group: KnownGroup, rules: Rules) -> _Hook | None:
    factor = rules.gate if group.gated else 1.0
    if factor == 0 or not rules.activation:
        return _factor_hook(factor)
    slope = slope_at_zero(group.act_fn)

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        return identity_rule(inputs[0], output, slope, factor) if inputs[0].requires_grad else None

    return hook


def _factor_hook(factor: float | Tensor) -> _Hook | None:
    """None for a factor of 1. factor: for all of the output, or one for each of its [width] entries."""
    if not isinstance(factor, Tensor):
        if factor == 1:
            return None
        if factor == 0:
            return lambda module, inputs, output: output.detach()
    return lambda module, inputs, output: scaled_gradient(output, factor) if output.requires_grad else None


def _factors(layer: KnownLayer, rules: Rules) -> dict[nn.Module, float | Tensor]:
    """The factor at the output of each projection: a tensor [width] where fused projections differ in theirs."""
    parts: list[tuple[Projection, float]] = [
        (layer.query, rules.query_key),
        (layer.key, rules.query_key),
        (layer.value, rules.value),
    ]
    for group in layer.groups:
        parts.append((group.gate, 1.0))
        if group.up is not None:
            parts.append((group.up, rules.up))
    of_module: dict[nn.Module, list[tuple[slice, float]]] = {}
    for projection, factor in parts:
        of_module.setdefault(projection.module, []).append((projection.rows, factor))
    weight = layer.query.module.get_parameter("weight")
    return {module: _joined(factors, weight) for module, factors in of_module.items()}


def _joined(factors: list[tuple[slice, float]], like: Tensor) -> float | Tensor:
    """like: of the dtype and on the device of the layer."""
    if len({factor for _, factor in factors}) == 1:
        return factors[0][1]
    joined = like.new_empty(max(rows.stop for rows, _ in factors))  # [width]
    for rows, factor in factors:
        joined[rows] = factor
    return joined


_CAPPED_ATTENTION = "eager_softcap_identity_rule"


@contextmanager
def _identity_rule_at_attention_softcaps(model: nn.Module) -> Iterator[None]:
    """Let `model` compute its attention by `_capped_attention`, which is registered in transformers under a name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_CAPPED_ATTENTION, _capped_attention)
    AttentionMaskInterface.register(_CAPPED_ATTENTION, eager_mask)
    whole: Any = model
    config = whole.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = _CAPPED_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _capped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    softcap: float,
    **ignored: object,
) -> tuple[Tensor, Tensor]:
    """Attention with a soft cap at its scores, step by step as in transformers' eager attention.

    query: [documents, heads, tokens, width]; key, value: [documents, key_value_heads, tokens, width]; attention_mask:
    added to the scores. Returns [documents, tokens, heads, width] and the attention weights.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
    scores = soft_cap(query @ key.transpose(2, 3) * scaling, softcap, ATTNLRP)  # [documents, heads, tokens, tokens]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights
