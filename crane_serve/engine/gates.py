"""Gates: what the activation function of an MLP reads is stored, so that requests can ask for act(gate) and up."""

from typing import Any

import torch
from torch import Tensor, nn

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.mlps import Mlp, linear_shape
from crane_serve.engine.activations import CaptureBuffers, store
from crane_serve.engine.config import GATES_VARIABLE

_GATES = torch.logspace(-3, 3, 61)  # at which the sign of act(gate) is looked at, and at their negatives


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

    neurons: on this rank; like: of any shape, of the dtype and on the device of the values. Without a gate the neurons
    are act(gate), and have their buffer already. Raises UnsupportedModelError for an activation function that does not
    read gate and up as one tensor (without a gate, what the MLP's other linear map makes), is not linear in up, or does
    not keep the sign of the gate.
    """
    function, attribute, of_all_ranks = mlp.activation, mlp.activation_attribute, linear_shape(mlp.projection)[0]
    gated = mlp.makers == [2 * of_all_ranks]
    if function is None or attribute is None or not (gated or mlp.makers == [of_all_ranks]):
        raise _refused(mlp, "no activation function in it reads gate and up as one")
    width = 2 * neurons if gated else neurons
    captured = like.new_zeros(len(buffers.slots) + 1, width)
    if gated:
        gate, up = _places(mlp, function, neurons, like)
        buffers.add_gates(layer, captured[:, gate], captured[:, up])
    else:
        buffers.add_gates(layer, None, captured)
    setattr(mlp.parent, attribute, StoredInput(function, captured, buffers.slots))


@torch.inference_mode()
def _places(mlp: Mlp, function: nn.Module, neurons: int, like: Tensor) -> tuple[slice, slice]:
    """Where gate and up are in what a gated activation function reads: it is linear in up, and keeps the gate's sign.

    Raises UnsupportedModelError if there is no such place.
    """
    halves = slice(neurons), slice(neurons, 2 * neurons)
    x = torch.rand(2, 2 * neurons, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype) * 2 - 1
    values = function(x)
    if values.shape[-1] != neurons:
        raise _refused(mlp, "its activation function reads the gate alone")
    linear = []
    for up in halves:
        changed = x.clone()
        changed[:, up] *= -0.5
        linear.append(torch.allclose(function(changed), -0.5 * values, rtol=1e-2, atol=1e-6))
    if sum(linear) != 1:
        raise _refused(mlp, "its activation function is not linear in one half of what it reads")
    gate, up = halves if linear[1] else halves[::-1]
    gates = torch.cat([-_GATES, torch.zeros(1), _GATES]).to(like.device, like.dtype)
    x = like.new_ones(len(gates), 2 * neurons)
    x[:, gate] = gates.unsqueeze(1)
    if not torch.equal(function(x) > 0, x[:, gate] > 0):
        raise _refused(mlp, "act(gate) is not above 0 where the gate is")
    return gate, up


def _refused(mlp: Mlp, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{mlp.name}: {why}; start the engine without gates (--gates, {GATES_VARIABLE})")


@torch.inference_mode()
def prove_gates(mlp: Mlp, layer: int, buffers: CaptureBuffers, tokens: Tensor) -> None:
    """Run the MLP, and show that what is stored makes its neurons.

    tokens: three, [..., 3, hidden]. Raises UnsupportedModelError.
    """
    stored, of_layer = mlp.activation, buffers.of(layer)
    assert isinstance(stored, StoredInput), "`store_gates` came before"
    assert of_layer is not None, "and had a buffer of neurons"
    buffers.erase(3)
    buffers.slots[:3] = torch.tensor([1, 2, 3], device=buffers.slots.device)
    try:
        mlp.parent(tokens)
    finally:
        buffers.slots[:3].zero_()
    made = stored.function(stored.captured[1:4])
    if not torch.allclose(made, of_layer.neurons[1:4], rtol=1e-2, atol=1e-3):
        raise _refused(mlp, "what its activation function reads does not make its neurons")
