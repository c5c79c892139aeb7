"""`crane eval`, `crane report` and `crane compare`: evaluations at the terminal."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crane_serve.common.bars import bar
from crane_serve.common.defaults import DEFAULT_SERVER
from crane_serve.common.text.corpus import Form

if TYPE_CHECKING:
    from rich.console import Console

    from clients.evaluation import Evaluation
    from clients.plan import Plan

_FAILURES_SHOWN = 10


def evaluate(
    out: Annotated[Path, typer.Option(help="Directory for the results; an unfinished run in it is continued.")],
    plan: Annotated[
        Path | None, typer.Argument(help="Plan file (YAML): masks x languages x tasks; without it, see --corpus.")
    ] = None,
    server: Annotated[str, typer.Option(help="Address of the server.")] = DEFAULT_SERVER,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help="A mask by name, pattern ('lape-*') or expression ('zh,vi@0.5'); may be repeated. "
            "Default: those of the plan, or all masks of the server. `none` is always evaluated."
        ),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            help="Of patterns, and of all masks, only those of this fraction of all neurons; may be repeated."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Without a plan: a preset that reads from the Hub, such as belebele; may be repeated."),
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Solved examples before each item of --task.")] = None,
    languages: Annotated[
        str | None,
        typer.Option(help="Without a plan: comma-separated languages.", show_default="those of the corpus"),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Without a plan: perplexity on this directory of {lang}.jsonl, {lang}.txt or other files, as `crane "
            "relevance` reads them; 'embedded' for the packaged one.",
            show_default="embedded",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the corpus; one without splits is used whole.", show_default="test")
    ] = None,
    normalise: Annotated[
        Form | None,
        typer.Option(help="Bring the corpus into this normal form of Unicode.", show_default="as it is"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Without a plan: items per language, the first of a corpus; default: all.")
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(help="Repeat this evaluation (results.json): the same plan, model, masks and items."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="What relative paths of the plan start from.",
            show_default="the plan's directory, or this one for a replay",
        ),
    ] = None,
    judge_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A judge's host that the plan may send questions, answers and a key to: judge.example, or "
            "127.0.0.1:8001 with a port; may be repeated. Default: none."
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A directory that the plan may read files in, beside its own or --base; may be repeated."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = 64,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for the server, at the start and when it goes away.")
    ] = 60.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of intervals and tests.", show_default="0")] = None,
) -> None:
    """Measure what each mask does to each language: masks x languages x tasks.

    Writes results.json, report.html, report.md, matrix.png, cells.csv, cells.parquet and items.parquet. Exits with 1 if
    some items failed; the same command asks them again. The API key is read from the environment variable
    CRANE_API_KEY, since other users could see it on the command line.
    """
    from rich.console import Console

    from clients import run
    from clients.client import AsyncCraneClient
    from clients.errors import EvaluationError
    from clients.evaluation import Evaluation
    from clients.permissions import Permissions
    from clients.plan import Plan
    from clients.replay import Replay

    if plan is not None and replay is not None:
        raise EvaluationError("a plan and --replay do not go together")
    instead = {
        "task": task, "shots": shots, "languages": languages, "corpus": corpus, "split": split,
        "normalise": normalise, "limit": limit,
    }  # fmt: skip
    flags = [f"--{option}" for option, value in instead.items() if value is not None]
    if flags and (plan or replay):
        raise EvaluationError(f"{', '.join(flags)}: for evaluations without a plan")
    changes = {"masks": mask, "budgets": budget, "seed": seed}
    if replay is not None and any(value is not None for value in changes.values()):
        raise EvaluationError(
            "--mask, --budget and --seed do not go with --replay, which takes them from the evaluation"
        )
    repeated = None if replay is None else Replay(Evaluation.read(replay), str(replay))
    if repeated is not None:
        wanted = repeated.plan
    else:
        original = Plan.read(plan) if plan is not None else _plan_of(instead)
        content = original.content() | {name: value for name, value in changes.items() if value is not None}
        wanted = Plan.parse(content, "the flags" if plan is None else str(plan))
    start = base or (plan.parent if plan is not None else Path())
    named = (*(data or ()), *([] if corpus in (None, "embedded") else [Path(corpus)]))
    directories = named if base is None and plan is None else (start, *named)  # a replay may be of anybody's plan
    allowed = Permissions(frozenset(judge_host or ()), directories)
    console = Console()

    async def measure() -> Evaluation:
        async with AsyncCraneClient(server, concurrency=concurrency) as client:
            with bar("eval", "answers", f"waiting for {server}") as progress_bar:
                began: float | None = None
                reached = 0

                def advance(progress: run.Progress) -> None:
                    nonlocal began, reached
                    if began is None:  # the first request is sent now: start the clocks
                        began, reached = time.monotonic(), progress.done
                        progress_bar.start(progress.total, reached, f"to get from {server}")
                    seconds = time.monotonic() - began
                    rate = f"{progress.tokens / seconds:,.0f} tokens/s" if seconds and progress.tokens else ""
                    failed = f", {progress.failed} failed" if progress.failed else ""
                    progress_bar.advance(progress.done - reached, rate + failed)
                    reached = progress.done

                return await run.evaluate(
                    client,
                    wanted,
                    out,
                    base=start,
                    wait_s=wait,
                    allowed=allowed,
                    expect=None if repeated is None else repeated.expect,
                    on_progress=advance,
                    on_notice=progress_bar.say,
                )

    evaluation = asyncio.run(measure())
    _show(evaluation, out, console)
    if repeated is not None:
        console.print(str(repeated.agreement(evaluation)), markup=False, highlight=False)
    if evaluation.failures:
        raise typer.Exit(1)


def render(
    directory: Annotated[Path, typer.Argument(help="Directory of an evaluation, finished or not.")],
) -> None:
    """Recompute the figures of an evaluation from its answers, print them and write the reports."""
    from rich.console import Console

    from clients.evaluation import EVALUATION_FILE, Evaluation
    from clients.record import Record
    from clients.reporting import write_all

    record = Record.read(directory)
    failures = Evaluation.read(directory).failures if (directory / EVALUATION_FILE).exists() else ()
    evaluation = record.evaluation(failures)
    evaluation.write(directory)
    write_all(evaluation, record.answers, directory)
    _show(evaluation, directory, Console())


def compare(
    first: Annotated[Path, typer.Argument(help="Directory of an evaluation, or its results.json.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory for compare.html, compare.md and compare.csv; default: none.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the intervals.")] = 0,
) -> None:
    """Compare two evaluations: methods, models, a base model against its chat version."""
    from rich.console import Console

    from clients.compare import compare as compare_evaluations
    from clients.evaluation import Evaluation
    from clients.record import Record
    from clients.reporting.comparison import terminal_tables, write_comparison

    before, after = Evaluation.read(first), Evaluation.read(second)
    answers = [Record.read(path).answers if path.is_dir() else None for path in (first, second)]
    comparison = compare_evaluations(before, after, *answers, seed=seed)
    console = Console()
    for table in terminal_tables(comparison):
        console.print(table)
    for difference in comparison.differences:
        console.print(difference, markup=False, highlight=False)
    for path in [] if out is None else write_comparison(comparison, out):
        console.print(str(path), soft_wrap=True, markup=False, highlight=False)


def _plan_of(flags: Mapping[str, Any]) -> "Plan":
    """The plan from flags: presets, or perplexity on a corpus."""
    from clients.errors import EvaluationError
    from clients.plan import Plan
    from clients.sources import EMBEDDED
    from crane_serve.common.text.corpus import EMBEDDED_CORPUS, Corpus

    names = flags["languages"]
    languages = None if names is None else [name.strip() for name in names.split(",") if name.strip()]
    common = {name: flags[name] for name in ("limit", "shots") if flags[name] is not None}
    if flags["task"] is None:
        if flags["shots"] is not None:
            raise EvaluationError("--shots belongs to --task")
        corpus = flags["corpus"] or EMBEDDED
        source = {"corpus": corpus, "split": flags["split"] or "test"}
        if flags["normalise"] is not None:
            source["normalise"] = str(flags["normalise"])
        tasks = [{"kind": "perplexity", "source": source, "pick": "first", **common}]
        place = EMBEDDED_CORPUS if corpus == EMBEDDED else Path(corpus)
        languages = languages or list(Corpus.load(place).languages)
    else:
        if any(flags[name] is not None for name in ("corpus", "split", "normalise")):
            raise EvaluationError("--corpus, --split and --normalise do not go with --task")
        if languages is None:
            raise EvaluationError("--task needs --languages, such as en,zh,vi")
        tasks = [{"preset": preset, **common} for preset in flags["task"]]
    return Plan.parse({"languages": languages, "tasks": tasks}, "the flags")


def _show(evaluation: "Evaluation", directory: Path, console: "Console") -> None:
    from clients.evaluation import EVALUATION_FILE
    from clients.reporting import FILES, summary_tables

    for table in summary_tables(evaluation):
        console.print(table)
    work = evaluation.throughput
    console.print(f"{work.answers:,} answers, {work.answers_per_s:,.1f} a second over {work.seconds:,.1f} s of asking")
    for failure in evaluation.failures[:_FAILURES_SHOWN]:
        what = f"{failure.task} / {failure.mask} / {failure.language} / {failure.item}"
        console.print(f"failed: {what}: {failure.error}", style="red", markup=False, highlight=False)
    if len(evaluation.failures) > _FAILURES_SHOWN:
        rest = len(evaluation.failures) - _FAILURES_SHOWN
        console.print(f"failed: {rest} more items, listed in the report", style="red")
    for name in (EVALUATION_FILE, *FILES):
        console.print(str(directory / name), soft_wrap=True, markup=False, highlight=False)
