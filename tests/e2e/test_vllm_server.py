"""vLLM's own OpenAI server with the plugin: each route runs a request under exactly its mask, or refuses it by name."""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import TINY_FLAGS, Tiny
from tests.engines import Oracle, Server

pytestmark = pytest.mark.engine

TEXT = "The harbour froze."
TOKENS = 12  # /render leaves 16 out, as the default, and /inference/v1/generate takes that for no limit
MESSAGES = [{"role": "user", "content": TEXT}]
GREEDY = {"model": "tiny", "temperature": 0, "ignore_eos": True}
COMPLETION = {**GREEDY, "prompt": TEXT, "max_tokens": TOKENS, "logprobs": 0}
CHAT = {**GREEDY, "messages": MESSAGES, "max_tokens": TOKENS, "logprobs": True}
RESPONSE = {**GREEDY, "input": TEXT, "max_output_tokens": TOKENS, "include": ["message.output_text.logprobs"]}
ZH = {"crane_mask": "zh"}


@pytest.fixture(scope="module")
def server(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("vllm-server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny.checkpoint)]
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    flags = ["--host", "127.0.0.1", "--served-model-name", "tiny", "--chat-template", template]
    # Token ids in place of texts, for which random models need not have any.
    flags += [*TINY_FLAGS, "--enforce-eager", "--enable-scale-out", "--return-tokens-as-token-ids"]
    running = Server([*command, *flags, "--port"], log, {"CRANE_MASKS": str(tiny.masks)}, ready="/health")
    try:
        with httpx.Client(base_url=running.wait().url, timeout=120) as client:
            yield client
    finally:
        running.stop()


def post(server: httpx.Client, path: str, body: Any) -> Any:
    answer = server.post(path, json=body)
    assert answer.is_success, answer.text
    return answer.json()


def xargs(body: dict, arguments: dict | None) -> dict:
    return body if arguments is None else {**body, "vllm_xargs": arguments}


# How to ask each route that carries a mask; each gives the tokens and their log-probabilities.
Answer = tuple[list[int], list[float]]


def _entries(entries: list[dict]) -> Answer:
    ids = [entry["token_id"] if "token_id" in entry else entry["token"].rpartition(":")[2] for entry in entries]
    return [int(token) for token in ids], [entry["logprob"] for entry in entries]


def completion(server: httpx.Client, arguments: dict | None) -> Answer:
    logprobs = post(server, "/v1/completions", xargs(COMPLETION, arguments))["choices"][0]["logprobs"]
    return [int(token.rpartition(":")[2]) for token in logprobs["tokens"]], logprobs["token_logprobs"]


def chat(server: httpx.Client, arguments: dict | None) -> Answer:
    answer = post(server, "/v1/chat/completions", xargs(CHAT, arguments))
    return _entries(answer["choices"][0]["logprobs"]["content"])


def chat_batch(server: httpx.Client, arguments: dict | None) -> Answer:
    answer = post(server, "/v1/chat/completions/batch", xargs({**CHAT, "messages": [MESSAGES] * 2}, arguments))
    first, second = (_entries(choice["logprobs"]["content"]) for choice in answer["choices"])
    assert first[0] == second[0]
    return second


def response(server: httpx.Client, arguments: dict | None) -> Answer:
    answer = post(server, "/v1/responses", xargs(RESPONSE, arguments))
    return _entries(answer["output"][0]["content"][0]["logprobs"])


def generate(server: httpx.Client, rendered: dict) -> Answer:
    answer = post(server, "/inference/v1/generate", rendered)
    return _entries(answer["choices"][0]["logprobs"]["content"])


def rendered_completion(server: httpx.Client, arguments: dict | None) -> Answer:
    (rendered,) = post(server, "/v1/completions/render", xargs(COMPLETION, arguments))
    return generate(server, rendered)


def rendered_chat(server: httpx.Client, arguments: dict | None) -> Answer:
    return generate(server, post(server, "/v1/chat/completions/render", xargs(CHAT, arguments)))


def rendered_response(server: httpx.Client, arguments: dict | None) -> Answer:
    return generate(server, post(server, "/v1/responses/render", xargs(RESPONSE, arguments)))


def rendered_message(server: httpx.Client, arguments: dict | None) -> Answer:
    body = {"model": "tiny", "temperature": 0, "messages": MESSAGES, "max_tokens": TOKENS}
    rendered = post(server, "/v1/messages/render", xargs(body, arguments))
    rendered["sampling_params"].update(logprobs=0, ignore_eos=True)  # which /v1/messages has no names for
    return generate(server, rendered)


WAYS = [
    *((way, True) for way in (completion, response, rendered_completion, rendered_response)),
    *((way, False) for way in (chat, chat_batch, rendered_chat, rendered_message)),
]


@pytest.mark.parametrize(
    ("mask", "positions"),
    [(None, None), ("none", None), ("zh,vi", None), ("en@0.5", "all"), ("zh", "prompt"), ("zh", "generated")],
)
@pytest.mark.parametrize(("ask", "begins"), WAYS, ids=[way.__name__ for way, _ in WAYS])
def test_each_route_that_carries_a_mask_equals_transformers_under_it(
    tiny: Tiny,
    tiny_oracle: Oracle,
    server: httpx.Client,
    ask: Callable[..., Answer],
    begins: bool,
    mask: str | None,
    positions: str | None,
) -> None:
    resolved = None if mask is None else tiny.library.resolve(mask)
    arguments = {"crane_mask": mask, "crane_positions": positions}
    prompt = tiny_oracle.tokenizer(TEXT)["input_ids"][0 if begins else 1 :]
    masked = {"prompt": slice(0, len(prompt)), "generated": slice(len(prompt), None)}.get(positions, slice(None))
    tokens, logprobs = ask(server, {name: value for name, value in arguments.items() if value is not None} or None)
    expected = tiny_oracle.logprobs([*prompt, *tokens], None if resolved is None else resolved.mask, masked)
    assert len(tokens) == TOKENS
    assert logprobs == pytest.approx(expected[-TOKENS:], abs=1e-4)


def test_messages_say_what_chat_says_under_the_same_mask(server: httpx.Client) -> None:
    texts = {}
    for mask in ("none", "zh", "vi"):
        body = {
            "model": "tiny",
            "temperature": 0,
            "messages": MESSAGES,
            "max_tokens": TOKENS,
            "vllm_xargs": {"crane_mask": mask},
        }
        said = post(server, "/v1/messages", body)["content"]
        chat_said = post(server, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
        assert "".join(part["text"] for part in said) == chat_said
        texts[mask] = chat_said
    assert len(set(texts.values())) == 3


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_a_masked_stream_says_what_the_plain_answer_says(server: httpx.Client, path: str, body: dict) -> None:
    plain = post(server, path, xargs(body, ZH))["choices"][0]
    with server.stream("POST", path, json={**xargs(body, ZH), "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    if path == "/v1/completions":
        assert "".join(choice["text"] for choice in choices) == plain["text"]
    else:
        said = "".join(choice["delta"].get("content") or "" for choice in choices)
        assert said == plain["message"]["content"]
    assert len(choices) > TOKENS // 2


SCORING = {"model": "tiny", "query": "a", "items": ["b"], "label_token_ids": [5, 6]}
TOKEN_IDS = {"token_ids": [0, 5, 6], "sampling_params": {"max_tokens": 1}}


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/completions", {**COMPLETION, **ZH}, "'crane_mask' would be ignored"),
        ("/v1/completions", {**COMPLETION, "mask": "zh"}, "'mask' would be ignored"),
        ("/v1/completions", {**COMPLETION, "neuron_mask": "zh"}, "'neuron_mask' would be ignored"),
        ("/v1/completions", {**COMPLETION, "metadata": {"maks": "zh"}}, "'metadata.maks' would be ignored"),
        ("/v1/completions", xargs(COMPLETION, {"masks": "zh"}), "'vllm_xargs.masks' would be ignored"),
        ("/v1/completions", xargs({**COMPLETION, "positions": "prompt"}, ZH), "'positions' would be ignored"),
        ("/v1/completions?masks=zh", COMPLETION, "query parameter 'masks'"),
        ("/v1/completions?mask=zh", COMPLETION, "query parameter 'mask'"),
        ("/v1/completions", xargs(COMPLETION, {"crane_mask": "fr"}), "unknown mask 'fr'"),
        ("/v1/completions", xargs(COMPLETION, {"crane_masks": "zh"}), "crane_masks"),
        ("/v1/completions", xargs({**COMPLETION, "use_beam_search": True, "n": 2}, ZH), "beam search"),
        ("/v1/completions/render", xargs({**COMPLETION, "use_beam_search": True, "n": 2}, ZH), "beam search"),
        ("/v1/chat/completions", {**CHAT, "extra_body": {"vllm_xargs": ZH}}, "'extra_body.vllm_xargs.crane_mask'"),
        ("/v1/chat/completions", xargs(CHAT, {"crane_mask": "fr"}), "unknown mask 'fr'"),
        ("/v1/chat/completions/batch", {**CHAT, "messages": [MESSAGES], **ZH}, "'crane_mask' would be ignored"),
        ("/v1/responses", {**RESPONSE, **ZH}, "'crane_mask' would be ignored"),
        ("/v1/responses", {**RESPONSE, "metadata": ZH}, "'metadata.crane_mask'"),
        ("/v1/responses", xargs(RESPONSE, {"crane_mask": "fr"}), "unknown mask 'fr'"),
        ("/v1/messages", {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **ZH}, "'crane_mask'"),
        ("/v1/messages/count_tokens", xargs({"model": "tiny", "messages": MESSAGES}, ZH), "count_tokens cannot"),
        ("/inference/v1/generate", xargs(TOKEN_IDS, ZH), "'vllm_xargs.crane_mask' would be ignored"),
        ("/inference/v1/generate", {**TOKEN_IDS, "sampling_params": ZH}, "'sampling_params.crane_mask'"),
        ("/generative_scoring", xargs(SCORING, ZH), "/generative_scoring cannot run under a mask"),
        ("/generative_scoring?crane_mask=zh", SCORING, "query parameter 'crane_mask'"),
        ("/v1/systemone", {"model": "tiny", "state": "a", "questions": {}, **ZH}, "/v1/systemone cannot"),
        ("/invocations", xargs(COMPLETION, ZH), "/invocations cannot run under a mask"),
        ("/tokenize", xargs({"model": "tiny", "prompt": "x"}, ZH), "/tokenize cannot run under a mask"),
        ("/v1/embeddings", xargs({"model": "tiny", "input": "x"}, ZH), "/v1/embeddings cannot run under a mask"),
        ("/score", {"model": "tiny", "text_1": "a", "text_2": "b", **ZH}, "/score cannot run under a mask"),
    ],
)
def test_a_mask_that_cannot_be_is_refused_and_the_next_request_is_answered(
    server: httpx.Client, path: str, body: dict, named: str
) -> None:
    answer = server.post(path, json=body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]
    short = {**COMPLETION, "max_tokens": 1}
    assert (
        post(server, "/v1/completions", short)["choices"]
        != post(server, "/v1/completions", xargs(short, ZH))["choices"]
    )


def test_routes_without_masks_serve_requests_that_ask_for_none(server: httpx.Client) -> None:
    assert len(post(server, "/generative_scoring", SCORING)["data"]) == 1
    assert post(server, "/tokenize", {"model": "tiny", "prompt": "crane"})["count"] == 6
    assert post(server, "/invocations", COMPLETION)["choices"]
    assert post(server, "/v1/completions", {**COMPLETION, "use_beam_search": True, "n": 2})["choices"]
