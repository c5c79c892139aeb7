"""What cannot be masked exactly is refused at start-up, with the reason."""

from typing import Any

from crane_serve.engine.config import flag
from crane_serve.engine.versions import READ_VERSIONS, TESTED_VERSIONS

ALLOW_UNTESTED_VARIABLE = "CRANE_ALLOW_UNTESTED_VLLM"


class UnsupportedEngine(ValueError):
    """The engine uses a feature under which masks would not be exact."""


def _untested_allowed() -> bool:
    return flag(ALLOW_UNTESTED_VARIABLE)


def check_version(version: str) -> None:
    """Raise UnsupportedEngine for a vLLM version that is not supported, unless the environment allows it."""
    if _base(version) not in (*TESTED_VERSIONS, *READ_VERSIONS) and not _untested_allowed():
        raise UnsupportedEngine(
            f"vLLM {version} has not been tested with this plugin (tested: {', '.join(TESTED_VERSIONS)}; checked "
            f"against its source: {', '.join(READ_VERSIONS)}); set {ALLOW_UNTESTED_VARIABLE}=1 to try it all the same"
        )


def caution(version: str) -> str | None:
    """What to say of a version that has only been read; None for the others."""
    if _base(version) not in READ_VERSIONS:
        return None
    return (
        f"vLLM {version} is supported by its source: no build of this version has been run with masks, only its Python "
        f"files (tested: {', '.join(TESTED_VERSIONS)}); `crane verify MODEL` tests it on this machine"
    )


def _base(version: str) -> str:
    return version.split("+")[0]


def check_engine(vllm_config: Any) -> None:
    """Raise UnsupportedEngine naming the first feature of a configured engine that masks cannot be exact under."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    refused = {
        "microbatching (--enable-dbo)": getattr(parallel, "use_ubatching", False),
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "kv_sharing_fast_prefill": getattr(cache, "kv_sharing_fast_prefill", False),
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "weights that change meanwhile (--weight-transfer-config)": vllm_config.weight_transfer_config is not None,
        "weights that are given back meanwhile (--enable-sleep-mode)": vllm_config.model_config.enable_sleep_mode,
        "KV transfer between engines": vllm_config.kv_transfer_config is not None,
    }
    refused["vLLM's Rust front end (VLLM_USE_RUST_FRONTEND), which loads no plugins"] = flag("VLLM_USE_RUST_FRONTEND")
    # If a request is aborted while a step runs, vLLM gives the token of that step to a later request with the same id.
    variable = "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"
    refused[f"request ids that may be used twice ({variable})"] = flag(variable)
    for feature, used in refused.items():
        if used:
            raise UnsupportedEngine(f"masks cannot be served with {feature}; start without it or without masks")
