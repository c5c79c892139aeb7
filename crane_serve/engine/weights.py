"""Ensures that vLLM reads the weights that the fingerprint was made from, and all weights that the model needs."""

from pathlib import Path
from typing import Any

from crane_serve.common.models.errors import CheckpointError
from crane_serve.common.models.load import require_weights_of
from crane_serve.common.models.weights import weight_files

_FORMATS = ("auto", "hf", "safetensors")


def require_same_weights(vllm_config: Any, checkpoint: Path) -> None:
    """Determine which files vLLM 0.32 loads, before any process starts.

    By itself vLLM reads `consolidated*.safetensors` if they exist, and without an index all weights in the directory; a
    tensor that the checkpoint lacks stays uninitialised. Raises CheckpointError naming the files that it would read
    beside the model's, or the tensors that are missing.
    """
    load_config = vllm_config.load_config
    if load_config.load_format not in _FORMATS:
        return
    if load_config.load_format == "auto":
        load_config.load_format = "hf"
    ours, theirs = set(weight_files(checkpoint)), _read(load_config, checkpoint)
    if others := sorted(file.name for file in theirs - ours):
        raise CheckpointError(
            f"{checkpoint}: vLLM would also read {', '.join(others)}, which is not among the model's weights "
            f"({', '.join(sorted(file.name for file in ours))}); move it elsewhere"
        )
    if unread := sorted(file.name for file in ours - theirs):
        raise CheckpointError(f"{checkpoint}: vLLM would not read {', '.join(unread)}, which holds the model's weights")
    require_weights_of(checkpoint)


def _read(load_config: Any, checkpoint: Path) -> set[Path]:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    try:
        _, files, *_ = DefaultModelLoader(load_config)._prepare_weights(str(checkpoint), None, None, True, None)
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{checkpoint}: vLLM finds no weights: {error}") from error
    return {Path(file) for file in files}
