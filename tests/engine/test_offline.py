"""Masks under vLLM's own scheduler: parity, mixing, chunked prefill, prefix cache, admission."""

import json
import os
from itertools import product
from typing import Any

import pytest

from crane_serve.common.defaults import DEFAULT_ROWS
from crane_serve.common.masks import Composition, MaskLibrary, Member, NeuronMask
from tests.conftest import Engines
from tests.engine.offline import BLOCK_TOKENS, CHUNK_TOKENS, LONG, PROMPTS, V2, generate
from tests.engines import Oracle
from tests.runners import ASYNCHRONOUS
from tests.tiny import BEYOND

pytestmark = pytest.mark.engine

MASKS = [None, "en", "zh", "vi", "zh,vi", "zh@0.5", "out"]
TOLERANCE = 1e-4  # nats


def assert_same(left: dict, right: dict) -> None:
    assert left["tokens"] == right["tokens"]
    assert left["logprobs"] == pytest.approx(right["logprobs"], abs=TOLERANCE)


def test_the_engine_runs_in_the_way_that_these_tests_are_run(llm) -> None:
    config = llm.llm_engine.vllm_config
    assert config.use_v2_model_runner == V2
    assert config.scheduler_config.async_scheduling == (os.environ.get(ASYNCHRONOUS) == "1")


def test_unmasked_requests_are_bit_identical_to_vllm_without_the_plugin(llm, baseline) -> None:
    for prompt, alone in zip(PROMPTS, baseline["compiled"], strict=True):
        answer = generate(llm, [prompt], [None])[0]
        assert (answer["tokens"], answer["logprobs"]) == (alone["tokens"], alone["logprobs"])


@pytest.mark.parametrize("mask", MASKS)
def test_every_prompt_and_generated_token_agrees_with_transformers(
    llm, library: MaskLibrary, tiny_oracle: Oracle, mask
) -> None:
    resolved = library.resolve(mask)
    neuron_mask = None if resolved is None else resolved.mask
    for answer in generate(llm, PROMPTS, [mask] * len(PROMPTS), score=True):
        expected = tiny_oracle.logprobs(answer["prompt"] + answer["tokens"], neuron_mask)
        assert answer["prompt_logprobs"] + answer["logprobs"] == pytest.approx(expected, abs=1e-3)
        assert sum(answer["prompt_logprobs"] + answer["logprobs"]) == pytest.approx(
            sum(expected), abs=TOLERANCE * len(expected)
        )


@pytest.fixture(scope="module")
def eager_idle(engines: Engines) -> list[dict]:
    """Unmasked generations without compilation, with the plugin."""
    engines.jobs.wait("families")
    return json.loads((engines.directory / "families" / "answers.json").read_text())["tiny"]


def test_unmasked_requests_are_bit_identical_in_eager_mode_too(eager_idle: list[dict], baseline) -> None:
    assert len(eager_idle) == len(PROMPTS)
    assert eager_idle == baseline["eager"]


def test_the_masks_matter(llm) -> None:
    answers = generate(llm, [PROMPTS[0]] * len(MASKS), MASKS)
    assert len({tuple(answer["logprobs"]) for answer in answers}) == len(MASKS)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_mixed_batch_equals_solo_runs(llm, prompt: str) -> None:
    together = generate(llm, [prompt] * len(MASKS), MASKS)
    for mask, mixed in zip(MASKS, together, strict=True):
        assert_same(mixed, generate(llm, [prompt], [mask], salt="cold")[0])


def test_prompts_of_all_lengths_with_all_masks_equal_solo_runs(llm) -> None:
    prompts = [prompt for prompt in PROMPTS for _ in MASKS]
    masks = MASKS * len(PROMPTS)
    assert max(len(prompt) for prompt in prompts) > 2 * CHUNK_TOKENS
    for prompt, mask, mixed in zip(prompts, masks, generate(llm, prompts, masks), strict=True):
        assert_same(mixed, generate(llm, [prompt], [mask], salt="cold")[0])


@pytest.mark.parametrize(
    ("first", "second"), [("zh", None), (None, "zh"), ("zh", "vi"), ("zh", "zh,vi"), ("zh", "zh@0.5"), ("en", "out")]
)
def test_the_prefix_cache_does_not_leak_between_masks(
    llm, library: MaskLibrary, tiny_oracle: Oracle, first, second
) -> None:
    prompt = f"{first} before {second}: {LONG}"
    generate(llm, [prompt], [first])
    answer = generate(llm, [prompt], [second])[0]
    resolved = library.resolve(second)
    expected = tiny_oracle.logprobs(answer["prompt"] + answer["tokens"], resolved.mask if resolved else None)
    assert answer["cached"] == 0
    assert answer["logprobs"] == pytest.approx(expected[-len(answer["tokens"]) :], abs=1e-3)


@pytest.mark.parametrize("mask", [None, "zh", "zh,vi"])
def test_the_same_mask_twice_hits_the_prefix_cache(llm, mask) -> None:
    prompt = f"twice under {mask}: {LONG}"
    cold, warm = (generate(llm, [prompt], [mask])[0] for _ in range(2))
    assert (cold["cached"], warm["cached"]) == (0, len(warm["prompt"]) // BLOCK_TOKENS * BLOCK_TOKENS)
    assert_same(cold, warm)


def test_clients_with_salts_of_their_own_share_with_themselves_under_the_same_mask_only(llm) -> None:
    prompt = f"salted: {LONG}"[: 2 * BLOCK_TOKENS]  # short, so that all of it fits into the cache at once
    whole = len(generate(llm, [prompt], [None])[0]["prompt"]) // BLOCK_TOKENS * BLOCK_TOKENS
    visits = [(mask, salt) for salt in ("one", "two") for mask in ("zh", None, "vi")]
    first = [generate(llm, [prompt], [mask], salt=salt)[0] for mask, salt in visits]
    again = [generate(llm, [prompt], [mask], salt=salt)[0] for mask, salt in reversed(visits)]
    assert [answer["cached"] for answer in first] == [0] * len(visits)
    assert [answer["cached"] for answer in again] == [whole] * len(visits)
    for cold, warm in zip(first, reversed(again), strict=True):
        assert_same(cold, warm)


def test_more_masks_than_rows_pass_through_the_table(llm, library: MaskLibrary, tiny_oracle: Oracle) -> None:
    masks = [f"{name}@{factor / 128!r}" for factor in range(100) for name in ("en", "zh", "vi")]
    assert len(masks) > DEFAULT_ROWS
    for mask, answer in zip(masks, generate(llm, [PROMPTS[0]] * len(masks), masks), strict=True):
        expected = tiny_oracle.logprobs(answer["prompt"] + answer["tokens"], library.resolve(mask).mask)
        assert answer["logprobs"] == pytest.approx(expected[-len(answer["tokens"]) :], abs=1e-3)


def test_a_union_in_another_order_is_the_same_mask(llm) -> None:
    prompt = f"either order: {LONG}"
    generate(llm, [prompt], ["zh,vi"])
    assert generate(llm, [prompt], ["attnlrp-vi,attnlrp-zh"])[0]["cached"] > 0


def in_request(library: MaskLibrary, name: str, **fields: float) -> dict[str, Any]:
    """The neurons of a mask file, as a request brings them."""
    sets = library.get(name).mask.neuron_sets()
    return {"neurons": {str(layer): neurons[::-1] for layer, neurons in enumerate(sets)}, **fields}


@pytest.mark.parametrize(("name", "fields"), [("zh", {}), ("en", {"scale": 0}), ("vi@0.5", {"scale": 0.5})])
def test_neurons_in_a_request_do_what_they_do_in_a_file(llm, library: MaskLibrary, name: str, fields: dict) -> None:
    brought = in_request(library, name.partition("@")[0], **fields)
    for prompt in PROMPTS:
        of_file, of_request = (generate(llm, [prompt], [mask], score=True)[0] for mask in (name, brought))
        assert of_request == of_file  # to the bit: the rows are equal


def test_masks_in_requests_mix_with_names_and_with_none(llm, library: MaskLibrary) -> None:
    masks = [None, "zh", in_request(library, "zh"), in_request(library, "vi", scale=2), "out", {"neurons": {"1": [5]}}]
    for prompt in (PROMPTS[1], LONG):
        together = generate(llm, [prompt] * len(masks), masks)
        assert_same(together[1], together[2])
        for mask, mixed in zip(masks, together, strict=True):
            assert_same(mixed, generate(llm, [prompt], [mask], salt="cold")[0])


@pytest.mark.parametrize(
    ("first", "second"),
    [("zh", None), (None, "zh"), ("zh", "zh by name"), ("zh by name", "zh"), ("zh", "vi"), ("zh", "zh at half")],
)
def test_the_prefix_cache_keeps_masks_in_requests_apart(
    llm, library: MaskLibrary, tiny_oracle: Oracle, first: str | None, second: str | None
) -> None:
    masks: dict[str | None, Any] = {
        None: None,
        "zh": in_request(library, "zh"),
        "vi": in_request(library, "vi"),
        "zh by name": "zh",
        "zh at half": in_request(library, "zh", scale=0.5),
    }
    meaning = {"zh by name": "zh", "zh at half": "zh@0.5"}
    prompt = f"brought: {first} before {second}: {LONG}"
    generate(llm, [prompt], [masks[first]])
    cold, warm = (generate(llm, [prompt], [masks[second]])[0] for _ in range(2))
    resolved = library.resolve(meaning.get(second, second))
    expected = tiny_oracle.logprobs(cold["prompt"] + cold["tokens"], resolved.mask if resolved else None)
    assert (cold["cached"], warm["cached"]) == (0, len(cold["prompt"]) // BLOCK_TOKENS * BLOCK_TOKENS)
    assert cold["logprobs"] == pytest.approx(expected[-len(cold["tokens"]) :], abs=1e-3)
    assert_same(cold, warm)


def test_the_same_neurons_in_another_order_share_a_prefix(llm) -> None:
    prompt = f"another order: {LONG}"
    generate(llm, [prompt], [{"neurons": {"0": [3, 9], "2": [1]}}])
    assert generate(llm, [prompt], [{"scale": -0.0, "neurons": {"2": [1], "0": [9, 3]}}])[0]["cached"] > 0


def test_more_masks_in_requests_than_rows_pass_through_the_table(
    llm, library: MaskLibrary, tiny_oracle: Oracle
) -> None:
    sets = [[[number % 160], [], [number % 7, 40 + number % 11]] for number in range(DEFAULT_ROWS + 20)]
    masks = [{"neurons": {str(layer): neurons for layer, neurons in enumerate(of)}, "scale": -8} for of in sets]
    for of, answer in zip(sets, generate(llm, [PROMPTS[0]] * len(masks), masks), strict=True):
        off = NeuronMask.switching_off(of, library.fingerprint.intermediate_sizes)
        mask = Composition([Member(NeuronMask(1 - 9 * (1 - off.intermediate), off.intermediate_sizes))])
        expected = tiny_oracle.logprobs(answer["prompt"] + answer["tokens"], mask)
        assert answer["logprobs"] == pytest.approx(expected[-len(answer["tokens"]) :], abs=1e-3)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"neurons": {"0": [160]}}, "layer 0: 160 is no neuron"),
        ({"neurons": {"0": [1]}, "offset": 1}, "adds to neurons, which this engine was started without"),
        ("fr", "unknown mask 'fr'; this server has attnlrp-en"),
        ("zh,", "malformed"),
        (7, "expected a mask name"),
    ],
)
def test_a_bad_mask_is_refused_and_the_engine_lives(llm, mask, message: str) -> None:
    with pytest.raises(Exception, match=message):
        generate(llm, [PROMPTS[0]], [mask])
    assert generate(llm, [PROMPTS[0]], ["zh"])[0]["tokens"]


def test_a_token_beyond_the_vocabulary_is_named_and_the_engine_lives(llm) -> None:
    from vllm.exceptions import VLLMValidationError

    for mask, prompt in product((None, "zh"), (f"Look: {BEYOND}", {"prompt_token_ids": [0, 258]})):
        with pytest.raises(VLLMValidationError, match=rf"token 258 \('{BEYOND}'\) .* 258 tokens"):
            generate(llm, [prompt], [mask], score=True)
    assert generate(llm, [PROMPTS[0]], ["zh"])[0]["tokens"]


def test_the_engine_core_refuses_a_token_that_the_front_end_let_through(llm, monkeypatch: pytest.MonkeyPatch) -> None:
    from crane_serve.engine import plugin

    monkeypatch.setattr(plugin, "require_embeddings", lambda *_: None)
    answer = llm.generate([f"Look: {BEYOND}"], _masked_parameters("zh"), use_tqdm=False)[0]
    assert answer.outputs[0].finish_reason == "error"
    monkeypatch.undo()
    assert generate(llm, [PROMPTS[0]], ["zh"])[0]["tokens"]


def test_the_weights_are_not_loaded_again_and_the_engine_lives(llm) -> None:
    before = generate(llm, [PROMPTS[0]], ["zh"])
    with pytest.raises(Exception, match="cannot be loaded again"):
        llm.collective_rpc("reload_weights")
    assert_same(generate(llm, [PROMPTS[0]], ["zh"])[0], before[0])


def test_a_salt_of_the_reserved_form_is_refused(llm) -> None:
    with pytest.raises(Exception, match="cache_salt must not begin with"):
        generate(llm, [PROMPTS[0]], [None], salt="crane-mask-0")


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_beam_search_over_http_refuses_a_mask_which_it_would_drop(llm, kind: str) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    asked = {"use_beam_search": True, "n": 2, "vllm_xargs": {"crane_mask": "zh"}}
    if kind == "completion":
        request = CompletionRequest(prompt="x", **asked)
    else:
        request = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], **asked)
    with pytest.raises(Exception, match="beam search cannot be masked"):
        request.to_beam_search_params(8, {})
    request.vllm_xargs = None
    assert request.to_beam_search_params(8, {}).beam_width == 2


def test_the_engine_core_refuses_what_the_front_end_let_through(llm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second line: a request that reaches the engine core with an unknown mask fails; it never runs unmasked."""
    from crane_serve.engine import plugin

    monkeypatch.setattr(plugin, "admit", lambda *_, **__: None)
    for mask in ("fr", {"neurons": {"0": [160]}}, 'neurons:{"neurons":{"0":[1,1]}}'):
        answer = llm.generate([PROMPTS[0]], _masked_parameters(mask), use_tqdm=False)[0]
        assert answer.outputs[0].finish_reason == "error"
    monkeypatch.undo()
    assert generate(llm, [PROMPTS[0]], ["zh"])[0]["tokens"]


def _masked_parameters(mask: str | dict):
    from vllm import SamplingParams

    return SamplingParams(max_tokens=2, extra_args={"crane_mask": mask})
