"""From what a user calls MODEL to a checkpoint directory."""

from pathlib import Path


class CheckpointError(ValueError):
    """MODEL is neither a local checkpoint directory nor a hub id that can be had."""


def resolve_checkpoint(model: str) -> Path:
    """Local directory of `model`, which is a directory or a hub id (downloaded, or taken from the hub's cache).

    Raises CheckpointError if it is neither.
    """
    directory = Path(model)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise CheckpointError(f"{model} is a directory without config.json; expected a Hugging Face checkpoint")
        return directory.resolve()
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model} does not exist; expected a checkpoint directory or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{model} is no local directory and could not be had from the hub: {reason[0]}"
        ) from error
