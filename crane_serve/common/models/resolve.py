"""From what a user calls MODEL to a checkpoint directory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from crane_serve.common.models.errors import CheckpointError
from crane_serve.common.models.weights import shard_names

# Beside the weights: config and tokenizer, from the top of the repository (chat templates have a folder of their own).
_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
_ELSEWHERE = ("*/*.json", "*/*.model", "*/*.txt")

Revision = Annotated[
    str | None, typer.Option(help="Commit, branch or tag of the hub id.", show_default="the hub's default branch")
]


def resolve_checkpoint(model: str, revision: str | None = None) -> Path:
    """Local directory of `model`, which is a directory or a hub id (downloaded, or taken from the hub's cache).

    revision: a commit, branch or tag of a hub id, None for the hub's default branch. For a hub id, only the files that
    transformers would load are fetched: safetensors, or pickled weights (`*.bin`) if there are none. transformers
    unpickles only tensors (`weights_only`). Raises CheckpointError if `model` is neither, or is a directory and a
    revision is given.
    """
    directory = Path(model)
    if directory.is_dir():
        require_no_revision(model, revision)
        if not (directory / "config.json").is_file():
            raise CheckpointError(f"{model} is a directory without config.json; expected a Hugging Face checkpoint")
        return directory.resolve()
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model} does not exist; expected a checkpoint directory or a hub id")
    fetched = _fetch(model, revision, _SMALL_FILES, _ELSEWHERE)
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = fetched / f"{single}.index.json"
        _fetch(model, fetched.name, (single, *(shard_names(index) if index.is_file() else ())), ())
        if index.is_file() or (fetched / single).is_file():
            break
    return fetched


def require_no_revision(model: str, revision: str | None) -> None:
    """Raise CheckpointError if a revision is given for `model`, which is a path."""
    if revision is not None:
        raise CheckpointError(f"{model} is no hub id, so it has no revision {revision!r}; give one or the other")


def _fetch(model: str, revision: str | None, files: Sequence[str], leave: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=list(files), ignore_patterns=list(leave))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        which = model if revision is None else f"{model} (revision {revision})"
        raise CheckpointError(
            f"{which} is not a local directory, and could not be downloaded from the hub: {reason[0]}"
        ) from error
