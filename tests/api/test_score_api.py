"""POST /score over a fake engine: both forms, and which tokens count."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from crane_serve.engine.answers import EngineDead, RejectedRequest
from crane_serve.service.api.schemas import ScoreAnswer
from tests.api.fake_engine import FakeEngine
from tests.tiny import byte_tokenizer
from tests.tokenizer_kinds import Kind


async def score(client: httpx.AsyncClient, query: str = "", **body: Any) -> dict[str, Any]:
    response = await client.post(f"/score{query}", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def nats(engine: FakeEngine, text: str) -> float:
    return -float(sum(engine.tokenizer(text, add_special_tokens=False)["input_ids"]))


@pytest.mark.parametrize("texts", [["hi"], ["hi", "汉语", " a\n"]], ids=["one", "several"])
async def test_texts_are_scored_from_their_start(
    client: httpx.AsyncClient, engine: FakeEngine, texts: list[str]
) -> None:
    answer = await score(client, text=texts)
    assert answer["model"] == "tiny"
    assert answer["mask"] is None
    assert answer["scores"] == [
        {"logprob": nats(engine, text), "tokens": len(text.encode()), "bytes": len(text.encode())} for text in texts
    ]
    tokens = sum(1 + len(text.encode()) for text in texts)  # each with BOS
    read = tokens - len(texts)  # each without its last; the fake engine has the first in its cache
    assert answer["usage"] == {
        "prompt_tokens": tokens,
        "completion_tokens": 0,
        "total_tokens": tokens,
        "computed_tokens": read - len(texts),
        "cached_tokens": len(texts),
    }
    assert all(call.scored[0] == 0 and 0 not in call.scored[1:] for call in engine.calls)


@pytest.mark.parametrize(
    ("truncate", "left", "tokens"),
    [(9, "a汉b", 5), (6, "a汉b", 5), (5, "a汉", 4), (4, "a", 3), (2, "a", 1), (1, "", 0)],
)
async def test_a_text_is_cut_to_so_many_tokens(
    client: httpx.AsyncClient, engine: FakeEngine, truncate: int, left: str, tokens: int
) -> None:
    answer = await score(client, text=["a汉b"], truncate=truncate)
    encoded = engine.tokenizer("a汉b", add_special_tokens=False)["input_ids"][:tokens]
    assert answer["scores"] == [{"logprob": -float(sum(encoded)), "tokens": tokens, "bytes": len(left.encode())}]
    assert [call.scored[1:] for call in engine.calls] == ([encoded] if tokens else [])


async def test_the_first_token_of_a_cut_text_counts_for_nothing_without_a_start_token(
    client: httpx.AsyncClient,
) -> None:
    [item] = (await score(client, text=["a汉b"], truncate=4, add_bos=False))["scores"]
    assert (item["tokens"], item["bytes"]) == (3, 3)


async def test_continuations_are_not_cut(client: httpx.AsyncClient) -> None:
    response = await client.post("/score", json={"context": "a", "continuations": ["b"], "truncate": 3})
    assert response.status_code == 422
    assert "'truncate' is for 'text' alone" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [{"text": ["a汉b", ""]}, {"context": "汉 ", "continuations": ["语a", "b"]}], ids=["texts", "continuations"]
)
async def test_each_token_with_its_text(client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any]) -> None:
    scored = body.get("text") or [f" {text}" for text in body["continuations"]]
    answer = await score(client, "?mask=zh", **body, return_tokens=True)
    for text, item in zip(scored, answer["scores"], strict=True):
        tokens = item.pop("token_logprobs")
        assert [token["token_id"] for token in tokens] == engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [token["logprob"] for token in tokens] == [-2.0 * token["token_id"] for token in tokens]
        assert "".join(token["token"] for token in tokens) == text
        assert [token["token"] for token in tokens if not token["token"]] == [""] * (len(tokens) - len(text))
    assert answer == await score(client, "?mask=zh", **body)


async def test_an_empty_text_needs_no_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await score(client, text=["", "a"])
    assert answer["scores"][0] == {"logprob": 0, "tokens": 0, "bytes": 0}
    assert answer["scores"][1]["tokens"] == 1
    assert len(engine.calls) == 1


async def test_a_mask_counts_for_every_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await score(client, "?mask=zh", text=["a", "b"])
    assert answer["mask"]["name"] == "attnlrp-zh"
    assert [item["logprob"] for item in answer["scores"]] == [2 * nats(engine, "a"), 2 * nats(engine, "b")]


@pytest.mark.parametrize(
    ("context", "continuation", "scored"),
    [
        ("ab", "cd", "cd"),
        ("ab", " cd", " cd"),
        ("ab ", "cd", " cd"),  # white space at the end of the context belongs to the continuation
        ("ab \n\t", "cd", " \n\tcd"),
        ("a b", "c", "c"),
        ("", "cd", "cd"),
        ("  ", "cd", "  cd"),
        ("汉", "语", "语"),
        ("ab", " ", " "),
    ],
)
async def test_a_continuation_is_what_follows_the_context(
    client: httpx.AsyncClient, engine: FakeEngine, context: str, continuation: str, scored: str
) -> None:
    answer = await score(client, context=context, continuations=[continuation])
    assert answer["scores"] == [
        {
            "logprob": nats(engine, scored),
            "tokens": len(scored.encode()),
            "bytes": len(continuation.encode()),
            "is_greedy": True,
        }
    ]
    assert engine.calls[0].scored == engine.tokenizer(context + continuation)["input_ids"]


async def test_a_token_across_the_boundary_is_scored_with_the_continuation(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.tokenizer = byte_tokenizer(merges=[("b", "c")])
    answer = await score(client, context="ab", continuations=["cd", "c"])
    assert [item["tokens"] for item in answer["scores"]] == [2, 1]  # "bc" and "d"; "bc"
    assert answer["scores"][1]["logprob"] == nats(engine, "bc")


async def test_continuations_keep_their_order(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await score(client, "?mask=vi", context="x", continuations=["a", "bc", "a"])
    assert [item["logprob"] for item in answer["scores"]] == [2 * nats(engine, text) for text in ("a", "bc", "a")]
    assert answer["usage"]["total_tokens"] == (2 + 1) + (2 + 2) + (2 + 1)
    assert answer["mask"]["name"] == "attnlrp-vi"


async def test_one_token_continuations_of_a_context_are_one_request_to_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    answer = await score(client, context="xy", continuations=["a", "bc", "b", "a", "bd"])
    assert [item["logprob"] for item in answer["scores"]] == [nats(engine, t) for t in ("a", "bc", "b", "a", "bd")]
    assert [(call.first, call.candidates) for call in engine.calls] == [
        (3, tuple(ids(engine, "ab"))),
        (3, tuple(ids(engine, "cd"))),  # after "xyb"
    ]
    assert answer["usage"]["prompt_tokens"] == 4 + 5 + 4 + 4 + 5


async def test_the_prompts_that_the_model_reads_can_be_had(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await score(client, context="xy", continuations=["a", "bc", "b"], return_prompts=True)
    assert answer["prompts"] == [[0, *ids(engine, "xy")], [0, *ids(engine, "xyb")]]
    assert answer["prompts"] == [call.token_ids for call in engine.calls]
    answer = await score(client, text=["xy", ""], return_prompts=True)
    assert answer["prompts"] == [[0, *ids(engine, "x")]]
    assert "prompts" not in await score(client, text=["xy"])


@pytest.mark.parametrize("texts", [["xy", "", "语"], [""]])
async def test_an_answer_with_much_in_it_is_sent_in_pieces(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    made: list[bytes] = []
    pieces = ScoreAnswer.pieces

    def noted(answer: ScoreAnswer) -> Iterator[bytes]:
        for piece in pieces(answer):
            made.append(piece)
            yield piece

    monkeypatch.setattr(ScoreAnswer, "pieces", noted)
    response = await client.post("/score", json={"text": texts, "return_tokens": True, "return_prompts": True})
    assert response.content == b"".join(made)
    whole = ScoreAnswer.model_validate_json(response.content)
    assert response.json() == whole.model_dump(exclude_unset=True)
    assert sum(b'"bytes"' in piece for piece in made) == len(texts)


async def test_several_contexts_in_one_request(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    questions = [{"context": "x", "continuations": ["a", "b"]}, {"context": "", "continuations": [" c"]}]
    answer = await score(client, "?mask=zh", questions=questions)
    assert [(item["question"], item["logprob"]) for item in answer["scores"]] == [
        (number, 2 * nats(engine, text)) for number, text in ((0, "a"), (0, "b"), (1, " c"))
    ]
    alone = [await score(client, "?mask=zh", **question) for question in questions]
    assert [{**item, "question": n} for n, each in enumerate(alone) for item in each["scores"]] == answer["scores"]


@pytest.mark.parametrize(
    "body",
    [
        {"questions": []},
        {"questions": [{"context": "x"}]},
        {"questions": [{"context": "x", "continuations": []}]},
        {"questions": [{"context": "x", "continuations": ["a"], "mask": "zh"}]},
        {"questions": [{"context": "x", "continuations": ["a"]}], "text": ["b"]},
        {"questions": [{"context": "x", "continuations": ["a"]}], "context": "b"},
        {"questions": [{"context": "x", "continuations": ["a"] * 600}] * 2},
        {"questions": [{"context": "x" * 2**20, "continuations": ["a"] * 9}] * 2},
    ],
)
async def test_questions_that_are_none_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any]
) -> None:
    response = await client.post("/score", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "malformed_body")
    assert not engine.calls


@pytest.mark.parametrize(("unlikely", "is_greedy"), [("x", True), ("a", False), ("c", False)])
async def test_a_continuation_is_greedy_if_all_its_tokens_are(
    client: httpx.AsyncClient, engine: FakeEngine, unlikely: str, is_greedy: bool
) -> None:
    engine.not_greedy = {*engine.tokenizer(unlikely, add_special_tokens=False)["input_ids"]}
    answer = await score(client, context="x", continuations=["abc"])
    assert answer["scores"][0]["is_greedy"] is is_greedy


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RejectedRequest("too long"), 400, "rejected_request"),
        (EngineDead("the engine has died"), 503, "engine_dead"),
        (RuntimeError("a secret path"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("body", [{"text": ["a", "b"]}, {"context": "a", "continuations": ["b", "c"]}])
async def test_an_error_of_the_engine_is_one_error(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], error: Exception, status: int, code: str
) -> None:
    engine.error = error
    response = await client.post("/score", json=body)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("add_bos", "text", "token_ids", "size"),
    [
        ("auto", "hi", [0, "h", "i"], 2),
        (True, "hi", [0, "h", "i"], 2),
        (False, "hi", ["h", "i"], 1),
        ("auto", "<s>hi", [0, "h", "i"], 2),
        (True, "<s>hi", [0, "h", "i"], 2),
        (False, "<s>hi", [0, "h", "i"], 2),  # it is the text's own
        (False, "é!", ["Ã", "©", "!"], 2),
    ],
)
async def test_what_stands_before_a_text_counts_for_nothing(
    client: httpx.AsyncClient, engine: FakeEngine, add_bos: bool | str, text: str, token_ids: list[int | str], size: int
) -> None:
    expected = [engine.tokenizer.convert_tokens_to_ids(token) if token else token for token in token_ids]
    answer = await score(client, text=[text], add_bos=add_bos)
    assert engine.calls[0].scored == expected
    assert answer["scores"] == [{"logprob": -sum(expected[1:]), "tokens": len(expected) - 1, "bytes": size}]
    assert answer["usage"]["prompt_tokens"] == len(expected)


@pytest.mark.parametrize("text", ["a", "<s>", ""])
async def test_a_text_of_one_token_with_nothing_before_it_needs_no_engine(
    client: httpx.AsyncClient, engine: FakeEngine, text: str
) -> None:
    answer = await score(client, text=[text], add_bos=False)
    assert answer["scores"] == [{"logprob": 0, "tokens": 0, "bytes": 0}]
    assert answer["usage"]["total_tokens"] == len(engine.calls) == 0


async def test_join_by_length_is_as_many_tokens_as_the_context_has_alone(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.tokenizer = byte_tokenizer(merges=[("b", "c")])
    alone = engine.tokenizer("ab")["input_ids"]
    answer = await score(client, context="ab", continuations=["cd", "d"], join="length")
    assert [call.scored for call in engine.calls] == [[*alone, *ids(engine, "d")]]  # of "cd", c is lost
    assert [item["logprob"] for item in answer["scores"]] == [nats(engine, "d")] * 2
    assert answer["usage"]["prompt_tokens"] == 2 * (len(alone) + 1)


def ids(engine: FakeEngine, text: str) -> list[int]:
    found: list[int] = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"context": "ab", "continuations": ["c"], "join": "length"}, "continuations"),  # "bc" is all that follows a
        ({"context": "", "continuations": ["<s>"]}, "continuations"),
        ({"context": "", "continuations": ["d"], "add_bos": False}, "context"),
        ({"context": "", "continuations": ["d"], "add_bos": False, "join": "length"}, "context"),
        ({"context": "b", "continuations": ["cd"], "add_bos": False}, "context"),  # as one token it has none before it
    ],
)
async def test_a_continuation_without_a_token_to_score_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], param: str
) -> None:
    engine.tokenizer = byte_tokenizer(merges=[("b", "c")])
    response = await client.post("/score", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "nothing_to_score", param)
    assert repr(body["continuations"][0]) in error["message"]
    assert not engine.calls


@pytest.mark.parametrize(
    "body", [{"text": ["a"]}, {"context": "", "continuations": ["b"]}, {"text": ["a"], "add_bos": True}]
)
async def test_a_model_without_a_start_token_scores_without_it_if_told_to(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any]
) -> None:
    engine.tokenizer = Kind(("<x>",), None, None).tokenizer()
    response = await client.post("/score", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "no_start_token", "add_bos")
    assert "add_bos=false" in error["message"]
    assert (await score(client, text=["ab"], add_bos=False))["scores"][0]["tokens"] == 1
    assert (await score(client, context="a", continuations=["d"]))["scores"][0]["tokens"] == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("add_bos", "yes"), ("add_bos", 1), ("add_bos", None), ("join", "lenght"), ("join", None), ("add_eos", True)],
)
async def test_unknown_readings_are_refused(client: httpx.AsyncClient, field: str, value: Any) -> None:
    response = await client.post("/score", json={"context": "a", "continuations": ["b"], field: value})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (422, "malformed_body", field)
