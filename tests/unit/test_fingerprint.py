"""Fingerprint: the same model however it is stored, another model whatever its shape."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from crane_serve.common.masks import Fingerprint, FingerprintError
from crane_serve.common.masks.canonical_config import file_digest
from tests.damaged import UP, Tensors, pickled, sharded
from tests.tiny import FAMILIES, HIDDEN, LAYERS, NEURONS, tiny_model


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


# --- the files that count


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors"])
@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "index"])
def test_safetensors_beside_the_models_own_do_not_matter(copy: Path, name: str, *, in_shards: bool) -> None:
    if in_shards:
        sharded(copy)
    before = Fingerprint.of(copy)
    save_file({"other": torch.ones(3)}, copy / name)
    assert Fingerprint.of(copy) == before
    (copy / name).write_bytes(b"not even safetensors")
    assert Fingerprint.of(copy) == before


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.bin", "adapter_model.bin", "rng_state.bin"])
@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "index"])
def test_pickles_beside_the_models_own_do_not_matter(copy: Path, name: str, *, in_shards: bool) -> None:
    if in_shards:
        sharded(copy, suffix=".bin", stem="pytorch_model")
    else:
        pickled(copy)
    before = Fingerprint.of(copy)
    (copy / name).write_bytes(b"arguments")
    assert Fingerprint.of(copy) == before


def test_the_files_are_those_that_transformers_prefers(copy: Path) -> None:
    whole = Fingerprint.of(copy)
    shutil.copy(copy / "model.safetensors", copy / "kept")
    shards = sharded(copy)
    of_shards = Fingerprint.of(copy)
    assert of_shards == whole
    save_file({"other": torch.ones(3)}, copy / "model.safetensors")  # goes before the index
    assert Fingerprint.of(copy).weights_digest != whole.weights_digest
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"older")  # comes after it
    assert Fingerprint.of(copy) == of_shards
    shards[0].unlink()
    with pytest.raises(FingerprintError, match=f"index.json names {shards[0].name}"):
        Fingerprint.of(copy)


def test_masks_of_the_first_version_stay_valid_with_files_beside(copy: Path) -> None:
    sharded(copy)
    save_file({"other": torch.ones(3)}, copy / "consolidated.safetensors")
    shutil.copytree(copy, both := copy.parent / "both")
    (both / "model.safetensors.index.json").unlink()
    everything = both / "model.safetensors"  # all tensors in the one file that counts, as the first version read them
    tensors = {name: tensor for file in both.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(tensors, everything)
    earlier = Fingerprint.of(copy).model_copy(update={"weights_digest": Fingerprint.of(both).weights_digest})
    Fingerprint.of(copy).require(earlier, "the mask")
    assert Fingerprint.of(copy) != earlier


# --- configs of one model


def old_style(checkpoint: Path, **changes: Any) -> None:
    """The config as transformers 4 wrote it: `torch_dtype`, and rotary settings one by one."""
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.40.0"
    rope = config.pop("rope_parameters", {})
    if "full_attention" in rope:
        config |= {
            "rope_theta": int(rope["full_attention"]["rope_theta"]),
            "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
            "sliding_window_pattern": config.pop("_sliding_window_pattern"),
            "cache_implementation": "hybrid",
            "rope_scaling": None,
        }
    elif rope:
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    for derived in ("layer_types", "use_bidirectional_attention"):
        config.pop(derived, None)
    file.write_text(json.dumps(config | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_old_and_new_configs_are_one_model(family: str, tmp_path: Path) -> None:
    new, old = tiny_model(family, tmp_path / "new"), tmp_path / "old"
    shutil.copytree(new, old)
    old_style(old)
    assert Fingerprint.of(old) == Fingerprint.of(new)
    AutoConfig.from_pretrained(old).save_pretrained(old)
    assert Fingerprint.of(old) == Fingerprint.of(new)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"type": "linear", "factor": 2},
        {"type": "linear", "rope_type": "linear", "factor": 2.0},
    ],
    ids=str,
)
def test_scaled_positions_are_one_model_however_written(copy: Path, tmp_path: Path, scaling: dict[str, Any]) -> None:
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    old_style(copy, rope_scaling=scaling)
    change_config(other, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    assert Fingerprint.of(copy) == Fingerprint.of(other)


def test_defaults_may_be_left_out(checkpoint: Path, copy: Path) -> None:
    file = copy / "config.json"
    config = json.loads(file.read_text())
    for key in (
        "attention_bias",
        "mlp_bias",
        "hidden_act",
        "rms_norm_eps",
        "head_dim",
        "rope_parameters",
        "architectures",
    ):
        del config[key]
    file.write_text(json.dumps(config))
    assert Fingerprint.of(copy) == Fingerprint.of(checkpoint)


def test_a_default_that_a_later_transformers_adds_changes_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Fingerprint.of(checkpoint)
    plain = LlamaConfig.to_dict
    monkeypatch.setattr(LlamaConfig, "to_dict", lambda self: {**plain(self), "later_option": False})
    assert Fingerprint.of(checkpoint) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}},
        {"rope_theta": 20000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"num_key_value_heads": 2},
        {"head_dim": 16},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"max_position_embeddings": 1024},
        {"unknown_option": 1},
    ],
    ids=str,
)
def test_what_changes_the_function_is_another_model(checkpoint: Path, copy: Path, changes: dict[str, Any]) -> None:
    old_style(copy, **changes)
    assert Fingerprint.of(copy).config_digest != Fingerprint.of(checkpoint).config_digest


@pytest.mark.parametrize("window", [16, None])
def test_a_sliding_window_is_part_of_the_model(tmp_path: Path, window: int | None) -> None:
    model = tiny_model("gemma3", tmp_path)
    before = Fingerprint.of(model)
    change_config(model, sliding_window=window)
    assert Fingerprint.of(model) != before


def test_masks_of_the_first_version_stay_valid(checkpoint: Path) -> None:
    """It digested the file itself, without the keys that libraries rewrite."""
    raw = json.loads((checkpoint / "config.json").read_text())
    stable = {key: raw[key] for key in raw if key not in ("transformers_version", "dtype", "use_cache")}
    digest = hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()
    assert file_digest(raw) == digest
    now = Fingerprint.of(checkpoint)
    earlier = Fingerprint.model_validate_json(now.model_copy(update={"config_digest": digest}).model_dump_json())
    assert earlier != now
    now.require(earlier, "the mask")
    assert now.is_of(earlier)
    with pytest.raises(FingerprintError, match="config_digest"):
        now.require(now.model_copy(update={"config_digest": "f" * 64}), "the mask")


# --- weights that torch.save wrote


def save_pickled(checkpoint: Path, change: Callable[[Tensors], Tensors] = dict, *, zipped: bool = True) -> Fingerprint:
    torch.save(
        change(load_file(checkpoint / "model.safetensors")),
        checkpoint / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    (checkpoint / "model.safetensors").rename(checkpoint / "kept")
    fingerprint = Fingerprint.of(checkpoint)
    (checkpoint / "kept").rename(checkpoint / "model.safetensors")
    return fingerprint


def one_weight(held: Tensors) -> Tensors:
    held[UP][held[UP].shape[0] // 2, 0] += 1
    return held


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_pickled_weights_count_by_their_values(copy: Path, zipped: bool) -> None:
    whole = Fingerprint.of(copy)
    assert save_pickled(copy, zipped=zipped) == whole  # in whatever form they are
    size = (copy / "pytorch_model.bin").stat().st_size
    changed = save_pickled(copy, one_weight, zipped=zipped)
    assert (copy / "pytorch_model.bin").stat().st_size == size
    assert changed.weights_digest != whole.weights_digest


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda held: {name: tensor.to(torch.bfloat16) for name, tensor in held.items()}, id="dtype"),
        pytest.param(lambda held: {f"{name}.": tensor for name, tensor in held.items()}, id="names"),
        pytest.param(lambda held: held | {UP: held[UP].reshape(-1)}, id="shape"),
    ],
)
def test_pickled_weights_count_by_name_dtype_and_shape(copy: Path, change: Callable[[Tensors], Tensors]) -> None:
    assert save_pickled(copy, change).weights_digest != Fingerprint.of(copy).weights_digest


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda held: held | {UP: held[UP].T.contiguous().T}, id="strides"),
        pytest.param(
            lambda held: held | {UP: torch.cat([held[UP], held[UP]])[: len(held[UP])]}, id="part of a storage"
        ),
        pytest.param(lambda held: held | {UP: nn.Parameter(held[UP])}, id="parameter"),
        pytest.param(lambda held: {name: held[name] for name in reversed(held)}, id="order"),
        pytest.param(lambda held: held | {"step": 3}, id="something else beside them"),
    ],
)
def test_how_tensors_lie_in_a_file_does_not_matter(copy: Path, change: Callable[[Tensors], Tensors]) -> None:
    assert save_pickled(copy, change) == Fingerprint.of(copy)


def test_shards_of_pickled_weights_are_one_model(copy: Path) -> None:
    whole = Fingerprint.of(copy)
    shards = sharded(copy, suffix=".bin", stem="pytorch_model")
    assert Fingerprint.of(copy) == whole
    held = torch.load(shards[1])
    torch.save({name: tensor + 1 for name, tensor in held.items()}, shards[1])
    assert Fingerprint.of(copy).weights_digest != whole.weights_digest


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".gguf"])
def test_what_an_index_names_is_read_whatever_its_suffix(copy: Path, suffix: str) -> None:
    whole = Fingerprint.of(copy)
    shards = sharded(copy, suffix=".bin", stem="pytorch_model")
    index = copy / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace(shards[0].name, f"part{suffix}"))
    shards[0].rename(copy / f"part{suffix}")
    assert Fingerprint.of(copy) == whole


class Command:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    "content", [b"", b"12", b"PK\x03\x04", b"PK\x03\x04" + b"\0" * 64, {}, [1], "state_dict", "code"]
)
def test_refuses_pickled_weights_that_are_none(copy: Path, tmp_path: Path, content: Any) -> None:
    (copy / "model.safetensors").unlink()
    ran = tmp_path / "ran"
    objects = {"state_dict": {"state_dict": {UP: torch.ones(3)}}, "code": {UP: Command(ran)}}
    file = copy / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(objects.get(content, content) if isinstance(content, str) else content, file)
    with pytest.raises(FingerprintError, match=r"pytorch_model\.bin is not a file of weights"):
        Fingerprint.of(copy)
    assert not ran.exists()


@pytest.mark.parametrize("beside", [(), ("training_args.bin",)], ids=str)
def test_masks_for_names_and_sizes_are_refused_with_what_to_do(copy: Path, beside: tuple[str, ...]) -> None:
    """Version 0.1.0 digested the names and sizes of all .bin files, later ones of those that count."""
    pickled(copy)
    for name in beside:
        (copy / name).write_bytes(b"arguments")
    entries = sorted(f"{file.name}:{file.stat().st_size}" for file in copy.glob("*.bin"))
    digest = hashlib.sha256("".join(entries).encode()).hexdigest()
    now = Fingerprint.of(copy)
    earlier = Fingerprint.model_validate(now.model_dump() | {"weights_digest": digest})
    assert not now.is_of(earlier)
    with pytest.raises(
        FingerprintError, match=r"names and sizes alone; make it again.*`crane masks transfer MASKS --to"
    ):
        now.require(earlier, "mask 'zh'")
    with pytest.raises(FingerprintError, match="made for another model"):
        now.require(now.model_copy(update={"weights_digest": "0" * 64}), "mask 'zh'")


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
        '{"model_type": "llama", "num_hidden_layers": 0}',
        '{"model_type": "llama", "num_hidden_layers": -1}',
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
        header('{"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'),
    ],
)
def test_refuses_damaged_weights(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(FingerprintError, match=r"model\.safetensors is not a safetensors file"):
        Fingerprint.of(copy)
