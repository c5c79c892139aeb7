"""What the activation function of an MLP reads is stored, and told apart into gate and up."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.mlps import Mlp
from crane_serve.engine.activations import CaptureBuffers
from crane_serve.engine.activations import store as store_rows
from crane_serve.engine.gates import prove_gates, store_gates

HIDDEN, NEURONS, MOST_TOKENS = 8, 12, 5


class Activation(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class MergedMlp(nn.Module):
    """As in vLLM: one linear map makes what the activation function reads."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 2 * NEURONS) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(HIDDEN, width, bias=False)
        self.act_fn = Activation(function)
        self.down_proj = nn.Linear(NEURONS, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)))


class SeparateMlp(nn.Module):
    """As in transformers: what the activation function reads is the gate alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(HIDDEN, NEURONS), nn.Linear(HIDDEN, NEURONS)
        self.act_fn = nn.SiLU()
        self.down_proj = nn.Linear(NEURONS, HIDDEN)


def gate_first(x: Tensor) -> Tensor:
    return nn.functional.silu(x[..., :NEURONS]) * x[..., NEURONS:]


def relu_last(x: Tensor) -> Tensor:
    """Doubling the gate doubles it, too."""
    return x[..., :NEURONS] * nn.functional.relu(x[..., NEURONS:])


def up_first(x: Tensor) -> Tensor:
    return x[..., :NEURONS] * nn.functional.gelu(x[..., NEURONS:], approximate="tanh")


class NormedMlp(MergedMlp):
    """Between its activation function and its neurons there is a norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.normalize(self.act_fn(self.gate_up_proj(x))))


def store(mlp: nn.Module, dtype: torch.dtype = torch.float32) -> CaptureBuffers:
    buffers, like = CaptureBuffers(gates=True), torch.zeros(1, dtype=dtype)
    buffers.add(0, NEURONS, 0, torch.zeros(MOST_TOKENS, dtype=torch.int64), like)
    store_gates(Mlp(mlp, "layers.0.mlp", "down_proj"), 0, NEURONS, buffers, like)
    return buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "width", "gate", "up"),
    [
        (gate_first, 2 * NEURONS, slice(NEURONS), slice(NEURONS, None)),
        (up_first, 2 * NEURONS, slice(NEURONS, None), slice(NEURONS)),
        (relu_last, 2 * NEURONS, slice(NEURONS, None), slice(NEURONS)),
        (nn.functional.gelu, NEURONS, None, slice(None)),
        (lambda x: nn.functional.relu(x) ** 2, NEURONS, None, slice(None)),
    ],
)
@torch.inference_mode()
def test_gate_and_up_are_those_that_the_function_reads(
    function: Callable[[Tensor], Tensor], width: int, gate: slice | None, up: slice, dtype: torch.dtype
) -> None:
    mlp = MergedMlp(function, width).to(dtype)
    tokens = torch.randn(3, HIDDEN, dtype=dtype)
    read, wanted = mlp.gate_up_proj(tokens), mlp(tokens)
    buffers = store(mlp, dtype)
    buffers.slots[:3] = torch.tensor([0, 2, 1])
    assert torch.equal(mlp(tokens), wanted)
    stored = buffers.of(0)
    assert (stored.gate is stored.neurons) == (gate is None)
    for buffer, columns in ((stored.gate, gate), (stored.up, up)):
        if columns is not None:
            assert torch.equal(buffer[[2, 1]], read[1:, columns])
            assert not buffer[3:].any()
    buffers.erase(2)
    assert all(buffer[1:3].isnan().all() for buffer in (stored.neurons, stored.gate, stored.up))


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (SeparateMlp(), "no activation function in it reads gate and up as one"),
        (MergedMlp(lambda x: x[..., :NEURONS].sigmoid() * x[..., NEURONS:]), r"act\(gate\) is not above 0 where"),
        (MergedMlp(lambda x: nn.functional.threshold(x[..., :NEURONS], 0.01, 0.0) * x[..., NEURONS:]), "not above 0"),
        (MergedMlp(nn.functional.silu), "its activation function reads the gate alone"),
        (MergedMlp(lambda x: gate_first(x.clamp(-0.5, 0.5))), "not linear in one half"),
        (MergedMlp(lambda x: x[..., :NEURONS] * x[..., NEURONS:]), "not linear in one half"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(mlp: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"layers\.0\.mlp: .*{message}"):
        store(mlp)


def test_an_activation_function_that_is_no_module_is_refused() -> None:
    mlp = MergedMlp(gate_first)
    del mlp.act_fn
    with pytest.raises(UnsupportedModelError, match="reads gate and up as one; start the engine without gates"):
        store(mlp)


@pytest.mark.parametrize(("kind", "proves"), [(MergedMlp, True), (NormedMlp, False)])
def test_what_is_stored_must_make_the_neurons(kind: type[MergedMlp], proves: bool) -> None:
    mlp = kind(gate_first)
    buffers = store(mlp)
    neurons = buffers.of(0).neurons
    mlp.down_proj.register_forward_pre_hook(lambda _, args: store_rows(args[0], neurons, buffers.slots))

    def prove() -> None:
        prove_gates(Mlp(mlp, "layers.0.mlp", "down_proj"), 0, buffers, torch.randn(3, HIDDEN))

    if proves:
        prove()
    else:
        with pytest.raises(UnsupportedModelError, match="reads does not make its neurons; start the engine without"):
            prove()
    assert not buffers.slots.any()
