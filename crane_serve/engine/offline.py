"""OfflineEngine: vLLM's offline `LLM`, which queues a whole batch before its first step.

The engine core runs in this process, so that how a batch is cut into steps depends on nothing but the batch. With
tensor parallelism its workers are processes of their own, stepped together.
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crane_serve.engine.admission import MASK_ARGUMENT
from crane_serve.engine.flags import engine_arguments

_CPU_KV_CACHE_GIB = "1"


@dataclass(frozen=True)
class Request:
    """A prompt to continue greedily, to its full `max_tokens`. score: ask for the prompt's log-probabilities too.

    vLLM reads no prefix cache for a scored prompt, and shares blocks only between requests of the same `salt`.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 1
    mask: str | None = None
    salt: str | None = None
    score: bool = False


@dataclass(frozen=True)
class Answer:
    """Generated tokens, their log-probabilities in nats, those of the prompt after its first token if asked for, and
    how many tokens of the prompt came from the prefix cache."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_logprobs: tuple[float, ...] = ()
    cached: int = 0


@dataclass(frozen=True)
class EngineFacts:
    """Facts about a running engine."""

    vllm: str
    device: str
    runner: str  # V1 or V2
    dtype: str
    compiled: bool
    tensor_parallel: int
    prefix_caching: bool
    block_tokens: int
    max_model_tokens: int


class OfflineEngine:
    """One engine in this process. Made by `start`, then any number of `run`, then `stop`."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._tokenizer = llm.get_tokenizer()
        self.facts = _facts(llm.llm_engine.vllm_config)

    @classmethod
    def start(cls, model: Path, flags: Sequence[str]) -> "OfflineEngine":
        """Start an engine; with masks if the environment says so. `flags` are vLLM's own engine flags.

        Raises ValueError for flags that vLLM does not know.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Without a limit vLLM takes most of a CPU host's memory for its KV cache.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", _CPU_KV_CACHE_GIB)
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs

        arguments = engine_arguments(EngineArgs, model, flags, program="crane verify")
        arguments.disable_log_stats = True
        return cls(LLM.from_engine_args(EngineArgs.from_cli_args(arguments)))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, with what the tokenizer puts around it."""
        return tuple(self._tokenizer.encode(text))

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Run a batch, all of it queued before the first step."""
        from vllm import SamplingParams

        prompts: list[dict[str, Any]] = []
        parameters: list[Any] = []
        for request in requests:
            salt = {} if request.salt is None else {"cache_salt": request.salt}
            prompts.append({"prompt_token_ids": list(request.prompt), **salt})
            parameters.append(
                SamplingParams(
                    temperature=0.0,
                    max_tokens=request.max_tokens,
                    ignore_eos=True,
                    detokenize=False,
                    logprobs=0,
                    prompt_logprobs=0 if request.score else None,
                    extra_args=None if request.mask is None else {MASK_ARGUMENT: request.mask},
                )
            )
        results = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [_answer(request, result) for request, result in zip(requests, results, strict=True)]

    def stop(self) -> None:
        """End the engine."""
        self._llm.llm_engine.engine_core.shutdown()


def _answer(request: Request, result: Any) -> Answer:
    output = result.outputs[0]
    if len(output.token_ids) != request.max_tokens:
        raise RuntimeError(
            f"the engine gave {len(output.token_ids)} of {request.max_tokens} tokens ({output.finish_reason})"
        )
    steps = zip(output.token_ids, output.logprobs, strict=True)
    scored: Any = ()
    if request.score:
        scored = zip(request.prompt[1:], result.prompt_logprobs[1:], strict=True)
    return Answer(
        tokens=tuple(output.token_ids),
        logprobs=tuple(float(step[token].logprob) for token, step in steps),
        prompt_logprobs=tuple(float(step[token].logprob) for token, step in scored),
        cached=int(result.num_cached_tokens or 0),
    )


def _facts(vllm_config: Any) -> EngineFacts:
    import vllm
    from vllm.config import CompilationMode

    model, cache = vllm_config.model_config, vllm_config.cache_config
    return EngineFacts(
        vllm=str(vllm.__version__),
        device=_device(str(vllm_config.device_config.device_type)),
        runner="V2" if vllm_config.use_v2_model_runner else "V1",
        dtype=str(model.dtype).removeprefix("torch."),
        compiled=vllm_config.compilation_config.mode != CompilationMode.NONE,
        tensor_parallel=int(vllm_config.parallel_config.tensor_parallel_size),
        prefix_caching=bool(cache.enable_prefix_caching),
        block_tokens=int(cache.block_size),
        max_model_tokens=int(model.max_model_len),
    )


def _device(kind: str) -> str:
    if kind != "cpu":
        from vllm.platforms import current_platform

        return f"{kind} ({current_platform.get_device_name()})"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"cpu ({name}, {os.cpu_count()} cores)"
