"""Masks in transformers: a model's forward passes under a mask, without vLLM."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from crane_serve.common.masks.composition import Composition
from crane_serve.common.masks.mask import NeuronMask
from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.experts import Experts, expert_modules, experts_of
from crane_serve.common.models.mlps import language_model, require_mlps
from crane_serve.common.models.routers import find_routers, kept_from


@contextmanager
def applied(model: nn.Module, mask: NeuronMask | Composition | None) -> Iterator[None]:
    """While the context lasts, `model` computes what `crane serve` does for a request under `mask`; None for no mask.

    model: of transformers, with any head, and on any device. Of the mask only its scales are looked at; whether it was
    made for these weights is the caller's to check (`Fingerprint.of`). Raises UnsupportedModelError for a model whose
    MLPs cannot be found or are not those of the mask.
    """
    if mask is None:
        yield
        return
    whole = mask.whole() if isinstance(mask, Composition) else mask
    decoder, sizes = language_model(model), whole.intermediate_sizes
    experts = experts_of(decoder, int(_config(model).hidden_size))
    dense = sizes if experts is None else experts.dense(sizes)
    if min(dense) < 0:
        raise UnsupportedModelError(f"the mask has {min(sizes)} neurons in a layer, fewer than the model's experts")
    mlps = require_mlps(decoder, dense, beside_experts=experts is not None)
    with ExitStack() as stack:
        for layer, mlp in mlps.items():
            scales = whole.intermediate[layer, : dense[layer]]  # [neurons]
            stack.callback(mlp.projection.register_forward_pre_hook(_scaling_inputs(scales)).remove)
            if whole.output is not None:
                output = whole.output[layer]  # [hidden]
                stack.callback(mlp.projection.register_forward_hook(_scaling_output(output)).remove)
        if experts is not None:
            _apply_to_experts(stack, decoder, experts, whole)
        elif whole.router is not None:
            raise UnsupportedModelError("the mask is of routers; the model has no experts")
        yield


def _config(model: nn.Module) -> Any:
    whole: Any = model
    return whole.config.get_text_config()


def _apply_to_experts(stack: ExitStack, decoder: nn.Module, experts: Experts, mask: NeuronMask) -> None:
    routers = find_routers(decoder) if mask.router is not None else {}
    for layer, module in expert_modules(decoder).items():
        scales = mask.intermediate[layer, experts.columns(layer, mask.intermediate_sizes)]
        stack.enter_context(_experts_scaled(module, scales.view(experts.count, experts.size)))
        if mask.router is not None:
            stack.enter_context(kept_from(routers[layer], mask.router[layer]))


def _scaling_inputs(scales: Tensor) -> Any:
    """Of a projection. scales: [neurons]."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] * scales.to(inputs[0]), *inputs[1:])

    return hook


def _scaling_output(scales: Tensor) -> Any:
    """Of a projection. scales: [hidden]."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * scales.to(output)

    return hook


@contextmanager
def _experts_scaled(module: Any, scales: Tensor) -> Iterator[None]:
    """While the experts compute, the weights that read their neurons are scaled. scales: [experts, neurons]."""
    if not hasattr(module, "is_transposed"):
        raise UnsupportedModelError(f"{type(module).__name__} does not say how its weights are laid out")
    whole = module.down_proj.data  # [experts, hidden, neurons], the last two exchanged in some models
    factors = scales.to(whole).unsqueeze(2 if module.is_transposed else 1)

    def before(*_: Any) -> None:
        module.down_proj.data = whole * factors

    def after(*_: Any) -> None:
        module.down_proj.data = whole

    hooks = module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
