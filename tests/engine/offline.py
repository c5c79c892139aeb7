"""vLLM's own LLM class on the tiny model, with the mask in `extra_args`."""

import math
import os
from pathlib import Path

CHUNK_TOKENS, BLOCK_TOKENS, KV_BLOCKS = 64, 32, 40
LONG = "A prompt that is longer than one chunk of the prefill, so that it takes several steps. " * 3
PROMPTS = ["The harbour froze.", "港口结冰了。", "Bến cảng đóng băng.", LONG, "One more short one"]
MAX_TOKENS = 12
V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


def start(checkpoint: Path, **options: object):
    from vllm import LLM

    settings = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": CHUNK_TOKENS,
        "block_size": BLOCK_TOKENS,
        # Few enough KV blocks that eight long requests preempt each other.
        "num_gpu_blocks_override": KV_BLOCKS,
        "disable_log_stats": False,
        "enable_prefix_caching": True,
    }
    return LLM(str(checkpoint), **{**settings, **options})


def generate(llm, prompts: list[str], masks: list[str | dict | None], *, score: bool = False, salt: str | None = None):
    """Greedy continuations, all prompts submitted together: a dict of tokens, logprobs, prompt_logprobs, cached."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=0,
            max_tokens=MAX_TOKENS,
            logprobs=0,
            ignore_eos=True,
            prompt_logprobs=0 if score else None,
            extra_args=None if mask is None else {"crane_mask": mask},
        )
        for mask in masks
    ]
    inputs = [prompt if salt is None else {"prompt": prompt, "cache_salt": salt} for prompt in prompts]
    answers = []
    for result in llm.generate(inputs, parameters, use_tqdm=False):
        output = result.outputs[0]
        logprobs = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
        scored = zip(result.prompt_token_ids[1:], (result.prompt_logprobs or [])[1:], strict=False)
        answers.append(
            {
                "tokens": list(output.token_ids),
                "logprobs": logprobs,
                "prompt": list(result.prompt_token_ids),
                "prompt_logprobs": [step[token].logprob for token, step in scored],
                "cached": result.num_cached_tokens,
            }
        )
    return answers


def fill_with_nan(worker) -> int:
    """In a worker: write NaN into every KV block; returns the number of layers."""
    for cache in worker.model_runner.kv_caches:
        cache.fill_(math.nan)
    return len(worker.model_runner.kv_caches)
