"""The service on a real engine, over HTTP, with our own client."""

import asyncio
import json
import random
from pathlib import Path

import httpx
import pytest

from clients import AsyncCraneClient, CraneClient, Evaluation
from crane_serve.cli import app
from crane_serve.common.masks import NeuronMask
from tests.conftest import TINY_CHUNK_TOKENS, Tiny
from tests.engines import Oracle, Server

pytestmark = pytest.mark.engine

TEXTS = ["The harbour froze.", "港口结冰了。", "Bến cảng đóng băng.", "A text longer than one chunk of prefill. " * 5]
MASKS = ["none", "en", "zh", "vi", "zh,vi", "zh@0.5", "en@2,vi"]


def neuron_mask(tiny: Tiny, name: str) -> NeuronMask | None:
    resolved = tiny.library.resolve(name)
    return None if resolved is None else resolved.mask


@pytest.mark.parametrize("mask", MASKS)
def test_score_equals_transformers_with_the_same_neurons_zeroed(
    tiny: Tiny, tiny_server: Server, tiny_oracle: Oracle, mask: str
) -> None:
    assert max(len(text.encode()) for text in TEXTS) > 2 * TINY_CHUNK_TOKENS
    with CraneClient(tiny_server.url) as client:
        scores = client.score_text(TEXTS, mask=mask).scores
    for text, score in zip(TEXTS, scores, strict=True):
        expected = tiny_oracle.text_logprobs(text, neuron_mask(tiny, mask))
        assert (score.tokens, score.bytes) == (len(expected), len(text.encode()))
        assert score.logprob / score.tokens == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_a_mask_in_the_body_gives_what_the_same_mask_gives_by_name(tiny: Tiny, tiny_server: Server) -> None:
    sets = tiny.library.get("zh").mask.neuron_sets()
    brought = {"mask": {"neurons": {str(layer): neurons for layer, neurons in enumerate(sets)}}}

    def post(route: str, body: dict, query: str = "") -> dict:
        answer = httpx.post(f"{tiny_server.url}{route}{query}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        expected = {"": "inline", "?mask=zh": "attnlrp-zh", "?mask=none": None}[query]
        assert answer.headers.get("x-crane-mask") == expected
        return answer.json()

    scores = {"text": TEXTS}
    by_name, by_body = post("/score", scores, "?mask=zh"), post("/score", {**scores, **brought})
    assert [score["logprob"] for score in by_body["scores"]] == pytest.approx(
        [score["logprob"] for score in by_name["scores"]], abs=1e-4 * len(TEXTS[3])
    )
    assert by_body["mask"]["neurons"] == by_name["mask"]["neurons"]
    assert (by_body["mask"]["name"], by_body["mask"]["digest"] != by_name["mask"]["digest"]) == ("inline", True)
    greedy = {"max_tokens": 12, "temperature": 0}
    prompt = {"prompt": TEXTS[1], **greedy}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": TEXTS[1]}], **greedy}
    for route, body, answered in (
        ("/generate", prompt, "outputs"),
        ("/v1/completions", {"model": "tiny", **prompt}, "choices"),
        ("/v1/chat/completions", chat, "choices"),
        ("/inference/v1/generate", {"token_ids": [0, 74, 75], "sampling_params": greedy}, "choices"),
    ):
        by_name, by_body = post(route, body, "?mask=zh"), post(route, body | brought)
        assert by_body[answered] == by_name[answered] != post(route, body, "?mask=none")[answered]
    refused = httpx.post(f"{tiny_server.url}/generate?mask=zh", json=prompt | brought)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "mask_conflict")


def test_continuations_equal_transformers(tiny: Tiny, tiny_server: Server, tiny_oracle: Oracle) -> None:
    context, continuations = "Two and two make ", ["four", "five and a half"]
    with CraneClient(tiny_server.url) as client:
        scores = client.score_continuations(context, continuations, mask="vi").scores
    for continuation, score in zip(continuations, scores, strict=True):
        expected = tiny_oracle.text_logprobs(context + continuation, neuron_mask(tiny, "vi"))
        tokens = len(f" {continuation}")  # the space at the end of the context counts as part of the continuation
        assert score.tokens == tokens
        assert score.logprob == pytest.approx(sum(expected[-tokens:]), abs=1e-4 * tokens)


def test_a_text_has_one_start_token_or_none_as_asked(tiny: Tiny, tiny_server: Server, tiny_oracle: Oracle) -> None:
    start, *token_ids = tiny_oracle.tokenizer(TEXTS[1])["input_ids"]
    with_start = tiny_oracle.logprobs([start, *token_ids], neuron_mask(tiny, "zh"))
    without = tiny_oracle.logprobs(token_ids, neuron_mask(tiny, "zh"))
    bytes_ = len(TEXTS[1].encode())
    with CraneClient(tiny_server.url) as client:
        ready = client.ready()
        assert (ready.prompt_start, ready.text_start) == ((start,), start)
        plain, brought = client.score_text([TEXTS[1], f"<s>{TEXTS[1]}"], mask="zh").scores
        (bare,) = client.score_text(TEXTS[1], mask="zh", add_bos=False).scores
        prompts = [client.generate(f"<s>{TEXTS[1]}", mask="zh", max_tokens=1, add_bos=on) for on in ("auto", False)]
        prompts.append(client.generate(TEXTS[1], mask="zh", max_tokens=1, add_bos=False))
    assert plain == brought
    assert (plain.tokens, plain.bytes, bare.tokens, bare.bytes) == (len(token_ids), bytes_, len(without), bytes_ - 1)
    assert plain.logprob == pytest.approx(sum(with_start), abs=1e-4 * plain.tokens)
    assert bare.logprob == pytest.approx(sum(without), abs=1e-4 * bare.tokens)
    assert [each.usage.prompt_tokens - len(token_ids) for each in prompts] == [1, 1, 0]


async def test_hundreds_of_requests_under_all_masks_at_once_equal_solo_runs(tiny_server: Server) -> None:
    jobs = [(text, mask) for text in TEXTS for mask in MASKS] * 10
    random.Random(0).shuffle(jobs)
    async with AsyncCraneClient(tiny_server.url, concurrency=64) as client:
        solo = {job: (await client.score_text([job[0]], mask=job[1])).scores[0].logprob for job in set(jobs)}
        together = await asyncio.gather(*(client.score_text([text], mask=mask) for text, mask in jobs))
    for (text, mask), answer in zip(jobs, together, strict=True):
        score = answer.scores[0]
        assert score.logprob / score.tokens == pytest.approx(solo[text, mask] / score.tokens, abs=1e-4)


def test_a_stream_says_what_the_plain_answer_says(tiny_server: Server) -> None:
    settings = {"max_tokens": 20, "temperature": 0.0}
    with CraneClient(tiny_server.url) as client:
        plain = client.generate(TEXTS[:2], mask="zh", **settings)
        with client.generate_stream(TEXTS[:2], mask="zh", **settings) as stream:
            deltas = list(stream)
    for output in plain.outputs:
        assert "".join(delta.text for delta in deltas if delta.index == output.index) == output.text
    assert stream.end is not None
    assert stream.end.mask == plain.mask
    assert [output.completion_tokens for output in stream.end.outputs] == [20, 20]


def test_a_seed_makes_sampling_repeatable_also_for_prompts_in_several_chunks(tiny_server: Server) -> None:
    sampling = {"max_tokens": 16, "temperature": 1.0, "seed": 7}
    with CraneClient(tiny_server.url) as client:
        first, again = (client.generate(TEXTS[3], mask="zh", **sampling).outputs[0].text for _ in range(2))
        other = client.generate(TEXTS[3], mask="zh", **{**sampling, "seed": 8}).outputs[0].text
    assert first == again
    assert first != other


def test_the_answer_names_the_mask_it_was_computed_under(tiny: Tiny, tiny_server: Server) -> None:
    with CraneClient(tiny_server.url) as client:
        used = client.generate("x", mask="zh", max_tokens=1).mask
        unmasked = client.generate("x", max_tokens=1).mask
    stored = tiny.library.get("attnlrp-zh")
    assert used is not None
    assert (used.name, used.digest, used.neurons) == ("attnlrp-zh", stored.mask.digest, stored.mask.neurons)
    assert unmasked is None


@pytest.mark.parametrize(
    ("query", "body", "status", "code"),
    [
        ("?mask=fr", {}, 404, "unknown_mask"),
        ("?mask=zh", {"mask": "vi"}, 400, "mask_conflict"),
        ("?mask=zh&mask=vi", {}, 400, "mask_conflict"),
        ("?mask=corrupt", {}, 409, "invalid_mask"),
        ("?mask=foreign", {}, 409, "invalid_mask"),
        ("", {"prompt": "x" * 600}, 400, "rejected_request"),
        ("", {"prompt": 5}, 422, "malformed_body"),
    ],
)
def test_a_bad_request_is_one_clear_error_and_the_next_is_answered(
    tiny_server: Server, query: str, body: dict, status: int, code: str
) -> None:
    answer = httpx.post(f"{tiny_server.url}/generate{query}", json={"prompt": "x", "max_tokens": 1, **body})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    good = httpx.post(f"{tiny_server.url}/generate?mask=zh", json={"prompt": "x", "max_tokens": 1})
    assert good.json()["mask"]["name"] == "attnlrp-zh"


def test_a_client_that_leaves_in_mid_stream_costs_nobody_else(tiny_server: Server) -> None:
    with CraneClient(tiny_server.url) as client:
        for _ in range(12):  # more than the engine runs at once
            with client.generate_stream("Go on for long", mask="vi", max_tokens=400, temperature=0.0) as stream:
                next(iter(stream))
        assert client.generate("x", mask="zh", max_tokens=2, temperature=0.0).outputs[0].completion_tokens == 2


def test_crane_eval_writes_the_matrix(tiny_server: Server, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for language, text in zip(("en", "zh", "vi"), TEXTS, strict=False):
        lines = [json.dumps({"id": str(index), "text": text * (index + 1)}) for index in range(3)]
        (corpus / f"{language}.jsonl").write_text("\n".join(lines))
    options = ["--server", tiny_server.url, "--corpus", str(corpus), "--mask", "en", "--mask", "zh"]
    result = CliRunner().invoke(app, ["eval", *options, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    evaluation = Evaluation.read(tmp_path / "out")
    assert list(evaluation.masks) == ["none", "attnlrp-en", "attnlrp-zh"]
    assert not evaluation.failures
    change = {cell.mask: cell.change for cell in evaluation.cells if cell.language == "zh" and cell.change}
    assert change["attnlrp-zh"].mean != 0
