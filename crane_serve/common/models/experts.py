"""Mixtures of experts: how many experts which layers have, and how their neurons are counted."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, field_validator
from torch import nn

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.load import empty_causal_lm
from crane_serve.common.models.mlps import NO_MLP, intermediate_sizes, language_model, layer_of, widths

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Experts(BaseModel):
    """The routed experts of a model: `count` in each of `layers`, with `size` neurons each.

    The neurons of such a layer are counted in one row: first those of its dense MLP (shared experts), if it has one,
    then those of each expert.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: PositiveInt
    size: PositiveInt
    layers: tuple[NonNegativeInt, ...]

    @field_validator("layers")
    @classmethod
    def _in_order(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if any(first >= second for first, second in pairwise(layers)):
            raise ValueError("expected each layer once, in ascending order")
        return layers

    @cached_property
    def _places(self) -> frozenset[int]:
        return frozenset(self.layers)

    @property
    def neurons(self) -> int:
        """How many a layer has in its experts."""
        return self.count * self.size

    def dense(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Number of neurons of each layer outside of its experts. sizes: with them."""
        return tuple(size - self.neurons * (layer in self._places) for layer, size in enumerate(sizes))

    def columns(self, layer: int, sizes: Sequence[int]) -> slice:
        """Which of a layer's neurons are in its experts, expert after expert; none in a layer without."""
        return slice(sizes[layer] - self.neurons * (layer in self._places), sizes[layer])


def neurons_of(checkpoint: Path, config: Any) -> tuple[tuple[int, ...], Experts | None]:
    """The number of neurons of each layer, and the experts that some of them are in.

    config: of transformers, of the whole model. Configs tell of experts in too many ways, so those of a model that has
    some are found in the model, made without weights. Raises CheckpointError if transformers cannot make it,
    UnsupportedModelError for experts that are not alike.
    """
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    if all(int(getattr(text, key, None) or 0) < 2 for key in _COUNTS):
        return intermediate_sizes(text, layers), None
    decoder = language_model(empty_causal_lm(checkpoint, config))
    hidden = int(text.hidden_size)
    experts = experts_of(decoder, hidden)
    if experts is None:
        return intermediate_sizes(text, layers), None
    sizes = list(widths(decoder, hidden, layers))
    for layer in experts.layers:
        sizes[layer] += experts.neurons
    if 0 in sizes:
        raise UnsupportedModelError(f"layer {sizes.index(0)} has neither experts nor an MLP; expected one in each")
    return tuple(sizes), experts


def experts_of(decoder: nn.Module, hidden: int) -> Experts | None:
    """The experts of a decoder of transformers; None if it has none.

    Raises UnsupportedModelError for layers whose experts differ in number or size, and for experts inside of what mixes
    tokens.
    """
    shapes = {layer: _shape(module, hidden) for layer, module in expert_modules(decoder).items()}
    if not shapes:
        return None
    if len(set(shapes.values())) > 1:
        raise UnsupportedModelError(f"layers have experts of different shapes: {sorted(set(shapes.values()))}")
    count, size = next(iter(shapes.values()))
    return Experts(count=count, size=size, layers=tuple(sorted(shapes)))


def expert_modules(decoder: nn.Module) -> dict[int, nn.Module]:
    """By layer, the module of transformers that holds a layer's experts, their weights in one tensor per projection.

    Raises UnsupportedModelError for two in one layer.
    """
    found: dict[int, nn.Module] = {}
    for path, module in decoder.named_modules():
        down = dict(module.named_parameters(recurse=False)).get("down_proj")
        layer = layer_of(path)
        if down is None or down.dim() != 3 or layer is None:
            continue
        if layer in found:
            raise UnsupportedModelError(f"layer {layer} has experts in two places, one of them {path}")
        if NO_MLP.search(path):
            raise UnsupportedModelError(f"{path}: experts in a place that mixes tokens are not known")
        found[layer] = module
    return found


def _shape(module: nn.Module, hidden: int) -> tuple[int, int]:
    """Number of experts, neurons of each."""
    down = module.get_parameter("down_proj")  # [experts, hidden, neurons], the last two exchanged in some models
    count, *both = down.shape
    if hidden not in both:
        raise UnsupportedModelError(f"experts project from {both[0]} to {both[1]}; expected {hidden} to be one of them")
    return count, down.numel() // count // hidden
