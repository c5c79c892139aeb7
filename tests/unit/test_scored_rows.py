"""Scoring in the workers: whatever the chunks, the rows and the neighbours, the scores are those of all logits."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crane_serve.engine import scoring
from crane_serve.engine.scoring import Chunk, ScoreRequest, Scoring, get_computed_blocks, token_scores
from crane_serve.engine.service import rank_of

HIDDEN, VOCABULARY = 4, 11
HEAD = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0))


def states(token_ids: list[int]) -> torch.Tensor:
    """Hidden states [tokens, hidden] that depend on the token and its position."""
    positions = torch.arange(len(token_ids))[:, None] + 1
    return torch.sin(torch.tensor(token_ids)[:, None] * torch.arange(1, HIDDEN + 1) + positions.sqrt())


@dataclass
class Running:
    """A prompt in mid-prefill. cuts: where its chunks end; restarts: how often it begins again after a chunk."""

    request: ScoreRequest
    token_ids: list[int]
    cuts: list[int]

    @property
    def expected(self) -> tuple[list[int], list[float], list[bool]]:
        logprobs = (states(self.token_ids) @ HEAD.T).log_softmax(-1)
        first, candidates = self.request
        rows = [*range(first - 1, len(self.token_ids) - 1), *[len(self.token_ids) - 1] * len(candidates)]
        tokens = [*self.token_ids[first:], *candidates]
        best = [int(logprobs[row].argmax()) == token for row, token in zip(rows, tokens, strict=True)]
        return tokens, [float(logprobs[row, token]) for row, token in zip(rows, tokens, strict=True)], best


@st.composite
def running(draw: st.DrawFn) -> Running:
    token_ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12))
    first = draw(st.integers(1, len(token_ids)))
    candidates = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=first == len(token_ids), max_size=3))
    begins = [draw(st.integers(0, first - 1)) for _ in range(draw(st.integers(1, 2)))]  # the last time it is completed
    cuts = []
    for number, begin in enumerate(begins):
        ends = sorted(draw(st.sets(st.integers(begin + 1, len(token_ids)), min_size=1)))
        whole = number == len(begins) - 1
        cuts += [begin, *(ends if not whole else [*(end for end in ends if end < len(token_ids)), len(token_ids)])]
        if not whole and cuts[-1] == len(token_ids):
            cuts.pop()  # a finished prompt does not begin again
    return Running(ScoreRequest(first, tuple(candidates)), token_ids, cuts)


def chunks(cuts: list[int]) -> Iterator[tuple[int, int]]:
    """Where each chunk begins and ends: a cut before the last one begins the prompt again."""
    for begin, end in itertools.pairwise(cuts):
        if end > begin:
            yield begin, end


@settings(max_examples=200, deadline=None)
@given(st.lists(running(), min_size=1, max_size=4), st.sampled_from([1, 2, 128]))
def test_whatever_the_chunks_the_scores_are_those_of_all_logits(together: list[Running], rows: int) -> None:
    worker, found = Scoring(), {}
    plans = {}
    for index, each in enumerate(together):
        worker.add(str(index), each.request)
        plans[str(index)] = chunks(each.cuts)
    before, scoring._ROWS_ON_CPU = scoring._ROWS_ON_CPU, rows
    try:
        while plans:
            hidden, batch, row = [torch.zeros(1, HIDDEN)], [], 1  # a token of a request that is not scored
            for key, plan in list(plans.items()):
                begin_end = next(plan, None)
                if begin_end is None:
                    del plans[key]
                    continue
                begin, end = begin_end
                ids = together[int(key)].token_ids
                hidden.append(states(ids)[begin:end])
                batch.append(
                    Chunk(key, row, begin, end - begin, len(ids), lambda a, b, ids=ids: torch.tensor(ids[a:b]))
                )
                row += end - begin
            found |= worker.step(lambda some: some @ HEAD.T, torch.cat(hidden), batch)
    finally:
        scoring._ROWS_ON_CPU = before
    for index, each in enumerate(together):
        tokens, logprobs, ranks = found[str(index)]
        expected = each.expected
        assert tokens[:, 0].tolist() == expected[0]
        assert logprobs[:, 0].tolist() == pytest.approx(expected[1], abs=1e-5)
        assert (ranks == 1).tolist() == expected[2]
    assert not worker._scored


def test_logits_of_a_row_are_made_once() -> None:
    made = []

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        made.append(len(rows))
        return rows @ HEAD.T

    rows, tokens = torch.tensor([3, 3, 3, 5, 6, 6]), torch.tensor([0, 1, 2, 3, 4, 5])
    token_scores(logits_of, torch.randn(8, HIDDEN), rows, tokens)
    assert made == [3]


def test_a_hit_ends_before_the_token_that_scores_the_first() -> None:
    def lookup(_: Any, request: Any) -> tuple[int, str]:
        return request.num_tokens - 1, request.name

    def request(extra_args: dict[str, Any] | None) -> SimpleNamespace:
        return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra_args), num_tokens=40, name="r")

    assert get_computed_blocks(lookup, None, request(None)) == (39, "r")
    assert get_computed_blocks(lookup, None, request(ScoreRequest(17, (1,)).argument)) == (16, "r")
    assert get_computed_blocks(lookup, None, SimpleNamespace(sampling_params=None, num_tokens=4, name="p")) == (3, "p")


@pytest.mark.parametrize(("given", "passed"), [(10, 10), (30, 16), (None, None)])
def test_a_hit_is_no_longer_than_the_caller_wants(given: int | None, passed: int | None) -> None:
    """vLLM 0.33 has an argument for it."""
    seen: list[int | None] = []

    def lookup(_: Any, request: Any, max_cache_hit_length: int | None = None) -> None:
        seen.append(max_cache_hit_length)

    for extra_args in (ScoreRequest(17, (1,)).argument, None):
        request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra_args), num_tokens=40)
        get_computed_blocks(lookup, None, request, given)
        get_computed_blocks(lookup, None, request, max_cache_hit_length=given)
    assert seen == [passed, passed, given, given]


def test_requests_that_are_gone_are_forgotten() -> None:
    worker = Scoring()
    for key in "abc":
        worker.add(key, ScoreRequest(1, ()))
    worker.remove("a")
    worker.remove("never there")
    worker.keep({"c", "d"})
    assert [key in worker for key in "abcd"] == [False, False, True, False]


def test_continuations_of_a_context_go_to_one_rank_and_whole_texts_anywhere() -> None:
    contexts = [[0, *range(number, number + 40)] for number in range(50)]
    ranks = [rank_of(context, 2, 32) for context in contexts]
    assert ranks == [rank_of(tuple(context), 2, 32) for context in contexts]
    assert set(ranks) == {0, 1}
    assert rank_of([0], 2, 32) is None
