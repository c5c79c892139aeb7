"""The identity of KV blocks: one per mask, positions and client salt, and vLLM's own for what is unmasked."""

from itertools import product

import pytest
import torch

from crane_serve.common.masks import Composition, MaskError, Member, NeuronMask, Positions, ResolvedMask
from crane_serve.engine.prefix_cache import check_salt, generated_salt, salted, with_generated_salt


def resolved(neuron: int, positions: Positions = Positions.ALL) -> ResolvedMask:
    mask = Composition([Member(NeuronMask.switching_off([[neuron]], [8]))])
    return ResolvedMask(f"m{neuron}", mask, positions)


MASKS = [resolved(1), resolved(2)]


@pytest.mark.parametrize("client_salt", [None, "tenant", ""])
@pytest.mark.parametrize("mask", [None, resolved(1, Positions.GENERATED)], ids=["none", "generated only"])
def test_a_prompt_that_is_computed_unmasked_keeps_its_salt(mask: ResolvedMask | None, client_salt: str | None) -> None:
    assert salted(mask, client_salt) == client_salt


def test_masks_and_clients_share_nothing() -> None:
    digests = [mask.mask.digest for mask in MASKS]
    salts = [salted(mask, client) for mask, client in product([None, *MASKS], [None, "one", "two", *digests])]
    assert len(set(salts)) == len(salts)


def test_the_same_mask_and_client_share_a_salt() -> None:
    assert salted(MASKS[0], "one") == salted(resolved(1), "one")


def test_a_masked_prompt_is_the_same_whether_what_follows_is_masked_or_not() -> None:
    assert salted(resolved(1, Positions.PROMPT), "one") == salted(resolved(1), "one")


@pytest.mark.parametrize("mask", [None, MASKS[0]], ids=["unmasked", "masked"])
def test_a_client_cannot_ask_for_the_blocks_of_a_mask(mask: ResolvedMask | None) -> None:
    masked = salted(MASKS[1], None)
    assert masked is not None
    with pytest.raises(MaskError, match="cache_salt must not begin with 'crane-mask-'"):
        salted(mask, masked)
    with pytest.raises(MaskError, match="cache_salt must not begin with 'crane-mask-'"):
        check_salt(masked)


def test_blocks_need_no_second_salt_where_all_tokens_are_treated_alike() -> None:
    assert generated_salt(None, 10, 32) is None
    assert generated_salt(MASKS[0], 10, 32) is None
    for positions in (Positions.PROMPT, Positions.GENERATED):
        assert generated_salt(resolved(1, positions), 32, 32) is None


def test_blocks_with_generated_tokens_are_told_apart_by_mask_positions_and_end_of_the_prompt() -> None:
    masks = product((1, 2), (Positions.PROMPT, Positions.GENERATED), (10, 11))
    salts = [generated_salt(resolved(neuron, positions), prompt, 32) for neuron, positions, prompt in masks]
    assert None not in salts
    assert len(set(salts)) == len(salts) == 8


def test_no_salt_of_a_client_hashes_like_a_block() -> None:
    blocks = {generated_salt(resolved(1, where), 12, 32) for where in (Positions.PROMPT, Positions.GENERATED)}
    clients = [f"{where}{join}12" for where in ("prompt", "generated") for join in ("|", "2:", "9:")]
    digest = resolved(1).mask.digest
    clients += [f"{len(digest)}:{digest}{client}" for client in clients]
    assert blocks.isdisjoint({salted(MASKS[0], client) for client in clients})


def test_a_second_salt_looks_like_vllms_own_keys() -> None:
    from vllm.v1.core.kv_cache_utils import to_event_extra_keys

    assert with_generated_salt(None, None) is None
    assert with_generated_salt((("cache_salt", "a"),), None) == (("cache_salt", "a"),)
    keys = with_generated_salt((("cache_salt", "a"),), "b")
    assert to_event_extra_keys([keys]) == [("a", "b")]


def test_masks_of_another_size_are_other_masks() -> None:
    other = ResolvedMask("x", Composition([Member(NeuronMask(torch.zeros(1, 8), (8,)))]))
    assert salted(other, None) != salted(MASKS[0], None)
