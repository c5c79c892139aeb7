"""Runs against a server of made-up answers: the stream, resumption, outages, and what is refused before any work."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from clients import AsyncCraneClient, CraneError, EvaluationError, RetryPolicy
from clients.blocking import iterate_answers, run_evaluation
from clients.evaluation import Evaluation
from clients.permissions import Permissions
from clients.plan import Plan
from clients.record import Record
from clients.results import RESULTS_FILE, RUN_FILE
from clients.run import Progress, Run, evaluate
from tests.fake_server import LANGUAGES, FakeServer, serving
from tests.full_disk import room_for


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        yield fake


def write_texts(directory: Path, documents: int, marker: str = "text") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        lines = [json.dumps({"id": f"d{n}", "text": f"{language} {marker} {n}"}) for n in range(documents)]
        (directory / f"{language}.jsonl").write_text("\n".join(lines))
    return directory


def plan_of(directory: Path, documents: int = 4, marker: str = "text", **settings: Any) -> Plan:
    texts = write_texts(directory / f"{marker}-{documents}", documents, marker)
    task = {"kind": "perplexity", "name": "texts", "source": {"files": str(texts / "{lang}.jsonl")}}
    return Plan.parse({"languages": list(LANGUAGES), "tasks": [task], **settings}, "plan")


async def run(server: FakeServer, plan: Plan, out: Path, concurrency: int = 8, **options: Any) -> Evaluation:
    retries = RetryPolicy(attempts=2, first_wait_s=0.001)
    async with AsyncCraneClient(server.address, concurrency=concurrency, retries=retries) as client:
        return await evaluate(client, plan, out, **({"wait_s": 5.0, "base": out.parent} | options))


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """Everything of an evaluation that does not depend on the clock."""
    return evaluation.model_dump(exclude={"throughput"})


def read_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RESULTS_FILE).read_text().splitlines()]


async def test_a_run_from_plan_to_figures(server: FakeServer, tmp_path: Path) -> None:
    seen: list[Progress] = []
    plan = plan_of(tmp_path, 12, masks=["zh", "attnlrp-en", "random-en", "attnlrp-zh"])
    evaluation = await run(server, plan, tmp_path / "out", on_progress=seen.append)
    assert list(evaluation.masks) == ["none", "attnlrp-zh", "attnlrp-en", "random-en"]
    assert evaluation.masks["attnlrp-zh"].neurons_per_layer == (3, 4)
    assert evaluation.masks["random-en"].seed == 0
    assert evaluation.masks["attnlrp-zh"].seed is None
    assert len(server.asked) == len(set(server.asked)) == 4 * 3 * 12
    assert (seen[0].done, seen[-1].done, seen[-1].total, seen[-1].failed) == (0, 144, 144, 0)

    texts = [f"zh text {n}" for n in range(12)]
    plain, masked = ([server.score(mask, text) for text in texts] for mask in ("none", "attnlrp-zh"))
    tokens = sum(score["tokens"] for score in plain)
    change = sum(p["logprob"] - m["logprob"] for p, m in zip(plain, masked, strict=True)) / tokens
    cell = evaluation.cell("texts", "nats_per_token", "zh", "attnlrp-zh")
    assert cell is not None
    assert cell.items == 12
    assert cell.change is not None
    assert cell.change.mean == pytest.approx(change)
    assert cell.change.low is not None
    assert cell.change.low < change
    (effect,) = (one for one in evaluation.effects if (one.mask, one.metric) == ("attnlrp-zh", "nats_per_token"))
    assert effect.own.mean == pytest.approx(change)
    assert effect.selectivity.mean > 1
    assert evaluation.failures == ()
    assert evaluation.throughput.answers == 144
    assert evaluation.throughput.tokens == sum(line["tokens"] for line in read_lines(tmp_path / "out"))

    assert Evaluation.read(tmp_path / "out") == evaluation
    assert Record.read(tmp_path / "out").evaluation() == evaluation
    for file in ("results.json", "report.html", "report.md", "matrix.png", "cells.csv", "cells.parquet"):
        assert (tmp_path / "out" / file).stat().st_size > 0


async def test_masks_are_innermost_so_that_batches_mix_them(server: FakeServer, tmp_path: Path) -> None:
    evaluation = await run(server, plan_of(tmp_path, 2), tmp_path / "out", concurrency=1)
    masks = list(evaluation.masks)
    assert len(masks) == 7
    assert [mask for mask, _ in server.asked] == masks * 6
    assert [text for _, text in server.asked[:: len(masks)]] == [
        f"{language} text {n}" for n in range(2) for language in LANGUAGES
    ]


async def test_masks_are_asked_in_groups_that_the_cache_has_room_for(server: FakeServer, tmp_path: Path) -> None:
    longest = sum(len(f"{language} text 0") // 2 for language in LANGUAGES)
    server.starts = {"kv_cache_tokens": 3 * 2 * longest}
    evaluation = await run(server, plan_of(tmp_path, 2), tmp_path / "out", concurrency=1)
    masks = list(evaluation.masks)
    texts = [f"{language} text {n}" for n in range(2) for language in LANGUAGES]
    groups = [masks[start : start + 3] for start in range(0, len(masks), 3)]
    assert server.asked == [(mask, text) for group in groups for text in texts for mask in group]


async def test_items_that_begin_alike_are_asked_in_a_row(server: FakeServer, tmp_path: Path) -> None:
    rows = [{"id": str(n), "text": f"en {paragraph} {n}"} for n, paragraph in enumerate("abab")]
    (tmp_path / "en.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"files": str(tmp_path / "{lang}.jsonl")}
    tasks = [{"kind": "perplexity", "name": "texts", "source": source}]
    plan = Plan.parse({"languages": ["en"], "masks": [], "tasks": tasks}, "plan")
    await run(server, plan, tmp_path / "out", concurrency=1)
    assert [text for _, text in server.asked] == ["en a 0", "en a 2", "en b 1", "en b 3"]


@pytest.mark.parametrize("counts", [True, False], ids=["counts", "does not count"])
async def test_a_run_says_what_its_scores_took(server: FakeServer, tmp_path: Path, counts: bool) -> None:
    server.starts = {"kv_cache_tokens": 10_000} if counts else {}
    said: list[str] = []
    plan = plan_of(tmp_path, 2)
    evaluation = await run(server, plan, tmp_path / "out", on_notice=said.append)
    computed = sum(line["tokens"] for line in read_lines(tmp_path / "out"))
    floor = len(evaluation.masks) * len({text[:end] for _, text in server.asked for end in range(1, len(text) + 1)})
    expected = [f"scores took {computed:,} computed tokens, {computed / floor:.2f}x of the floor"]
    assert said == (expected if counts else [])
    assert sum(body.get("return_prompts", False) for body in server.bodies) == (6 if counts else 0)
    said.clear()
    assert await run(server, plan, tmp_path / "out", on_notice=said.append)
    assert said == []  # nothing was asked


async def test_tasks_may_have_masks_and_languages_of_their_own(server: FakeServer, tmp_path: Path) -> None:
    source = {"files": str(write_texts(tmp_path / "texts", 1) / "{lang}.jsonl")}
    tasks = [
        {"kind": "perplexity", "name": "all", "source": source},
        {"kind": "perplexity", "name": "some", "source": source, "languages": ["zh"], "masks": ["*-zh"]},
    ]
    plan = Plan.parse({"languages": list(LANGUAGES), "masks": ["attnlrp-*", "zh@0.5"], "tasks": tasks}, "plan")
    evaluation = await run(server, plan, tmp_path / "out")
    asked = Counter(text for _, text in server.asked)
    assert asked == {"en text 0": 5, "vi text 0": 5, "zh text 0": 7, "a": 1}
    assert evaluation.task("some").masks == ("none", "attnlrp-zh")
    assert evaluation.masks["zh@0.5"].digest == "composed-zh@0.5"
    assert evaluation.masks["zh@0.5"].language is None


async def test_generation_is_greedy_and_says_what_it_is_asked(server: FakeServer, tmp_path: Path) -> None:
    source = {"files": str(write_texts(tmp_path / "texts", 2) / "{lang}.jsonl")}
    task = {"kind": "open_generation", "source": source, "max_tokens": 9, "stop": ["\n"]}
    evaluation = await run(
        server, Plan.parse({"languages": ["en"], "masks": ["en"], "tasks": [task]}, "plan"), tmp_path / "out"
    )
    assert len(server.bodies) == 4
    for body in server.bodies:
        assert (body["max_tokens"], body["temperature"], body["stop"]) == (9, 0.0, ["\n"])
        assert body["repetition_penalty"] == 1.1
    assert evaluation.throughput.tokens == 4 * 7
    answers = [line["answer"] for line in read_lines(tmp_path / "out")]
    assert {answer["text"] for answer in answers} <= {" plain answer", " masked answer"}


async def test_a_second_run_asks_only_what_is_missing(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = await run(server, plan_of(tmp_path, 5, masks=["en"]), out)
    assert len(server.asked) == 30
    again = await run(server, plan_of(tmp_path, 5, masks=["en"]), out)
    assert len(server.asked) == 30
    assert again == first
    both = await run(server, plan_of(tmp_path, 5, masks=["zh", "en"]), out)
    assert len(server.asked) == 45
    assert list(json.loads((out / RUN_FILE).read_text())["masks"]) == ["none", "attnlrp-zh", "attnlrp-en"]
    assert both.cell("texts", "nats_per_token", "vi", "attnlrp-en") is not None
    fewer = await run(server, plan_of(tmp_path, 5, masks=["zh"]), out)
    assert len(server.asked) == 45
    assert list(fewer.masks) == ["none", "attnlrp-zh"]


async def test_answers_are_handed_out_as_they_come_and_a_run_can_be_left(server: FakeServer, tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path, 6, masks=["en"]), tmp_path / "out"
    async with (
        AsyncCraneClient(server.address, concurrency=2) as client,
        Run.start(client, plan, out, base=tmp_path) as running,
        aclosing(aiter(running)) as results,
    ):
        first = [(await anext(results)).question for _ in range(5)]
    assert len(set(first)) == 5
    kept = len(read_lines(out))
    assert 5 <= kept < 36
    asked = len(server.asked)
    async with (
        AsyncCraneClient(server.address, concurrency=2) as client,
        Run.start(client, plan, out, base=tmp_path) as running,
    ):
        assert running.progress.resumed == kept
        rest = [result.question async for result in running]
        assert len(rest) == 36 - kept
        assert not set(rest) & set(first)
        assert running.evaluation().cells
    left_under_way = len(server.asked) - asked - (36 - kept)  # of the first run, and counted late
    assert 0 <= left_under_way <= 2


def test_without_asyncio(server: FakeServer, tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path, 3, masks=["en"]), tmp_path / "out"
    questions = [result.question for result in iterate_answers(plan, out, server=server.address, base=tmp_path)]
    assert len(set(questions)) == 18
    evaluation = run_evaluation(plan, out, server=server.address, base=tmp_path)
    assert len(server.asked) == 18
    assert evaluation == Evaluation.read(out)


async def test_a_torn_last_line_is_asked_again(server: FakeServer, tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path, 3, masks=["en"]), tmp_path / "out"
    whole = await run(server, plan, out)
    path = out / RESULTS_FILE
    content = path.read_bytes()
    for cut in (1, 40):
        path.write_bytes(content[:-cut])
        server.asked.clear()
        assert figures(await run(server, plan, out)) == figures(whole)
        assert len(server.asked) == 1
        assert len(read_lines(out)) == 18


async def test_a_full_disk_ends_a_run_that_then_goes_on(server: FakeServer, tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path, 3, masks=["en"]), tmp_path / "out"
    whole = await run(server, plan, tmp_path / "whole")
    size = (tmp_path / "whole" / RESULTS_FILE).stat().st_size
    for room in (0.5, 0.3, 0.9):
        with room_for(int(room * size)), pytest.raises(OSError, match="too large"):
            await run(server, plan, out)
        kept = read_lines(out)
        assert 0 < len(kept) < 18
    server.asked.clear()
    assert figures(await run(server, plan, out)) == figures(whole)
    assert len(set(server.asked)) == 18 - len(kept)  # also of the run before, under way when it ended


async def test_lines_that_are_no_results_are_named(server: FakeServer, tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path, 2, masks=["en"]), tmp_path / "out"
    await run(server, plan, out)
    path = out / RESULTS_FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "{}\n", *lines[2:]]))
    with pytest.raises(EvaluationError, match=r"results\.jsonl:2 is not a result: task"):
        await run(server, plan, out)
    path.write_text(lines[0])
    (out / RUN_FILE).unlink()
    with pytest.raises(EvaluationError, match=r"has no run\.json beside it"):
        await run(server, plan, out)


async def test_results_of_something_else_are_refused(server: FakeServer, tmp_path: Path) -> None:
    plan, out = plan_of(tmp_path, 2, masks=["en"]), tmp_path / "out"
    await run(server, plan, out)
    asked = len(server.asked)
    with pytest.raises(EvaluationError, match="item 'd0' of task 'texts' in 'en' asked something else"):
        await run(server, plan_of(tmp_path, 2, "other", masks=["en"]), out)
    server.digests["attnlrp-en"] = "changed"
    with pytest.raises(EvaluationError, match=r"mask 'attnlrp-en' \(digest digest-attnlrp-e; now changed\)"):
        await run(server, plan, out)
    server.fingerprint = {"architecture": "Fake", "layers": 3}
    with pytest.raises(EvaluationError, match=r"the model \(its layers; .*; mask 'attnlrp-en'"):
        await run(server, plan, out)
    assert len(server.asked) == asked


async def test_a_mask_that_left_a_run_must_come_back_the_same(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    await run(server, plan_of(tmp_path, 2, masks=["en", "zh"]), out)
    await run(server, plan_of(tmp_path, 2, masks=["zh"]), out)
    server.digests["attnlrp-en"] = "changed"
    with pytest.raises(EvaluationError, match="there mask 'attnlrp-en' had digest digest-attnlrp-e, now changed"):
        await run(server, plan_of(tmp_path, 2, masks=["en", "zh"]), out)


async def test_two_writers_are_refused(server: FakeServer, tmp_path: Path) -> None:
    server.delay_s = 0.02
    plan, out = plan_of(tmp_path, 6, masks=["en"]), tmp_path / "out"

    async def intrude() -> None:
        with pytest.raises(EvaluationError, match="being written by another evaluation"):
            await run(server, plan, out)

    intruders: list[asyncio.Task[None]] = []

    def once(progress: Progress) -> None:
        if not intruders:
            intruders.append(asyncio.create_task(intrude()))

    await run(server, plan, out, concurrency=2, on_progress=once)
    await intruders[0]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (["en", "xx"], "no mask 'xx'; it has none, attnlrp-en, .*random-zh$"),
        (["broken"], "'broken' cannot be used by the server: it is corrupt"),
        (["lape-*"], r"no mask of the server fits 'lape-\*'; it has none, attnlrp-en"),
        ([{"methods": ["lape"]}], "no mask of the server fits .*lape.*; it has none, attnlrp-en"),
        (["attnlrp-en,attnlrp-fr"], "no mask 'attnlrp-en,attnlrp-fr' .*; it has none, attnlrp-en"),
    ],
)
async def test_masks_that_are_missing_are_named_before_any_work(
    server: FakeServer, tmp_path: Path, masks: list[Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        await run(server, plan_of(tmp_path, 2, masks=masks), tmp_path / "out")
    assert server.asked == []
    assert not (tmp_path / "out").exists()


async def test_bare_languages_need_a_default_method(server: FakeServer, tmp_path: Path) -> None:
    server.default_method = None
    with pytest.raises(EvaluationError, match="bare language names need a server with a default method"):
        await run(server, plan_of(tmp_path, 2, masks=["en"]), tmp_path / "out")


async def test_a_task_whose_masks_the_plan_lacks(server: FakeServer, tmp_path: Path) -> None:
    source = {"files": str(write_texts(tmp_path / "texts", 1) / "{lang}.jsonl")}
    task = {"kind": "perplexity", "source": source, "masks": ["random-*"]}
    plan = Plan.parse({"languages": ["en"], "masks": ["attnlrp-*"], "tasks": [task]}, "plan")
    with pytest.raises(EvaluationError, match=r"task 'perplexity': no mask of the plan fits 'random-\*'"):
        await run(server, plan, tmp_path / "out")
    assert server.asked == []


async def test_a_server_of_another_model_is_refused_before_any_work(server: FakeServer, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="serves 'fake', the plan is for 'llama'"):
        await run(server, plan_of(tmp_path, 2, model="llama"), tmp_path / "out")
    await run(server, plan_of(tmp_path, 2, model="fake", masks=["en"]), tmp_path / "out")


async def test_the_server_is_waited_for(server: FakeServer, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 1, masks=["en"])
    server.down = 3
    assert (await run(server, plan, tmp_path / "out")).failures == ()
    server.down = 1_000_000
    with pytest.raises(CraneError, match="loading"):
        await run(server, plan, tmp_path / "out", wait_s=0.2)


async def test_failed_items_are_listed_and_left_out(server: FakeServer, tmp_path: Path) -> None:
    server.refuse = lambda mask, text: 400 if (mask, text) == ("attnlrp-en", "zh text 1") else None
    plan, out = plan_of(tmp_path, 4, masks=["en"]), tmp_path / "out"
    evaluation = await run(server, plan, out)
    (failure,) = evaluation.failures
    assert (failure.task, failure.mask, failure.language, failure.item) == ("texts", "attnlrp-en", "zh", "d1")
    assert "fake refused" in failure.error
    cell = evaluation.cell("texts", "nats_per_token", "zh", "attnlrp-en")
    texts = [f"zh text {n}" for n in (0, 2, 3)]
    plain, masked = ([server.score(mask, text) for text in texts] for mask in ("none", "attnlrp-en"))
    assert cell is not None
    assert cell.change is not None
    assert cell.items == 3
    assert cell.change.mean == pytest.approx(
        sum(p["logprob"] - m["logprob"] for p, m in zip(plain, masked, strict=True)) / sum(p["tokens"] for p in plain)
    )
    assert "fake refused" in (out / "report.md").read_text()
    server.refuse = lambda mask, text: None
    assert (await run(server, plan, out)).failures == ()


async def test_a_cell_without_any_answer_is_empty(server: FakeServer, tmp_path: Path) -> None:
    server.refuse = lambda mask, text: 400 if mask == "attnlrp-en" and text.startswith("vi") else None
    evaluation = await run(server, plan_of(tmp_path, 2, masks=["en"]), tmp_path / "out")
    cell = evaluation.cell("texts", "nats_per_token", "vi", "attnlrp-en")
    assert cell is None or (cell.change is None and cell.level is None)
    assert len(evaluation.failures) == 2


async def test_a_server_that_comes_back_is_used_again_and_that_is_said(server: FakeServer, tmp_path: Path) -> None:
    outage: Counter[str] = Counter()

    def die_once(mask: str, text: str) -> int | None:
        outage[text] += 1
        if text == "vi text 2" and outage[text] <= 2:  # both attempts of the first try
            server.down = 2
            return 503
        return None

    server.refuse = die_once
    said: list[str] = []
    plan = plan_of(tmp_path, 4, masks=["en"])
    evaluation = await run(server, plan, tmp_path / "out", concurrency=1, on_notice=said.append)
    assert evaluation.failures == ()
    assert [notice.split(" (")[0].split(" after")[0] for notice in said] == [
        "the server does not answer", "the server is back"]  # fmt: skip


async def test_a_judge_that_does_not_answer_is_no_outage_of_the_server(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RetryPolicy, "_wait_s", lambda *_: 0.0)
    source = {"files": str(write_texts(tmp_path / "texts", 1) / "{lang}.jsonl")}
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
        judge = {"base_url": f"http://{host}", "model": "judge"}
        task = {"kind": "open_generation", "source": source, "judge": judge}
        plan = Plan.parse({"languages": ["en"], "masks": [], "tasks": [task]}, "plan")
        said: list[str] = []
        allowed = Permissions(frozenset({host}), (tmp_path,))
        evaluation = await run(server, plan, tmp_path / "out", on_notice=said.append, allowed=allowed)
    assert said == []
    (failure,) = evaluation.failures
    assert "judge" in failure.error
    assert "answer_not_completed" in failure.error


async def test_too_much_load_is_no_outage(server: FakeServer, tmp_path: Path) -> None:
    refused: Counter[str] = Counter()

    def refuse(mask: str, text: str) -> int | None:
        refused[text] += 1
        return 429 if text == "vi text 2" and refused[text] <= 2 else None

    server.refuse = refuse
    said: list[str] = []
    plan = plan_of(tmp_path, 4, masks=["en"])
    assert (await run(server, plan, tmp_path / "out", concurrency=1, on_notice=said.append)).failures == ()
    assert said == []


async def test_a_server_that_stays_away_ends_the_run_with_what_there_is(server: FakeServer, tmp_path: Path) -> None:
    def die(mask: str, text: str) -> int | None:
        if len(server.asked) > 6:
            server.down = 1_000_000
            return 503
        return None

    server.refuse = die
    plan, out = plan_of(tmp_path, 20, masks=["en"]), tmp_path / "out"
    evaluation = await run(server, plan, out, concurrency=2, wait_s=0.3)
    assert len(evaluation.failures) == 120 - 6
    assert any(
        "not asked, because the server did not come back within 0.3 s" in one.error for one in evaluation.failures
    )
    assert len(server.asked) <= 6 + 2 * 2 * 2
    assert len(read_lines(out)) == 6


async def test_a_mask_that_changes_in_between_stops_the_run(server: FakeServer, tmp_path: Path) -> None:
    def swap_mask(mask: str, text: str) -> int | None:
        if len(server.asked) == 9:
            server.digests["attnlrp-en"] = "other"
        return None

    server.refuse = swap_mask
    with pytest.raises(EvaluationError, match="mask 'attnlrp-en' with content other, expected digest-attnlrp-e"):
        await run(server, plan_of(tmp_path, 5, masks=["en"]), tmp_path / "out")


async def test_a_server_that_comes_back_with_another_model_stops_the_run(server: FakeServer, tmp_path: Path) -> None:
    def swap_model(mask: str, text: str) -> int | None:
        server.fingerprint = {"architecture": "Another"}
        return 503

    server.refuse = swap_model
    with pytest.raises(EvaluationError, match="now serves another model"):
        await run(server, plan_of(tmp_path, 5, masks=["en"]), tmp_path / "out")
