"""`crane size`: the memory that a model, its masks and its KV cache take, from the model's config alone."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crane_serve.common.defaults import DEFAULT_ROWS
from crane_serve.common.models.resolve import Revision, require_no_revision

if TYPE_CHECKING:
    from crane_serve.common.models.experts import Experts

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
_FILE_SCALE_BYTES = 4  # mask files, and masks in memory, are float32
_SLOT_BYTES = 8  # int64


class SizeError(ValueError):
    """There is no config, or it lacks a field that sizes are computed from."""


@dataclass(frozen=True)
class ModelSizes:
    """The numbers that sizes are computed from.

    neurons: MLP neurons of each layer, those of experts included; experts: which those are. full_layers: attention
    layers that keep the keys and values of every token; window_layers: those that keep the last `window` tokens' (None
    without such layers). dtype: the checkpoint's.
    """

    parameters: int
    hidden_size: int
    neurons: tuple[int, ...]
    experts: "Experts | None"
    kv_heads: int
    head_size: int
    full_layers: int
    window_layers: int
    window: int | None
    dtype: str

    @classmethod
    def of(cls, model: str | Path, revision: str | None = None) -> "ModelSizes":
        """Sizes of a checkpoint directory, a config file, or a hub id, of which only the config is fetched.

        revision: of a hub id. Of a multimodal model, only the language model counts. Raises SizeError; CheckpointError
        for a revision of a path.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from crane_serve.common.models.experts import neurons_of
        from crane_serve.common.models.load import reason

        if Path(model).exists():
            require_no_revision(str(model), revision)
        try:
            whole: Any = AutoConfig.from_pretrained(model, revision=revision or "main", trust_remote_code=False)
            config = whole.get_text_config()
            with torch.device("meta"):
                parameters = sum(tensor.numel() for tensor in AutoModelForCausalLM.from_config(config).parameters())
            layers, hidden_size = int(config.num_hidden_layers), int(config.hidden_size)
            heads = int(config.num_attention_heads)
            neurons, experts = neurons_of(Path(model), whole)
        except Exception as error:  # what transformers raises for a bad config has no common base
            raise SizeError(f"{model}: no config of a causal language model: {reason(error)}") from error
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
        windowed = kinds.count("sliding_attention")
        return cls(
            parameters=parameters,
            hidden_size=hidden_size,
            neurons=neurons,
            experts=experts,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_size=int(getattr(config, "head_dim", None) or hidden_size // heads),
            full_layers=layers - windowed,
            window_layers=windowed,
            window=int(window) if window and windowed else None,
            dtype=str(config.dtype or "float32").removeprefix("torch."),
        )

    def weight_bytes(self, dtype: str) -> int:
        """Of all parameters."""
        return self.parameters * DTYPE_BYTES[dtype]

    def mask_file_bytes(self) -> int:
        """Of the scales in a mask file, [layers, widest] in float32; its header adds a few bytes per neuron named. Of
        experts [layers, experts, neurons], and [layers, widest] of what is beside them."""
        dense, of_experts = self.neurons, 0
        if self.experts is not None:
            dense, of_experts = self.experts.dense(self.neurons), self.experts.neurons
        return len(self.neurons) * (max(dense) + of_experts) * _FILE_SCALE_BYTES

    def row_bytes(self, dtype: str, ranks: int = 1, *, outputs: bool = False, offsets: bool = False) -> int:
        """Of one row of the mask table on one of `ranks` tensor-parallel ranks.

        outputs: whether some mask scales the MLPs' outputs, too; these scales are whole on every rank. offsets: whether
        some mask adds to neurons.
        """
        of_neurons = sum(size // ranks for size in self.neurons) * (2 if offsets else 1)
        return (of_neurons + (len(self.neurons) * self.hidden_size if outputs else 0)) * DTYPE_BYTES[dtype]

    def table_bytes(
        self, rows: int, dtype: str, ranks: int = 1, *, outputs: bool = False, offsets: bool = False
    ) -> int:
        """Of the mask table on one rank: `rows` masks, and the row of unmasked requests."""
        return (rows + 1) * self.row_bytes(dtype, ranks, outputs=outputs, offsets=offsets)

    def activation_bytes(self, batch_tokens: int, dtype: str, ranks: int = 1, *, gates: bool = False) -> int:
        """Of the buffers in which the neurons of a batch are stored, those of experts left out, on one rank. gates:
        with gate and up (without a gate there is less)."""
        stored = self.neurons if self.experts is None else self.experts.dense(self.neurons)
        return (batch_tokens + 1) * sum(size // ranks for size in stored) * (3 if gates else 1) * DTYPE_BYTES[dtype]

    def kv_bytes_per_token(self, dtype: str, ranks: int = 1) -> int:
        """Keys and values of one token in one layer, on one rank; a rank has a head of its own at least."""
        return 2 * max(1, self.kv_heads // ranks) * self.head_size * DTYPE_BYTES[dtype]

    def kv_bytes(self, tokens: int, dtype: str, ranks: int = 1) -> int:
        """Keys and values of a sequence of so many tokens, in all layers, on one rank."""
        cached_tokens = self.full_layers * tokens + self.window_layers * min(tokens, self.window or 0)
        return cached_tokens * self.kv_bytes_per_token(dtype, ranks)


@dataclass(frozen=True)
class Size:
    """Bytes on one rank, except of mask files, which are on the disk and completely in the memory of every process."""

    parameters: int
    neurons: int
    weights: int
    mask_file: int
    masks_in_memory: int
    table_row: int
    table: int
    slots: int
    activations: int
    kv_per_token: int
    kv_of_a_sequence: int
    kv: int
    total: int


def size_of(
    model: ModelSizes,
    *,
    rows: int,
    masks: int,
    sequences: int,
    tokens: int,
    batch_tokens: int,
    ranks: int,
    dtype: str,
    kv_dtype: str,
    outputs: bool,
    offsets: bool = False,
    activations: bool = False,
    gates: bool = False,
) -> Size:
    """The memory of an engine: its weights, its mask table, and keys and values of `sequences` times `tokens` tokens.

    activations: whether requests can ask for values of neurons; gates: for these and for gate and up. The total leaves
    out what vLLM needs to compute: hidden states, graphs, CUDA itself.
    """
    weights = model.weight_bytes(dtype) // ranks
    table = model.table_bytes(rows, dtype, ranks, outputs=outputs, offsets=offsets)
    slots, of_a_sequence = batch_tokens * _SLOT_BYTES, model.kv_bytes(tokens, kv_dtype, ranks)
    stored = 0
    if activations or gates:
        slots, stored = 2 * slots, model.activation_bytes(batch_tokens, dtype, ranks, gates=gates)
    return Size(
        parameters=model.parameters,
        neurons=sum(model.neurons),
        weights=weights,
        mask_file=model.mask_file_bytes(),
        masks_in_memory=masks * model.mask_file_bytes(),
        table_row=model.row_bytes(dtype, ranks, outputs=outputs, offsets=offsets),
        table=table,
        slots=slots,
        activations=stored,
        kv_per_token=(model.full_layers + model.window_layers) * model.kv_bytes_per_token(kv_dtype, ranks),
        kv_of_a_sequence=of_a_sequence,
        kv=sequences * of_a_sequence,
        total=weights + table + slots + stored + sequences * of_a_sequence,
    )


def byte_text(count: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    size, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while size >= 1024 and unit != "GiB":
        size, unit = size / 1024, next(units)
    return f"{count} B" if unit == "B" else f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"


def size(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, config file, or hub id")],
    revision: Revision = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the mask table, as --mask-rows")] = DEFAULT_ROWS,
    masks: Annotated[int, typer.Option(min=0, help="Mask files in the directory")] = 16,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences at once")] = 64,
    max_model_len: Annotated[int, typer.Option(min=1, help="Tokens of each, prompt and completion")] = 4096,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step")] = 8192,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks that share each layer")] = 1,
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPE_BYTES)}; default: the model's")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="Likewise, of keys and values; default: as dtype")] = None,
    outputs: Annotated[bool, typer.Option("--outputs", help="Some mask scales the MLPs' outputs")] = False,
    offsets: Annotated[bool, typer.Option("--offsets", help="Some mask adds to neurons")] = False,
    activations: Annotated[bool, typer.Option("--activations", help="Requests can ask for values of neurons")] = False,
    gates: Annotated[bool, typer.Option("--gates", help="They can ask for these, and for act(gate) and up")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes, as JSON")] = False,
) -> None:
    """Show what a model, its masks and its KV cache take: on each rank, before what vLLM needs to compute."""
    sizes = ModelSizes.of(model, revision)
    dtype = dtype or sizes.dtype
    for name in (dtype, kv_cache_dtype or dtype):
        if name not in DTYPE_BYTES:
            raise SizeError(f"dtype {name!r}: expected one of {', '.join(DTYPE_BYTES)}")
    shared = list(sizes.neurons if sizes.experts is None else (*sizes.experts.dense(sizes.neurons), sizes.experts.size))
    undivided = [neurons for neurons in shared if neurons % tensor_parallel_size]
    if undivided:
        what = "a layer" if sizes.experts is None else "a layer or an expert"
        raise SizeError(f"{tensor_parallel_size} ranks: expected a divisor of the {undivided[0]} neurons of {what}")
    estimate = size_of(
        sizes,
        rows=rows,
        masks=masks,
        sequences=max_num_seqs,
        tokens=max_model_len,
        batch_tokens=max_num_batched_tokens,
        ranks=tensor_parallel_size,
        dtype=dtype,
        kv_dtype=kv_cache_dtype or dtype,
        outputs=outputs,
        offsets=offsets,
        activations=activations,
        gates=gates,
    )
    if as_json:
        typer.echo(json.dumps(asdict(estimate), indent=2))
        return
    window = f"; {sizes.window_layers} layers keep the last {sizes.window} tokens" if sizes.window else ""
    lines = {
        f"weights, {estimate.parameters:,} parameters, {dtype}": estimate.weights,
        f"mask table, {rows} rows and one of ones": estimate.table,
        f"    a row, {estimate.neurons:,} neurons": estimate.table_row,
        f"slots, {max_num_batched_tokens} tokens": estimate.slots,
        **(
            {f"values of neurons, {max_num_batched_tokens} tokens": estimate.activations}
            if estimate.activations
            else {}
        ),
        f"KV cache, {max_num_seqs} sequences of {max_model_len} tokens": estimate.kv,
        f"    a token, in all layers{window}": estimate.kv_per_token,
        f"    a sequence of {max_model_len} tokens": estimate.kv_of_a_sequence,
        "total on each rank": estimate.total,
        "a mask file, on the disk": estimate.mask_file,
        f"{masks} masks, in the memory of every process": estimate.masks_in_memory,
    }
    width = max(map(len, lines))
    for line, count in lines.items():
        typer.echo(f"{line.ljust(width)}  {byte_text(count):>9}")
