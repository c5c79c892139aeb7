"""add_bos and join on their way from tasks and clients to the server, and what they do to runs begun before."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clients import AsyncCraneClient, CraneClient, EvaluationError
from clients.evaluation import Evaluation
from clients.plan import Plan
from clients.record import Record
from clients.results import ITEMS_FILE, RUN_FILE
from clients.run import evaluate
from clients.task import Generate, Item, Request, ScoreContinuations, ScoreText
from clients.tasks import parse_task
from tests.fake_server import FakeServer, serving

SOURCE = {"files": "rows.jsonl"}
PERPLEXITY = {"kind": "perplexity", "source": SOURCE}
CHOICE = {"kind": "choice", "source": SOURCE, "question": "{{ text }}", "choices": ["a", "b"], "answer": "0"}
CLOZE = {"kind": "cloze", "source": SOURCE, "prompt": "{{ text }}", "candidates": ["a", "b"], "answer": "a"}
QA = {"kind": "qa", "source": SOURCE, "prompt": "{{ text }}", "answers": "{{ ['a'] }}"}
TALK = {"kind": "open_generation", "source": SOURCE, "prompt": "{{ text }}", "max_tokens": 4}
TASKS = [PERPLEXITY, CHOICE, CLOZE, QA, TALK]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    (tmp_path / "rows.jsonl").write_text('{"id": "1", "text": "en one"}\n')
    with serving() as fake:
        yield fake


async def run(server: FakeServer, directory: Path, *tasks: dict[str, Any]) -> Evaluation:
    plan = Plan.parse({"languages": ["en"], "masks": [], "tasks": list(tasks)}, "plan")
    async with AsyncCraneClient(server.address) as client:
        return await evaluate(client, plan, directory / "out", base=directory)


async def test_a_task_s_options_reach_the_server_and_defaults_are_not_sent(server: FakeServer, tmp_path: Path) -> None:
    await run(server, tmp_path, *TASKS)
    assert len(server.bodies) == len(TASKS)
    assert not any({"add_bos", "join"} & set(body) for body in server.bodies)
    server.bodies.clear()
    changed = [{**task, "name": f"{task['kind']}-2", "add_bos": number % 2 > 0} for number, task in enumerate(TASKS)]
    changed[1]["join"] = changed[2]["join"] = "length"
    await run(server, tmp_path, *changed)
    sent = [(body["add_bos"], body.get("join")) for body in server.bodies]
    wanted = [(False, None), (True, "length"), (False, "length"), (True, None), (False, None)]
    assert sorted(sent, key=repr) == sorted(wanted, key=repr)
    assert Record.read(tmp_path / "out").answers.answers.keys()


@pytest.mark.parametrize(
    ("task", "field", "value"),
    [(PERPLEXITY, "add_bos", "yes"), (QA, "add_bos", 1), (CHOICE, "join", "harness"), (CLOZE, "join", True)],
)
def test_unknown_options_are_named(task: dict[str, Any], field: str, value: Any) -> None:
    with pytest.raises(EvaluationError, match=f"^task 1: {field}") as caught:
        parse_task({**task, field: value}, "task 1")
    assert repr(value) in str(caught.value)
    with pytest.raises(EvaluationError, match="join: unknown setting"):
        parse_task({**PERPLEXITY, "join": "length"}, "task 1")


@pytest.mark.parametrize(
    ("request_", "digest"),  # as version 0.1.0 made them
    [
        (ScoreText("Hà Nội"), "f506b49d528c66b0149bbf9caddd4b124c3548f85097dbca2882e24ade6ff9cf"),
        (
            ScoreContinuations("a", (" b", " c")),
            "52f796075cf9e4fb2d790b4cc8e3c9fb704b60ccb60650aa34abebd029c82512",
        ),
        (Generate("p", 8, ("\n",)), "bfc120689e76e27eadec9d77f2e05cb40c4475023b52182295a6e86e2fc80b12"),
    ],
)
def test_a_question_with_the_defaults_is_the_question_from_before(request_: Request, digest: str) -> None:
    assert Item("1", "vi", request_, {"x": 1}).digest == digest
    other = type(request_)(**{**vars(request_), "add_bos": True})
    assert Item("1", "vi", other, {"x": 1}).digest != digest


async def test_another_option_is_another_question(server: FakeServer, tmp_path: Path) -> None:
    await run(server, tmp_path, CHOICE)
    for change in ({"add_bos": True}, {"add_bos": False}, {"join": "length"}):
        with pytest.raises(EvaluationError, match="asked something else"):
            await run(server, tmp_path, {**CHOICE, **change})


def made_before(out: Path) -> None:
    """Take out of a run's files what version 0.1.0 did not write."""
    settings = json.loads((out / RUN_FILE).read_text())
    assert settings.pop("prompt_start", None) != settings.pop("text_start", None)
    (out / RUN_FILE).write_text(json.dumps(settings))
    items = [json.loads(line) for line in (out / ITEMS_FILE).read_text().splitlines()]
    for item in items:
        assert item["request"].pop("add_bos") == "auto"
        item["request"].pop("join", None)
    (out / ITEMS_FILE).write_text("".join(json.dumps(item) + "\n" for item in items))


async def test_a_run_begun_before_goes_on_where_contexts_begin_as_before(server: FakeServer, tmp_path: Path) -> None:
    server.starts = {"prompt_start": [2], "text_start": 2}
    first = await run(server, tmp_path, *TASKS)
    made_before(tmp_path / "out")
    assert Record.read(tmp_path / "out").evaluation() == first
    asked = len(server.asked)
    assert await run(server, tmp_path, *TASKS) == first
    assert len(server.asked) == asked


@pytest.mark.parametrize("prompt_start", [[], [1, 2]])
async def test_a_run_begun_before_is_refused_where_contexts_begin_otherwise(
    server: FakeServer, tmp_path: Path, prompt_start: list[int]
) -> None:
    server.starts = {"prompt_start": prompt_start, "text_start": 2}
    first = await run(server, tmp_path, CHOICE)
    assert await run(server, tmp_path, CHOICE) == first
    made_before(tmp_path / "out")
    with pytest.raises(EvaluationError, match=r"before a context \(then \[2\], now "):
        await run(server, tmp_path, CHOICE)


async def test_keyword_arguments_of_the_clients(server: FakeServer) -> None:
    with CraneClient(server.address) as client:
        client.score_text("en a", add_bos=False)
        client.score_continuations("en", [" a"], add_bos=True, join="length")
        client.generate("en a", add_bos=False)
        client.generate("en a", add_bos="auto")
    async with AsyncCraneClient(server.address) as awaiting:
        await awaiting.score_text("en a", add_bos=False)
        await awaiting.score_continuations("en", [" a"], add_bos=True, join="length")
        await awaiting.generate("en a", add_bos=False)
        await awaiting.generate("en a", add_bos="auto")
    assert server.bodies[:4] == server.bodies[4:] == [
        {"text": ["en a"], "add_bos": False},
        {"context": "en", "continuations": [" a"], "add_bos": True, "join": "length"},
        {"prompt": "en a", "add_bos": False},
        {"prompt": "en a"},
    ]  # fmt: skip
