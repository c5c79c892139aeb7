"""The identity of KV blocks: one per mask, positions and client salt, and vLLM's own for what is unmasked."""

import hashlib
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crane_serve.common.masks import Composition, MaskError, Member, NeuronMask, Positions, ResolvedMask
from crane_serve.engine.admission import MaskRequest
from crane_serve.engine.prefix_cache import WindowSalts, check_salt, generated_salt, salted, with_second_salt


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


def test_salts_of_the_three_words_are_those_of_earlier_versions() -> None:
    """What other processes have cached, or routed by, stays valid."""
    assert [str(positions) for positions in (Positions.ALL, Positions.PROMPT, Positions.GENERATED)] == [
        "all",
        "prompt",
        "generated",
    ]
    digest = MASKS[0].mask.digest
    text = f"7:request{len(digest)}:{digest}3:one"
    assert salted(MASKS[0], "one") == "crane-mask-" + hashlib.sha256(text.encode()).hexdigest()
    text = f"5:block{len(digest)}:{digest}9:generated2:10"
    expected = "crane-mask-" + hashlib.sha256(text.encode()).hexdigest()
    assert generated_salt(resolved(1, Positions.GENERATED), 10, 32) == expected


def window_salts(positions: str, prompt: int, neuron: int = 1) -> list[str | None]:
    """Of four blocks of 8 tokens."""
    salts = WindowSalts.of(MaskRequest(resolved(neuron).wire, Positions.parse(positions)), prompt)
    assert salts is not None
    return [salts.salt(start, start + 8) for start in range(0, 32, 8)]


@pytest.mark.parametrize("positions", [None, Positions.ALL, Positions.PROMPT, Positions.GENERATED])
def test_the_three_words_have_no_salts_of_windows(positions: Positions | None) -> None:
    request = None if positions is None else MaskRequest(resolved(1).wire, positions)
    assert WindowSalts.of(request, 10) is None


@pytest.mark.parametrize("positions", ["prompt[-4:]", "generated[:16]", "all+until=7", "prompt+until=7"])
def test_windows_keep_the_clients_salt_and_have_no_other_second_one(positions: str) -> None:
    mask = resolved(1, Positions.parse(positions))
    assert salted(mask, "one") == "one"
    assert generated_salt(mask, 10, 32) is None


def test_blocks_before_the_first_masked_token_are_those_of_unmasked_requests() -> None:
    assert [salt is None for salt in window_salts("prompt[-4:]", 24)] == [True, True, False, True]
    assert [salt is None for salt in window_salts("generated[:2]", 15)] == [True, False, False, True]
    assert [salt is None for salt in window_salts("prompt[:3]+generated[9:]", 15)] == [False, True, True, False]
    assert [salt is None for salt in window_salts("all+until=7", 15)] == [False] * 4


_POSITIONS = st.sampled_from(
    [
        "prompt[:8]",
        "prompt[4:]",
        "prompt[-4:]",
        "prompt[2:-2]",
        "prompt[:8]+generated[:4]",
        "generated[:4]",
        "generated[2:]",
    ]
)
_ENDS = st.sampled_from(["", "+until=7", "+until=7,9"])


@given(st.builds(str.__add__, _POSITIONS, _ENDS), st.builds(str.__add__, _POSITIONS, _ENDS), *[st.integers(1, 31)] * 2)
def test_blocks_are_shared_only_where_the_same_tokens_are_masked_with_the_same_end(
    one: str, other: str, prompt: int, other_prompt: int
) -> None:
    """The salts of all blocks up to one are equal only if all tokens up to its end are treated alike."""
    first, second = window_salts(one, prompt), window_salts(other, other_prompt)
    for blocks in range(1, 5):
        masked, other_masked = masked_of(one, prompt, 8 * blocks), masked_of(other, other_prompt, 8 * blocks)
        ends = [Positions.parse(each).until for each in (one, other)]
        alike = masked == other_masked and (ends[0] == ends[1] or not masked)
        assert alike or first[:blocks] != second[:blocks]


def masked_of(positions: str, prompt: int, tokens: int) -> list[int]:
    """Indices of the masked tokens, but for an end."""
    windows = Positions.parse(positions).windows(prompt)
    return [token for token in range(tokens) if any(token in window for window in windows)]


def test_windows_of_other_masks_and_windows_that_are_whole_are_told_apart() -> None:
    """Such a block has a hash of its own, not that of `all`: it carries no salt of the request."""
    salts = [*window_salts("prompt[0:32]", 32), *window_salts("prompt[0:32]", 32, neuron=2)]
    assert len({salt for salt in salts if salt is not None}) == 8
    assert not {salted(mask, None) for mask in MASKS} & set(salts)


def test_no_salt_of_a_client_hashes_like_a_block() -> None:
    blocks = {generated_salt(resolved(1, where), 12, 32) for where in (Positions.PROMPT, Positions.GENERATED)}
    clients = [f"{where}{join}12" for where in ("prompt", "generated") for join in ("|", "2:", "9:")]
    digest = resolved(1).mask.digest
    clients += [f"{len(digest)}:{digest}{client}" for client in clients]
    assert blocks.isdisjoint({salted(MASKS[0], client) for client in clients})


def test_a_second_salt_looks_like_vllms_own_keys() -> None:
    from vllm.v1.core.kv_cache_utils import to_event_extra_keys

    assert with_second_salt(None, None) is None
    assert with_second_salt((("cache_salt", "a"),), None) == (("cache_salt", "a"),)
    keys = with_second_salt((("cache_salt", "a"),), "b")
    assert to_event_extra_keys([keys]) == [("a", "b")]


def test_masks_of_another_size_are_other_masks() -> None:
    other = ResolvedMask("x", Composition([Member(NeuronMask(torch.zeros(1, 8), (8,)))]))
    assert salted(other, None) != salted(MASKS[0], None)
