"""Values of neurons over a real engine: as transformers has them, whatever runs beside, and nobody else is touched."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from crane_serve.common.masks import MaskLibrary
from crane_serve.engine.activations import (
    MAX_REQUESTS,
    TAKE_METHOD,
    ActivationRequest,
    Activations,
    Reduction,
    joined,
)
from tests.conftest import Engines
from tests.engine.offline import CHUNK_TOKENS, LONG, PROMPTS, V2, generate, start
from tests.engines import Oracle, same_shares
from tests.tiny import LAYERS, NEURONS

pytestmark = pytest.mark.engine

SIZES = (NEURONS,) * LAYERS
WHOLE = ActivationRequest(dict.fromkeys(range(LAYERS)))
SOME = ActivationRequest({2: (17, 3, 159), 0: None})
_KEYS = itertools.count()


@pytest.fixture(scope="module", params=["eager"] if V2 else ["compiled", "eager"])
def seeing(request: pytest.FixtureRequest, engines: Engines) -> Iterator[object]:
    """As `llm`, with activations; compiled and under V2 with gates."""
    with pytest.MonkeyPatch.context() as environment:  # not for other engines of the session
        environment.setenv("CRANE_MASKS", str(engines.output_masks))
        environment.setenv("CRANE_GATES" if V2 or request.param == "compiled" else "CRANE_ACTIVATIONS", "1")
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        engine = start(engines.tiny.checkpoint, enforce_eager=request.param == "eager")
    yield engine
    engine.llm_engine.engine_core.shutdown()


@dataclass
class Asked:
    """A prompt, a mask, and what it asks to see."""

    prompt: str | list[int]
    mask: str | None = None
    request: ActivationRequest | None = None
    max_tokens: int = 6
    options: dict = field(default_factory=dict)
    key: str = field(default_factory=lambda: f"key-{next(_KEYS)}")

    @property
    def parameters(self) -> object:
        from vllm import SamplingParams

        arguments = {} if self.mask is None else {"crane_mask": self.mask}
        if self.request is not None:
            arguments |= self.request.argument(self.key)
        settings = {"temperature": 0, "logprobs": 0, "ignore_eos": True, **self.options}
        return SamplingParams(max_tokens=self.max_tokens, extra_args=arguments or None, **settings)

    @property
    def engine_prompt(self) -> object:
        return self.prompt if isinstance(self.prompt, str) else {"prompt_token_ids": self.prompt}


def every_reduction(llm) -> tuple[Reduction, ...]:
    """Those that an engine has."""
    config = llm.llm_engine.vllm_config.additional_config["crane"]
    return tuple(each for each in Reduction if each.source == "neurons" or config.gates)


def taken(llm, asked: Asked, end: int) -> Activations | None:
    """What the engine has before position `end`."""
    of_workers = llm.llm_engine.engine_core.call_utility(TAKE_METHOD, asked.key, end)
    return None if of_workers is None else joined(asked.request, SIZES, of_workers)


def run(
    llm, batch: list[Asked], salt: str | None = None
) -> list[tuple[list[int], list[float], Activations | None, int]]:
    """Of each: all tokens, log-probabilities, activations, and how many tokens came from the prefix cache."""
    inputs = [asked.engine_prompt for asked in batch]
    if salt is not None:
        inputs = [{"prompt": each, "cache_salt": salt} for each in inputs]
    answers = []
    for asked, result in zip(
        batch, llm.generate(inputs, [each.parameters for each in batch], use_tqdm=False), strict=True
    ):
        output = result.outputs[0]
        tokens = [*result.prompt_token_ids, *output.token_ids]
        logprobs = [row[token].logprob for token, row in zip(output.token_ids, output.logprobs, strict=True)]
        seen = None if asked.request is None else taken(llm, asked, len(tokens) - 1)
        answers.append((tokens, logprobs, seen, result.num_cached_tokens))
    return answers


def check(oracle: Oracle, library: MaskLibrary, asked: Asked, tokens: list[int], seen: Activations | None) -> None:
    resolved = library.resolve(asked.mask)
    request = asked.request
    end = len(tokens) - 1 if request.end is None else min(request.end, len(tokens) - 1)
    mask = None if resolved is None else resolved.mask
    whole = oracle.neurons(tokens, mask)[:, request.first : end]
    act, up = (each[:, request.first : end] for each in oracle.gates(tokens, mask))
    assert seen is not None
    assert (seen.first, seen.tokens) == (request.first, end - request.first)
    assert list(seen.values) == list(request.neurons)
    for layer, neurons in request.neurons.items():
        columns = slice(None) if neurons is None else list(neurons)
        rows = whole[layer][:, columns]
        scale = float(rows.abs().max())
        wanted = {
            "values": rows,
            "mean": rows.mean(0),
            "mean_abs": rows.abs().mean(0),
            "max": rows.amax(0),
            "positive": (rows > 0).float().mean(0),
            "act_positive": (act[layer][:, columns] > 0).float().mean(0),
            "up_mean_abs": up[layer][:, columns].abs().mean(0),
        }
        assert list(seen.values[layer]) == (list(map(str, request.reductions)) or ["values"])
        for name, values in seen.values[layer].items():
            assert values.dtype == np.float32
            if name in ("positive", "act_positive"):
                assert same_shares(values, wanted[name], seen.tokens), (layer, name)
            else:
                assert values == pytest.approx(wanted[name].numpy(), rel=1e-4, abs=1e-4 * scale), (layer, name)


def test_every_token_has_its_values_in_a_mixed_batch_of_prompts_in_chunks(seeing, tiny_oracle, library) -> None:
    batch = [
        Asked(LONG, "zh", WHOLE),
        Asked(PROMPTS[0], None, SOME),
        Asked(PROMPTS[1], "en"),
        Asked(PROMPTS[2], "zh,vi", ActivationRequest({1: (0, 1)}, first=3, end=9)),
        Asked(PROMPTS[4], "out", ActivationRequest({1: None}, every_reduction(seeing))),
        Asked(LONG, "vi@0.5", ActivationRequest({0: (5, 4), 2: None}, every_reduction(seeing), first=1), max_tokens=30),
        Asked(PROMPTS[0]),
    ]
    assert len(LONG) > 2 * CHUNK_TOKENS
    for _ in range(2):  # the second time with a warm prefix cache
        for asked, (tokens, _, seen, cached) in zip(batch, run(seeing, batch), strict=True):
            if asked.request is not None:
                check(tiny_oracle, library, asked, tokens, seen)
                assert not cached


def test_values_are_those_before_the_mask(seeing, tiny_oracle, library) -> None:
    """Neurons of the first layer are the same with and without the mask that switches them off."""
    off = tuple((library.get("en").mask.intermediate[0] == 0).nonzero().flatten().tolist())
    request = ActivationRequest({0: off})
    values = []
    for mask in (None, "en"):
        asked = Asked([5, 6, 7, 8, 9], mask, request, max_tokens=1)
        [(tokens, _, seen, _)] = run(seeing, [asked])
        check(tiny_oracle, library, asked, tokens, seen)
        values.append(seen.values[0]["values"])
    assert np.abs(values[0]).max() > 0
    assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-6)


def test_neighbours_are_bit_identical_with_and_without_a_request_that_asks(seeing) -> None:
    def batch(request: ActivationRequest | None) -> list[Asked]:
        return [Asked(LONG, "zh", request, 12), *(Asked(prompt, mask) for prompt in PROMPTS for mask in (None, "en"))][
            :8
        ]

    without = run(seeing, batch(None), salt="without")
    beside = run(seeing, batch(WHOLE), salt="beside")
    assert [answer[:2] for answer in beside] == [answer[:2] for answer in without]


@pytest.mark.skipif(V2, reason="under V2 this engine is eager, and the baseline compiled")
def test_requests_that_do_not_ask_are_bit_identical_to_vllm_without_the_plugin(seeing, baseline) -> None:
    if seeing.llm_engine.vllm_config.model_config.enforce_eager:
        pytest.skip("the eager baseline has other threads, and so other roundings")
    for prompt, alone in zip(PROMPTS, baseline["compiled"], strict=True):
        answer = generate(seeing, [prompt], [None])[0]
        assert (answer["tokens"], answer["logprobs"]) == (alone["tokens"], alone["logprobs"])


def test_a_request_that_is_preempted_has_each_token_once(seeing, tiny_oracle, library) -> None:
    def preemptions() -> int:
        return sum(metric.value for metric in seeing.get_metrics() if metric.name == "vllm:num_preemptions")

    before, engine = preemptions(), seeing.llm_engine
    requests = [ActivationRequest({1: (3, 4)}), ActivationRequest({2: None, 0: (1,)}, every_reduction(seeing), first=1)]
    asked = {
        f"{asked.key}": asked
        for asked in (Asked([7 + n, *range(3, 122)], "en", requests[n % 2], 200 if not V2 else 120) for n in range(8))
    }
    for key, each in asked.items():
        engine.add_request(key, each.engine_prompt, each.parameters)
    tokens = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    assert preemptions() > before
    for key, each in asked.items():
        check(tiny_oracle, library, each, tokens[key], taken(seeing, each, len(tokens[key]) - 1))


def test_what_is_taken_or_was_aborted_is_forgotten_and_the_next_request_is_exact(seeing, tiny_oracle, library) -> None:
    asked = Asked(PROMPTS[0], None, SOME)
    [(tokens, *_)] = run(seeing, [asked])
    assert taken(seeing, asked, len(tokens) - 1) is None
    engine, aborted = seeing.llm_engine, Asked(LONG, "zh", WHOLE, 50)
    engine.add_request("aborted", aborted.engine_prompt, aborted.parameters)
    for _ in range(4):
        engine.step()
    engine.abort_request(["aborted"])
    assert taken(seeing, aborted, 0) is None
    assert taken(seeing, aborted, 3) is None
    for _ in range(MAX_REQUESTS + 1):
        [(tokens, _, seen, _)] = run(seeing, [asked])
        check(tiny_oracle, library, asked, tokens, seen)


def test_an_end_before_what_has_been_reduced_or_behind_what_is_known_gives_nothing(seeing) -> None:
    for end, there in ((4, False), (5, True), (8, True), (9, False)):
        asked = Asked([5, 6, 7, 8, 9], None, ActivationRequest({0: (1,)}, (Reduction.MEAN,)), max_tokens=4)
        seeing.generate([asked.engine_prompt], [asked.parameters], use_tqdm=False)
        assert (taken(seeing, asked, end) is not None) == there


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ActivationRequest({}), "expected 'layers', 'neurons' or both"),
        (ActivationRequest({LAYERS: None}), f"layer {LAYERS}: the model has the layers 0 to {LAYERS - 1}"),
        (ActivationRequest({0: (NEURONS,)}), f"layer 0, neuron {NEURONS}: expected 0 to {NEURONS - 1}"),
        (ActivationRequest({0: (-1,)}), "layer 0, neuron -1"),
        (ActivationRequest({0: (4, 4)}), "layer 0: a neuron is asked for twice"),
        (ActivationRequest({0: ()}), "layer 0: expected at least one neuron"),
        (ActivationRequest({0: None}, first=4), "within the prompt's 4"),
        (ActivationRequest({0: None}, first=2, end=2), "an end behind it"),
    ],
)
def test_what_there_cannot_be_is_refused(seeing, request_: ActivationRequest, message: str) -> None:
    from vllm.exceptions import VLLMValidationError

    asked = Asked([3, 4, 5, 6], None, request_)
    with pytest.raises(VLLMValidationError, match=message):
        seeing.generate([asked.engine_prompt], [asked.parameters], use_tqdm=False)


def test_several_answers_of_one_request_are_refused(seeing) -> None:
    from vllm.exceptions import VLLMValidationError

    asked = Asked([3, 4, 5, 6], None, SOME, options={"n": 2, "temperature": 1.0})
    with pytest.raises(VLLMValidationError, match="n is 2, expected 1"):
        seeing.generate([asked.engine_prompt], [asked.parameters], use_tqdm=False)


def test_an_engine_without_activations_refuses_and_has_no_buffers(llm) -> None:
    from vllm.exceptions import VLLMValidationError

    asked = Asked([3, 4, 5, 6], None, SOME)
    with pytest.raises(VLLMValidationError, match="started without activations; CRANE_ACTIVATIONS=1"):
        llm.generate([asked.engine_prompt], [asked.parameters], use_tqdm=False)
    [names] = llm.collective_rpc(buffers)
    assert not [name for name in names if "capture" in name]


def buffers(worker) -> list[str]:
    return [name for name, _ in worker.model_runner.model.named_buffers()]
