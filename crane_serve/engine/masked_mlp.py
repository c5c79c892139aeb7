"""The module that multiplies, and its installation in a loaded vLLM model."""

from typing import Any

import torch
from torch import Tensor, nn

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.experts import Experts
from crane_serve.common.models.mlps import Mlp, language_model, layer_of, linear_shape, require_mlps
from crane_serve.engine.activations import CaptureBuffers, store
from crane_serve.engine.gates import prove_gates, store_gates
from crane_serve.engine.masked_experts import mask_experts
from crane_serve.engine.table import NO_OFFSET, MaskTable, Part, new_table

_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class MaskedProjection(nn.Module):
    """The MLP's projection from its neurons to the hidden size, with the scale of each token's mask before it, and
    after it if there is a table for that; and its offsets before it, if there is one for them. Where there is a buffer
    for the values of neurons, they are stored before all that, see `activations`.

    All of these are buffers, so the compiled graph takes them as inputs and later changes to them are seen.
    """

    table: Tensor  # [rows, neurons on this rank]
    slots: Tensor  # [maximum tokens], the row of each token
    outputs: Tensor | None  # [rows, hidden]
    offsets: Tensor | None  # [rows, neurons on this rank]
    captured: Tensor | None  # [maximum tokens + 1, neurons on this rank]
    capture_slots: Tensor | None  # [maximum tokens], the row of `captured` that each token is stored in

    def __init__(
        self,
        projection: nn.Module,
        table: Tensor,
        slots: Tensor,
        outputs: Tensor | None = None,
        offsets: Tensor | None = None,
        captured: Tensor | None = None,
        capture_slots: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.projection = projection
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("outputs", outputs, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("captured", captured, persistent=False)
        self.register_buffer("capture_slots", capture_slots, persistent=False)

    def forward(self, x: Tensor) -> Any:
        """x: [..., tokens, neurons on this rank] -> what the projection returns: [..., tokens, hidden], complete on
        every tensor-parallel rank, in vLLM's own models with the bias that is added later, if any."""
        if self.captured is not None and self.capture_slots is not None:
            store(x, self.captured, self.capture_slots)
        x = _scaled(x, self.table, self.slots)
        if self.offsets is not None:
            x = x + self.offsets[self.slots[: x.shape[-2]]]
        answer = self.projection(x)
        if self.outputs is None:
            return answer
        if isinstance(answer, Tensor):
            return _scaled(answer, self.outputs, self.slots)
        output, bias = answer
        return _scaled(output, self.outputs, self.slots), bias


def _scaled(x: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    """x: [tokens, width], or [1, tokens, width] in vLLM's Transformers backend; scaled by each token's row.

    Raises UnsupportedModelError for more dimensions of tokens, in which their order would be a guess.
    """
    if x.shape[:-2].numel() != 1:
        raise UnsupportedModelError(f"an MLP's neurons come as {list(x.shape)}; expected [tokens, neurons]")
    return x * table[slots[: x.shape[-2]]]


def install_masks(
    model: nn.Module,
    intermediate_sizes: tuple[int, ...],
    rows: int,
    max_tokens: int,
    *,
    outputs: bool,
    offsets: bool = False,
    experts: Experts | None = None,
    buffers: CaptureBuffers | None = None,
) -> tuple[MaskTable, Tensor]:
    """Patch every decoder layer's MLP of a loaded model; return the mask table and the slots [max_tokens].

    MLPs are recognised by their structure: see `find_mlps`. Raises UnsupportedModelError unless there is exactly one
    per layer, of the size that `intermediate_sizes` says, and each is shown to obey its mask. Layers keep their global
    index; those of other pipeline ranks are left out. `outputs`: whether masks may also scale the MLP's output
    dimensions; `offsets`: whether they may also add to neurons. experts: those among the neurons, see
    `crane_serve.engine.masked_experts`. buffers: to be made, one per MLP, in which the values of neurons are stored.
    """
    decoder = language_model(model)
    dense = intermediate_sizes if experts is None else experts.dense(intermediate_sizes)
    elsewhere = _layers_of_other_ranks(decoder)
    mlps = require_mlps(decoder, dense, elsewhere, beside_experts=experts is not None)
    # Quantised weights have other dtypes than the activations.
    reference = next(parameter for parameter in decoder.parameters() if parameter.dtype in _PLAIN_DTYPES)
    slots = torch.zeros(max_tokens, dtype=torch.int64, device=reference.device)
    capture_slots = None if buffers is None else torch.zeros_like(slots)
    parts: dict[int, list[Part]] = {}
    output_tables: dict[int, Tensor] = {}
    routers: dict[int, Tensor] = {}
    shape = (1, 3) if _is_of_transformers(model) else (3,)
    for layer, mlp in mlps.items():
        projection, (_, hidden_size) = mlp.projection, linear_shape(mlp.projection)
        if outputs and getattr(projection, "skip_bias_add", False) and projection.bias is not None:
            raise UnsupportedModelError(
                f"{mlp.name}: the bias of its last projection is added elsewhere; masks of MLP outputs would miss it"
            )
        neurons, start = _own_neurons(projection)
        table = new_table(rows, neurons, like=reference)
        added = new_table(rows, neurons, like=reference, value=NO_OFFSET) if offsets else None
        parts[layer] = [Part(table, start, start + neurons, offsets=added)]
        if outputs:
            output_tables[layer] = new_table(rows, hidden_size, like=reference)
        captured = None
        if buffers is not None and capture_slots is not None:
            captured = buffers.add(layer, neurons, start, capture_slots, like=reference)
            if buffers.gates:
                store_gates(mlp, layer, neurons, buffers, reference)
        masked = MaskedProjection(projection, table, slots, output_tables.get(layer), added, captured, capture_slots)
        setattr(mlp.parent, mlp.attribute, masked)
        if mlp.is_own_module:
            _prove(mlp, masked, shape, hidden_size)
            if buffers is not None and buffers.gates:
                prove_gates(mlp, layer, buffers, _three_tokens(table, hidden_size).view(*shape, hidden_size))
    if experts is not None:
        if outputs:
            raise UnsupportedModelError("masks of MLP outputs are not served for a mixture of experts")
        of_experts, routers = mask_experts(decoder, experts, intermediate_sizes, rows, slots, elsewhere, offsets)
        for layer, part in of_experts.items():
            parts.setdefault(layer, []).append(part)
    return MaskTable(parts, output_tables, routers), slots


def _is_of_transformers(model: nn.Module) -> bool:
    """Whether vLLM runs transformers' own modules, with activations [1, tokens, width]."""
    return any(kind.__module__.startswith("vllm.model_executor.models.transformers.") for kind in type(model).__mro__)


def _own_neurons(projection: Any) -> tuple[int, int]:
    """How many neurons this rank's projection reads, and which is the first of them."""
    if not getattr(projection, "input_is_parallel", False):
        return linear_shape(projection)[0], 0
    neurons = int(projection.input_size_per_partition)
    return neurons, int(projection.tp_rank) * neurons


def _layers_of_other_ranks(decoder: nn.Module) -> list[int]:
    from vllm.model_executor.models.utils import PPMissingLayer

    places = ((layer_of(path), module) for path, module in decoder.named_modules())
    return [layer for layer, module in places if layer is not None and isinstance(module, PPMissingLayer)]


@torch.inference_mode()
def _prove(mlp: Mlp, masked: MaskedProjection, shape: tuple[int, ...], hidden_size: int) -> None:
    """Run the MLP unmasked and with all neurons off. Unmasked, its output must depend on the input; switched off, it
    must not, but on offsets. shape: of three tokens, as the model will have them."""
    table, slots, offsets = masked.table, masked.slots, masked.offsets
    off = table.shape[0] - 1
    table[off].fill_(0.0)
    slots[:3] = torch.tensor([0, off, off], device=slots.device)
    tokens = _three_tokens(table, hidden_size).view(*shape, hidden_size)
    try:
        answer = mlp.parent(tokens)
        if offsets is not None:
            offsets[off].fill_(1.0)
            shifted = _output_of(mlp.parent(tokens)).view(3, -1)
    except Exception as error:  # whatever a module raises that needs more than hidden states
        raise UnsupportedModelError(
            f"{mlp.name} does not run on hidden states alone; it cannot be masked ({error})"
        ) from error
    finally:
        table[off].fill_(1.0)
        slots[:3].fill_(0)
        if offsets is not None:
            offsets[off].fill_(NO_OFFSET)
    live, dead, dead_too = _output_of(answer).view(3, -1)
    if offsets is not None and (not torch.equal(shifted[0], live) or torch.equal(shifted[1], dead)):
        raise UnsupportedModelError(f"{mlp.name}: what a mask adds to its neurons does not reach its output alone")
    if not torch.equal(dead, dead_too) or torch.equal(live, dead):
        raise UnsupportedModelError(
            f"{mlp.name}: switching off all its neurons does not switch it off; it cannot be masked"
        )


def _three_tokens(like: Tensor, hidden_size: int) -> Tensor:
    """Of which the first two are the same, [3, hidden]."""
    token, other = torch.randn(2, hidden_size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    return torch.stack([token, token, other])


def _output_of(answer: Any) -> Tensor:
    """Of an MLP of vLLM, which may return a bias beside it."""
    output: Tensor = answer if isinstance(answer, Tensor) else answer[0]
    return output
