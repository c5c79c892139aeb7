"""Fingerprint: the same model however it is stored, another model whatever its shape."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from crane_serve.masks import Fingerprint, FingerprintError
from tests.tiny import HIDDEN, LAYERS, NEURONS


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def change_config(checkpoint: Path, **changes: Any) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(checkpoint: Path, name: str, change: Any) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file)


def test_describes_the_model(checkpoint: Path) -> None:
    fingerprint = Fingerprint.of(checkpoint)
    assert fingerprint.architecture == "LlamaForCausalLM"
    assert (fingerprint.layers, fingerprint.hidden_size) == (LAYERS, HIDDEN)
    assert fingerprint.intermediate_sizes == (NEURONS,) * LAYERS
    assert Fingerprint.model_validate_json(fingerprint.model_dump_json()) == fingerprint


def test_how_a_checkpoint_is_saved_does_not_matter(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert Fingerprint.of(tmp_path) == Fingerprint.of(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_version": "9.9"},
        {"use_cache": False},
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"_name_or_path": "elsewhere"},
    ],
    ids=str,
)
def test_config_keys_without_meaning_do_not_matter(checkpoint: Path, copy: Path, changes: dict[str, Any]) -> None:
    change_config(copy, **changes)
    assert Fingerprint.of(copy) == Fingerprint.of(checkpoint)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rms_norm_eps": 0.5}, "config_digest"),
        ({"hidden_act": "gelu"}, "config_digest"),
        ({"architectures": ["OtherForCausalLM"]}, "architecture"),
        ({"num_hidden_layers": 2}, "layers"),
        ({"hidden_size": 32}, "hidden_size"),
        ({"intermediate_size": 128}, "intermediate_sizes"),
    ],
    ids=str,
)
def test_another_config_is_another_model(checkpoint: Path, copy: Path, changes: dict[str, Any], field: str) -> None:
    change_config(copy, **changes)
    with pytest.raises(FingerprintError, match=f"mask 'zh' was made for another model: its {field} is "):
        Fingerprint.of(checkpoint).require(Fingerprint.of(copy), "mask 'zh'")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda weight: weight + 0.001, id="fine-tuned"),
        pytest.param(lambda weight: weight.to(torch.bfloat16), id="dtype"),
        pytest.param(lambda weight: weight.T.contiguous(), id="shape"),
    ],
)
def test_other_weights_are_another_model(checkpoint: Path, copy: Path, change: Any) -> None:
    change_weights(copy, "model.layers.1.mlp.up_proj.weight", change)
    with pytest.raises(FingerprintError, match=r"its weights_digest is \w{16}\.\.\., this model has \w{16}\.\.\.$"):
        Fingerprint.of(checkpoint).require(Fingerprint.of(copy), "the mask")


def test_swapped_layers_are_another_model(checkpoint: Path, copy: Path) -> None:
    file, one, two = (
        copy / "model.safetensors",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    )
    tensors = load_file(file)
    tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, file)
    assert Fingerprint.of(copy).weights_digest != Fingerprint.of(checkpoint).weights_digest


def test_the_same_model_is_accepted(checkpoint: Path, copy: Path) -> None:
    Fingerprint.of(checkpoint).require(Fingerprint.of(copy), "the mask")
    assert Fingerprint.of(checkpoint) == Fingerprint.of(copy)


def test_sizes_may_differ_between_layers(copy: Path) -> None:
    sizes = [NEURONS, NEURONS - 1, NEURONS - 2]
    change_config(copy, model_type="gemma3n_text", intermediate_size=sizes)
    assert Fingerprint.of(copy).intermediate_sizes == tuple(sizes)


def test_long_lists_of_sizes_are_shortened_in_messages(checkpoint: Path) -> None:
    mine = Fingerprint.of(checkpoint).model_copy(update={"intermediate_sizes": (8,) * 26})
    theirs = mine.model_copy(update={"intermediate_sizes": (9,) * 26})
    with pytest.raises(FingerprintError, match=r"is \(9, 9, 9\)\.\.\. \(26 layers\), this model has \(8, 8, 8\)"):
        mine.require(theirs, "the mask")


def test_legacy_weights_count_by_name_and_size(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    digests = []
    for content in (b"12", b"34", b"567"):
        (copy / "pytorch_model.bin").write_bytes(content)
        digests.append(Fingerprint.of(copy).weights_digest)
    assert digests[0] == digests[1] != digests[2]


def test_refuses_a_directory_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(FingerprintError, match=f"{copy} holds no weights"):
        Fingerprint.of(copy)


@pytest.mark.parametrize(
    "config",
    [
        None,
        "",
        "{",
        "{}",
        "[]",
        "null",
        '{"model_type": "no-such-model"}',
        '{"model_type": "resnet"}',
        '{"model_type": "llama", "num_hidden_layers": "many"}',
    ],
)
def test_refuses_a_directory_without_a_usable_config(copy: Path, config: str | None) -> None:
    (copy / "config.json").unlink()
    if config is not None:
        (copy / "config.json").write_text(config)
    with pytest.raises(FingerprintError, match=f"{copy} is not a Hugging Face checkpoint"):
        Fingerprint.of(copy)


def header(content: str) -> bytes:
    return len(content).to_bytes(8, "little") + content.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        b"\xff" * 64,
        header("{{"),
        header("[]"),
        header('"text"'),
        header('{"weight": 1}'),
        header('{"weight": {"dtype": "F32", "shape": [1]}}'),
        header('{"weight": {"dtype": "F32", "shape": [1], "data_offsets": 3}}'),
        header('{"weight": {"dtype": "F32", "shape": [1], "data_offsets": ["a", "b"]}}'),
        header('{"weight": {"dtype": "F32", "shape": [1], "data_offsets": [-9999, 4]}}'),
    ],
)
def test_refuses_damaged_weights(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(FingerprintError, match=r"model\.safetensors is not a safetensors file"):
        Fingerprint.of(copy)
