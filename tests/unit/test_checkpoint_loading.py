"""A checkpoint is loaded whole or refused by one CheckpointError that names what is wrong."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from crane_serve.cli import app
from crane_serve.common.masks import Fingerprint, MaskInfo, NeuronMask, write_mask
from crane_serve.common.models import load
from crane_serve.common.models.errors import CheckpointError
from crane_serve.common.models.load import load_causal_lm, load_config, load_tokenizer, require_weights_of
from relevance.model import load_model, load_skeleton
from tests.damaged import DOWN, UP, change_config, change_tensors, copied, pickled, sharded, without
from tests.scores import scores_info
from tests.tiny import FAMILIES, HIDDEN, NEURONS, tiny_model

CPU = torch.device("cpu")
Loader = Callable[[Path], object]
LOADERS: dict[str, Loader] = {
    "model": lambda checkpoint: load_model(checkpoint, torch.float32, CPU),
    "skeleton": load_skeleton,
    "served": require_weights_of,
    "reference": lambda checkpoint: load_causal_lm(checkpoint, "auto"),
}


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return copied(checkpoint, tmp_path / "copy")


@pytest.fixture(params=LOADERS)
def loader(request: pytest.FixtureRequest) -> Loader:
    load._warn.cache_clear()
    return LOADERS[request.param]


# --- weights


@pytest.mark.parametrize("name", [DOWN, UP, "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(copy: Path, loader: Loader, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"lacks 1 tensor .*: {name}$"):
        loader(without(copy, name))


def test_renamed_tensors_are_missing_and_the_other_names_are_told(copy: Path, loader: Loader) -> None:
    change_tensors(copy, lambda held: {f"module.{name}": tensor for name, tensor in held.items()})
    with pytest.raises(CheckpointError, match=r"lacks 30 tensors .* and 26 more; it has module\.lm_head"):
        loader(copy)


def test_a_tensor_of_another_shape_is_named(copy: Path, loader: Loader) -> None:
    change_tensors(copy, lambda held: held | {UP: held[UP][:100]})
    with pytest.raises(CheckpointError, match=rf"{UP} is \[100, {HIDDEN}\], not \[{NEURONS}, {HIDDEN}\]"):
        loader(copy)


def test_a_file_without_tensors(copy: Path, loader: Loader) -> None:
    save_file({}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks 30 tensors"):
        loader(copy)


def test_tensors_that_the_model_does_not_use_are_one_warning(
    copy: Path, loader: Loader, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    change_config(copy, num_hidden_layers=2)
    for _ in range(2):
        loader(copy)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert "9 tensors" in message
    assert "model.layers.2.input_layernorm.weight" in message
    assert "\n" not in message
    assert "UNEXPECTED" not in capfd.readouterr().err


def test_a_missing_tensor_of_shards_is_named(copy: Path, loader: Loader) -> None:
    without(copy, DOWN)
    sharded(copy)
    with pytest.raises(CheckpointError, match=DOWN):
        loader(copy)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_missing_shard_is_named(copy: Path, suffix: str) -> None:
    shards = sharded(copy, suffix=suffix, stem="model" if suffix == ".safetensors" else "pytorch_model")
    load_model(copy, torch.float32, CPU)
    shards[1].unlink()
    for read in (LOADERS["model"], load_skeleton):
        with pytest.raises(CheckpointError, match=f"index.json names {shards[1].name}"):
            read(copy)


def test_a_truncated_shard_is_named(copy: Path) -> None:
    shard = sharded(copy)[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    for read in (LOADERS["model"], load_skeleton):
        with pytest.raises(CheckpointError, match=f"{shard.name} is not a safetensors file"):
            read(copy)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}'])
def test_an_index_that_is_none(copy: Path, index: str) -> None:
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    (copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is not an index of weights"):
        load_skeleton(copy)


def test_other_forms_of_weights_are_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"holds no weights; expected one of model\.safetensors, .*Q4_K_M\.gguf"):
        load_skeleton(copy)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_checkpoints_of_every_family_raise_no_alarm(
    family: str, tmp_path: Path, loader: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    loader(tiny_model(family, tmp_path))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}),
        ("gpt2", {f"transformer.h.0.attn.{name}": torch.ones(1, 1, 4, 4) for name in ("bias", "masked_bias")}),
    ],
)
def test_buffers_of_old_checkpoints_raise_no_alarm(
    family: str, buffers: dict[str, torch.Tensor], tmp_path: Path, loader: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    loader(change_tensors(tiny_model(family, tmp_path), lambda held: held | buffers))
    assert caplog.records == []


def test_gpt2_without_the_prefix_of_its_names(tmp_path: Path, loader: Loader, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model("gpt2", tmp_path)
    change_tensors(tmp_path, lambda held: {name.removeprefix("transformer."): held[name] for name in held})
    loader(tmp_path)
    assert caplog.records == []


def test_what_transformers_cannot_tell_is_left_to_the_engine(copy: Path) -> None:
    without(copy, "lm_head.weight")
    change_config(copy, architectures=["LlamaForSequenceClassification"])
    require_weights_of(copy)
    change_config(copy, architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "gptq", "bits": 4})
    require_weights_of(copy)


def test_pickled_weights_load_and_are_compared(copy: Path, loader: Loader) -> None:
    loader(pickled(copy))
    held = torch.load(copy / "pytorch_model.bin", weights_only=True)
    torch.save({name: held[name] for name in held if name != DOWN}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=DOWN):
        loader(copy)


class Payload:
    """Runs a command when it is unpickled without `weights_only`."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_pickled_code_is_never_run(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({"weight": Payload(tmp_path / "ran")}, copy / "pytorch_model.bin")
    for read in (LOADERS["model"], load_skeleton):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            read(copy)
    assert not (tmp_path / "ran").exists()


# --- configs and tokenizers

QUANTISED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8": {"quant_method": "fp8"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "mxfp4": {"quant_method": "mxfp4"},
    "torchao": {"quant_method": "torchao"},
    "an unnamed format": {"bits": 4},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_checkpoint_is_named(copy: Path, method: str) -> None:
    change_config(copy, quantization_config=QUANTISED[method])
    for read in (LOADERS["model"], load_skeleton):
        with pytest.raises(CheckpointError, match=rf"is quantised \({method}\); expected the checkpoint .* made from"):
            read(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": "many"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"hidden_size": None},
        {"hidden_act": "nope"},
        {"rope_parameters": {"rope_type": "nope", "rope_theta": 1.0}},
        {"rope_parameters": [1]},
        {"dtype": "float99"},
        {"architectures": "LlamaForCausalLM"},
        {"quantization_config": "gptq"},
        {"quantization_config": []},
        {"auto_map": None},
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
    ],
    ids=str,
)
def test_a_config_that_does_not_hold(copy: Path, changes: dict[str, Any]) -> None:
    change_config(copy, **changes)
    for read in (LOADERS["model"], load_skeleton):
        with pytest.raises(CheckpointError) as caught:
            read(copy)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '"llama"', "null", "{}", '{"model_type": "nope"}'])
def test_a_config_that_is_none(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"has no config that can be loaded: .") as caught:
        load_config(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.T", null]}}'),
    ],
)
def test_a_tokenizer_that_is_none(copy: Path, file: str, content: str | None) -> None:
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content)
    with pytest.raises(CheckpointError, match=r"has no tokenizer that can be loaded: .") as caught:
        load_tokenizer(copy)
    assert "\n" not in str(caught.value)


# --- commands


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "texts"
    directory.mkdir()
    for language in ("en", "zh"):
        lines = (
            {"id": f"{split}{number}", "text": f"{language} {split} {number}", "split": split}
            for split in ("relevance", "validation", "test")
            for number in range(3)
        )
        (directory / f"{language}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def commands(checkpoint: Path, whole: Path, corpus: Path, out: Path) -> dict[str, list[object]]:
    """Every command that loads a model, on a checkpoint for which there are scores and a mask already."""
    from relevance.scores import Scores

    fingerprint = Fingerprint.of(checkpoint)
    info = scores_info(("en", "zh"), fingerprint.intermediate_sizes, fingerprint.hidden_size)
    scores = out / "scores.safetensors"
    values = torch.rand(2, fingerprint.layers, max(fingerprint.intermediate_sizes))
    Scores({"attnlrp": values}, info.model_copy(update={"fingerprint": fingerprint}), {}).save(scores)
    mask = NeuronMask.switching_off([[1], [2], [3]], fingerprint.intermediate_sizes)
    write_mask(out / "masks", "by-hand-en", mask, MaskInfo(language="en", method="by-hand", fingerprint=fingerprint))
    texts = ("--corpus", corpus)
    return {
        "relevance": ["relevance", checkpoint, *texts, "--out", out / "new.safetensors"],
        "refine": ["refine", checkpoint, scores, *texts],
        "learn": ["learn", checkpoint, scores, *texts],
        "validate": ["validate", checkpoint, scores, *texts, "--out", out / "validation"],
        "masks compare": [
            "masks",
            "compare",
            checkpoint,
            whole,
            "--masks",
            out / "masks",
            *texts,
            "--out",
            out / "pair",
        ],
        "verify": ["verify", checkpoint],
    }


COMMANDS = ("relevance", "refine", "learn", "validate", "masks compare", "verify")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_on_missing_weights(
    command: str, copy: Path, checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    arguments = commands(without(copy, DOWN), checkpoint, corpus, tmp_path)[command]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"error: {copy} lacks 1 tensor that the model needs: {DOWN}" in result.output
    assert "MISSING" not in result.output


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "verify"])
def test_no_command_of_relevance_runs_on_quantised_weights(
    command: str, copy: Path, checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    change_config(copy, quantization_config=QUANTISED["awq"])
    arguments = commands(copy, checkpoint, corpus, tmp_path)[command]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    assert f"error: {copy} is quantised (awq)" in result.output


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
@pytest.mark.parametrize("command", ["relevance", "verify", "size", "masks transfer", "masks import-lape"])
def test_a_broken_config_is_one_line(command: str, content: str, copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").write_text(content)
    (tmp_path / "lape.pt").write_bytes(b"")
    more: dict[str, list[object]] = {
        "masks transfer": [tmp_path, "--to", copy, "--out", tmp_path / "out"],
        "masks import-lape": [tmp_path / "lape.pt", "--languages", "en", "--model", copy, "--out", tmp_path / "out"],
    }
    arguments = [*command.split(), *(str(argument) for argument in more.get(command, [copy]))]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    begun = f"{command}: "  # what a long job says in a log before it loads anything
    (line,) = [line for line in result.output.splitlines() if line.strip() and not line.startswith(begun)]
    assert line.startswith("error: ")
    assert str(copy) in line
