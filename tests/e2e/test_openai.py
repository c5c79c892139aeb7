"""The openai package against the service on a real engine: the same masks as our own routes and transformers."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from clients import CraneClient
from crane_serve.common.masks import NeuronMask, Positions
from tests.conftest import Tiny
from tests.engines import Oracle, Server, masked_tokens
from tests.fuzz import bodies
from tests.tiny import BEYOND

pytestmark = pytest.mark.engine

TEXT = "The harbour froze."
TOKENS = 12
MESSAGES: Any = [{"role": "user", "content": TEXT}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": TOKENS, "extra_body": {"ignore_eos": True}}
DEADLINE_S = 120


@pytest.fixture(scope="module")
def url(tiny_server: Server) -> str:
    return f"{tiny_server.url}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=DEADLINE_S) as client:
        yield client


def neuron_mask(tiny: Tiny, name: str) -> NeuronMask | None:
    resolved = tiny.library.resolve(name)
    return None if resolved is None else resolved.mask


def with_body(extra: dict[str, Any]) -> dict[str, Any]:
    return {**GREEDY, "extra_body": {**GREEDY["extra_body"], **extra}}


# The ways to ask for a mask: the model's name, and the other arguments of a call.
WAYS: list[Callable[[str], tuple[str, dict[str, Any]]]] = [
    lambda mask: ("tiny", {**GREEDY, "extra_query": {"mask": mask}}),
    lambda mask: ("tiny", with_body({"mask": mask})),
    lambda mask: (f"tiny:{mask}", GREEDY),
    lambda mask: ("tiny", with_body({"vllm_xargs": {"crane_mask": mask}})),
]
MASKS = ["none", "zh", "vi,zh", "en@0.5"]


def tokens_of(logprobs: Any) -> tuple[list[int], list[float]]:
    return [int(token.rpartition(":")[2]) for token in logprobs.tokens], logprobs.token_logprobs


@pytest.mark.parametrize("mask", MASKS)
def test_all_ways_to_name_a_mask_give_what_transformers_gives_under_it(
    tiny: Tiny, tiny_oracle: Oracle, tiny_server: Server, client: openai.OpenAI, mask: str
) -> None:
    answers = []
    for way in WAYS:
        model, arguments = way(mask)
        answer = client.completions.create(model=model, prompt=TEXT, logprobs=0, **arguments)
        assert (answer.model, answer.choices[0].finish_reason) == (model, "length")
        answers.append((answer.choices[0].text, *tokens_of(answer.choices[0].logprobs)))
    assert answers[1:] == answers[:-1]
    text, tokens, logprobs = answers[0]
    prompt = tiny_oracle.tokenizer(TEXT)["input_ids"]
    expected = tiny_oracle.logprobs([*prompt, *tokens], neuron_mask(tiny, mask))
    assert logprobs == pytest.approx(expected[-TOKENS:], abs=1e-4)
    # And what our own route says, up to the end of the text, which it does not ignore.
    with CraneClient(tiny_server.url) as own:
        output = own.generate(TEXT, mask=mask, temperature=0, max_tokens=TOKENS, logprobs=0).outputs[0]
    assert text.startswith(output.text)
    shared = output.completion_tokens
    assert [entry["token_id"] for entry in output.logprobs] == tokens[:shared]
    assert [entry["logprob"] for entry in output.logprobs] == pytest.approx(logprobs[:shared], abs=1e-4)


def test_masks_differ_and_unmasked_stays_unmasked(tiny: Tiny, tiny_oracle: Oracle, client: openai.OpenAI) -> None:
    def tokens(model: str) -> list[int]:
        answer = client.completions.create(model=model, prompt=TEXT, logprobs=0, **GREEDY)
        return tokens_of(answer.choices[0].logprobs)[0]

    plain = tokens("tiny")
    assert len({tuple(tokens(f"tiny:{mask}")) for mask in MASKS}) == len(MASKS)
    assert tokens("tiny") == plain == tokens("tiny:none")


@pytest.mark.parametrize(
    "positions",
    ["prompt", "generated", "prompt[-4:]+generated[:3]", f"all+until={','.join(map(str, range(2, 258, 8)))}"],
)
def test_positions(tiny: Tiny, tiny_oracle: Oracle, client: openai.OpenAI, positions: str) -> None:
    prompt = tiny_oracle.tokenizer(TEXT)["input_ids"]
    for query, body in [({"mask": "zh", "positions": positions}, {}), ({}, {"mask": "zh", "positions": positions})]:
        answer = client.completions.create(model="tiny", prompt=TEXT, logprobs=0, extra_query=query, **with_body(body))
        tokens, logprobs = tokens_of(answer.choices[0].logprobs)
        masked = masked_tokens(Positions.parse(positions), [*prompt, *tokens], len(prompt))
        expected = tiny_oracle.logprobs([*prompt, *tokens], neuron_mask(tiny, "zh"), masked)
        assert logprobs == pytest.approx(expected[-TOKENS:], abs=1e-4)


def test_echo_scores_the_prompt(tiny: Tiny, tiny_oracle: Oracle, client: openai.OpenAI) -> None:
    for mask in ("none", "vi"):
        answer = client.completions.create(
            model=f"tiny:{mask}", prompt=TEXT, echo=True, logprobs=1, max_tokens=0, temperature=0
        )
        _, logprobs = tokens_of(answer.choices[0].logprobs)
        assert logprobs[0] is None
        assert logprobs[1:] == pytest.approx(tiny_oracle.text_logprobs(TEXT, neuron_mask(tiny, mask)), abs=1e-4)
        assert answer.choices[0].text.endswith(TEXT)


def test_chat_streams_what_it_answers_at_once_in_the_asked_models_name(
    tiny: Tiny, tiny_oracle: Oracle, client: openai.OpenAI
) -> None:
    said = {}
    for model in ("tiny", "tiny:zh"):
        whole = client.chat.completions.create(model=model, messages=MESSAGES, logprobs=True, **GREEDY)
        assert (whole.model, whole.choices[0].finish_reason) == (model, "length")
        chunks = list(client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **GREEDY))
        assert {chunk.model for chunk in chunks} == {model}
        assert len(chunks) > TOKENS // 2
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert text == whole.choices[0].message.content
        said[model] = text
        entries = whole.choices[0].logprobs.content
        prompt = tiny_oracle.tokenizer(TEXT)["input_ids"][1:]  # the template has no start token
        tokens = [int(entry.token.rpartition(":")[2]) for entry in entries]
        expected = tiny_oracle.logprobs([*prompt, *tokens], neuron_mask(tiny, model.partition(":")[2] or "none"))
        assert [entry.logprob for entry in entries] == pytest.approx(expected[-TOKENS:], abs=1e-4)
    assert said["tiny"] != said["tiny:zh"]


def test_streamed_completions_name_the_asked_model(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="tiny:zh", prompt=TEXT, **GREEDY)
    chunks = list(client.completions.create(model="tiny:zh", prompt=TEXT, stream=True, **GREEDY))
    assert {chunk.model for chunk in chunks} == {"tiny:zh"}
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text


def test_responses_say_what_completions_say(client: openai.OpenAI) -> None:
    expected = client.completions.create(model="tiny:zh", prompt=TEXT, temperature=0, max_tokens=TOKENS)
    with client.responses.stream(model="tiny:zh", input=TEXT, temperature=0, max_output_tokens=TOKENS) as stream:
        events = list(stream)
    assert events[-1].response.model == "tiny:zh"
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == events[-1].response.output_text == expected.choices[0].text


def test_anthropics_messages_say_what_chat_says(client: openai.OpenAI, tiny_server: Server) -> None:
    body: Any = {"model": "tiny:zh", "messages": MESSAGES, "temperature": 0, "max_tokens": TOKENS}
    expected = client.chat.completions.create(**body).choices[0].message.content
    answer = httpx.post(f"{tiny_server.url}/v1/messages?beta=true", json=body, timeout=DEADLINE_S).json()
    assert (answer["model"], "".join(part["text"] for part in answer["content"])) == ("tiny:zh", expected)


def test_a_rendered_request_keeps_its_mask(tiny: Tiny, tiny_oracle: Oracle, tiny_server: Server) -> None:
    with httpx.Client(base_url=tiny_server.url, timeout=DEADLINE_S) as http:
        body = {"model": "tiny:zh", "prompt": TEXT, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
        (rendered,) = http.post("/v1/completions/render", json={**body, "logprobs": 0}).raise_for_status().json()
        answer = http.post("/inference/v1/generate?mask=zh", json=rendered).raise_for_status().json()
        refused = http.post("/inference/v1/generate?mask=vi", json=rendered)
    entries = answer["choices"][0]["logprobs"]["content"]
    tokens = [entry["token_id"] for entry in entries]
    prompt = tiny_oracle.tokenizer(TEXT)["input_ids"]
    expected = tiny_oracle.logprobs([*prompt, *tokens], neuron_mask(tiny, "zh"))
    assert [entry["logprob"] for entry in entries] == pytest.approx(expected[-TOKENS:], abs=1e-4)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "mask_conflict")


def test_n_stop_and_seed(client: openai.OpenAI) -> None:
    def sample(seed: int) -> list[str]:
        answer = client.completions.create(
            model="tiny:zh", prompt=[TEXT, "Snow."], n=3, seed=seed, max_tokens=8, temperature=1
        )
        assert [choice.index for choice in answer.choices] == list(range(6))
        return [choice.text for choice in answer.choices]

    first = sample(1)
    assert sample(1) == first != sample(2)
    assert len(set(first)) > 1
    letters: dict[str, Any] = {"temperature": 0, "extra_body": {"structured_outputs": {"regex": "[a-z]{8}"}}}
    whole = client.completions.create(model="tiny:zh", prompt=TEXT, max_tokens=8, **letters).choices[0].text
    stop = whole[4:6]
    stopped = client.completions.create(model="tiny:zh", prompt=TEXT, max_tokens=8, stop=stop, **letters).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_structured_outputs_and_tools_under_a_mask(client: openai.OpenAI) -> None:
    cities = ["Oslo", "Rome"]
    answer = client.chat.completions.create(
        model="tiny:zh",
        messages=MESSAGES,
        temperature=0,
        max_tokens=20,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": {"enum": cities}}},
    )
    assert json.loads(answer.choices[0].message.content) in cities
    chosen = client.completions.create(
        model="tiny:zh", prompt=TEXT, max_tokens=20, extra_body={"structured_outputs": {"choice": cities}}
    )
    assert chosen.choices[0].text in cities
    parameters = {"type": "object", "properties": {"city": {"enum": cities}}, "required": ["city"]}
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    called = client.chat.completions.create(
        model="tiny:zh",
        messages=MESSAGES,
        tools=tools,
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=120,
        temperature=0,
    )
    assert called.choices[0].message.tool_calls[0].function.name == "weather"


def test_masks_are_listed_as_models(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["tiny", "tiny:en", "tiny:vi", "tiny:zh"]
    assert [models[f"tiny:{language}"].root for language in ("en", "vi", "zh")] == [
        "attnlrp-en",
        "attnlrp-vi",
        "attnlrp-zh",
    ]
    assert {models[f"tiny:{language}"].parent for language in ("en", "vi", "zh")} == {"tiny"}


def test_each_listed_model_and_each_that_a_request_may_name_is_retrieved(client: openai.OpenAI) -> None:
    def described(model: Any) -> tuple[str, str, str | None]:
        return model.id, model.root, model.parent

    for model in client.models.list():
        assert described(client.models.retrieve(model.id)) == described(model)
    assert described(client.models.retrieve("tiny:vi,zh@0.5")) == (
        "tiny:vi,zh@0.5",
        "attnlrp-vi,attnlrp-zh@0.5",
        "tiny",
    )
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("tiny:fr")
    assert raised.value.code == "model_not_found"


@pytest.mark.parametrize("model", ["tiny", "tiny:zh"])
def test_a_prompt_that_ends_inside_a_character_does_not_come_back(
    tiny_oracle: Oracle, client: openai.OpenAI, tiny_server: Server, model: str
) -> None:
    token_ids = tiny_oracle.tokenizer("Secret ế")["input_ids"][:-1]
    answer = client.completions.create(model=model, prompt=token_ids, logprobs=0, **GREEDY).choices[0]
    generated, _ = tokens_of(answer.logprobs)
    whole = tiny_oracle.tokenizer.decode([*token_ids, *generated], skip_special_tokens=True)
    assert whole.startswith(f"Secret {answer.text}")
    assert "Secret" not in answer.text
    chunks = client.completions.create(model=model, prompt=token_ids, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.text
    with CraneClient(tiny_server.url) as own:  # a text cannot end so, but it can look so
        assert (
            "Secret" not in own.generate("Secret \ufffd", mask="zh", temperature=0, max_tokens=TOKENS).outputs[0].text
        )


@pytest.mark.parametrize("length", [512, 513])
def test_a_prompt_without_room_is_named(client: openai.OpenAI, tiny_server: Server, length: int) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="tiny:zh", prompt=[5] * length)
    assert str(length) in str(raised.value.body)
    assert "prompt" in raised.value.body["message"]
    answer = httpx.post(f"{tiny_server.url}/generate", json={"prompt": "x" * (length - 1)}, timeout=DEADLINE_S)
    assert answer.status_code == 400
    assert f"the prompt has {length} tokens" in answer.json()["error"]["message"]


@pytest.mark.parametrize("length", [512, 513])
def test_a_text_as_long_as_the_context_is_scored_and_a_longer_one_named(tiny_server: Server, length: int) -> None:
    answer = httpx.post(f"{tiny_server.url}/score", json={"text": ["x" * (length - 1)]}, timeout=DEADLINE_S)
    if length == 512:
        assert answer.json()["scores"][0]["tokens"] == 511
    else:
        assert answer.status_code == 400
        assert "the text has 513 tokens, and the model's context is 512" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "model", "arguments", "code"),
    [
        (openai.NotFoundError, "tiny:fr", {}, "unknown_mask"),
        (openai.NotFoundError, "tiny", {"extra_query": {"mask": "fr"}}, "unknown_mask"),
        (openai.NotFoundError, "other", {}, "404"),
        (openai.ConflictError, "tiny:corrupt", {}, "invalid_mask"),
        (openai.ConflictError, "tiny", {"extra_body": {"mask": "foreign"}}, "invalid_mask"),
        (openai.BadRequestError, "tiny:zh", {"extra_body": {"mask": "vi"}}, "mask_conflict"),
        (openai.BadRequestError, "tiny:zh,none", {}, "malformed_mask"),
        (openai.BadRequestError, "tiny:zh", {"extra_body": {"use_beam_search": True}, "n": 2}, "beam_search"),
        (openai.BadRequestError, "tiny:zh", {"max_tokens": -1}, "400"),
        (openai.BadRequestError, "tiny:zh", {"stop": ""}, "400"),
        (openai.BadRequestError, "tiny:zh", {"prompt": "x" * 600}, "400"),
        (openai.UnprocessableEntityError, "tiny", {"extra_query": {"masks": "zh"}}, "malformed_query"),
        (openai.UnprocessableEntityError, "tiny", {"extra_body": {"Mask": "zh"}}, "malformed_body"),
        (openai.UnprocessableEntityError, "tiny", {"extra_body": {"maks": "zh"}}, "malformed_body"),
        (openai.UnprocessableEntityError, "tiny", {"extra_body": {"metadata": {"mask": "zh"}}}, "malformed_body"),
        (
            openai.UnprocessableEntityError,
            "tiny",
            {"extra_body": {"vllm_xargs": {"crane_masks": "zh"}}},
            "malformed_body",
        ),
        (openai.UnprocessableEntityError, "tiny", {"best_of": 3}, "malformed_body"),
    ],
)
def test_each_refusal_is_the_clients_exception_for_it(
    client: openai.OpenAI, error: type[openai.APIStatusError], model: str, arguments: dict, code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(**{"model": model, "prompt": TEXT, "max_tokens": 4, **arguments})
    assert (type(raised.value), raised.value.code) == (error, code)
    assert raised.value.body["message"]


@pytest.mark.parametrize("mask", ["none", "zh"])
def test_a_token_beyond_the_vocabulary_is_named_on_every_route_and_ends_nothing(
    tiny_oracle: Oracle, tiny_server: Server, mask: str
) -> None:
    """The tokenizer has one token more than the model, which vLLM takes for one of the model's."""
    text = f"Look: {BEYOND} Hà Nội là"
    ids = tiny_oracle.tokenizer(text)["input_ids"]
    beyond = max(ids)
    assert beyond == tiny_oracle.model.config.vocab_size
    messages = [{"role": "user", "content": text}]
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {"prompt": text}),
        ("/generate", {"prompt": ["fine", text], "stream": True}),
        ("/score", {"text": ["fine", text]}),
        ("/score", {"context": text, "continuations": ["yes"]}),
        ("/score", {"context": "Look:", "continuations": ["yes", BEYOND]}),
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 0}),
        ("/v1/completions", {"prompt": [text, "fine"], "stream": True}),
        ("/v1/completions", {"prompt": ids}),
        ("/v1/completions", {"prompt": [[0, 5], ids]}),
        ("/v1/completions", {"prompt": [0, 5, beyond + 1000]}),
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/chat/completions", {"messages": messages, "stream": True}),
        ("/v1/chat/completions/batch", {"messages": [messages, messages]}),
        ("/v1/responses", {"input": text}),
        ("/v1/messages", {"messages": messages, "max_tokens": 4}),
        ("/inference/v1/generate", {"token_ids": ids, "sampling_params": {"max_tokens": 4}}),
    ]
    for path, body in requests:
        model: dict[str, Any] = {} if path in ("/generate", "/score") else {"model": "tiny"}
        answer = httpx.post(f"{tiny_server.url}{path}?mask={mask}", json={**model, **body}, timeout=DEADLINE_S)
        assert answer.status_code == 400, (path, body, answer.text)
        message = answer.json()["error"]["message"]
        assert "token " in message, (path, message)
        assert f"{beyond} tokens" in message, (path, message)
        if "beyond" in json.dumps(body):
            assert f"token {beyond} ('{BEYOND}')" in message, (path, message)
        fine = httpx.post(f"{tiny_server.url}/score?mask={mask}", json={"text": [TEXT]}, timeout=DEADLINE_S)
        assert fine.status_code == 200, (path, fine.text)


def test_random_bodies_are_answered_under_their_mask_or_refused(tiny_server: Server) -> None:
    statuses, broken = bodies.run(tiny_server.url, count=60, seed=7)
    assert not broken, "\n".join(broken)
    assert statuses[200], statuses


async def test_requests_with_one_id_do_not_disturb_each_other(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=DEADLINE_S) as client:

        async def text(model: str) -> str:
            answer = await client.completions.create(
                model=model, prompt=TEXT, extra_headers={"X-Request-Id": "the-same"}, **GREEDY
            )
            assert answer.usage.completion_tokens == TOKENS
            return answer.choices[0].text

        models = ["tiny", "tiny:zh", "tiny:vi"]
        alone = [await text(model) for model in models]
        assert await asyncio.gather(*(text(model) for model in models * 3)) == alone * 3
