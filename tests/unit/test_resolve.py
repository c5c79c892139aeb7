"""From MODEL to a checkpoint directory, without the network."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from crane_serve.checkpoints.errors import CheckpointError
from crane_serve.checkpoints.resolve import resolve_checkpoint


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
    with pytest.raises(CheckpointError, match=f"{model} is no local directory and .* hub: no connection$"):
        resolve_checkpoint(model)
    assert hub == [model]


@pytest.mark.parametrize("error", [HFValidationError(""), OSError()])
def test_an_error_without_words_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=f"hub: {type(error).__name__}$"):
        resolve_checkpoint("some/model")


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert resolve_checkpoint("some/model") == tmp_path
