"""The evaluation against a server of made-up scores: plans, resumption, errors, statistics, the matrix."""

import asyncio
import csv
import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response
from typer.testing import CliRunner

from clients import AsyncCraneClient, CraneError, EvaluationError, RetryPolicy
from clients.commands import evaluate as evaluate_command
from clients.commands import render as render_command
from clients.matrix import Matrix
from clients.plan import Item, Plan, PlannedMask
from clients.results import RESULTS_FILE, RUN_FILE
from clients.run import Progress, evaluate
from crane_serve.statistics import change_per_token
from relevance.corpus import Corpus, Document

LANGUAGES = ("en", "vi", "zh")
DAMAGE = 2.0  # nats per token a mask adds to its own language
ROOT = Path(__file__).parents[2]


def fraction(*parts: str) -> float:
    """A number in [0, 1) that depends on nothing but `parts`."""
    return int(hashlib.sha256("|".join(parts).encode()).hexdigest()[:8], 16) / 2**32


class FakeServer:
    """A crane server that makes its scores up from the text and the mask, and counts what it is asked."""

    def __init__(self) -> None:
        self.fingerprint: dict[str, Any] = {"architecture": "Fake", "layers": 2}
        self.digests = {f"{method}-{language}": f"digest-{method}-{language}"
                        for method in ("attnlrp", "random") for language in LANGUAGES}  # fmt: skip
        self.invalid = [{"name": "broken", "reason": "it is corrupt"}]
        self.default_method: str | None = "attnlrp"
        self.delay_s = 0.0
        self.asked: list[tuple[str, str]] = []
        self.refuse: Callable[[str, str], int | None] = lambda mask, text: None
        self.down = 0
        self.port = 0
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def settle(self) -> None:
        """Wait until nothing has been asked for a while."""
        seen = -1
        while seen != len(self.asked):
            seen = len(self.asked)
            time.sleep(0.3)

    def summary(self, name: str) -> dict[str, Any]:
        method, language = name.split("-")
        return {"name": name, "digest": self.digests[name], "neurons": 7, "language": language, "method": method,
                "budget": 0.01}  # fmt: skip

    def score(self, mask: str, text: str) -> dict[str, Any]:
        language = text.split()[0]
        tokens = 5 + int(20 * fraction(text))
        nll = tokens * (3 + fraction("base", text))
        method, _, target = mask.partition("-")
        if method == "attnlrp":
            nll += tokens * (DAMAGE if target == language else 0.1) * (0.5 + fraction(mask, text))
        elif method == "random":
            nll += tokens * 0.02 * (fraction(mask, text) - 0.5)
        return {"logprob": -nll, "tokens": tokens, "bytes": len(text.encode())}

    def app(self) -> FastAPI:
        app = FastAPI()

        def error(status: int, code: str) -> JSONResponse:
            return JSONResponse({"error": {"code": code, "message": f"fake {code}", "param": None}}, status)

        @app.get("/ready")
        def ready() -> Response:
            if self.down > 0:
                self.down -= 1
                return error(503, "loading")
            return JSONResponse(
                {"status": "ready", "model": "fake", "fingerprint": self.fingerprint, "version": "0.0.1"}
            )

        @app.get("/masks")
        def masks() -> dict[str, Any]:
            listed = [self.summary(name) for name in sorted(self.digests)]
            return {"masks": listed, "invalid": self.invalid, "default_method": self.default_method}

        @app.get("/masks/{name}")
        def mask(name: str) -> Response:
            for candidate in (name, f"{self.default_method}-{name}"):
                if candidate in self.digests:
                    return JSONResponse({**self.summary(candidate), "layers": []})
            return error(404, "unknown_mask")

        @app.post("/score")
        def score(request: Request, body: dict[str, list[str]], mask: str = "none") -> Response:
            (text,) = body["text"]
            time.sleep(self.delay_s)
            with self._lock:
                self.asked.append((mask, text))
                status = self.refuse(mask, text)
            if status is not None:
                return error(status, "refused")
            used = None if mask == "none" else {"name": mask, "digest": self.digests[mask], "neurons": 7}
            return JSONResponse({"mask": used, "scores": [self.score(mask, text)], "usage": {}})

        return app


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    listener = socket.create_server(("127.0.0.1", 0))
    fake.port = listener.getsockname()[1]
    runner = uvicorn.Server(uvicorn.Config(fake.app(), log_level="warning"))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
    thread.start()
    yield fake
    runner.should_exit = True
    thread.join()
    listener.close()


def corpus_of(documents: int, marker: str = "text") -> Corpus:
    return Corpus({
        language: tuple(Document(f"d{n}", f"{language} {marker} {n}") for n in range(documents))
        for language in LANGUAGES
    })  # fmt: skip


async def run(server: FakeServer, corpus: Corpus, out: Path, concurrency: int = 8, **options: Any) -> Matrix:
    retries = RetryPolicy(attempts=2, first_wait_s=0.001)
    async with AsyncCraneClient(server.address, concurrency=concurrency, retries=retries) as client:
        return await evaluate(client, corpus, out, **({"wait_s": 5.0} | options))


def figures(matrix: Matrix) -> dict[str, Any]:
    """Everything of a matrix that does not depend on the clock."""
    return matrix.model_dump(exclude={"seconds", "tokens_per_second"})


def read_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RESULTS_FILE).read_text().splitlines()]


def test_plan_goes_document_by_document_with_the_masks_innermost() -> None:
    uneven = Corpus({"en": (Document("a", "x"), Document("b", "y")), "zh": (Document("c", "z"),)})
    plan = Plan(uneven, [PlannedMask(name="m", digest="1"), PlannedMask(name="none")])
    assert list(plan.items()) == [
        Item("none", "en", "a"), Item("m", "en", "a"), Item("none", "zh", "c"), Item("m", "zh", "c"),
        Item("none", "en", "b"), Item("m", "en", "b"),
    ]  # fmt: skip
    assert len(plan) == 6
    assert len(Plan(uneven, [], limit=1)) == 2
    with pytest.raises(EvaluationError, match="limit is 0"):
        Plan(uneven, [], limit=0)


async def test_evaluation_end_to_end(server: FakeServer, tmp_path: Path) -> None:
    seen: list[Progress] = []
    matrix = await run(
        server, corpus_of(12), tmp_path, masks=["zh", "attnlrp-en", "random-en", "attnlrp-zh"], on_progress=seen.append
    )
    assert matrix.masks == ("none", "attnlrp-zh", "attnlrp-en", "random-en")
    assert matrix.languages == LANGUAGES
    assert len(server.asked) == len(set(server.asked)) == 4 * 3 * 12
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, 144, 144)
    assert seen[-1].tokens == 4 * sum(matrix.tokens.values())

    texts = [f"zh text {n}" for n in range(12)]
    plain = [server.score("none", text) for text in texts]
    masked = [server.score("attnlrp-zh", text) for text in texts]
    tokens = sum(score["tokens"] for score in plain)
    nats = -sum(score["logprob"] for score in masked)
    change = matrix.delta_nats_per_token["attnlrp-zh"]["zh"]
    assert change is not None
    assert change.mean == pytest.approx((nats + sum(score["logprob"] for score in plain)) / tokens)
    assert change.low is not None
    assert change.high is not None
    assert change.low < change.mean < change.high
    assert matrix.nats_per_token["attnlrp-zh"]["zh"] == pytest.approx(nats / tokens)
    assert matrix.perplexity["attnlrp-zh"]["zh"] == pytest.approx(math.exp(nats / tokens))
    size = sum(score["bytes"] for score in plain)
    assert matrix.bits_per_byte["attnlrp-zh"]["zh"] == pytest.approx(nats / math.log(2) / size)
    assert matrix.documents == dict.fromkeys(LANGUAGES, 12)
    assert matrix.tokens["zh"] == tokens
    profile = matrix.profile("attnlrp-zh")
    assert profile.own == change
    assert profile.selectivity is not None
    assert profile.selectivity > 1

    lines = read_lines(tmp_path)
    assert len(lines) == 144
    assert {line["mask_digest"] for line in lines} == {
        None, "digest-attnlrp-zh", "digest-attnlrp-en", "digest-random-en"}  # fmt: skip
    assert {line["text_digest"] for line in lines if line["language"] == "zh"} == {
        hashlib.sha256(text.encode()).hexdigest() for text in texts
    }

    written = json.loads((tmp_path / "matrix.json").read_text())
    assert written["delta_nats_per_token"]["none"]["en"] == {"mean": 0, "low": 0, "high": 0}
    assert set(written["delta_nats_per_token"]["random-en"]["vi"]) == {"mean", "low", "high"}
    assert written["model"] == {"name": "fake", "architecture": "Fake", "layers": 2}
    assert written["mask_info"]["random-en"]["neurons"] == 7
    assert written["tokens_per_second"] > 0
    assert written["failed"] == []
    assert Matrix.read(tmp_path) == matrix
    with (tmp_path / "matrix.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    (row,) = [row for row in rows if (row["mask"], row["language"]) == ("attnlrp-zh", "zh")]
    assert float(row["mean"]) == change.mean
    assert (row["mask_language"], row["documents"], row["budget"]) == ("zh", "12", "0.01")


async def test_all_masks_are_the_default_and_batches_mix_them(server: FakeServer, tmp_path: Path) -> None:
    matrix = await run(server, corpus_of(6), tmp_path, concurrency=1, limit=2)
    assert len(matrix.masks) == 7
    assert [mask for mask, _ in server.asked[:7]] == list(matrix.masks)
    assert matrix.documents["en"] == 2
    assert matrix.corpus.limit == 2


async def test_a_second_run_asks_only_what_is_missing(server: FakeServer, tmp_path: Path) -> None:
    first = await run(server, corpus_of(5), tmp_path, masks=["en"])
    assert len(server.asked) == 30
    again = await run(server, corpus_of(5), tmp_path, masks=["en"])
    assert len(server.asked) == 30
    assert again == first
    await run(server, corpus_of(5), tmp_path, masks=["zh", "en"])
    assert len(server.asked) == 45
    assert json.loads((tmp_path / RUN_FILE).read_text())["masks"] == {
        "none": None, "attnlrp-en": "digest-attnlrp-en", "attnlrp-zh": "digest-attnlrp-zh"}  # fmt: skip


async def test_a_torn_last_line_is_asked_again(server: FakeServer, tmp_path: Path) -> None:
    whole = await run(server, corpus_of(3), tmp_path, masks=["en"])
    path = tmp_path / RESULTS_FILE
    content = path.read_bytes()
    for cut in (1, 40):
        path.write_bytes(content[:-cut])
        server.asked.clear()
        assert figures(await run(server, corpus_of(3), tmp_path, masks=["en"])) == figures(whole)
        assert len(server.asked) == 1
        assert len(read_lines(tmp_path)) == 18


async def test_lines_that_are_no_results_are_named(server: FakeServer, tmp_path: Path) -> None:
    await run(server, corpus_of(2), tmp_path, masks=[])
    path = tmp_path / RESULTS_FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "{}\n", *lines[2:]]))
    with pytest.raises(EvaluationError, match=r"results\.jsonl:2 is not a result: mask"):
        await run(server, corpus_of(2), tmp_path, masks=[])
    path.write_text(lines[0])
    (tmp_path / RUN_FILE).unlink()
    with pytest.raises(EvaluationError, match=r"has no run\.json beside it"):
        await run(server, corpus_of(2), tmp_path, masks=[])


async def test_results_of_something_else_are_refused(server: FakeServer, tmp_path: Path) -> None:
    await run(server, corpus_of(2), tmp_path, masks=["en"])
    asked = len(server.asked)
    with pytest.raises(EvaluationError, match=r"differs in the corpus \(digest .*choose another output directory"):
        await run(server, corpus_of(2, "other"), tmp_path, masks=["en"])
    server.digests["attnlrp-en"] = "changed"
    with pytest.raises(EvaluationError, match=r"mask 'attnlrp-en' \(digest digest-attnlrp-e; now changed\)"):
        await run(server, corpus_of(2), tmp_path, masks=["en"])
    server.fingerprint = {"architecture": "Fake", "layers": 3}
    with pytest.raises(EvaluationError, match=r"the model \(its layers; .*; mask 'attnlrp-en'"):
        await run(server, corpus_of(2), tmp_path, masks=["en"])
    assert len(server.asked) == asked


async def test_two_writers_are_refused(server: FakeServer, tmp_path: Path) -> None:
    server.delay_s = 0.02

    async def intrude(progress: Progress) -> None:
        with pytest.raises(EvaluationError, match="being written by another evaluation"):
            await run(server, corpus_of(2), tmp_path, masks=["en"])

    intruders: list[asyncio.Task[None]] = []

    def once(progress: Progress) -> None:
        if not intruders:
            intruders.append(asyncio.create_task(intrude(progress)))

    await run(server, corpus_of(6), tmp_path, concurrency=2, masks=["en"], on_progress=once)
    await intruders[0]


async def test_unknown_and_unusable_masks_are_named_before_any_work(server: FakeServer, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no mask 'xx'; it has none, attnlrp-en, .*random-zh$"):
        await run(server, corpus_of(2), tmp_path / "out", masks=["en", "xx"])
    with pytest.raises(EvaluationError, match="'broken' cannot be used by the server: it is corrupt"):
        await run(server, corpus_of(2), tmp_path / "out", masks=["broken"])
    server.default_method = None
    with pytest.raises(EvaluationError, match="bare language names need a server with a default method"):
        await run(server, corpus_of(2), tmp_path / "out", masks=["en"])
    assert server.asked == []
    assert not (tmp_path / "out").exists()


async def test_the_server_is_waited_for(server: FakeServer, tmp_path: Path) -> None:
    server.down = 3
    assert (await run(server, corpus_of(1), tmp_path, masks=[])).failed == ()
    server.down = 1_000_000
    with pytest.raises(CraneError, match="loading"):
        await run(server, corpus_of(1), tmp_path, masks=[], wait_s=0.2)


async def test_failed_items_are_listed_and_left_out(server: FakeServer, tmp_path: Path) -> None:
    server.refuse = lambda mask, text: 400 if (mask, text) == ("attnlrp-en", "zh text 1") else None
    matrix = await run(server, corpus_of(4), tmp_path, masks=["en"])
    (failure,) = matrix.failed
    assert (failure.mask, failure.language, failure.document) == ("attnlrp-en", "zh", "d1")
    assert "fake refused" in failure.error
    change = matrix.delta_nats_per_token["attnlrp-en"]["zh"]
    texts = [f"zh text {n}" for n in (0, 2, 3)]
    plain, masked = ([server.score(mask, text) for text in texts] for mask in ("none", "attnlrp-en"))
    assert change is not None
    assert change.mean == pytest.approx(
        sum(p["logprob"] - m["logprob"] for p, m in zip(plain, masked, strict=True)) / sum(p["tokens"] for p in plain)
    )
    report = (tmp_path / "report.md").read_text()
    assert "1 items failed" in report
    assert "| `attnlrp-en` | zh | d1 | fake refused" in report
    server.refuse = lambda mask, text: None
    assert (await run(server, corpus_of(4), tmp_path, masks=["en"])).failed == ()


async def test_a_cell_without_any_result_is_empty(server: FakeServer, tmp_path: Path) -> None:
    server.refuse = lambda mask, text: 400 if mask == "attnlrp-en" and text.startswith("vi") else None
    matrix = await run(server, corpus_of(2), tmp_path, masks=["en"])
    assert matrix.delta_nats_per_token["attnlrp-en"]["vi"] is None
    assert matrix.perplexity["attnlrp-en"]["vi"] is None
    assert len(matrix.failed) == 2


async def test_a_server_that_comes_back_is_used_again(server: FakeServer, tmp_path: Path) -> None:
    outage: Counter[str] = Counter()

    def die_once(mask: str, text: str) -> int | None:
        outage[text] += 1
        if text == "vi text 2" and outage[text] <= 2:  # both attempts of the first try
            server.down = 2
            return 503
        return None

    server.refuse = die_once
    assert (await run(server, corpus_of(4), tmp_path, concurrency=1, masks=[])).failed == ()


async def test_a_server_that_stays_away_ends_the_run_with_what_there_is(server: FakeServer, tmp_path: Path) -> None:
    def die(mask: str, text: str) -> int | None:
        if len(server.asked) > 6:
            server.down = 1_000_000
            return 503
        return None

    server.refuse = die
    matrix = await run(server, corpus_of(20), tmp_path, concurrency=2, masks=["en"], wait_s=0.3)
    assert len(matrix.failed) == 120 - 6
    assert any("not asked, because the server did not come back within 0.3 s" in item.error for item in matrix.failed)
    assert len(server.asked) <= 6 + 2 * 2 * 2
    assert len(read_lines(tmp_path)) == 6


async def test_a_mask_that_changes_in_between_stops_the_run(server: FakeServer, tmp_path: Path) -> None:
    def swap_mask(mask: str, text: str) -> int | None:
        if len(server.asked) == 9:
            server.digests["attnlrp-en"] = "other"
        return None

    server.refuse = swap_mask
    with pytest.raises(EvaluationError, match="mask 'attnlrp-en' with content other, expected digest-attnlrp-en"):
        await run(server, corpus_of(5), tmp_path, masks=["en"])


async def test_a_server_that_comes_back_with_another_model_stops_the_run(server: FakeServer, tmp_path: Path) -> None:
    def swap_model(mask: str, text: str) -> int | None:
        server.fingerprint = {"architecture": "Another"}
        return 503

    server.refuse = swap_model
    with pytest.raises(EvaluationError, match="now serves another model"):
        await run(server, corpus_of(5), tmp_path, masks=["en"])


def write_corpus(directory: Path, documents: int) -> Path:
    directory.mkdir()
    for language, texts in corpus_of(documents).documents.items():
        lines = [json.dumps({"id": document.id, "text": document.text}) for document in texts]
        (directory / f"{language}.jsonl").write_text("\n".join(lines))
    return directory


def start_evaluation(server: FakeServer, corpus: Path, out: Path) -> subprocess.Popen[str]:
    program = "import typer; from clients.commands import evaluate; typer.run(evaluate)"
    options = ["--server", server.address, "--corpus", str(corpus), "--masks", "en,zh,random-vi", "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-c", program, *options, "--concurrency", "4"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_kill_9_in_the_middle_loses_and_repeats_nothing(server: FakeServer, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", 20)
    total = 4 * 3 * 20
    server.delay_s = 0.02
    lines_after_kill = []
    for goal in (60, 150):
        process = start_evaluation(server, corpus, tmp_path / "killed")
        while len(server.asked) < goal:
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        server.settle()
        lines_after_kill.append((tmp_path / "killed" / RESULTS_FILE).read_bytes().count(b"\n"))
        assert 0 < lines_after_kill[-1] < total
        assert not (tmp_path / "killed" / "matrix.json").exists()
    before = len(server.asked)
    server.delay_s = 0.0
    process = start_evaluation(server, corpus, tmp_path / "killed")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert len(server.asked) - before == total - lines_after_kill[-1]
    keys = [(line["mask"], line["language"], line["document"]) for line in read_lines(tmp_path / "killed")]
    assert len(keys) == len(set(keys)) == total

    process = start_evaluation(server, corpus, tmp_path / "whole")
    assert process.communicate()[0]
    assert figures(Matrix.read(tmp_path / "killed")) == figures(Matrix.read(tmp_path / "whole"))
    assert {line["session"] for line in read_lines(tmp_path / "killed")} == {1, 2, 3}


@pytest.fixture
def cli() -> typer.Typer:
    app = typer.Typer()
    app.command("eval")(evaluate_command)
    app.command("report")(render_command)
    return app


def test_commands(server: FakeServer, tmp_path: Path, cli: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    options = ["--server", server.address, "--corpus", str(write_corpus(tmp_path / "corpus", 4)), "--out", str(out)]
    result = CliRunner().invoke(cli, ["eval", *options, "--masks", "none, en,random-zh", "--limit", "3"])
    assert result.exit_code == 0, result.output
    for expected in ("attnlrp-en", "random-zh", "tokens per second", str(out / "report.md"), str(out / "matrix.png")):
        assert expected in result.output
    (out / "matrix.png").unlink()
    assert CliRunner().invoke(cli, ["report", str(out)]).exit_code == 0
    assert (out / "matrix.png").exists()

    server.refuse = lambda mask, text: 400 if text == "en text 3" else None
    result = CliRunner().invoke(cli, ["eval", *options, "--masks", "en,random-zh"])
    assert result.exit_code == 1
    assert "failed: attnlrp-en / en / d3: fake refused" in result.output

    result = CliRunner().invoke(cli, ["eval", *options, "--masks", "xx"])
    assert isinstance(result.exception, EvaluationError)
    result = CliRunner().invoke(cli, ["eval", "--corpus", str(tmp_path / "nowhere"), "--out", str(out)])
    assert isinstance(result.exception, ValueError)
    result = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert isinstance(result.exception, EvaluationError)


def test_change_is_the_ratio_of_sums_and_pairs_documents() -> None:
    tokens = np.array([10.0, 30.0, 20.0, 40.0])
    baseline = np.array([30.0, 500.0, 10.0, 90.0])  # documents differ far more than masks do
    change = np.array([11.0, 29.0, 21.0, 39.0])
    estimate = change_per_token(baseline + change, baseline, tokens, seed=3)
    assert estimate.mean == pytest.approx(1.0)
    assert estimate.low is not None
    assert estimate.high is not None
    assert 0.9 < estimate.low < 1.0 < estimate.high < 1.15
    assert estimate == change_per_token(baseline + change, baseline, tokens, seed=3)


def test_an_interval_needs_two_documents_and_may_be_a_point() -> None:
    single = change_per_token(np.array([7.0]), np.array([5.0]), np.array([4.0]))
    assert (single.mean, single.low, single.high) == (0.5, None, None)
    alike = change_per_token(np.full(5, 7.0), np.full(5, 5.0), np.full(5, 4.0))
    assert (alike.mean, alike.low, alike.high) == (0.5, 0.5, 0.5)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    planted = 0.3
    covered = found = false_alarms = 0
    trials = 150
    for trial in range(trials):
        tokens = generator.integers(20, 120, size=40).astype(float)
        baseline = tokens * generator.normal(4.0, 1.0, size=40)
        noise = tokens * generator.normal(0.0, 0.4, size=40)
        effect = change_per_token(baseline + noise + planted * tokens, baseline, tokens, seed=trial)
        null = change_per_token(baseline + noise, baseline, tokens, seed=trial)
        assert effect.low is not None
        assert effect.high is not None
        assert null.low is not None
        assert null.high is not None
        covered += effect.low <= planted <= effect.high
        found += effect.low > 0
        false_alarms += not null.low <= 0 <= null.high
    assert covered / trials > 0.88
    assert found / trials > 0.9
    assert false_alarms / trials < 0.12


@pytest.mark.parametrize(
    ("nll", "tokens", "message"),
    [([1.0], [1.0, 2.0], "expected the same"), ([], [], "at least one document"), ([1.0], [0.0], "at least one token")],
)
def test_impossible_statistics(nll: list[float], tokens: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change_per_token(np.array(nll), np.array(nll), np.array(tokens))
