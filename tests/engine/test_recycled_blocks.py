"""What one request leaves in its KV blocks never reaches the next that gets them."""

import pytest

from crane_serve.common.masks import MaskError, MaskLibrary
from crane_serve.common.masks.mask import MAX_SCALE
from tests.engine.offline import LONG, PROMPTS, fill_with_nan, generate
from tests.tiny import LAYERS

pytestmark = pytest.mark.engine

LARGEST = "zh@100,vi@100"
MASKS = [None, "zh", "vi", "zh,vi", "out"]
TOLERANCE = 1e-4  # nats


def poison(llm) -> None:
    """Write NaN into every KV block, all of which are free, as no request is under way."""
    assert llm.reset_prefix_cache()
    assert llm.collective_rpc(fill_with_nan) == [LAYERS]


def scored(llm, masks: list[str | None]) -> list[list[float]]:
    """Log-probabilities of all tokens of all prompts, under the masks in turn, in one batch."""
    answers = generate(llm, PROMPTS, [masks[index % len(masks)] for index in range(len(PROMPTS))], score=True)
    return [answer["prompt_logprobs"] + answer["logprobs"] for answer in answers]


@pytest.mark.parametrize("mask", MASKS)
def test_blocks_full_of_nan_change_nothing(llm, mask: str | None) -> None:
    before = scored(llm, [mask])
    poison(llm)
    after = scored(llm, [mask])
    for expected, found in zip(before, after, strict=True):
        assert found == pytest.approx(expected, abs=TOLERANCE)


def test_the_largest_scales_do_not_reach_a_neighbour_or_the_next(llm, library: MaskLibrary) -> None:
    low, high = library.resolve(LARGEST).mask.whole().extremes
    assert max(-low, high) == MAX_SCALE
    before = scored(llm, [None])
    # As many blocks as there are, so that those who come next get blocks that these leave behind.
    generate(llm, [f"{number}: {LONG}" for number in range(8)], [LARGEST] * 8)
    beside = generate(llm, [*PROMPTS, LONG], [None] * len(PROMPTS) + [LARGEST], score=True)[: len(PROMPTS)]
    llm.reset_prefix_cache()
    for expected, answer, found in zip(before, beside, scored(llm, [None]), strict=True):
        assert answer["prompt_logprobs"] + answer["logprobs"] == pytest.approx(expected, abs=TOLERANCE)
        assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("mask", ["zh@100,zh@99,zh@98", "zh@100,vi@100,en@2"])
def test_larger_scales_are_refused_and_the_engine_lives(llm, library: MaskLibrary, mask: str) -> None:
    with pytest.raises(MaskError, match="expected at most 10000"):
        library.resolve(mask)
    with pytest.raises(Exception, match="expected at most 10000"):
        generate(llm, [PROMPTS[0]], [mask])
    assert generate(llm, [PROMPTS[0]], ["zh"])[0]["tokens"]
