"""Configure an engine with masks: everything that can be checked before its processes start."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crane_serve.common.masks import Fingerprint
from crane_serve.common.models.errors import CheckpointError
from crane_serve.common.models.load import load_tokenizer, reason
from crane_serve.engine.config import (
    ACTIVATIONS_VARIABLE,
    DEFAULT_METHOD_VARIABLE,
    DISABLE_VARIABLE,
    GATES_VARIABLE,
    INLINE_VARIABLE,
    MASKS_VARIABLE,
    ROWS_VARIABLE,
    mask_config,
)
from crane_serve.engine.flags import serving_arguments

_CPU_KV_CACHE_GIB = "2"
_CPU_PRIMITIVES = "64"
_CPU_BLOCK_TOKENS = 32


@dataclass(frozen=True)
class EngineConfig:
    """A checked configuration of an engine with masks.

    vllm_config: vLLM's own. arguments: vLLM's flags, those of its OpenAI front end too, as a namespace.
    """

    vllm_config: Any
    arguments: Any


def configure_engine(
    model: Path,
    masks: Path,
    default_method: str,
    rows: int,
    flags: Sequence[str],
    *,
    inline_masks: bool = False,
    activations: bool = False,
    gates: bool = False,
) -> EngineConfig:
    """Check everything that can be checked before processes start.

    rows: how many different masks can be resident; flags: vLLM's own, of its engine and its OpenAI front end;
    inline_masks: whether requests may bring masks with them; activations: whether they can ask for values of neurons;
    gates: for these and for act(gate) and up.
    Raises ValueError (MaskFileError, FingerprintError, CheckpointError, UnsupportedEngine, ...) naming what is wrong.
    """
    os.environ[MASKS_VARIABLE] = str(masks)
    os.environ[DEFAULT_METHOD_VARIABLE] = default_method
    os.environ[ROWS_VARIABLE] = str(rows)
    os.environ[INLINE_VARIABLE] = str(int(inline_masks))
    os.environ[ACTIVATIONS_VARIABLE] = str(int(activations))
    os.environ[GATES_VARIABLE] = str(int(gates))
    # Without a limit vLLM takes most of a CPU host's memory for its KV cache.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", _CPU_KV_CACHE_GIB)
    # oneDNN keeps machine code for each number of tokens that it has seen; by default for 1,024 products, half a GB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _CPU_PRIMITIVES)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    arguments = serving_arguments(model, flags, program="crane serve")
    if current_platform.is_cpu():
        # vLLM 0.32 cannot load what it has compiled ahead of time for a CPU, and compiles it again at every start.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
        if arguments.block_size is None:
            # A prefix is found in the cache by whole blocks. vLLM's on a CPU have 128 tokens, more than many questions.
            arguments.block_size = _CPU_BLOCK_TOKENS
    _require_readable(model, arguments)
    try:
        vllm_config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    except Exception as error:  # vLLM's own and those of the libraries below it have no common base
        if isinstance(error, ValueError | OSError) and "\n" not in str(error).strip():
            raise
        raise CheckpointError(f"{model}: vLLM cannot serve it so: {reason(error)}") from error
    if mask_config(vllm_config) is None:
        raise ValueError(f"masks are disabled ({DISABLE_VARIABLE} is set); the mask service cannot start")
    return EngineConfig(vllm_config, arguments)


def _require_readable(model: Path, arguments: Any) -> None:
    """Read config and tokenizer before vLLM does: its errors are not one line, or come when the engine has started."""
    Fingerprint.of(model)
    if not arguments.tokenizer and arguments.tokenizer_mode == "auto" and not arguments.skip_tokenizer_init:
        load_tokenizer(model, trust_remote_code=arguments.trust_remote_code)


def configured_bos(model_config: Any) -> list[int]:
    """The BOS token of the model by the configs in vLLM's `model_config`; the tokenizer may have none."""
    configs = (model_config.hf_config, model_config.hf_text_config)
    of_generation = model_config.try_get_generation_config().get("bos_token_id")
    start_tokens = (*(getattr(config, "bos_token_id", None) for config in configs), of_generation)
    return [token_id for token_id in start_tokens if isinstance(token_id, int)]
