"""Which engines have their KV blocks zeroed, and what zeroing does; without an engine."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.engine import core
from vllm.v1.kv_cache_interface import KVCacheConfig

from crane_serve.engine import plugin
from crane_serve.engine.config import MaskConfig
from crane_serve.engine.fresh_blocks import get_kv_cache_configs, zero_blocks


@pytest.mark.parametrize("masks", [True, False])
def test_blocks_are_zeroed_in_engines_with_masks_and_in_no_others(masks: bool) -> None:
    config = MaskConfig(2, False, False, "model", Path("masks"), "attnlrp", "0")
    vllm_config = SimpleNamespace(additional_config={"crane": config} if masks else {})
    made = [KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[]) for _ in range(2)]
    for found in get_kv_cache_configs(lambda *_: made, vllm_config, [], []):
        sent = pickle.loads(pickle.dumps(found))  # noqa: S301  # as to a worker; the scheduler has a copy
        for arrived in (found, copy.deepcopy(found), sent):
            assert arrived.needs_kv_cache_zeroing is masks
            assert arrived.num_blocks == 4


def test_the_engine_core_asks_for_it() -> None:
    plugin.install()
    assert hasattr(core.get_kv_cache_configs, "_crane_wrapped")


def test_exactly_the_named_blocks_are_zeroed_in_every_layer() -> None:
    parts = (torch.full((6, 3), torch.nan), torch.full((12, 2, 5), torch.inf))  # one part of a block, and two
    runner = SimpleNamespace(kv_caches=list(parts), kv_cache_config=SimpleNamespace(num_blocks=6))
    zero_blocks(runner, [1, 4])
    for cache in parts:
        zeroed = (cache.reshape(6, -1) == 0).all(dim=1)
        assert zeroed.tolist() == [False, True, False, False, True, False]
        assert not cache.reshape(6, -1)[~zeroed].isfinite().any()
