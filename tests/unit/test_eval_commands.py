"""`crane eval`, `report` and `compare` as processes and as commands: kill -9, replays, one message for each mistake."""

import json
import random
import re
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from clients import EvaluationError
from clients.commands import compare, evaluate, render
from clients.evaluation import Evaluation
from clients.results import RESULTS_FILE
from tests.fake_server import LANGUAGES, FakeServer, serving
from tests.forked import crane

DOCUMENTS = 12
KILLS = 10


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        yield fake


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    app.command("eval")(evaluate)
    app.command("report")(render)
    app.command("compare")(compare)
    return app


def write_plan(directory: Path, **changes: Any) -> Path:
    """A plan of three kinds of task, with its texts beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        rows = [
            {"id": f"d{n}", "text": f"{language} text {n}", "choices": ["one", "two"], "answer": n % 2}
            for n in range(DOCUMENTS)
        ]
        (directory / f"{language}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"files": "{lang}.jsonl"}
    content = {
        "languages": list(LANGUAGES),
        "masks": ["attnlrp-*", "random-vi"],
        "tasks": [
            {"kind": "perplexity", "name": "texts", "source": source},
            {"kind": "choice", "source": source, "question": "{{ text }}", "choices": "{{ choices }}",
             "answer": "{{ answer }}"},
            {"kind": "open_generation", "name": "talk", "source": source, "limit": 6},
        ],
    }  # fmt: skip
    path = directory / "plan.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


TOTAL = 5 * 3 * (DOCUMENTS + DOCUMENTS + 6)


def start(server: FakeServer, plan: Path, out: Path) -> ForkServerProcess:
    options = ("--server", server.address, "--out", out, "--concurrency", 4)
    return crane("eval", plan, *options, log=out.with_suffix(".log"))


def read_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RESULTS_FILE).read_text().splitlines()]


def test_kill_9_ten_times_loses_and_repeats_nothing(server: FakeServer, tmp_path: Path) -> None:
    plan, out = write_plan(tmp_path / "plan"), tmp_path / "killed"
    server.delay_s = 0.02
    draw = random.Random(0)
    kept = 0
    for kill in range(KILLS):
        process = start(server, plan, out)
        goal = len(server.asked) + draw.randrange(1, (TOTAL - kept) // (KILLS - kill) + 1)
        while len(server.asked) < goal:
            assert process.exitcode is None, out.with_suffix(".log").read_text()
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        server.settle()
        lines = (out / RESULTS_FILE).read_bytes().count(b"\n")
        assert kept <= lines < TOTAL
        kept = lines
        assert not (out / "results.json").exists()
    before = len(server.asked)
    server.delay_s = 0.0
    process = start(server, plan, out)
    process.join()
    assert process.exitcode == 0, out.with_suffix(".log").read_text()
    assert len(server.asked) - before == TOTAL - kept
    keys = [(line["task"], line["mask"], line["language"], line["item"]) for line in read_lines(out)]
    assert len(keys) == len(set(keys)) == TOTAL
    assert {line["session"] for line in read_lines(out)} <= set(range(1, KILLS + 2))

    process = start(server, plan, tmp_path / "whole")
    process.join()
    assert process.exitcode == 0
    killed, whole = (
        Evaluation.read(tmp_path / name).model_dump(exclude={"throughput"}) for name in ("killed", "whole")
    )
    assert killed == whole
    for name in ("cells.csv", "items.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def invoke(cli: typer.Typer, *arguments: object) -> Any:
    return CliRunner().invoke(cli, list(map(str, arguments)))


def test_a_plan_from_the_command_line(server: FakeServer, tmp_path: Path, cli: typer.Typer) -> None:
    out = tmp_path / "out"
    result = invoke(cli, "eval", write_plan(tmp_path / "plan"), "--server", server.address, "--out", out)
    assert result.exit_code == 0, result.output
    for expected in ("attnlrp-en", "random-vi", f"{TOTAL} answers", out / "report.html", out / "results.json"):
        assert str(expected) in result.output
    before = Evaluation.read(out)
    (out / "report.html").unlink()
    (out / "results.json").unlink()
    assert invoke(cli, "report", out).exit_code == 0
    assert (out / "report.html").exists()
    assert Evaluation.read(out) == before

    assert len(server.asked) == TOTAL
    result = invoke(
        cli,
        "eval",
        write_plan(tmp_path / "plan"),
        "--server",
        server.address,
        "--out",
        out,
        "--mask",
        "zh",
        "--seed",
        1,
    )
    assert result.exit_code == 0, result.output
    assert len(server.asked) == TOTAL
    assert list(Evaluation.read(out).masks) == ["none", "attnlrp-zh"]
    assert Evaluation.read(out).intervals.seed == 1


def test_without_a_plan_it_is_perplexity_on_a_corpus(server: FakeServer, tmp_path: Path, cli: typer.Typer) -> None:
    write_plan(tmp_path / "corpus")
    out = tmp_path / "out"
    options = ["--server", server.address, "--corpus", tmp_path / "corpus", "--out", out, "--limit", 3]
    result = invoke(cli, "eval", *options, "--mask", "en", "--mask", "zh,vi@0.5")
    assert result.exit_code == 0, result.output
    evaluation = Evaluation.read(out)
    assert list(evaluation.masks) == ["none", "attnlrp-en", "zh,vi@0.5"]
    assert evaluation.task("perplexity").items == dict.fromkeys(LANGUAGES, 3)
    texts = {text for _, text in server.asked if text.startswith("en")}
    assert texts == {"en text 0", "en text 1", "en text 2"}, "the first, not some from everywhere"


def test_a_budget_keeps_the_masks_that_were_allowed_it(server: FakeServer, tmp_path: Path, cli: typer.Typer) -> None:
    server.budgets = {"attnlrp-en": 0.02, "random-vi": 0.02}
    write_plan(tmp_path / "corpus")
    options = ["--server", server.address, "--corpus", tmp_path / "corpus", "--limit", 1, "--languages", "zh,en"]
    result = invoke(cli, "eval", *options, "--budget", 0.02, "--out", tmp_path / "all")
    assert result.exit_code == 0, result.output
    evaluation = Evaluation.read(tmp_path / "all")
    assert list(evaluation.masks) == ["none", "attnlrp-en", "random-vi"]
    assert evaluation.languages == ("zh", "en")
    options += ["--budget", 0.02, "--budget", 0.01, "--mask", "attnlrp-*", "--mask", "random-en"]
    assert invoke(cli, "eval", *options, "--out", tmp_path / "some").exit_code == 0
    named = list(Evaluation.read(tmp_path / "some").masks)
    assert named == ["none", "attnlrp-en", "attnlrp-vi", "attnlrp-zh", "random-en"]


def test_failures_are_listed_and_the_exit_code_says_so(server: FakeServer, tmp_path: Path, cli: typer.Typer) -> None:
    server.refuse = lambda mask, text: 400 if (mask, text) == ("attnlrp-en", "en text 3") else None
    out = tmp_path / "out"
    result = invoke(cli, "eval", write_plan(tmp_path / "plan"), "--server", server.address, "--out", out)
    assert result.exit_code == 1
    assert "failed: texts / attnlrp-en / en / d3: fake refused" in result.output
    assert f"{TOTAL - 2} answers" in result.output
    assert len(Evaluation.read(out).failures) == 2
    assert invoke(cli, "report", out).exit_code == 0
    assert len(Evaluation.read(out).failures) == 2


def test_a_replay_repeats_an_evaluation(server: FakeServer, tmp_path: Path, cli: typer.Typer) -> None:
    plan, first = write_plan(tmp_path / "plan"), tmp_path / "first"
    assert invoke(cli, "eval", plan, "--server", server.address, "--out", first).exit_code == 0

    def replay(out: str, *options: object) -> Any:
        return invoke(
            cli, "eval", "--replay", first / "results.json", "--server", server.address, "--base", plan.parent,
            "--out", tmp_path / out, *options,
        )  # fmt: skip

    result = replay("second")
    assert result.exit_code == 0, result.output
    assert "changes are identical to those replayed" in result.output
    second = Evaluation.read(tmp_path / "second")
    assert second.model_dump(exclude={"throughput"}) == Evaluation.read(first).model_dump(exclude={"throughput"})

    asked = len(server.asked)
    for options, message in (
        (["--mask", "en"], "--mask, --budget and --seed do not go with --replay"),
        (["--limit", 3, "--languages", "en"], "--languages, --limit: for evaluations without a plan"),
        ([plan], "a plan and --replay do not go together"),
        (["--base", tmp_path], r"there is no file .*en\.jsonl"),
    ):
        assert_refused(replay("other", *options), message)
    server.digests["attnlrp-vi"] = "changed"
    assert_refused(replay("other"), "mask 'attnlrp-vi' of the evaluation to replay has digest digest-attnlrp-v")
    server.digests["attnlrp-vi"] = "digest-attnlrp-vi"
    server.fingerprint = {"architecture": "Fake", "layers": 3}
    assert_refused(
        replay("other"), r"serves another model \(fake\) than the evaluation to replay .*: its layers differ"
    )
    server.fingerprint = {"architecture": "Fake", "layers": 2}
    (plan.parent / "zh.jsonl").write_text((plan.parent / "zh.jsonl").read_text().replace("zh text 5", "zh text five"))
    assert_refused(replay("other"), "task 'texts' has other items in 'zh' than the evaluation to replay")
    assert len(server.asked) == asked
    assert not (tmp_path / "other").exists()


def assert_refused(result: Any, message: str) -> None:
    assert isinstance(result.exception, EvaluationError), result.output
    assert re.search(message, str(result.exception)), result.exception
    assert "\n" not in str(result.exception)


def test_what_is_wrong_is_said_before_any_work(server: FakeServer, tmp_path: Path, cli: typer.Typer) -> None:
    def run(plan: Path, *options: object) -> Any:
        return invoke(cli, "eval", plan, "--server", server.address, "--out", tmp_path / "out", *options)

    plan = write_plan(tmp_path / "plan")
    assert_refused(run(plan, "--mask", "xx"), "the server has no mask 'xx'; it has none, attnlrp-en")
    assert_refused(run(plan, "--corpus", "embedded"), "--corpus: for evaluations without a plan")
    assert_refused(run(plan, "--budget", 0.5, "--mask", "*"), r"fits '\*' at the budgets 0.5; it has none, attnlrp-en")
    assert_refused(run(plan, "--budget", 0), "budgets")
    flags = ["eval", "--server", server.address, "--out", tmp_path / "out"]
    assert_refused(invoke(cli, *flags, "--task", "belebele"), "--task needs --languages, such as en,zh,vi")
    assert_refused(invoke(cli, *flags, "--task", "chess", "--languages", "en"), "task 1: .*'chess'.*belebele")
    assert_refused(invoke(cli, *flags, "--task", "xcopa", "--split", "test"), "--split and --normalise do not go with")
    assert_refused(invoke(cli, *flags, "--shots", 2), "--shots belongs to --task")
    assert_refused(run(tmp_path / "nowhere.yaml"), "nowhere.yaml cannot be read; expected a plan")
    assert_refused(run(write_plan(tmp_path / "plan", model="llama")), "serves 'fake', the plan is for 'llama'")
    task = {"kind": "chess", "source": {"files": "{lang}.jsonl"}}
    assert_refused(
        run(write_plan(tmp_path / "plan", tasks=[task])), "task 1: .*'chess'.*choice, cloze, open_generation"
    )
    task = {"kind": "perplexity", "source": {"files": "gone/{lang}.jsonl"}}
    assert_refused(run(write_plan(tmp_path / "plan", tasks=[task])), r"there is no file .*gone/en\.jsonl")
    assert_refused(run(write_plan(tmp_path / "plan", languages="en")), "languages")
    assert_refused(invoke(cli, "report", tmp_path), r"run\.json cannot be read; expected the settings of a run")
    assert server.asked == []
    assert not (tmp_path / "out").exists()


def test_two_evaluations_are_compared(server: FakeServer, tmp_path: Path, cli: typer.Typer) -> None:
    plan = write_plan(tmp_path / "plan")
    for name in ("base", "chat"):
        assert invoke(cli, "eval", plan, "--server", server.address, "--out", tmp_path / name).exit_code == 0
        server.fingerprint = {"architecture": "Fake", "layers": 2, "weights": "tuned"}
        server.model = "fake-chat"
    result = invoke(cli, "compare", tmp_path / "base", tmp_path / "chat", "--out", tmp_path / "compared")
    assert result.exit_code == 0, result.output
    assert "attnlrp-en" in result.output
    assert "weights" in result.output
    assert (tmp_path / "compared" / "compare.html").exists()
    result = invoke(cli, "compare", tmp_path / "base", tmp_path / "nowhere")
    assert isinstance(result.exception, EvaluationError)
