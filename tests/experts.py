"""Mixtures of experts of transformers, computed token by token: an oracle for what masks do inside experts."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tests.tiny import mlp_projection_modules

_LAYER = re.compile(r"\.(\d+)\.")


def experts_by_layer(model: nn.Module) -> dict[int, nn.Module]:
    """The modules that hold a layer's experts."""
    return {
        int(_LAYER.search(name).group(1)): module
        for name, module in model.named_modules()
        if getattr(module, "down_proj", None) is not None and isinstance(module.down_proj, nn.Parameter)
    }


def dense_by_layer(model: nn.Module) -> dict[int, nn.Module]:
    """The projections whose inputs are neurons that every token has."""
    return {int(_LAYER.search(name).group(1)): module for name, module in mlp_projection_modules(model).items()}


@contextmanager
def experts_scaled(module: nn.Module, scales: Callable[[int], Tensor]) -> Iterator[None]:
    """Every expert's neurons times `scales(tokens)`, [tokens, experts * neurons]."""

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        factors = scales(len(hidden)).view(len(hidden), module.num_experts, -1)
        output = torch.zeros_like(hidden)
        for token, (chosen, shares) in enumerate(zip(ids.tolist(), weights, strict=True)):
            for expert, share in zip(chosen, shares, strict=True):
                gate_up = _product(module, "gate_up_proj", expert, hidden[token])
                neurons = module._apply_gate(gate_up.unsqueeze(0))[0] * factors[token, expert]
                output[token] += share * _product(module, "down_proj", expert, neurons)
        return output

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _product(module: nn.Module, name: str, expert: int, vector: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    product = vector @ weight if module.is_transposed else weight @ vector
    return product + getattr(module, f"{name}_bias")[expert] if module.has_bias else product
