"""KV events: what vLLM publishes of a block is what the block is identified by, second salts included."""

from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    hash_block_tokens,
    init_none_hash,
    maybe_convert_block_hash,
)
from vllm.v1.request import Request

from crane_serve.common.masks import Composition, Member, NeuronMask, Positions, ResolvedMask
from crane_serve.engine import plugin
from crane_serve.engine.admission import mask_arguments
from crane_serve.engine.prefix_cache import salted

BLOCK_TOKENS, PROMPT_TOKENS, GENERATED_TOKENS = 4, 6, 7


THE_WORDS = (Positions.ALL, Positions.PROMPT, Positions.GENERATED)
WINDOWS = ("prompt[-3:]", "generated[:3]", "prompt[:5]+generated[2:]", "all+until=3")


def masked_request(positions: Positions | None) -> Any:
    """A request as the engine core has it once it has generated some tokens."""
    mask = None
    if positions is not None:
        mask = ResolvedMask("m", Composition([Member(NeuronMask.switching_off([[1]], [8]))]), positions)
    hasher = get_request_block_hasher(BLOCK_TOKENS, sha256_cbor)
    request = Request(
        "request",
        list(range(PROMPT_TOKENS)),
        SamplingParams(extra_args=None if mask is None else mask_arguments(mask)),
        None,
        cache_salt=salted(mask, None),
        block_hasher=hasher,
    )
    setattr(request, plugin._LEASE, mask)
    request.append_output_token_ids(list(range(100, 100 + GENERATED_TOKENS)))
    return request


@pytest.mark.parametrize("positions", [None, *THE_WORDS, *map(Positions.parse, WINDOWS)], ids=str)
def test_the_keys_of_an_event_make_the_hashes_of_its_blocks(positions: Positions | None) -> None:
    plugin.install()
    init_none_hash(sha256_cbor)
    request = masked_request(positions)
    pool = BlockPool(8, enable_caching=True, hash_block_size=BLOCK_TOKENS, enable_kv_cache_events=True)
    full = (PROMPT_TOKENS + GENERATED_TOKENS) // BLOCK_TOKENS
    pool.cache_full_blocks(request, pool.get_new_blocks(full), 0, full, BLOCK_TOKENS, 0)
    (event,) = pool.take_events()
    parent, hashes = None, []
    for block in range(full):
        keys = event.extra_keys[block]
        tokens = event.token_ids[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]
        tagged = None if keys is None else tuple(("cache_salt", key) for key in keys)
        parent = hash_block_tokens(sha256_cbor, parent, tokens, tagged)
        hashes.append(maybe_convert_block_hash(parent))
    assert event.block_hashes == hashes
    is_salted = positions in (Positions.PROMPT, Positions.GENERATED)
    if positions is not None and positions not in THE_WORDS:
        last = range(BLOCK_TOKENS * (full - 1), BLOCK_TOKENS * full)
        is_salted = any(token in window for window in positions.windows(PROMPT_TOKENS) for token in last)
    assert (event.extra_keys[-1] is not None) == is_salted


def test_a_prompt_is_hashed_with_its_windows_when_the_request_is_made() -> None:
    plugin.install()
    init_none_hash(sha256_cbor)
    texts = (None, "generated[:3]", "prompt[-1:]", "prompt[:4]", "prompt[:5]", "prompt[:2]", "prompt[:4]+until=3")
    requests = [masked_request(None if text is None else Positions.parse(text)) for text in texts]
    unmasked, generated, last, *others = (request.block_hashes[0] for request in requests)
    assert unmasked == generated == last  # the first block is computed without a mask
    assert others[0] == others[1]  # in both all four tokens of it are masked
    assert len({unmasked, *others}) == 4


def test_every_module_that_makes_these_keys_is_covered() -> None:
    """vLLM's offloading of KV blocks is the third; it is a KV transfer, which is refused at start."""
    root = Path(vllm.__file__).parent
    users = {
        str(path.relative_to(root))
        for path in (root / "v1").rglob("*.py")
        if "generate_block_hash_extra_keys" in path.read_text()
    }
    assert users == {"v1/core/kv_cache_utils.py", "v1/core/block_pool.py", "v1/simple_kv_offload/manager.py"}
