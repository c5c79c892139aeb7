"""Mixtures of experts of transformers, computed token by token: an oracle for what masks do inside experts."""

import copy
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
def experts_changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Every expert's neurons as `change` makes them of [tokens, experts * neurons]; nothing reads those of experts
    that a token does not have."""

    module.forward = _by_token(module, change)
    try:
        yield
    finally:
        del module.forward


def expert_neurons(module: nn.Module, hold: Callable[[Tensor], None]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A forward function that hands out the neurons [tokens, experts * neurons], 0 for experts that a token does not
    have; the router's weights have no gradient."""

    def change(neurons: Tensor) -> Tensor:
        hold(neurons)
        return neurons

    return _by_token(module, change)


def without_experts(model: nn.Module, left: list[int]) -> nn.Module:
    """A model whose layers have only the experts `left`, with the weights of `model`."""
    config = copy.deepcopy(model.config)
    count = next(iter(experts_by_layer(model).values())).num_experts
    for name in ("num_experts", "num_local_experts"):
        if getattr(config, name, None) == count:
            setattr(config, name, len(left))
    smaller = type(model)(config).eval()
    weights = {}
    for name, own in smaller.state_dict().items():
        whole = model.state_dict()[name]
        weights[name] = whole if own.shape == whole.shape else whole[left]
    smaller.load_state_dict(weights)
    return smaller


def _by_token(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for state, chosen in zip(hidden, ids.tolist(), strict=True):
            none = torch.zeros(module.down_proj.numel() // module.num_experts // hidden.shape[1])
            row = [none] * module.num_experts
            for expert in chosen:
                gate_up = _product(module, "gate_up_proj", expert, state)
                row[expert] = module._apply_gate(gate_up.unsqueeze(0))[0]
            rows.append(torch.cat(row))
        changed = change(torch.stack(rows)).view(len(hidden), module.num_experts, -1)
        outputs = []
        for token, (chosen, shares) in enumerate(zip(ids.tolist(), weights.detach(), strict=True)):
            products = [_product(module, "down_proj", expert, changed[token, expert]) for expert in chosen]
            outputs.append(sum(share * product for share, product in zip(shares, products, strict=True)))
        return torch.stack(outputs)

    return forward


def _product(module: nn.Module, name: str, expert: int, vector: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    product = vector @ weight if module.is_transposed else weight @ vector
    return product + getattr(module, f"{name}_bias")[expert] if module.has_bias else product
