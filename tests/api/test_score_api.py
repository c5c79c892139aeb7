"""POST /score over a fake engine: both forms, and which tokens count."""

from typing import Any

import httpx
import pytest

from crane_serve.engine.service import EngineDead, RejectedRequest
from tests.api.fake_engine import FakeEngine
from tests.tiny import byte_tokenizer


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
    assert answer["usage"] == {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    assert all(call.token_ids[0] == 0 and 0 not in call.token_ids[1:] for call in engine.calls)


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
    assert engine.calls[0].token_ids == engine.tokenizer(context + continuation)["input_ids"]


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
