"""What a plan may reach: judges that were named, files in its own directory, no secret but a judge's key."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clients import EvaluationError, Permissions, Plan, iterate_answers, run_evaluation
from clients.judge import Judge
from crane_serve.cli import app
from tests.fake_judge import FakeJudge, judging
from tests.fake_server import FakeServer, serving

SECRET = "sk-secret"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        yield fake


@pytest.fixture
def referee() -> Iterator[FakeJudge]:
    with judging() as judge:
        yield judge


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CRANE_JUDGE_KEY", "CRANE_JUDGE_KEY_2", "CRANE_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)


def talk(place: Path, judge: dict[str, Any] | None = None, **source: Any) -> dict[str, Any]:
    """A plan's content, with its one text in `place`."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "en.jsonl").write_text('{"id": "1", "text": "en one"}\n')
    task = {"kind": "open_generation", "source": source or {"files": "{lang}.jsonl"}}
    return {"languages": ["en"], "masks": [], "tasks": [task if judge is None else {**task, "judge": judge}]}


def crane_eval(server: FakeServer, out: Path, *options: object) -> tuple[int, str]:
    arguments = ["eval", "--out", str(out), "--server", server.address, *map(str, options)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "1000"})
    return result.exit_code, result.output


def written(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))  # which is YAML, too
    return path


# --- judges


def test_a_judge_that_nobody_named_gets_nothing(server: FakeServer, referee: FakeJudge, tmp_path: Path) -> None:
    judge = {"base_url": referee.base_url, "model": "m", "key_variable": "CRANE_JUDGE_KEY"}
    plan = written(tmp_path / "plan.yaml", talk(tmp_path, judge))
    for options in ((), ("--judge-host", "127.0.0.1"), ("--judge-host", "judge.example")):
        code, said = crane_eval(server, tmp_path / "out", plan, *options)
        assert code == 1
        assert (
            f"to {referee.host}, with the key in CRANE_JUDGE_KEY; allow that with --judge-host {referee.host}" in said
        )
    assert (referee.asked, server.asked) == ([], [])
    code, _ = crane_eval(server, tmp_path / "out", plan, "--judge-host", referee.host)
    assert (code, referee.keys) == (0, [f"Bearer {SECRET}"])


def test_a_judge_without_a_key_must_be_named_too(server: FakeServer, referee: FakeJudge, tmp_path: Path) -> None:
    plan = Plan.parse(talk(tmp_path, {"base_url": referee.base_url, "model": "m"}), "plan")
    for run in (run_evaluation, lambda *given, **named: list(iterate_answers(*given, **named))):
        with pytest.raises(EvaluationError, match=f"would send .* to {referee.host}; allow that"):
            run(plan, tmp_path / "out", server=server.address, base=tmp_path)
    assert referee.asked == []
    allowed = Permissions(frozenset({referee.host}), (tmp_path,))
    assert run_evaluation(plan, tmp_path / "out", server=server.address, base=tmp_path, allowed=allowed).failures == ()
    assert referee.keys == [None]


@pytest.mark.parametrize(
    "variable",
    [
        "AWS_SECRET_ACCESS_KEY",
        "CRANE_API_KEY",
        "CRANE_JUDGE_KEYS",
        "XCRANE_JUDGE_KEY",
        "crane_judge_key",
        "CRANE_JUDGE_KEY\n",
    ],
)
def test_a_plan_names_no_other_secret(server: FakeServer, referee: FakeJudge, variable: str, tmp_path: Path) -> None:
    judge = {"base_url": referee.base_url, "model": "m", "key_variable": variable}
    plan = written(tmp_path / "plan.yaml", talk(tmp_path, judge))
    code, said = crane_eval(server, tmp_path / "out", plan, "--judge-host", referee.host)
    assert code == 1
    assert "expected CRANE_JUDGE_KEY, or a name that begins with CRANE_JUDGE_KEY_" in said
    with pytest.raises(EvaluationError, match="expected CRANE_JUDGE_KEY"):
        asyncio.run(Judge.model_validate(judge).ask("q", "a", "en"))
    assert (referee.asked, server.asked) == ([], [])


@pytest.mark.parametrize("address", ["http://judge.example/v1", "http://10.0.0.1:8000", "http://127.0.0.1.example"])
def test_what_is_sent_elsewhere_is_encrypted(server: FakeServer, address: str, tmp_path: Path) -> None:
    judge = {"base_url": address, "model": "m"}
    plan = written(tmp_path / "plan.yaml", talk(tmp_path, judge))
    host = Judge.model_validate(judge).host
    code, said = crane_eval(server, tmp_path / "out", plan, "--judge-host", host)
    assert code == 1
    assert f"judge m at {address}: expected https, as it is not this machine" in said
    with pytest.raises(EvaluationError, match="expected https"):
        asyncio.run(Judge.model_validate(judge).ask("q", "a", "en"))


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("https://judge.example/v1", "judge.example"),
        ("https://judge.example:443/v1", "judge.example"),
        ("https://Judge.Example:8443", "judge.example:8443"),
        ("http://[::1]:80", "[::1]"),
    ],
)
def test_a_host_has_its_port_where_it_is_not_the_usual_one(address: str, host: str) -> None:
    judge = Judge(base_url=address, model="m")
    judge.require_safe()
    assert judge.host == host


async def test_the_key_is_not_sent_on(referee: FakeJudge) -> None:
    with judging() as elsewhere:
        referee.redirect = f"{elsewhere.base_url}/chat/completions"
        judge = Judge(base_url=referee.base_url, model="m", key_variable="CRANE_JUDGE_KEY_2")
        with pytest.raises(Exception, match="judge m at"):
            await judge.ask("q", "a", "en")
        assert (referee.keys, elsewhere.asked) == ([f"Bearer {SECRET}"], [])


# --- files


@pytest.mark.parametrize(
    "named", ["absolute", "../secrets", "link", "linked", "codes", "shots", "corpus", "corpus link"]
)
def test_files_elsewhere_are_not_read(server: FakeServer, named: str, tmp_path: Path) -> None:
    own, secrets = tmp_path / "own", tmp_path / "secrets"
    own.mkdir()
    talk(secrets)
    (own / "link.jsonl").symlink_to(secrets / "en.jsonl")
    (own / "linked").symlink_to(secrets)
    (own / "corpus").mkdir()
    (own / "corpus" / "en.jsonl").symlink_to(secrets / "en.jsonl")
    source: dict[str, Any] = {
        "absolute": {"files": f"{secrets}/{{lang}}.jsonl"},
        "../secrets": {"files": "../secrets/{lang}.jsonl"},
        "link": {"files": {"en": "link.jsonl"}},
        "linked": {"files": "linked/{lang}.jsonl"},
        "codes": {"files": "{lang}.jsonl", "codes": {"en": "../secrets/en"}},
        "corpus": {"corpus": str(secrets)},
        "corpus link": {"corpus": "corpus"},
    }.get(named, {"files": "{lang}.jsonl"})
    content = talk(own, **source)
    if named == "shots":
        more = {"shots": 1, "shots_source": {"files": f"{secrets}/en.jsonl"}, "prompt": "q", "answers": "a"}
        content["tasks"] = [{"kind": "qa", "source": source, **more}]
    plan = written(own / "plan.yaml", content)
    code, said = crane_eval(server, tmp_path / "out", plan)
    assert code == 1
    assert f"{secrets}" in said
    assert f"which is outside of the plan's directory; allow that with --data {secrets}" in said
    assert server.asked == []
    if named != "shots":
        code, said = crane_eval(server, tmp_path / "out", plan, "--data", secrets)
        assert (code, server.asked) == (0, [("none", "en one")]), said


def test_a_corpus_on_the_command_line_is_allowed(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "en.jsonl").write_text('{"id": "1", "text": "en one"}\n')
    code, said = crane_eval(server, tmp_path / "out", "--corpus", tmp_path / "texts", "--mask", "none")
    assert (code, server.asked) == (0, [("none", "en one")]), said


# --- replays


def recorded(server: FakeServer, own: Path, **changes: Any) -> Path:
    """The results of a plan in `own`, with another plan in them, and without the digests that would differ."""
    plan = Plan.parse(talk(own), "plan")
    run_evaluation(plan, own / "out", server=server.address, base=own)
    server.asked.clear()
    results = own / "out" / "results.json"
    content = json.loads(results.read_text())
    content["plan"]["tasks"][0].update(changes)
    return written(results, {**content, "tasks": [], "cells": [], "effects": [], "ranks": [], "matched": []})


def test_a_replay_asks_no_judge_that_nobody_named(server: FakeServer, referee: FakeJudge, tmp_path: Path) -> None:
    judge = {"base_url": referee.base_url, "model": "m", "key_variable": "CRANE_JUDGE_KEY"}
    results = recorded(server, tmp_path / "own", judge=judge)
    options = ("--replay", results, "--base", tmp_path / "own")
    code, said = crane_eval(server, tmp_path / "again", *options)
    assert (code, referee.asked) == (1, [])
    assert f"--judge-host {referee.host}" in said
    code, said = crane_eval(server, tmp_path / "again", *options, "--judge-host", referee.host)
    assert referee.keys == [f"Bearer {SECRET}"], said


def test_a_replay_reads_no_files_here_unless_told_where(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = recorded(server, tmp_path / "own", source={"files": "{lang}.jsonl"})
    monkeypatch.chdir(tmp_path / "own")
    code, said = crane_eval(server, tmp_path / "again", "--replay", results)
    assert (code, server.asked) == (1, [])
    assert f"would read {tmp_path / 'own' / 'en.jsonl'}" in said
    code, said = crane_eval(server, tmp_path / "again", "--replay", results, "--base", ".")
    assert server.asked == [("none", "en one")], said
