"""Sizes from configs against the real thing: parameters, mask files, the table's tensors, vLLM's KV pages."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from crane_serve.cli import app
from crane_serve.common.masks import Fingerprint, MaskInfo, NeuronMask, write_mask
from crane_serve.engine.activations import CaptureBuffers
from crane_serve.engine.masked_mlp import install_masks
from crane_serve.sizing import DTYPE_BYTES, ModelSizes, SizeError, byte_text
from tests.engine.stand_in import Model
from tests.tiny import FAMILIES, HIDDEN, LAYERS, NEURONS, tiny_model

CONFIGS = Path(__file__).parent.parent.parent / "docs" / "deployment" / "configs"
PAGE = CONFIGS.parent / "sizing.md"
PUBLISHED = {  # parameters, by the models' cards
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-14b": 14_768_307_200,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-270m": 268_098_176,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    assert ModelSizes.of(CONFIGS / f"{name}.json").parameters == PUBLISHED[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_as_large_as_computed(family: str, tmp_path: Path) -> None:
    checkpoint = tiny_model(family, tmp_path)
    sizes = ModelSizes.of(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert sizes.weight_bytes("float32") == sum(tensor.nbytes for tensor in model.parameters())
    assert sizes.neurons == (NEURONS,) * LAYERS


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_is_as_large_as_computed(checkpoint: Path, dtype: torch.dtype, outputs: bool) -> None:
    rows, model = 12, Model().to(dtype)
    _, slots = install_masks(model, (NEURONS,) * LAYERS, rows + 1, max_tokens=64, outputs=outputs)
    tensors = [tensor for name, tensor in model.named_buffers() if name.endswith(("table", "outputs"))]
    assert len(tensors) == LAYERS * (1 + outputs)
    sizes, name = ModelSizes.of(checkpoint), str(dtype).removeprefix("torch.")
    assert sizes.hidden_size == HIDDEN
    assert sizes.table_bytes(rows, name, outputs=outputs) == sum(tensor.nbytes for tensor in tensors)
    assert slots.nbytes == 64 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_values_of_a_batch_are_as_large_as_computed(checkpoint: Path, dtype: torch.dtype) -> None:
    model, buffers = Model().to(dtype), CaptureBuffers()
    install_masks(model, (NEURONS,) * LAYERS, 2, max_tokens=64, outputs=False, buffers=buffers)
    captured = [tensor for name, tensor in model.named_buffers() if name.endswith("captured")]
    assert len(captured) == LAYERS
    name = str(dtype).removeprefix("torch.")
    assert ModelSizes.of(checkpoint).activation_bytes(64, name) == sum(tensor.nbytes for tensor in captured)
    assert buffers.slots.nbytes == 64 * 8


def test_ranks_share_a_row(checkpoint: Path) -> None:
    sizes = ModelSizes.of(checkpoint)
    assert sizes.row_bytes("float32", 2) * 2 == sizes.row_bytes("float32")
    with_outputs = sizes.row_bytes("float32", 2, outputs=True) - sizes.row_bytes("float32", 2)
    assert with_outputs == LAYERS * HIDDEN * 4  # whole on every rank


def test_a_mask_file_is_as_large_as_computed(checkpoint: Path, tmp_path: Path) -> None:
    fingerprint = Fingerprint.of(checkpoint)
    mask = NeuronMask.switching_off([[1, 2], [], [3]], fingerprint.intermediate_sizes)
    path = write_mask(tmp_path, "zh", mask, MaskInfo(language="zh", method="attnlrp", fingerprint=fingerprint))
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert ModelSizes.of(checkpoint).mask_file_bytes() == len(content) - header
    assert header < 4096


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_and_values_are_as_large_as_vllm_has_them(checkpoint: Path, dtype: str) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    sizes = ModelSizes.of(checkpoint)
    page = FullAttentionSpec(
        block_size=32, num_kv_heads=sizes.kv_heads, head_size=sizes.head_size, dtype=getattr(torch, dtype)
    ).page_size_bytes
    assert page == 32 * sizes.kv_bytes_per_token(dtype)
    assert sizes.kv_bytes(320, dtype) == 10 * LAYERS * page


def test_sliding_windows_keep_their_window() -> None:
    sizes = ModelSizes.of(CONFIGS / "gemma-3-270m.json")
    assert (sizes.full_layers, sizes.window_layers, sizes.window) == (3, 15, 512)
    token = sizes.kv_bytes_per_token("bfloat16")
    assert sizes.kv_bytes(100, "bfloat16") == 18 * 100 * token
    assert sizes.kv_bytes(2048, "bfloat16") == (3 * 2048 + 15 * 512) * token


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["size", *arguments])
    return result.exit_code, result.output


def test_the_command_adds_up(checkpoint: Path) -> None:
    code, output = run(str(checkpoint), "--rows", "3", "--max-num-seqs", "2", "--max-model-len", "128", "--json")
    assert code == 0
    size = json.loads(output)
    assert size["table"] == 4 * size["table_row"] == 4 * LAYERS * NEURONS * 4
    assert size["kv"] == 2 * 128 * size["kv_per_token"]
    assert size["total"] == size["weights"] + size["table"] + size["slots"] + size["kv"]
    assert size["activations"] == 0
    code, output = run(str(checkpoint), "--max-num-batched-tokens", "64", "--activations", "--json")
    assert code == 0
    size = json.loads(output)
    assert (size["slots"], size["activations"]) == (2 * 64 * 8, 65 * LAYERS * NEURONS * 4)
    assert size["total"] == size["weights"] + size["table"] + size["slots"] + size["activations"] + size["kv"]
    code, output = run(str(checkpoint), "--max-num-batched-tokens", "64", "--gates", "--json")
    assert code == 0
    size = json.loads(output)
    assert (size["slots"], size["activations"]) == (2 * 64 * 8, 65 * LAYERS * 3 * NEURONS * 4)
    code, output = run(str(checkpoint), "--rows", "3")
    assert code == 0
    assert "values of neurons" not in output
    assert re.search(rf"mask table, 3 rows and one of ones +{4 * LAYERS * NEURONS * 4 / 1024:.3g} KiB", output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float8"], "dtype 'float8': expected one of float32"),
        (["--kv-cache-dtype", "int3"], "dtype 'int3': expected one of float32"),
        (["--tensor-parallel-size", "3"], "3 ranks: expected a divisor of the 160 neurons of a layer"),
    ],
)
def test_what_cannot_be(checkpoint: Path, arguments: list[str], message: str) -> None:
    code, output = run(str(checkpoint), *arguments)
    assert code == 1
    assert message in output


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(SizeError, match="no config of a causal language model"):
        ModelSizes.of(tmp_path)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1020 * 1024, "1020 KiB"), (2**40, "1024 GiB")]
)
def test_bytes_are_written(count: int, text: str) -> None:
    assert byte_text(count) == text


def rows_of_the_page() -> dict[str, list[str]]:
    rows = re.findall(r"^\| `([\w.-]+)` \|(.*)\|$", PAGE.read_text(), flags=re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_page_has_these_sizes(name: str) -> None:
    sizes = ModelSizes.of(CONFIGS / f"{name}.json")
    dtype = "bfloat16"
    assert DTYPE_BYTES[sizes.dtype] == DTYPE_BYTES[dtype]
    layers = sizes.full_layers + sizes.window_layers
    assert rows_of_the_page()[name] == [
        byte_text(sizes.weight_bytes(dtype)),
        f"{sum(sizes.neurons):,}",
        byte_text(sizes.mask_file_bytes()),
        byte_text(sizes.row_bytes(dtype)),
        byte_text(sizes.table_bytes(16, dtype)),
        byte_text(sizes.table_bytes(256, dtype)),
        byte_text(layers * sizes.kv_bytes_per_token(dtype)),
        byte_text(sizes.kv_bytes(4096, dtype)),
    ]
