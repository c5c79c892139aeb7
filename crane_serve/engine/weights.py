"""Ensures that vLLM reads the weights that the fingerprint was made from, and all weights that the model needs."""

from pathlib import Path
from typing import Any

from crane_serve.common.models.errors import CheckpointError
from crane_serve.common.models.load import require_weights_of
from crane_serve.common.models.weights import weight_files

_BY_FILES = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "pt", "npcache")
_RANDOM = "dummy"


def require_own_config(model_config: Any) -> None:
    """Raise CheckpointError if vLLM would take the model or its config from where the fingerprint does not."""
    from vllm import envs

    elsewhere = model_config.hf_config_path
    if elsewhere not in (None, model_config.model):
        raise CheckpointError(f"--hf-config-path {elsewhere}: masks belong to the model with its own config")
    if not Path(model_config.model).is_dir() and envs.VLLM_USE_MODELSCOPE:
        raise CheckpointError(
            f"{model_config.model}: masks belong to the model on the Hugging Face Hub, but VLLM_USE_MODELSCOPE is set; "
            "download the model and give its directory"
        )


def require_same_weights(vllm_config: Any, checkpoint: Path) -> None:
    """Determine which files vLLM 0.32 loads, before any process starts.

    By itself vLLM reads `consolidated*.safetensors` if they exist, and without an index all weights in the directory,
    or in the repository of a hub id; a tensor that the checkpoint lacks stays uninitialised. Raises CheckpointError
    naming the files that it would read beside the model's, the tensors that are missing, or a load format whose files
    are not known.
    """
    load_config, model = vllm_config.load_config, vllm_config.model_config
    if load_config.load_format == _RANDOM:  # to measure speed
        return
    if load_config.load_format == "auto":
        load_config.load_format = "hf"
    ours = {file.name for file in weight_files(checkpoint)}
    theirs = _read(load_config, str(model.model), model.revision)
    if others := sorted(theirs - ours):
        raise CheckpointError(
            f"{model.model}: vLLM would also read {', '.join(others)}, which is not among the model's weights "
            f"({', '.join(sorted(ours))}); move it elsewhere"
        )
    if unread := sorted(ours - theirs):
        raise CheckpointError(
            f"{model.model}: vLLM would not read {', '.join(unread)}, which holds the model's weights"
        )
    require_weights_of(checkpoint)


def _read(load_config: Any, model: str, revision: str | None) -> set[str]:
    """The names of the files. Those of a hub id are downloaded, as vLLM would do it next."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load_format = load_config.load_format
    if load_format not in _BY_FILES:
        raise CheckpointError(
            f"--load-format {load_format}: masks belong to one model, and which weights vLLM reads so cannot be told"
        )
    try:
        _, files, *_ = DefaultModelLoader(load_config)._prepare_weights(model, None, revision, True, None)
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{model}: vLLM finds no weights: {error}") from error
    return {Path(file).name for file in files}
