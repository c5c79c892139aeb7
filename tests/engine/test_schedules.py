"""Masks under everything a scheduler does to a request, driven step by step and checked against transformers."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crane_serve.common.masks import MaskLibrary, Positions
from tests.engine.offline import BLOCK_TOKENS, KV_BLOCKS, V2
from tests.engines import Oracle, masked_tokens
from tests.tiny import byte_tokenizer

# An engine that has died would wait for ever.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900 if V2 else 120)]

EXPRESSIONS = (None, "en", "zh", "vi", "zh,vi", "en@0.5", "vi@2", "out")
WORDS = (Positions.ALL, Positions.PROMPT, Positions.GENERATED)
LETTERS = byte_tokenizer().convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))  # of prompts
SOME_IDS = ",".join(map(str, range(2, 258, 10)))  # a tenth of what a random model generates
WINDOWS = tuple(
    map(
        Positions.parse,
        (
            "prompt[-20:]+generated[:40]",
            "prompt[33:70]",
            "generated[8:]",
            f"all+until={LETTERS[3]}",
            f"prompt[40:]+generated+until={LETTERS[0]},{LETTERS[4]}",
            f"generated[2:]+until={SOME_IDS}",
        ),
    )
)
TOLERANCE = 1e-3  # nats, for a single token
_IDS = itertools.count()


@dataclass(frozen=True)
class Job:
    """A request: `length` bytes of prompt, all from `seed`, so that prompts share prefixes of their shorter length."""

    mask: str | None
    length: int
    seed: int = 0
    max_tokens: int = 4
    n: int = 1
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    positions: Positions = Positions.ALL
    tokens: tuple[int, ...] | None = None

    @property
    def prompt(self) -> str | dict[str, list[int]]:
        if self.tokens is not None:
            return {"prompt_token_ids": list(self.tokens)}
        return "".join(chr(ord("a") + (self.seed + index * (index + 7)) % 26) for index in range(self.length))

    @property
    def arguments(self) -> dict[str, str] | None:
        return None if self.mask is None else {"crane_mask": self.mask, "crane_positions": str(self.positions)}


class Schedule:
    """Requests of one vLLM engine, added, stepped and aborted by hand."""

    def __init__(self, llm) -> None:
        self.engine = llm.llm_engine
        self.jobs: dict[str, Job] = {}
        self.finished: dict[str, object] = {}

    def add(self, job: Job, request_id: str | None = None) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=job.temperature,
            max_tokens=job.max_tokens,
            n=job.n,
            seed=job.seed,
            stop=list(job.stop),
            logprobs=0,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=job.arguments,
        )
        request_id = request_id or f"scheduled-{next(_IDS)}"
        self.engine.add_request(request_id, job.prompt, parameters)
        self.jobs[request_id] = job
        return request_id

    def step(self) -> None:
        if self.engine.has_unfinished_requests():
            for result in self.engine.step():
                if result.finished:
                    self.finished[result.request_id] = result

    def abort(self, request_id: str) -> None:
        self.engine.abort_request([request_id])
        del self.jobs[request_id]

    def drain(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()

    def check(self, oracle: Oracle, library: MaskLibrary) -> None:
        """Every job has finished, and each of its tokens has the log-probability that transformers gives it."""
        for request_id, job in self.jobs.items():
            result = self.finished[request_id]
            resolved = library.resolve(job.mask)
            assert len(result.outputs) == job.n
            for output in result.outputs:
                logprobs = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
                sequence = [*result.prompt_token_ids, *output.token_ids]
                masked = masked_tokens(job.positions, sequence, len(result.prompt_token_ids))
                expected = oracle.logprobs(sequence, None if resolved is None else resolved.mask, masked)
                assert logprobs == pytest.approx(expected[-len(logprobs) :], abs=TOLERANCE), job


@pytest.fixture
def schedule(llm) -> Iterator[Schedule]:
    schedule = Schedule(llm)
    yield schedule
    schedule.drain()


def preemptions(llm) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def test_preempted_requests_keep_their_masks(
    llm, schedule: Schedule, tiny_oracle: Oracle, library: MaskLibrary
) -> None:
    before = preemptions(llm)
    jobs = [Job(mask, length=150 + index, seed=index, max_tokens=120) for index, mask in enumerate(EXPRESSIONS)]
    assert sum(job.length + job.max_tokens for job in jobs) > KV_BLOCKS * BLOCK_TOKENS
    for job in jobs:
        schedule.add(job)
    schedule.drain()
    schedule.check(tiny_oracle, library)
    assert preemptions(llm) > before


def test_an_aborted_id_may_come_back_with_another_mask(
    schedule: Schedule, tiny_oracle: Oracle, library: MaskLibrary
) -> None:
    for first, second in itertools.permutations(("zh", "vi", None), 2):
        request_id = schedule.add(Job(first, length=100, max_tokens=50))
        schedule.step()
        schedule.step()
        schedule.abort(request_id)
        schedule.add(Job(second, length=100, max_tokens=6), request_id)
        schedule.drain()
        schedule.check(tiny_oracle, library)


def test_seeded_samples_of_a_request_share_its_mask(
    schedule: Schedule, tiny_oracle: Oracle, library: MaskLibrary
) -> None:
    for mask in EXPRESSIONS:
        schedule.add(Job(mask, length=70, n=3, temperature=1.0, max_tokens=8))
    schedule.drain()
    schedule.check(tiny_oracle, library)


def test_a_stop_string_ends_a_masked_request_where_it_stands(
    schedule: Schedule, tiny_oracle: Oracle, library: MaskLibrary
) -> None:
    free = schedule.add(Job("zh", length=40, max_tokens=24))
    schedule.drain()
    text = schedule.finished[free].outputs[0].text
    character = next(character for character in text[4:] if character.isascii() and text.index(character) > 2)
    stopped = schedule.add(Job("zh", length=40, max_tokens=24, stop=(character,)))
    schedule.drain()
    output = schedule.finished[stopped].outputs[0]
    assert output.finish_reason == "stop"
    assert text.startswith(output.text)
    schedule.check(tiny_oracle, library)


def test_requests_that_come_while_others_end_keep_their_masks(
    schedule: Schedule, tiny_oracle: Oracle, library: MaskLibrary
) -> None:
    for index in range(24):
        mask = EXPRESSIONS[index % len(EXPRESSIONS)]
        schedule.add(Job(mask, length=5 + 9 * (index % 7), seed=index, max_tokens=1 + index % 5))
        schedule.step()
    schedule.drain()
    schedule.check(tiny_oracle, library)


@pytest.mark.parametrize("positions", [Positions.PROMPT, Positions.GENERATED, WINDOWS[0], WINDOWS[-1]], ids=str)
def test_a_mask_of_the_prompt_or_of_what_is_generated_is_exact_also_when_preempted(
    llm, schedule: Schedule, tiny_oracle: Oracle, library: MaskLibrary, positions: Positions
) -> None:
    before = preemptions(llm)
    for index, mask in enumerate(("en", "zh", "vi", None, "zh,vi", "en@0.5", "vi@2", None)):
        schedule.add(Job(mask, length=150 + index, seed=index, max_tokens=120, positions=positions))
    schedule.drain()
    schedule.check(tiny_oracle, library)
    assert preemptions(llm) > before


def test_the_prefix_cache_tells_generated_tokens_from_the_same_tokens_in_a_prompt(
    schedule: Schedule, tiny_oracle: Oracle, library: MaskLibrary
) -> None:
    """What one request generates is the prompt of the next, under all pairs of positions."""
    for number, (first, second) in enumerate(itertools.product((*WORDS, None), repeat=2)):

        def job(positions: Positions | None, **fields: object) -> Job:
            return Job("zh" if positions else None, positions=positions or Positions.ALL, **fields)

        one = schedule.add(job(first, length=40 + number, seed=number, max_tokens=60))
        schedule.drain()
        result = schedule.finished[one]
        tokens = (*result.prompt_token_ids, *result.outputs[0].token_ids)
        schedule.add(job(second, length=0, tokens=tokens, max_tokens=8))
        schedule.drain()
        schedule.check(tiny_oracle, library)


PAIRS = [*itertools.permutations((*WINDOWS, Positions.ALL, None), 2), *((each, each) for each in WINDOWS)]


@pytest.mark.parametrize("pairs", [PAIRS[::8]] if V2 else [PAIRS[start::4] for start in range(4)])
def test_the_prefix_cache_tells_windows_and_ends_apart(
    schedule: Schedule, tiny_oracle: Oracle, library: MaskLibrary, pairs: list[tuple[Positions | None, ...]]
) -> None:
    """Each pair of positions in both orders: the same prompt for both, and then what the first has generated."""
    for number, pair in enumerate(pairs):
        first, second = (
            Job("zh" if each else None, length=80, seed=3000 + 7 * number, max_tokens=40, positions=each or WORDS[0])
            for each in pair
        )
        one = schedule.add(first)
        schedule.drain()
        schedule.add(second)
        result = schedule.finished[one]
        tokens = (*result.prompt_token_ids, *result.outputs[0].token_ids)
        schedule.add(replace(second, tokens=tokens, max_tokens=8))
        schedule.drain()
        schedule.check(tiny_oracle, library)


@pytest.mark.parametrize("where", ["prompt", "generated"])
def test_a_mask_ends_with_a_token_of_the_prompt_or_of_what_is_generated(
    schedule: Schedule, tiny_oracle: Oracle, library: MaskLibrary, where: str
) -> None:
    job = Job("zh", length=70, seed=4000, max_tokens=24, positions=Positions.parse(where))
    free = schedule.add(job)
    schedule.drain()
    result = schedule.finished[free]
    tokens = result.prompt_token_ids if where == "prompt" else result.outputs[0].token_ids
    for token in {tokens[len(tokens) // 3], tokens[len(tokens) // 2]}:
        ending = [
            schedule.add(replace(job, positions=Positions.parse(f"{windows}+until={token}")))
            for windows in (where, "all", f"{where}[1:]")
        ]
        schedule.drain()
        whole = schedule.finished[ending[0]]
        sequence = [*whole.prompt_token_ids, *whole.outputs[0].token_ids]
        positions = schedule.jobs[ending[0]].positions
        masked = masked_tokens(positions, sequence, len(whole.prompt_token_ids))
        assert sequence[masked[-1]] == token
        assert len(masked) < len(tokens)
    schedule.check(tiny_oracle, library)


def test_samples_end_their_masks_each_with_its_own_token(
    schedule: Schedule, tiny_oracle: Oracle, library: MaskLibrary
) -> None:
    for mask, positions in itertools.product(("zh", "vi@2"), WINDOWS):
        schedule.add(Job(mask, length=70, n=3, temperature=1.0, max_tokens=16, positions=positions))
    schedule.drain()
    schedule.check(tiny_oracle, library)


def test_an_end_that_is_no_token_of_the_model_is_refused(schedule: Schedule) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(
        VLLMValidationError, match=r"until=7,258: token 258 is not in the model's vocabulary of 258 tokens"
    ):
        schedule.add(Job("zh", length=10, positions=Positions.parse("all+until=7,258")))


def test_a_prompt_computed_unmasked_is_shared_with_unmasked_requests_and_a_masked_one_with_masked(
    schedule: Schedule,
) -> None:
    pairs = [
        (("zh", Positions.GENERATED), (None, Positions.ALL), True),
        (("zh", Positions.PROMPT), ("zh", Positions.ALL), True),
        (("zh", Positions.GENERATED), ("zh", Positions.PROMPT), False),
        (("zh", Positions.PROMPT), (None, Positions.ALL), False),
        (("zh", Positions.parse("prompt[-4:]")), (None, Positions.ALL), True),
        (("vi", Positions.GENERATED), ("zh", Positions.parse("prompt[-4:]+generated")), True),
        (("zh", Positions.parse("prompt[4:]")), ("zh", Positions.parse("prompt[4:98]+generated[:3]")), True),
        (("zh", Positions.parse("prompt[4:]")), ("vi", Positions.parse("prompt[4:]")), False),
        (("zh", Positions.parse("prompt[4:]")), ("zh", Positions.parse("prompt[5:]")), False),
        (("zh", Positions.parse("all+until=7")), ("zh", Positions.parse("all+until=8")), False),
        (("zh", Positions.ALL), ("zh", Positions.parse("all+until=7")), False),
    ]
    for number, (*jobs, shared) in enumerate(pairs):
        for mask, positions in jobs:
            last = schedule.add(Job(mask, length=100, seed=1000 + 7 * number, positions=positions))
            schedule.drain()
        cached = schedule.finished[last].num_cached_tokens
        assert cached == (100 // BLOCK_TOKENS * BLOCK_TOKENS if shared else 0), jobs


_JOBS = st.builds(
    Job,
    positions=st.sampled_from((*WORDS, *WINDOWS)),
    mask=st.sampled_from(EXPRESSIONS),
    length=st.integers(1, 200),
    seed=st.integers(0, 2),
    max_tokens=st.integers(1, 12),
    n=st.integers(1, 2),
    temperature=st.sampled_from((0.0, 1.0)),
).map(lambda job: job if job.temperature else replace(job, n=1))  # greedy requests have one sample
_ACTIONS = st.lists(st.one_of(_JOBS, st.just("step"), st.just("abort")), min_size=4, max_size=24)


@settings(
    max_examples=5 if V2 else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(actions=_ACTIONS)
def test_any_schedule_gives_every_request_its_own_mask(
    llm, tiny_oracle: Oracle, library: MaskLibrary, actions: list[Job | str]
) -> None:
    schedule = Schedule(llm)
    try:
        for action in actions:
            if isinstance(action, Job):
                schedule.add(action)
            elif action == "step":
                schedule.step()
            elif running := [id_ for id_ in schedule.jobs if id_ not in schedule.finished]:
                schedule.abort(running[0])
    finally:
        schedule.drain()
    schedule.check(tiny_oracle, library)
