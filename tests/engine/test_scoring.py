"""Scored requests over a real engine: as transformers says, whatever is in the prefix cache or runs beside them."""

import itertools
import random

import pytest

from crane_serve.common.masks import MaskLibrary
from crane_serve.engine.scoring import ScoreRequest
from tests.engine.offline import BLOCK_TOKENS, CHUNK_TOKENS, KV_BLOCKS
from tests.engines import Oracle

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4  # nats, per token
MASKS = (None, "en", "zh", "zh,vi", "out", "vi@0.5")
Asked = tuple[list[int], ScoreRequest, str | None]
"""A prompt, what of it is scored, and a mask."""


def ask(llm, asked: list[Asked]) -> list[tuple[list[float], int]]:
    """Log-probabilities of each, all asked together, and how many tokens came from the prefix cache."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=0,
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            skip_reading_prefix_cache=False,
            extra_args={**request.argument, **({} if mask is None else {"crane_mask": mask})},
        )
        for _, request, mask in asked
    ]
    prompts = [{"prompt_token_ids": token_ids} for token_ids, _, _ in asked]
    answers = []
    for (token_ids, request, _), result in zip(asked, llm.generate(prompts, parameters, use_tqdm=False), strict=True):
        wanted = [*token_ids[request.first :], *request.candidates]
        rows = [row[token].logprob for token, row in zip(wanted, result.prompt_logprobs[1:], strict=True)]
        answers.append((rows, result.num_cached_tokens))
    return answers


def expected(oracle: Oracle, library: MaskLibrary, asked: Asked) -> list[float]:
    token_ids, (first, candidates), name = asked
    resolved = library.resolve(name)
    mask = None if resolved is None else resolved.mask
    scored = oracle.logprobs(token_ids, mask)[first - 1 :] if len(token_ids) > 1 else []
    return scored + [oracle.logprobs([*token_ids, candidate], mask)[-1] for candidate in candidates]


def text(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(3, 250) for _ in range(length)]


def check(llm, oracle: Oracle, library: MaskLibrary, asked: list[Asked]) -> list[int]:
    """Compare with transformers; how many tokens of each were cached."""
    found = ask(llm, asked)
    for one, (logprobs, cached) in zip(asked, found, strict=True):
        assert logprobs == pytest.approx(expected(oracle, library, one), abs=TOLERANCE), one
        assert cached < one[1].first
    return [cached for _, cached in found]


def test_a_context_is_computed_once_and_its_continuations_are_exact(llm, tiny_oracle, library) -> None:
    draw = random.Random(0)
    for mask in MASKS:
        context = text(draw, 3 * BLOCK_TOKENS + 5)
        request = ScoreRequest(len(context), tuple(text(draw, 100)))  # of one token each
        assert check(llm, tiny_oracle, library, [(context, request, mask)]) == [0]
        assert check(llm, tiny_oracle, library, [(context, request, mask)]) == [3 * BLOCK_TOKENS]
        longer = [(context + text(draw, size), ScoreRequest(len(context), (7,)), mask) for size in (1, 2, 40)]
        assert check(llm, tiny_oracle, library, longer) == [3 * BLOCK_TOKENS] * 3


def test_a_hit_never_reaches_into_scored_tokens(llm, tiny_oracle, library) -> None:
    """The same text again, and its beginnings, with every number of unscored tokens around the ends of blocks."""
    draw = random.Random(1)
    whole = text(draw, 3 * BLOCK_TOKENS)
    check(llm, tiny_oracle, library, [(whole, ScoreRequest(1, ()), "zh")])
    for first, length in itertools.product((1, 31, 32, 33, 34, 64, 65, 95), (33, 64, 65, 96)):
        if first < length:
            cached = check(llm, tiny_oracle, library, [(whole[:length], ScoreRequest(first, (5,)), "zh")])
            assert cached == [(first - 1) // BLOCK_TOKENS * BLOCK_TOKENS]


@pytest.mark.parametrize("seed", range(3))
def test_random_prefixes_under_all_masks_in_every_order_equal_cold_runs(llm, tiny_oracle, library, seed: int) -> None:
    """Texts that begin alike, contexts and their continuations, under different masks, cache warm and cold."""
    draw = random.Random(seed)
    trunks = [text(draw, draw.randrange(1, 5 * BLOCK_TOKENS)) for _ in range(3)]
    asked = []
    for _ in range(40):
        trunk = draw.choice(trunks)
        prompt = trunk[: draw.randrange(1, len(trunk) + 1)] + text(draw, draw.choice((0, 0, 1, 9, 70)))
        first = draw.randrange(1, len(prompt) + 1)
        candidates = tuple(text(draw, draw.randrange(1, 4)))
        asked.append((prompt, ScoreRequest(first, candidates), draw.choice(MASKS)))
    assert any(check(llm, tiny_oracle, library, asked))  # together
    for one in draw.sample(asked, 12):  # alone
        check(llm, tiny_oracle, library, [one])


def test_a_scored_text_that_is_preempted_has_the_same_scores(llm, tiny_oracle, library) -> None:
    from vllm import SamplingParams

    def preemptions() -> int:
        return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")

    draw, before, engine = random.Random(5), preemptions(), llm.llm_engine
    asked, answers = {}, {}

    def add(name: str, prompt: list[int], request: ScoreRequest, mask: str, max_tokens: int) -> None:
        asked[name] = (prompt, request, mask)
        parameters = SamplingParams(
            max_tokens=max_tokens,
            temperature=0,
            ignore_eos=True,
            prompt_logprobs=0,
            detokenize=False,
            skip_reading_prefix_cache=False,
            extra_args={**request.argument, "crane_mask": mask},
        )
        engine.add_request(name, {"prompt_token_ids": prompt}, parameters)

    # Generations that grow until there is no KV block left, while a long text is scored in many chunks. Their own
    # prompts are scored, too, and computed once more with what was generated when they come back.
    for number in range(7):
        add(f"grows-{number}", text(draw, 120), ScoreRequest(50, (9,)), "en", 200)
    for _ in range(30):
        engine.step()
    add("scored", text(draw, 6 * CHUNK_TOKENS), ScoreRequest(9, (7, 8)), "zh", 1)
    while engine.has_unfinished_requests():
        answers |= {output.request_id: output for output in engine.step() if output.finished}
    assert preemptions() > before, f"the requests fit into {KV_BLOCKS} blocks"
    for name, (prompt, request, mask) in asked.items():
        wanted = [*prompt[request.first :], *request.candidates]
        rows = answers[name].prompt_logprobs[1:]
        found = [row[token].logprob for token, row in zip(wanted, rows, strict=True)]
        assert found == pytest.approx(expected(tiny_oracle, library, (prompt, request, mask)), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"first": 0, "candidates": [1]}, "first is 0, expected 1 to 4"),
        ({"first": 5, "candidates": [1]}, "first is 5, expected 1 to 4"),
        ({"first": 4, "candidates": []}, "and a token to score"),
        ({"first": 1.5, "candidates": []}, "expected 'first' and 'candidates'"),
        ({"first": 1}, "expected 'first' and 'candidates'"),
        ("all", "expected 'first' and 'candidates'"),
        ({"first": 1, "candidates": ["a"]}, "token ids"),
        ({"first": 1, "candidates": [258]}, "token 258"),
    ],
)
def test_what_cannot_be_scored_is_refused(llm, argument, message: str) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, extra_args={"crane_score": argument})
    with pytest.raises(VLLMValidationError, match=message):
        llm.generate([{"prompt_token_ids": [3, 4, 5, 6]}], parameters, use_tqdm=False)


def test_it_needs_prompt_logprobs(llm) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    parameters = SamplingParams(max_tokens=1, extra_args=ScoreRequest(1, (3,)).argument)
    with pytest.raises(VLLMValidationError, match="prompt_logprobs=0"):
        llm.generate([{"prompt_token_ids": [3, 4, 5, 6]}], parameters, use_tqdm=False)
