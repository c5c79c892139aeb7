"""From MODEL to a checkpoint directory, without the network."""

import json
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from crane_serve.common.models.errors import CheckpointError
from crane_serve.common.models.resolve import resolve_checkpoint
from crane_serve.common.models.weights import weight_files


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hub ids asked for; the hub itself cannot be reached."""
    asked: list[str] = []

    def snapshot_download(repo_id: str, **_: object) -> str:
        asked.append(repo_id)
        raise LocalEntryNotFoundError("no connection\nand no cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_local_checkpoint_is_itself(checkpoint: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    assert resolve_checkpoint(checkpoint.name) == checkpoint.resolve()
    assert resolve_checkpoint(str(checkpoint)) == checkpoint.resolve()
    assert hub == []


def test_a_directory_needs_a_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{tmp_path} is a directory without config\.json"):
        resolve_checkpoint(str(tmp_path))


@pytest.mark.parametrize("model", ["./missing", "/missing", "../missing", "~/missing", "a/b/c"])
def test_a_path_is_never_taken_for_a_hub_id(hub: list[str], model: str) -> None:
    with pytest.raises(CheckpointError, match=f"{model} does not exist"):
        resolve_checkpoint(model)
    assert hub == []


@pytest.mark.parametrize("model", ["google/gemma-3-270m", "gpt2"])
def test_an_unreachable_hub_is_one_line(hub: list[str], model: str) -> None:
    with pytest.raises(CheckpointError, match=f"{model} is not a local directory, and .* hub: no connection$"):
        resolve_checkpoint(model)
    assert hub == [model]


@pytest.mark.parametrize("error", [HFValidationError(""), OSError()])
def test_an_error_without_words_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=f"hub: {type(error).__name__}$"):
        resolve_checkpoint("some/model")


SHARDS = ("-00001-of-00002", "-00002-of-00002")
SMALL = (
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
    "templates/tool.jinja",
)
NEVER = (
    *("training_args.bin", "optimizer.pt", "optimizer.bin", "adapter_model.bin", "adapter_model.safetensors", "x.gguf"),
    *("consolidated.safetensors", "consolidated.00.pth", "original/consolidated.00.pth", "original/params.json"),
    *(
        "original/model.safetensors",
        "onnx/model.onnx",
        "onnx/config.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "README.md",
    ),
)
SAFE = tuple(f"model{shard}.safetensors" for shard in SHARDS)
PICKLED = tuple(f"pytorch_model{shard}.bin" for shard in SHARDS)


class Hub:
    """A repository on the Hub, of which `snapshot_download` copies what its patterns name, as huggingface_hub does."""

    def __init__(self, place: Path, files: Iterable[str]) -> None:
        self.files = tuple(files)
        self.snapshot = place / "0123abc"
        self.revisions: list[str | None] = []

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        assert repo_id == "some/model"
        self.revisions.append(revision)
        wanted = filter_repo_objects(self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns or None)
        for name in wanted:
            file = self.snapshot / name
            file.parent.mkdir(parents=True, exist_ok=True)
            shards = SAFE if "safetensors" in name else PICKLED
            file.write_text(json.dumps({"weight_map": {f"tensor {shard}": shard for shard in shards}}))
        return str(self.snapshot)


@pytest.mark.parametrize(
    ("weights", "beside"),
    [
        (("model.safetensors",), ()),
        (("model.safetensors",), ("pytorch_model.bin",)),
        (("model.safetensors.index.json", *SAFE), ()),
        (("model.safetensors.index.json", *SAFE), ("pytorch_model.bin.index.json", *PICKLED)),
        (("pytorch_model.bin",), ()),
        (("pytorch_model.bin.index.json", *PICKLED), ()),
    ],
    ids=str,
)
def test_of_a_hub_id_what_transformers_loads_is_fetched(
    weights: tuple[str, ...], beside: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path, (*SMALL, *weights, *beside, *NEVER))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert resolve_checkpoint("some/model") == hub.snapshot
    fetched = {str(file.relative_to(hub.snapshot)) for file in hub.snapshot.rglob("*") if file.is_file()}
    indexes = {name for name in beside if name.endswith(".json")}  # small, and of no consequence
    assert fetched - indexes == {*SMALL, *weights}
    assert hub.revisions[0] is None
    assert set(hub.revisions[1:]) == {hub.snapshot.name}  # one commit, even if the repository changes meanwhile
    assert {file.name for file in weight_files(hub.snapshot)} == {name for name in weights if "index" not in name}


def test_a_hub_id_without_weights_is_left_to_whoever_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path, (*SMALL, *NEVER))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    with pytest.raises(CheckpointError, match="holds no weights"):
        weight_files(resolve_checkpoint("some/model"))
