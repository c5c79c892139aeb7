"""The module that multiplies, and its installation in a loaded vLLM model."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crane_serve.common.models.families import available, layer_lists
from crane_serve.common.models.family import ServedMlp
from crane_serve.engine.table import MaskTable, new_table

# Decoder layers are numbered children of one list: "model.layers.3.mlp", "transformer.h.3.mlp".
_LAYER = re.compile(rf"(?:^|\.)(?:{layer_lists()})\.(\d+)(?:\.|$)")
_KINDS = tuple(dict.fromkeys(family.served for family in available().values()))


class UnsupportedModel(ValueError):
    """The model has an MLP that cannot be masked exactly."""


@dataclass(frozen=True)
class _Mlp:
    """An MLP of a decoder layer, by the module that holds its parts."""

    name: str
    module: nn.Module
    parts: ServedMlp


class MaskedActivation(nn.Module):
    """The MLP's activation, followed by the scale of each token's mask.

    `table` and `slots` are buffers, so the compiled graph takes them as inputs and later changes to them are seen.
    """

    table: Tensor  # [rows, neurons on this rank]
    slots: Tensor  # [maximum tokens], the row of each token

    def __init__(self, activation: nn.Module, table: Tensor, slots: Tensor) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("slots", slots, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [tokens, what the activation takes] -> [tokens, neurons on this rank].

        Raises UnsupportedModel for an input with more than one dimension of tokens.
        """
        neurons: Tensor = self.activation(x)  # [tokens, neurons on this rank]
        if neurons.dim() != 2:
            raise UnsupportedModel(f"MLP input has {neurons.dim() - 1} token dimensions, expected one")
        return neurons * self.table[self.slots[: neurons.shape[0]]]


class MaskedOutput(nn.Module):
    """`down_proj`, followed by the scale of each output dimension of the MLP under each token's mask."""

    table: Tensor  # [rows, hidden]
    slots: Tensor  # [maximum tokens], the row of each token

    def __init__(self, projection: nn.Module, table: Tensor, slots: Tensor) -> None:
        super().__init__()
        self.projection = projection
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("slots", slots, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: [tokens, neurons on this rank] -> [tokens, hidden], and the bias that vLLM adds later, if any."""
        output, bias = self.projection(x)  # [tokens, hidden], complete on every tensor-parallel rank
        return output * self.table[self.slots[: output.shape[0]]], bias


def install_masks(
    model: nn.Module, intermediate_sizes: tuple[int, ...], rows: int, max_tokens: int, *, outputs: bool
) -> tuple[MaskTable, Tensor]:
    """Patch every decoder layer's MLP of a loaded model; return the mask table and the slots [max_tokens].

    An MLP is recognised by its structure, not by its class name: it is a module of a decoder layer that has the parts
    of a known kind. Raises UnsupportedModel unless there is exactly one per layer, of the size that
    `intermediate_sizes` says, and each is shown to obey its mask. Layers keep their global index; those of other
    pipeline ranks are left out. `outputs`: whether masks may also scale the MLP's output dimensions.
    """
    mlps, elsewhere = _find_mlps(model), _layers_of_other_ranks(model)
    owned = [layer for layer in range(len(intermediate_sizes)) if layer not in elsewhere]
    if sorted(mlps) != owned or not owned:
        raise UnsupportedModel(
            f"found maskable MLPs in layers {sorted(mlps)}, expected one in each of {_listed(owned)}; "
            f"an MLP has {' or '.join(f'{kind.activation} and {kind.projection}' for kind in _KINDS)}"
        )
    reference = next(model.parameters())
    slots = torch.zeros(max_tokens, dtype=torch.int64, device=reference.device)
    tables: dict[int, Tensor] = {}
    offsets: dict[int, int] = {}
    output_tables: dict[int, Tensor] = {}
    for layer, mlp in mlps.items():
        parts = mlp.parts
        projection: Any = getattr(mlp.module, parts.projection)
        if projection.input_size != intermediate_sizes[layer]:
            raise UnsupportedModel(
                f"{mlp.name}.{parts.projection} takes {projection.input_size} inputs, "
                f"expected {intermediate_sizes[layer]}"
            )
        neurons, hidden_size = int(projection.input_size_per_partition), int(projection.output_size)
        tables[layer] = new_table(rows, neurons, like=reference)
        offsets[layer] = int(projection.tp_rank) * neurons
        activation = getattr(mlp.module, parts.activation)
        setattr(mlp.module, parts.activation, MaskedActivation(activation, tables[layer], slots))
        if parts.is_own_module:
            _prove(mlp, tables[layer], slots, hidden_size)
        if outputs:
            output_tables[layer] = new_table(rows, hidden_size, like=reference)
            setattr(mlp.module, parts.projection, MaskedOutput(projection, output_tables[layer], slots))
    return MaskTable(tables, offsets, output_tables), slots


def _listed(layers: list[int]) -> str:
    contiguous = layers and layers == list(range(layers[0], layers[-1] + 1))
    return f"layers {layers[0]} to {layers[-1]}" if contiguous else f"layers {layers}"


def _layers_of_other_ranks(model: nn.Module) -> set[int]:
    from vllm.model_executor.models.utils import PPMissingLayer

    places = ((_LAYER.search(name), module) for name, module in model.named_modules())
    return {int(place.group(1)) for place, module in places if place and isinstance(module, PPMissingLayer)}


def _find_mlps(model: nn.Module) -> dict[int, _Mlp]:
    mlps: dict[int, _Mlp] = {}
    for name, module in model.named_modules():
        # A shared expert looks like an MLP, but the experts beside it would go unmasked.
        if "experts" in name.split(".") or "moe" in type(module).__name__.lower():
            raise UnsupportedModel(
                f"{name} ({type(module).__name__}) belongs to a mixture of experts; it cannot be masked"
            )
        layer = _LAYER.search(name)
        if layer is None:
            continue
        for parts in _KINDS:
            if hasattr(module, parts.activation) and hasattr(module, parts.projection):
                index = int(layer.group(1))
                if index in mlps:
                    raise UnsupportedModel(f"layer {index} has two MLPs, {mlps[index].name} and {name}; expected one")
                mlps[index] = _Mlp(name, module, parts)
    return dict(sorted(mlps.items()))


@torch.inference_mode()
def _prove(mlp: _Mlp, table: Tensor, slots: Tensor, hidden_size: int) -> None:
    """Run the MLP unmasked and with all neurons off. Unmasked, its output must depend on the input; switched off, it
    must not."""
    generator = torch.Generator().manual_seed(0)
    token, other = torch.randn(2, hidden_size, generator=generator).to(table.device, table.dtype)
    off = table.shape[0] - 1
    table[off].fill_(0.0)
    slots[:3] = torch.tensor([0, off, off], device=slots.device)
    live, dead, dead_too = mlp.module(torch.stack([token, token, other]))
    table[off].fill_(1.0)
    slots[:3].fill_(0)
    if not torch.equal(dead, dead_too) or torch.equal(live, dead):
        raise UnsupportedModel(f"{mlp.name}: switching off all its neurons does not switch it off; it cannot be masked")
