"""Judge: what is sent to an OpenAI-compatible server, what is read from its reply, and how it fails."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from clients.errors import CraneError, EvaluationError
from clients.judge import Judge
from clients.retries import RetryPolicy
from tests.fake_judge import FakeJudge, completion, judging

QUICK = RetryPolicy(attempts=3, first_wait_s=0.001)


def judge_of(server: FakeJudge, **settings: Any) -> Judge:
    judge = Judge.model_validate({"base_url": server.base_url, "model": "referee", **settings})
    judge._retries = QUICK
    return judge


@pytest.fixture
def server() -> Iterator[FakeJudge]:
    with judging() as fake:
        yield fake


async def test_what_is_sent(server: FakeJudge) -> None:
    judge = judge_of(server, template="{{ language }}|{{ question }}|{{ answer }}", max_tokens=9)
    assert await judge.ask("长城在哪里？", "在 {{ answer }}", "zh") == "Rating: [[7]]"
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert "authorization" not in headers
    assert body == {
        "model": "referee",
        "messages": [{"role": "user", "content": "zh|长城在哪里？|在 {{ answer }}"}],
        "max_tokens": 9,
        "temperature": 0.0,
    }


async def test_without_a_temperature_none_is_sent(server: FakeJudge) -> None:
    await judge_of(server, temperature=None).ask("q", "a", "en")
    assert "temperature" not in server.asked[0][2]


async def test_the_default_template_asks_for_what_the_default_pattern_reads(server: FakeJudge) -> None:
    await judge_of(server).ask("Why is it so?", "Because of <that> & this.", "vi")
    prompt = server.asked[0][2]["messages"][0]["content"]
    assert all(part in prompt for part in ("\nWhy is it so?\n", "\nBecause of <that> & this.\n", "vi", "Rating: [["))


async def test_a_slash_at_the_end_of_the_address_does_not_matter(server: FakeJudge) -> None:
    await judge_of(server, base_url=server.base_url + "/").ask("q", "a", "en")
    assert server.asked[0][0] == "/v1/chat/completions"


async def test_a_judge_on_this_machine_is_asked_without_a_proxy(
    server: FakeJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert await judge_of(server).ask("q", "a", "en") == "Rating: [[7]]"


async def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    server: FakeJudge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CRANE_JUDGE_KEY", "sk-secret")
    caplog.set_level("DEBUG")
    judge = judge_of(server, key_variable="CRANE_JUDGE_KEY")
    await judge.ask("q", "a", "en")
    assert server.asked[0][1]["authorization"] == "Bearer sk-secret"
    server.answers = [(401, {"error": {"code": "invalid_api_key", "message": "wrong key: sk-secret"}})]
    with pytest.raises(CraneError, match=r"judge referee at http://127.*: wrong key: \*\*\*") as caught:
        await judge.ask("q", "a", "en")
    seen = f"{judge!r} {judge.model_dump_json()} {judge.digest} {caught.value!r} {caplog.text}"
    assert "sk-secret" not in seen


@pytest.mark.parametrize("key", [None, "", "two words", "schlüssel"])
async def test_without_a_key_nothing_is_sent(
    server: FakeJudge, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.delenv("CRANE_JUDGE_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("CRANE_JUDGE_KEY", key)
    with pytest.raises(EvaluationError, match="CRANE_JUDGE_KEY holds no API key") as caught:
        await judge_of(server, key_variable="CRANE_JUDGE_KEY").ask("q", "a", "en")
    assert not key or key not in str(caught.value)
    assert server.asked == []


@pytest.mark.parametrize("status", [429, 503])
async def test_an_overloaded_judge_is_asked_again(server: FakeJudge, status: int) -> None:
    server.answers = [(status, {}), (status, {}), (200, completion("Rating: [[3]]"))]
    assert await judge_of(server).ask("q", "a", "en") == "Rating: [[3]]"
    assert len(server.asked) == 3


async def test_an_overloaded_judge_is_not_asked_for_ever(server: FakeJudge) -> None:
    server.answers = [(503, {"error": {"code": "busy", "message": "busy"}})]
    with pytest.raises(CraneError, match=r"judge referee at http://127.*: busy \(busy, status 503\)") as caught:
        await judge_of(server).ask("q", "a", "en")
    assert caught.value.transient
    assert len(server.asked) == QUICK.attempts


@pytest.mark.parametrize("status", [400, 404, 500])
async def test_a_refusal_names_the_judge_and_is_not_repeated(server: FakeJudge, status: int) -> None:
    server.answers = [(status, {"error": {"code": "no", "message": "no such model"}})]
    with pytest.raises(CraneError, match=r"^judge referee at http://127.*/v1: no such model") as caught:
        await judge_of(server).ask("q", "a", "en")
    assert (caught.value.status, caught.value.code, len(server.asked)) == (status, "no", 1)


@pytest.mark.parametrize("answer", [b"<html>", {}, {"choices": []}, {"choices": [{"text": "[[7]]"}]}, []])
async def test_what_is_no_chat_completion_is_an_error(server: FakeJudge, answer: Any) -> None:
    server.answers = [(200, answer)]
    with pytest.raises(CraneError, match=r"judge referee .*expected choices with a message"):
        await judge_of(server).ask("q", "a", "en")


async def test_no_content_is_an_empty_reply(server: FakeJudge) -> None:
    server.answers = [(200, completion(None))]
    assert await judge_of(server).ask("q", "a", "en") == ""


async def test_nobody_there_names_the_judge(server: FakeJudge) -> None:
    with pytest.raises(CraneError, match=r"judge referee at http://127\.0\.0\.1:9/v1: cannot connect") as caught:
        await judge_of(server, base_url="http://127.0.0.1:9/v1").ask("q", "a", "en")
    assert caught.value.transient


def test_a_judge_outlives_event_loops(server: FakeJudge) -> None:
    judge = judge_of(server)

    async def several() -> list[str]:
        return await asyncio.gather(*(judge.ask("q", "a", "en") for _ in range(8)))

    assert [asyncio.run(several()) for _ in range(2)] == [["Rating: [[7]]"] * 8] * 2


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[ 8.5 ]]", 8.5),
        ("[[1]] to begin with, and so Rating: [[1]]", 1.0),
        ("[[1.0]] or [[1]]", 1.0),
        ("[[10]]", 10.0),
        ("Rating: [[3]] ... Rating: [[4]]", None),
        ("of [[1]] to [[10]]: [[5]]", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[0.99]]", None),
        ("[[-5]]", None),
        ("[[5]] of [[50]]", None),
        ("[[7/10]]", None),
        ("Rating: 7", None),
        ("[7]", None),
        ("[[seven]]", None),
        ("", None),
    ],
)
def test_marks(reply: str, expected: float | None) -> None:
    assert Judge(base_url="http://judge/v1", model="referee").score(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"), [("Note: 0", 0.0), ("Note: 20", 20.0), ("Note: viel", None), ("Note: ", None)]
)
def test_marks_of_another_form(reply: str, expected: float | None) -> None:
    settings = {"base_url": "http://judge/v1", "model": "referee", "lowest": 0, "highest": 20}
    assert Judge.model_validate({**settings, "pattern": r"Note: (\w+)?"}).score(reply) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "judge/v1"}, "expected an address"),
        ({"base_url": "ftp://judge/v1"}, "expected an address"),
        ({"base_url": "http://"}, "expected an address"),
        ({"base_url": "https://me:secret@judge/v1"}, "without credentials"),
        ({"base_url": "https://judge/v1?key=secret"}, "without credentials or query"),
        ({"base_url": "http://judge:port/"}, "expected an address"),
        ({"model": ""}, "model"),
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": "[0-9]+"}, "no group"),
        ({"lowest": 5, "highest": 5}, "the lowest first"),
        ({"highest": float("inf")}, "finite"),
        ({"lowest": float("nan")}, "finite"),
        ({"template": "{{ question"}, "template"),
        ({"key": "sk-secret"}, "key"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, EvaluationError), match=message):
        Judge.model_validate({"base_url": "http://judge/v1", "model": "referee", **settings})


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        ({"model": "other"}, True),
        ({"template": "{{ answer }}"}, True),
        ({"temperature": 0.5}, True),
        ({"max_tokens": 1}, True),
        ({"base_url": "http://elsewhere/v1"}, False),
        ({"highest": 5}, False),
    ],
)
def test_the_digest_is_of_what_decides_on_a_reply(changed: dict[str, Any], differs: bool) -> None:
    settings = {"base_url": "http://judge/v1", "model": "referee"}
    digests = {Judge.model_validate(of).digest for of in (settings, {**settings, **changed})}
    assert len(digests) == (2 if differs else 1)
