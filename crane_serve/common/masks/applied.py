"""Masks in transformers: a model's forward passes under a mask, without vLLM."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from crane_serve.common.masks.composition import Composition
from crane_serve.common.masks.mask import NeuronMask
from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.experts import Experts, expert_modules, experts_of
from crane_serve.common.models.mlps import language_model, require_mlps
from crane_serve.common.models.routers import find_routers, kept_from

_MASKED = "_crane_masked"


@contextmanager
def applied(model: nn.Module, mask: NeuronMask | Composition | None) -> Iterator[None]:
    """While the context lasts, `model` computes what `crane serve` does for a request under `mask`; None for no mask.

    model: of transformers, with any head, and on any device. Whether the mask was made for these weights is the
    caller's to check (`Fingerprint.of`). Whatever torch has compiled in this process is compiled again after the
    beginning and after the end, since it would not notice. Raises UnsupportedModelError for a model whose MLPs cannot
    be found or are not those of the mask, and RuntimeError for a model under another mask; `Composition` joins masks.
    """
    decoder = language_model(model)
    if mask is None:
        with _alone(decoder):
            yield
        return
    whole = mask.whole() if isinstance(mask, Composition) else mask
    sizes = whole.intermediate_sizes
    experts = experts_of(decoder, int(_config(model).hidden_size))
    dense = sizes if experts is None else experts.dense(sizes)
    if min(dense) < 0:
        raise UnsupportedModelError(f"the mask has {min(sizes)} neurons in a layer, fewer than the model's experts")
    mlps = require_mlps(decoder, dense, beside_experts=experts is not None)
    with ExitStack() as stack:
        stack.callback(_forget_compiled)
        stack.enter_context(_alone(decoder))
        for layer, mlp in mlps.items():
            scales, offsets = _of(whole, layer, slice(0, dense[layer]))
            stack.callback(mlp.projection.register_forward_pre_hook(_changing_inputs(scales, offsets)).remove)
            if whole.output is not None:
                output = whole.output[layer]  # [hidden]
                stack.callback(mlp.projection.register_forward_hook(_scaling_output(output)).remove)
        if experts is not None:
            _apply_to_experts(stack, decoder, experts, whole)
        elif whole.router is not None:
            raise UnsupportedModelError("the mask is of routers; the model has no experts")
        _forget_compiled()
        yield


@contextmanager
def _alone(decoder: nn.Module) -> Iterator[None]:
    """Raise RuntimeError within another such context of the same decoder."""
    if getattr(decoder, _MASKED, False):
        raise RuntimeError("the model is under a mask already; join masks with Composition")
    setattr(decoder, _MASKED, True)
    try:
        yield
    finally:
        delattr(decoder, _MASKED)


def _forget_compiled() -> None:
    """Code that torch has compiled does not see hooks that come or go."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _config(model: nn.Module) -> Any:
    whole: Any = model
    return whole.config.get_text_config()


def _apply_to_experts(stack: ExitStack, decoder: nn.Module, experts: Experts, mask: NeuronMask) -> None:
    routers = find_routers(decoder) if mask.router is not None else {}
    for layer, module in expert_modules(decoder).items():
        scales, offsets = _of(mask, layer, experts.columns(layer, mask.intermediate_sizes))
        shape = (experts.count, experts.size)
        added = None if offsets is None else offsets.view(shape)
        stack.enter_context(_experts_changed(module, scales.view(shape), added))
        if mask.router is not None:
            stack.enter_context(kept_from(routers[layer], mask.router[layer]))


def _of(mask: NeuronMask, layer: int, columns: slice) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets of some neurons of a layer, [neurons] each."""
    offsets = None if mask.offset is None else mask.offset[layer, columns]
    return mask.intermediate[layer, columns], offsets


def _changing_inputs(scales: Tensor, offsets: Tensor | None) -> Any:
    """Of a projection. scales, offsets: [neurons]."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        scaled = inputs[0] * scales.to(inputs[0])
        return (scaled if offsets is None else scaled + offsets.to(scaled), *inputs[1:])

    return hook


def _scaling_output(scales: Tensor) -> Any:
    """Of a projection. scales: [hidden]."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * scales.to(output)

    return hook


@contextmanager
def _experts_changed(module: Any, scales: Tensor, offsets: Tensor | None) -> Iterator[None]:
    """While the experts compute, the weights that read their neurons are scaled, and what the offsets become behind
    them is added to what each expert gives. scales, offsets: [experts, neurons]."""
    if not hasattr(module, "is_transposed"):
        raise UnsupportedModelError(f"{type(module).__name__} does not say how its weights are laid out")
    whole = module.down_proj.data  # [experts, hidden, neurons], the last two exchanged in some models
    factors = scales.to(whole).unsqueeze(2 if module.is_transposed else 1)
    added = None
    if offsets is not None:
        weights = whole.transpose(1, 2) if module.is_transposed else whole
        added = (weights.float() @ offsets.to(whole.device).unsqueeze(2)).squeeze(2)  # [experts, hidden]

    def before(*_: Any) -> None:
        module.down_proj.data = whole * factors

    def after(_: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        module.down_proj.data = whole
        if added is None:
            return None
        _, ids, weights = inputs  # [tokens, top k] both
        answer: Tensor = output + (added[ids] * weights.unsqueeze(2)).sum(1).to(output.dtype)
        return answer

    def restored(*_: Any) -> None:  # after an error, too, when there is no output
        module.down_proj.data = whole

    hooks = (
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after),
        module.register_forward_hook(restored, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
