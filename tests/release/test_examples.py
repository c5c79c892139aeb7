"""The examples: the scripts on tiny models and a made-up server, the plan and the commands of CRANE's table."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from typer.exceptions import TyperException
from typer.testing import CliRunner

from clients.blocking import run_evaluation
from clients.plan import Plan
from crane_serve.cli import app
from crane_serve.common.masks import read_mask
from tests.api.serve_fake import FakeServer as TalkingServer
from tests.fake_server import FakeServer, serving
from tests.tiny import LAYERS, NEURONS, tiny_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TABLE = EXAMPLES / "crane_table"
LANGUAGES = ("en", "vi", "zh")


def test_every_example_is_listed() -> None:
    page = (EXAMPLES / "README.md").read_text()
    listed = set(re.findall(r"\]\(([\w/.]+)\)", page))
    assert listed == {path.name + "/" * path.is_dir() for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__/"}


def test_neurons_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EXAMPLE_MODEL", str(tiny_model("llama", tmp_path / "model")))
    monkeypatch.setenv("EXAMPLE_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("EXAMPLE_DOCUMENTS", "2")
    found = runpy.run_path(str(EXAMPLES / "find_neurons.py"))
    names = [f"{method}-{language}" for method in ("attnlrp", "lape", "random") for language in LANGUAGES]
    stored = {path.stem: read_mask(path).mask for path in (tmp_path / "out" / "masks").iterdir()}
    assert sorted(stored) == names
    assert {mask.neurons for mask in stored.values()} == {round(0.01 * LAYERS * NEURONS)}
    *_, heading = (line for line in capsys.readouterr().out.splitlines() if line.startswith("mask "))
    assert heading.split() == ["mask", *LANGUAGES]
    effect = {name: found["nats"](name)["vi"] - found["unmasked"]["vi"] for name in ("attnlrp-vi", "random-vi")}
    assert all(effect.values())  # what a mask costs is measured under that mask
    assert effect["attnlrp-vi"] != effect["random-vi"]


def test_output_is_steered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    server = TalkingServer(tmp_path, talks=True)
    try:
        monkeypatch.setenv("EXAMPLE_SERVER", f"http://127.0.0.1:{server.port}")
        monkeypatch.setenv("EXAMPLE_TOKENS", "16")
        found = runpy.run_path(str(EXAMPLES / "steer_language.py"))
    finally:
        server.kill()
    rows = found["rows"]
    assert list(rows) == ["none", "en", "zh", "vi", "en,zh", "en,vi", "zh,vi"]
    assert [rows["none"]["en"], rows["zh"]["vi"], rows["vi"]["zh"], rows["zh,vi"]["other"]] == [1.0] * 4
    assert all(sum(row.values()) == pytest.approx(1) for row in rows.values())
    assert {len(texts) for texts in found["texts"].values()} == {40}
    assert re.search(r"^none +100% ", capsys.readouterr().out, re.M)


_STUB = f"""#!{sys.executable}
import json, os, signal, sys, time
from pathlib import Path

ready = Path(os.environ["RECORD"] + ".ready")
name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
with open(os.environ["RECORD"], "a") as record:
    record.write(json.dumps([name, *arguments]) + "\\n")
if arguments[0] == "serve":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    ready.touch()
    signal.sigwait([signal.SIGTERM])
    ready.unlink()
while arguments[0] == "eval" and not ready.exists():
    time.sleep(0.01)
if arguments[:2] == ["masks", "import-lape"]:
    out = Path(arguments[arguments.index("--out") + 1])
    out.mkdir()
    for language in ("en", "zh", "vi"):
        (out / f"lape-{{language}}.safetensors").touch()
    (out.parent / "masks").mkdir()
"""


def _commands(directory: Path, **variables: object) -> list[list[str]]:
    """What `run.sh` runs, with commands that only say so in their place."""
    stubs = directory / "bin"
    stubs.mkdir()
    for name in ("crane", "python"):
        (stubs / name).write_text(_STUB)
        (stubs / name).chmod(0o755)
    record = directory / "record.jsonl"
    path = f"{stubs}{os.pathsep}{os.environ['PATH']}"
    given = {name: str(value) for name, value in variables.items()}
    environment = {**os.environ, "PATH": path, "RECORD": str(record), **given}
    done = subprocess.run(
        [TABLE / "run.sh"], cwd=directory, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in record.read_text().splitlines()]


def _parse(arguments: list[str]) -> None:
    """Have a command line parsed as `crane` would, and run nothing. Raises what typer does for a wrong one."""
    root = typer.main.get_command(app)
    commands = [root]
    while commands:
        command = commands.pop()
        command.callback = None
        commands += getattr(command, "commands", {}).values()
    root.main(arguments, standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["select", "scores", "--method", "crane", "--no-such-option"], "No such option"),
        (["serv", "model"], "No such command"),
        (["masks", "import-lape", "file"], "--languages"),
        (["select", "scores", "--method", "crane", "--rule", "none"], "'none' is not one of"),
    ],
)
def test_command_lines_are_checked(arguments: list[str], problem: str) -> None:
    with pytest.raises(TyperException) as refused:
        _parse(arguments)
    assert problem in refused.value.format_message()


def test_the_commands_of_the_table_are_commands(tmp_path: Path) -> None:
    commands = _commands(tmp_path, LAPE="neurons.pth", CORPUS="texts", SPLIT="train", OUT="out")
    of_crane = [arguments for name, *arguments in commands if name == "crane"]
    for arguments in of_crane:
        _parse(arguments)
    verbs = [arguments[0] if arguments[0] != "masks" else " ".join(arguments[:2]) for arguments in of_crane]
    assert sorted(verbs[:5]) == sorted(["relevance", "select", "select", "masks import-lape", "masks list"])
    assert sorted(verbs[5:]) == sorted(["serve", "eval", "masks transfer", "serve", "eval", "compare"])
    assert [arguments for name, *arguments in commands if name == "python"] == [
        [str(TABLE / "table.py"), f"out/{version}"] for version in ("base", "chat")
    ]
    (relevance,) = (arguments for arguments in of_crane if arguments[0] == "relevance")
    assert relevance[2:6] == ["--corpus", "texts", "--split", "train"]


def test_masks_of_the_table_are_made(tmp_path: Path) -> None:
    """What `run.sh` does without a server, on tiny models and the packaged corpus."""
    base = tiny_model("llama", tmp_path / "base")
    chat = tiny_model("llama", tmp_path / "chat", seed=1)
    out = tmp_path / "out"
    for name, *arguments in _commands(tmp_path, BASE=base, CHAT=chat, OUT=out):
        if name == "crane" and arguments[0] in ("relevance", "select", "masks"):
            if arguments[0] == "relevance":
                arguments += ["--max-tokens", "64", "--limit", "8"]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, (arguments, result.output, result.exception)
    masks, of_chat = (
        {path.stem: read_mask(path) for path in (out / name).iterdir()} for name in ("masks", "masks-chat")
    )
    assert sorted(masks) == sorted(
        f"{method}-{language}" for method in ("crane", "random", "lape") for language in LANGUAGES
    )
    for language in LANGUAGES:
        found, control = masks[f"crane-{language}"].mask, masks[f"random-{language}"].mask
        assert found.output is not None
        assert control.output is not None
        assert torch.equal((found.intermediate == 0).sum(dim=1), (control.intermediate == 0).sum(dim=1))
        assert torch.equal((found.output == 0).sum(dim=1), (control.output == 0).sum(dim=1))
    assert {name: stored.mask.digest for name, stored in masks.items()} == {
        name: stored.mask.digest for name, stored in of_chat.items()
    }
    assert all(stored.info.transferred_from is not None for stored in of_chat.values())


def test_the_plan_of_the_table() -> None:
    plan = Plan.read(TABLE / "plan.yaml")
    asked = {task.name: (task.kind, task.languages, task.settings()["shots"]) for task in plan.tasks}
    assert asked == {
        "mmlu": ("choice", ("en",), 5),
        "c-eval": ("choice", ("zh",), 5),
        "belebele-vi": ("choice", ("vi",), 5),
        "belebele": ("choice", None, 5),
    }
    datasets = [task.settings()["source"]["dataset"] for task in plan.tasks]
    assert datasets == ["cais/mmlu", "ceval/ceval-exam", "facebook/belebele", "facebook/belebele"]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


def test_the_table(fake: FakeServer, tmp_path: Path) -> None:
    """The plan on rows of the data sets' form, answered by a made-up server, and what `table.py` makes of it."""
    number = range(8)
    rows = {
        "mmlu": [{"question": f"Q{n}?", "choices": list("pqrs"), "answer": n % 4, "subject": "tea"} for n in number],
        "c-eval": [{"question": f"题{n}", **dict.fromkeys("ABCD", "茶"), "answer": "ABCD"[n % 4]} for n in number],
        "belebele": [
            {"flores_passage": f"P{n}", "question": "Q?", "correct_answer_num": str(n % 4 + 1)}
            | {f"mc_answer{choice}": f"a{choice}" for choice in range(1, 5)}
            for n in number
        ],
    }
    for name, of_task in rows.items():
        lines = (
            json.dumps({"id": str(n), "link": f"l{n}", "question_number": 1, "config": "law"} | row)
            for n, row in enumerate(of_task)
        )
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    content = Plan.read(TABLE / "plan.yaml").content()
    for task in content["tasks"]:
        file = tmp_path / f"{task['name'].removesuffix('-vi')}.jsonl"
        kept = {"id": task["source"]["id"]} if "id" in task["source"] else {}
        task["source"] = {"files": {language: str(file) for language in LANGUAGES}} | kept
        task.pop("shots_source", None)
        task["shots"] = 1
        task.pop("shots_by", None)
    plan = Plan.parse(content, "the plan of the table")
    evaluation = run_evaluation(plan, tmp_path / "out", server=fake.address, base=tmp_path)
    done = subprocess.run(
        [sys.executable, TABLE / "table.py", tmp_path / "out"],
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("│") for line in done.stdout.splitlines() if "│" in line]
    shown = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in lines}
    assert list(shown) == ["none", *(name for name in evaluation.masks if name != "none")]
    for mask, cells in shown.items():
        level = evaluation.cell("mmlu", "accuracy", "en", mask).level.mean
        assert cells[0] == f"{level:.4f}"
        assert (cells[4] == "") == (mask == "none")
