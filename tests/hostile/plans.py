"""A plan, or a recorded evaluation, by somebody else: what it sends away, and what it reads."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.hostile.case import Case, Outcome

_EVAL = "from crane_serve.cli import app; app()"
_SECRET = "made-up-secret"
_TEXT = "of a file elsewhere"


def _plan(directory: Path, **task: Any) -> dict[str, Any]:
    (directory / "en.jsonl").write_text('{"id": "1", "text": "en one"}\n')
    source = {"files": str(directory / "{lang}.jsonl")}
    return {"languages": ["en"], "masks": [], "tasks": [{"kind": "open_generation", "source": source} | task]}


def _evaluated(address: str, directory: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "A_SECRET": _SECRET, "HF_HUB_OFFLINE": "1"}
    environment["CRANE_JUDGE_KEY"] = _SECRET
    command = [sys.executable, "-P", "-c", _EVAL, "eval", "--server", address, "--out", str(directory / "out")]
    subprocess.run(
        [*command, *arguments], env=environment, cwd=directory, capture_output=True, timeout=240, check=False
    )


def _received(variable: str, *, replayed: bool) -> Outcome:
    """What a judge that nobody named received."""
    from clients import Plan, run_evaluation
    from tests.fake_judge import judging
    from tests.fake_server import serving

    with serving() as server, judging() as referee, tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        judge = {"base_url": referee.base_url, "model": "m", "key_variable": variable}
        if replayed:
            plan = Plan.parse(_plan(directory), "plan")
            run_evaluation(plan, directory / "theirs", server=server.address, base=directory)
            results = directory / "theirs" / "results.json"
            content = json.loads(results.read_text())
            content["plan"]["tasks"][0]["judge"] = judge
            emptied = {key: [] for key in ("tasks", "cells", "effects", "ranks", "matched")}
            results.write_text(json.dumps(content | emptied))
            _evaluated(server.address, directory, "--replay", str(results), "--base", name)
        else:
            (directory / "plan.yaml").write_text(json.dumps(_plan(directory, judge=judge)))
            _evaluated(server.address, directory, str(directory / "plan.yaml"))
        leaked = any(_SECRET in (key or "") for key in referee.keys)
        return Outcome(
            f"requests: {len(referee.asked)}, with the variable: {'yes' if leaked else 'no'}", not referee.asked
        )


def _read(*, linked: bool) -> Outcome:
    """Whether a text from outside of the plan's directory reached the server."""
    from tests.fake_server import serving

    with serving() as server, tempfile.TemporaryDirectory() as name:
        own, elsewhere = Path(name) / "own", Path(name) / "elsewhere"
        own.mkdir()
        elsewhere.mkdir()
        (elsewhere / "en.jsonl").write_text(json.dumps({"id": "1", "text": _TEXT}))
        (own / "en.jsonl").symlink_to(elsewhere / "en.jsonl")
        files = "{lang}.jsonl" if linked else str(elsewhere / "{lang}.jsonl")
        task = {"kind": "perplexity", "source": {"files": files}}
        (own / "plan.yaml").write_text(json.dumps({"languages": ["en"], "masks": [], "tasks": [task]}))
        _evaluated(server.address, own, "plan.yaml")
        return Outcome(f"texts that reached the server: {len(server.asked)}", not server.asked)


def _working_directory() -> Outcome:
    from tests.fake_server import serving

    with serving() as server, tempfile.TemporaryDirectory() as name:
        (Path(name) / "notes.txt").write_text(_TEXT)
        task = {"kind": "perplexity", "source": {"dataset": "text", "split": "train"}}
        plan = {"languages": ["en"], "masks": [], "tasks": [task]}
        with tempfile.TemporaryDirectory() as theirs:
            (Path(theirs) / "plan.yaml").write_text(json.dumps(plan))
            _evaluated(server.address, Path(name), f"{theirs}/plan.yaml")
        return Outcome(f"lines of notes.txt that reached the server: {len(server.asked)}", not server.asked)


CASES = {
    "judge-variable": Case(
        10,
        "a plan with a judge on a host of its own and key_variable: A_SECRET",
        "nothing is sent",
        lambda: _received("A_SECRET", replayed=False),
    ),
    "judge-key": Case(
        10,
        "the same with the judge's own key",
        "nothing is sent to a host that was not named",
        lambda: _received("CRANE_JUDGE_KEY", replayed=False),
    ),
    "replayed-judge": Case(
        10,
        "`--replay` of results with such a judge",
        "nothing is sent",
        lambda: _received("A_SECRET", replayed=True),
    ),
    "plan-file": Case(
        10, "a plan that names a file elsewhere by its path", "it is not read", lambda: _read(linked=False)
    ),
    "plan-link": Case(10, "a plan beside a link to a file elsewhere", "it is not read", lambda: _read(linked=True)),
    "plan-dataset": Case(
        10, "`dataset: text`, a reader of all texts in the working directory", "none is read", _working_directory
    ),
}
