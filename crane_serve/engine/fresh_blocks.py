"""Fresh KV blocks: what a request leaves in its blocks never reaches the next one that gets them.

Attention reads whole blocks and weighs the places that are not written yet by 0. But 0 times infinity or NaN, which an
overflow under one mask may have left there, is NaN: on a CPU it was in every token of the next request. vLLM 0.32 can
zero blocks when it hands them out, and does so for some kinds of caches; with masks it does so for all.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig

from crane_serve.engine.config import mask_config


class ZeroedKVCacheConfig(KVCacheConfig):  # type: ignore[misc]
    """vLLM's description of a KV cache, of which the scheduler names new blocks and the workers zero them."""

    needs_kv_cache_zeroing = True


def get_kv_cache_configs(original: Callable[..., Any], vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM's function in the engine core: the caches of all workers; the scheduler's is a copy of the first."""
    configs = original(vllm_config, *args, **kwargs)
    if mask_config(vllm_config) is not None:
        for config in configs:
            config.__class__ = ZeroedKVCacheConfig
    return configs


def zero_blocks(runner: Any, block_ids: list[int]) -> None:
    """Zero these blocks in every layer; vLLM's own function for the CPU leaves out layers with a sliding window."""
    for cache in runner.kv_caches:
        blocks = cache.unflatten(0, (runner.kv_cache_config.num_blocks, -1))  # [blocks, parts of a block, ...]
        blocks[torch.tensor(block_ids)] = 0
