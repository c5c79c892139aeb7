"""What vLLM would load is what the fingerprint was taken of, and whole; no engine is started."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from crane_serve.common.models.errors import CheckpointError
from crane_serve.engine import weights
from crane_serve.engine.configure import configure_engine
from crane_serve.engine.weights import require_same_weights
from tests.damaged import DOWN, UP, copied, pickled, sharded, without
from tests.unit.test_engine_environment import BOUNDS, VARIABLES


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return copied(checkpoint, tmp_path / "copy")


def require(checkpoint: Path, load_format: str = "auto") -> str:
    """Check, and return the format that vLLM is to load."""
    from vllm.config import LoadConfig

    config = SimpleNamespace(
        load_config=LoadConfig(load_format=load_format),
        model_config=SimpleNamespace(model=str(checkpoint), revision=None),
    )
    require_same_weights(config, checkpoint)
    return str(config.load_config.load_format)


def test_plain_checkpoints_pass(copy: Path) -> None:
    assert require(copy) == "hf"
    assert require(copy, "safetensors") == "safetensors"
    sharded(copy)
    require(copy)


def test_pickled_checkpoints_pass(copy: Path) -> None:
    (pickled(copy) / "training_args.bin").write_bytes(b"arguments")
    require(copy)


def test_weights_of_another_form_beside_an_index_are_not_loaded_instead(copy: Path) -> None:
    sharded(copy)
    save_file({"other": torch.ones(3)}, copy / "consolidated.safetensors")
    save_file({"other": torch.ones(3)}, copy / "adapter_model.safetensors")
    assert require(copy) == "hf"  # "auto" would take the consolidated file


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors", "model-old.safetensors"])
def test_a_second_file_without_an_index_is_refused(copy: Path, name: str) -> None:
    save_file({UP: torch.ones(3)}, copy / name)
    with pytest.raises(CheckpointError, match=f"would also read {name}, .*move it elsewhere"):
        require(copy)


def test_shards_that_an_index_prefers_to_the_one_file_are_refused(copy: Path) -> None:
    single = (copy / "model.safetensors").read_bytes()
    shards = sharded(copy)
    (copy / "model.safetensors").write_bytes(single)  # transformers takes this one, vLLM what the index names
    with pytest.raises(CheckpointError, match=f"would also read {shards[0].name}"):
        require(copy)


@pytest.mark.parametrize("name", [DOWN, UP, "lm_head.weight"])
def test_a_missing_tensor_is_named_before_an_engine_starts(copy: Path, name: str) -> None:
    without(copy, name)
    with pytest.raises(CheckpointError, match=f"lacks 1 tensor .*: {name}$"):
        require(copy)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "is not a Hugging Face checkpoint: "),
        ("tokenizer.json", "has no tokenizer that can be loaded"),
    ],
)
def test_what_cannot_be_read_is_one_line_before_an_engine_starts(
    copy: Path, tmp_path: Path, file: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in (*VARIABLES, *BOUNDS):
        monkeypatch.setenv(variable, "")  # so that what the call sets is undone
        monkeypatch.delenv(variable)
    (copy / file).write_text("{")
    with pytest.raises(ValueError, match=message) as caught:
        configure_engine(copy, tmp_path, "attnlrp", 4, ())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load_format", ["mistral", "instanttensor", "fastsafetensors"])
def test_no_format_reads_other_files(copy: Path, load_format: str) -> None:
    save_file({UP: torch.ones(3)}, copy / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"would also read consolidated\.safetensors"):
        require(copy, load_format)


def test_pickles_are_not_read_in_place_of_the_models_safetensors(copy: Path) -> None:
    shutil.copy(copy / "model.safetensors", copy / "kept")
    (pickled(copy) / "kept").rename(copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"would also read pytorch_model\.bin"):
        require(copy, "npcache")


@pytest.mark.parametrize(
    "load_format",
    [
        "sharded_state",
        "tensorizer",
        "ipc_cache",
        "modelexpress",
        "runai_streamer",
        "runai_streamer_sharded",
        "of_some_plugin",
    ],
)
def test_a_format_that_does_not_tell_its_files_is_refused(copy: Path, load_format: str) -> None:
    with pytest.raises(CheckpointError, match=f"--load-format {load_format}: "):
        require(copy, load_format)


def test_every_format_of_vllm_is_known() -> None:
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as LOADERS
    from vllm.model_executor.model_loader import DefaultModelLoader

    assert {name for name, loader in LOADERS.items() if loader is DefaultModelLoader} == set(weights._BY_FILES)
    assert weights._RANDOM in LOADERS


def test_random_weights_are_left_to_vllm(copy: Path) -> None:
    without(copy, DOWN)
    assert require(copy, "dummy") == "dummy"
