"""Gates: what the activation function of an MLP reads is stored, so that requests can ask for act(gate) and up."""

from typing import Any

import torch
from torch import Tensor, nn

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.mlps import Mlp, linear_shape
from crane_serve.engine.activations import CaptureBuffers, store

_REACH = 6.0  # of gates at which the sign of act(gate) is looked at


class StoredInput(nn.Module):
    """An activation function that stores what it reads, as a buffer of the compiled graph."""

    captured: Tensor  # [maximum tokens + 1, width]
    capture_slots: Tensor  # [maximum tokens], the row of `captured` that each token is stored in

    def __init__(self, function: nn.Module, captured: Tensor, capture_slots: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("captured", captured, persistent=False)
        self.register_buffer("capture_slots", capture_slots, persistent=False)

    def forward(self, x: Tensor) -> Any:
        """x: [..., tokens, width], gate and up of this rank's neurons, or without a gate what makes them."""
        store(x, self.captured, self.capture_slots)
        return self.function(x)


def store_gates(mlp: Mlp, layer: int, neurons: int, buffers: CaptureBuffers, like: Tensor) -> None:
    """Have an MLP's activation function store what it reads, in a new buffer of `buffers`.

    neurons: on this rank. Raises UnsupportedModelError for an activation function that does not read gate and up as one
    tensor (without a gate, what the MLP's other linear map makes), or does not keep the sign of the gate.
    """
    function, attribute, of_all_ranks = mlp.activation, mlp.activation_attribute, linear_shape(mlp.projection)[0]
    gated = mlp.makers == [2 * of_all_ranks]
    if function is None or attribute is None or not (gated or mlp.makers == [of_all_ranks]):
        raise UnsupportedModelError(f"{mlp.name}: nothing in it reads gate and up as one; they cannot be shown")
    width = 2 * neurons if gated else neurons
    captured = torch.zeros(len(buffers.slots) + 1, width, dtype=like.dtype, device=like.device)
    gate, up = _places(mlp, function, neurons, like) if gated else (slice(neurons), slice(neurons))
    signs = torch.zeros(2, width, dtype=like.dtype, device=like.device)
    signs[:, up] = 1.0
    signs[:, gate] = torch.linspace(-_REACH, _REACH, neurons, dtype=like.dtype, device=like.device)
    with torch.inference_mode():
        positive = function(signs) > 0
    if not torch.equal(positive, signs[:, gate] > 0):
        raise UnsupportedModelError(f"{mlp.name}: act(gate) is not above 0 where the gate is; it cannot be shown")
    buffers.add_gates(layer, captured[:, gate], captured[:, up])
    setattr(mlp.parent, attribute, StoredInput(function, captured, buffers.slots))


@torch.inference_mode()
def _places(mlp: Mlp, function: nn.Module, neurons: int, like: Tensor) -> tuple[slice, slice]:
    """Where gate and up are in what a gated activation function reads: it is linear in up.

    Raises UnsupportedModelError if it is in neither half.
    """
    halves = slice(neurons), slice(neurons, 2 * neurons)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2 * neurons, generator=generator).to(like.device, like.dtype)
    twice = 2 * function(x)
    for gate, up in (halves, halves[::-1]):
        changed = x.clone()
        changed[:, up] *= 2
        if torch.allclose(function(changed), twice, rtol=1e-2, atol=1e-6):
            return gate, up
    raise UnsupportedModelError(f"{mlp.name}: its activation function is linear in neither half of what it reads")
