"""AttnLRP as modified gradients: inside `attnlrp(model)` the relevance of any activation is activation * gradient.

Achtibat et al. 2024, "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers", arXiv:2402.05602.
A rule that sends relevance R_j to R_i is here the factor by which the gradient R / activation has to be multiplied on
its way back. The forward values are untouched; linear layers (epsilon rule with a vanishing epsilon, equation 8) and
the softmax (its Taylor expansion, proposition 3.1) keep their ordinary gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from relevance.families import Norm, take_apart

_Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]

# f(z) / z is replaced by its limit nearer to zero than this: below it both may underflow.
_NEAR_ZERO = 1e-6


class IdentityRule(torch.autograd.Function):
    """Identity rule for an element-wise activation: R_z = R_f(z), so the gradient is multiplied by f(z) / z.

    arXiv:2402.05602, equation 9. Inputs `z` and `ratio` = f(z) / z have one shape, `value` = f(z) is returned as is.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, ratio: Tensor) -> Tensor:
        ctx.save_for_backward(ratio)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (ratio,) = ctx.saved_tensors
        return gradient * ratio, None, None


class ScaledGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by `factor`.

    The uniform rule (arXiv:2402.05602, equation 7; for products, propositions 3.2 and 3.3) gives each of the two
    factors of a product half of its relevance: with activation * gradient, half of its gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class NormRule(torch.autograd.Function):
    """Identity rule for normalisation: the reciprocal root mean square counts as a constant.

    arXiv:2402.05602, proposition 3.4. `value` = scale * x / rms is returned as is; the gradient is multiplied by
    scale / rms. x, value: [..., width]; rms: [..., 1]; scale: [width].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, rms: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(rms, scale)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        rms, scale = ctx.saved_tensors
        return (gradient * scale / rms).to(gradient.dtype), None, None, None


def identity_rule(z: Tensor, value: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """`value` = activation(z) with the gradient of IdentityRule. Near zero f(z) / z is its limit, taken at 1e-6."""
    with torch.no_grad():
        small = torch.full((), _NEAR_ZERO, dtype=z.dtype, device=z.device)
        near_zero = z.abs() < small
        ratio = torch.where(near_zero, activation(small) / small, value / torch.where(near_zero, small, z))
    return _apply(IdentityRule, z, value.detach(), ratio)


def uniform_rule(x: Tensor, products: int = 1) -> Tensor:
    """`x` with its gradient halved once for each of the bilinear `products` that it is a factor of, one in another."""
    return _apply(ScaledGradient, x, 0.5**products)


def norm_rule(x: Tensor, value: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """`value` = scale * x / rms(x) with the gradient of NormRule. x, value: [..., width]; scale: [width]."""
    with torch.no_grad():
        wide = x if x.dtype == torch.float64 else x.float()
        rms = (wide.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()  # [..., 1]
    return _apply(NormRule, x, value.detach(), rms, scale.detach())


def _apply(rule: type[torch.autograd.Function], *arguments: object) -> Tensor:
    result: Tensor = rule.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


@contextmanager
def attnlrp(model: nn.Module) -> Iterator[None]:
    """Give `model`, a Hugging Face causal language model, the backward pass of AttnLRP.

    The rules are forward hooks on this model's own modules, taken away on leaving, also by an exception.
    Gated product act(gate) * up: the uniform rule at both factors, after the identity rule at the activation.
    Attention softmax(q k) v: values are a factor of one product; queries and keys are factors of a product inside it.
    A backward step is linear in the gradient that it receives, so the factors 1/2 and 1/4 may act at the outputs of
    the projections, behind query and key norms and rotary embeddings, whatever attention kernel runs.

    Raises UnsupportedModelError for a model of an unknown family.
    """
    decoder = take_apart(model)
    with ExitStack() as stack:

        def install(module: nn.Module, hook: _Hook) -> None:
            handle: RemovableHandle = module.register_forward_hook(hook)
            stack.callback(handle.remove)

        for norm in decoder.norms:
            install(norm.module, _norm_hook(norm))
        for layer in decoder.layers:
            install(layer.act_fn, _activation_hook)
            install(layer.up_proj, _factor_hook(products=1))
            install(layer.q_proj, _factor_hook(products=2))
            install(layer.k_proj, _factor_hook(products=2))
            install(layer.v_proj, _factor_hook(products=1))
        yield


def _norm_hook(norm: Norm) -> _Hook:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
        return norm_rule(inputs[0], output, norm.scale(module), norm.epsilon)

    return hook


def _activation_hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
    return uniform_rule(identity_rule(inputs[0], output, module.forward))


def _factor_hook(products: int) -> _Hook:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
        return uniform_rule(output, products)

    return hook
