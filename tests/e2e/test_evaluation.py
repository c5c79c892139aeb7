"""Evaluations on a real engine: figures against transformers, many kills of the client, a kill of the server."""

import asyncio
import json
import random
import signal
import time
from contextlib import aclosing
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from clients import AsyncCraneClient, Evaluation, Plan, RetryPolicy, Run
from clients.results import RESULTS_FILE
from crane_serve.common.masks import NeuronMask
from tests.conftest import Tiny
from tests.engines import START_TIMEOUT_S, Oracle, Server
from tests.forked import crane

pytestmark = pytest.mark.engine

TEXTS = {
    "en": ["The harbour froze in the night.", "Bells rang until noon.", "Nobody saw the ship leave.", "Fog came."],
    "vi": ["Bến cảng đóng băng trong đêm.", "Chuông reo đến trưa.", "Không ai thấy tàu rời đi.", "Sương xuống."],
    "zh": ["港口在夜里结冰了。", "钟声一直响到中午。", "没有人看见船离开。", "起雾了。"],
}
MASKS = ["en", "zh", "vi", "zh,vi@0.5"]
KILLS = 10


def write_plan(directory: Path) -> Path:
    """Perplexity, a choice, a question and a generation in three languages under four masks, with their texts."""
    directory.mkdir(parents=True, exist_ok=True)
    for language, texts in TEXTS.items():
        rows = [
            {"id": f"t{number}", "text": text, "wrong": texts[number - 1][-8:], "answers": [text[-6:]]}
            for number, text in enumerate(texts)
        ]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (directory / f"{language}.jsonl").write_text("\n".join(lines))
    source = {"files": "{lang}.jsonl"}
    tasks = [
        {"kind": "perplexity", "name": "texts", "source": source},
        {"kind": "choice", "source": source, "question": "{{ text[:-8] }}", "delimiter": "", "answer": "0",
         "choices": ["{{ text[-8:] }}", "{{ wrong }}"]},
        {"kind": "qa", "source": source, "prompt": "{{ text }}", "answers": "{{ answers }}", "max_tokens": 6},
        {"kind": "open_generation", "name": "talk", "source": source, "max_tokens": 12},
    ]  # fmt: skip
    path = directory / "plan.yaml"
    path.write_text(yaml.safe_dump({"languages": list(TEXTS), "masks": MASKS, "tasks": tasks}))
    return path


TOTAL = 4 * 3 * 4 * (1 + len(MASKS))


def start(server: Server, plan: Path, out: Path) -> ForkServerProcess:
    options = ("--server", server.url, "--out", out, "--concurrency", 8)
    return crane("eval", plan, *options, log=log_of(out))


def log_of(out: Path) -> Path:
    return out.with_suffix(".log")


def run_to_its_end(server: Server, plan: Path, out: Path) -> None:
    process = start(server, plan, out)
    process.join()
    assert process.exitcode == 0, log_of(out).read_text()


def lines_of(out: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    lines = [json.loads(line) for line in (out / RESULTS_FILE).read_text().splitlines()]
    found = {tuple(line[key] for key in ("task", "mask", "language", "item")): line["answer"] for line in lines}
    assert len(found) == len(lines)
    return found


def assert_same_answers(first: Path, second: Path) -> None:
    """The same questions, texts and tokens; log-probabilities within what another batch changes in float32."""
    one, other = lines_of(first), lines_of(second)
    assert one.keys() == other.keys()
    for question, answer in one.items():
        assert answer.get("text") == other[question].get("text"), question
        for score, again in zip(answer.get("scores", ()), other[question].get("scores", ()), strict=True):
            assert score["tokens"] == again["tokens"]
            assert score["logprob"] == pytest.approx(again["logprob"], abs=1e-4 * max(1, score["tokens"]))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plan(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def whole(plan: Path, tiny_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an evaluation that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    run_to_its_end(tiny_server, plan, out)
    assert len(lines_of(out)) == TOTAL
    return out


@pytest.mark.parametrize("mask", ["attnlrp-en", "attnlrp-zh", "zh,vi@0.5"])
def test_changes_equal_transformers_with_the_same_neurons_zeroed(
    tiny: Tiny, tiny_oracle: Oracle, whole: Path, mask: str
) -> None:
    resolved = tiny.library.resolve(mask)
    assert resolved is not None

    def nats(text: str, neurons: NeuronMask | None) -> tuple[float, int]:
        logprobs = tiny_oracle.text_logprobs(text, neurons)
        return -sum(logprobs), len(logprobs)

    evaluation = Evaluation.read(whole)
    for language, texts in TEXTS.items():
        cell = evaluation.cell("texts", "nats_per_token", language, mask)
        assert cell is not None
        assert cell.change is not None
        assert cell.level is not None
        masked, plain = ([nats(text, neurons) for text in texts] for neurons in (resolved.mask, None))
        tokens = sum(count for _, count in plain)
        assert cell.level.mean == pytest.approx(sum(one for one, _ in masked) / tokens, abs=1e-4)
        change = sum(one for one, _ in masked) - sum(one for one, _ in plain)
        assert cell.change.mean == pytest.approx(change / tokens, abs=1e-4)
        assert abs(cell.change.mean) > 0.01


def test_choices_equal_transformers(tiny: Tiny, tiny_oracle: Oracle, whole: Path) -> None:
    resolved = tiny.library.resolve("vi")
    assert resolved is not None
    evaluation = Evaluation.read(whole)
    for language, texts in TEXTS.items():
        right, margins = 0, []
        for number, text in enumerate(texts):
            start, choices = text[:-8], (text[-8:], texts[number - 1][-8:])
            logprobs = [
                sum(tiny_oracle.text_logprobs(start + choice, resolved.mask)[len(start.encode()) :])
                for choice in choices
            ]
            right += logprobs[0] >= logprobs[1]
            margins.append(logprobs[0] - logprobs[1])
        accuracy = evaluation.cell("choice", "accuracy", language, "attnlrp-vi")
        margin = evaluation.cell("choice", "margin", language, "attnlrp-vi")
        assert accuracy is not None
        assert accuracy.level is not None
        assert accuracy.level.mean == right / len(texts)
        assert margin is not None
        assert margin.level is not None
        assert margin.level.mean == pytest.approx(sum(margins) / len(margins), abs=1e-2)


def test_kill_9_of_the_client_ten_times(plan: Path, tiny_server: Server, whole: Path, tmp_path: Path) -> None:
    out, draw, kept = tmp_path / "killed", random.Random(1), 0
    results = out / RESULTS_FILE
    for kill in range(KILLS):
        process = start(tiny_server, plan, out)
        goal = kept + draw.randrange(1, max(2, (TOTAL - kept) // (KILLS - kill)))
        while not results.exists() or results.read_bytes().count(b"\n") < goal:
            assert process.exitcode is None, log_of(out).read_text()
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kept = results.read_bytes().count(b"\n")
        if kept >= TOTAL:
            break
    run_to_its_end(tiny_server, plan, out)
    assert_same_answers(out, whole)


async def test_a_server_that_is_killed_and_started_again(
    tiny_server: Server, whole: Path, plan: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    out, answered = tmp_path / "out", 0
    retries = RetryPolicy(attempts=2, first_wait_s=0.1)
    async with (
        AsyncCraneClient(tiny_server.url, concurrency=4, retries=retries) as client,
        Run.start(client, Plan.read(plan), out, base=plan.parent, wait_s=START_TIMEOUT_S, on_notice=said.append) as run,
        aclosing(aiter(run)) as results,
    ):
        async for _ in results:
            answered += 1
            if answered == TOTAL // 3:
                for process in psutil.Process(tiny_server.process.pid).children(recursive=True):
                    process.kill()
                tiny_server.process.kill()
                await asyncio.to_thread(tiny_server.process.wait)
                tiny_server.start()
        assert run.failures == []
    assert answered == TOTAL
    assert said[0].startswith("the server does not answer")
    assert said[-1].startswith("the server is back after")
    assert_same_answers(out, whole)
