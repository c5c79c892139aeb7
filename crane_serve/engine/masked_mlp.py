"""The module that multiplies, and its installation in a loaded vLLM model."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from crane_serve.engine.table import MaskTable, new_table

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class UnsupportedModel(ValueError):
    """The model has an MLP that cannot be masked exactly."""


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
        neurons: Tensor = self.activation(x)  # [tokens, neurons on this rank]
        if neurons.dim() != 2:
            raise UnsupportedModel(f"MLP input has {neurons.dim() - 1} token dimensions, expected one")
        return neurons * self.table[self.slots[: neurons.shape[0]]]


def install_masks(
    model: nn.Module, intermediate_sizes: tuple[int, ...], rows: int, max_tokens: int
) -> tuple[MaskTable, Tensor]:
    """Patch every decoder layer's MLP of a loaded model; return the mask table and the slots [max_tokens].

    Structure decides, not class names: an MLP is a module of a decoder layer with `act_fn` and `down_proj`. Raises
    UnsupportedModel unless there is exactly one per layer, of the size that `intermediate_sizes` says, and each is
    shown to obey its mask.
    """
    mlps = _find_mlps(model)
    if sorted(mlps) != list(range(len(intermediate_sizes))):
        raise UnsupportedModel(
            f"found maskable MLPs in layers {sorted(mlps)}, expected one in each of {len(intermediate_sizes)} layers; "
            "an MLP needs 'act_fn' and 'down_proj' (mixture-of-experts layers cannot be masked)"
        )
    reference = next(model.parameters())
    slots = torch.zeros(max_tokens, dtype=torch.int64, device=reference.device)
    tables: dict[int, Tensor] = {}
    offsets: dict[int, int] = {}
    for layer, (name, mlp) in mlps.items():
        down_proj: Any = mlp.down_proj
        if down_proj.input_size != intermediate_sizes[layer]:
            raise UnsupportedModel(
                f"{name}.down_proj takes {down_proj.input_size} inputs, expected {intermediate_sizes[layer]}"
            )
        neurons = int(down_proj.input_size_per_partition)
        tables[layer] = new_table(rows, neurons, like=reference)
        offsets[layer] = int(down_proj.tp_rank) * neurons
        activation: Any = mlp.act_fn
        mlp.act_fn = MaskedActivation(activation, tables[layer], slots)
        _prove(name, mlp, tables[layer], slots, hidden_size=int(down_proj.output_size))
    return MaskTable(tables, offsets), slots


def _find_mlps(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    mlps: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        layer = _LAYER.search(name + ".")
        if layer and hasattr(module, "act_fn") and hasattr(module, "down_proj"):
            index = int(layer.group(1))
            if index in mlps:
                raise UnsupportedModel(f"layer {index} has two MLPs, {mlps[index][0]} and {name}; expected one")
            mlps[index] = (name, module)
    return dict(sorted(mlps.items()))


@torch.inference_mode()
def _prove(name: str, mlp: nn.Module, table: Tensor, slots: Tensor, hidden_size: int) -> None:
    """Run the MLP on two random tokens, the second with all neurons off; its output must not depend on its input."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, hidden_size, generator=generator).to(table.device, table.dtype)
    off = torch.zeros_like(tokens[:1])
    last_row = table.shape[0] - 1
    table[last_row].fill_(0.0)
    slots[:3] = torch.tensor([0, last_row, last_row], device=slots.device)
    live, dead, dead_zero = mlp(torch.cat([tokens, off]))[:3]
    table[last_row].fill_(1.0)
    slots[:3].fill_(0)
    if not torch.equal(dead, dead_zero) or torch.equal(live, dead):
        raise UnsupportedModel(f"{name}: switching off all its neurons does not switch it off; it cannot be masked")
