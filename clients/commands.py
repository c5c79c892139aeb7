"""The commands `crane eval` and `crane report`: evaluations at the terminal."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.client import DEFAULT_SERVER

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.table import Table

    from clients.matrix import Matrix

_FAILURES_SHOWN = 10


def evaluate(
    out: Annotated[Path, typer.Option(help="Directory for the results; an unfinished run in it is continued.")],
    server: Annotated[str, typer.Option(help="Address of the server.")] = DEFAULT_SERVER,
    corpus: Annotated[
        Path | None, typer.Option(help="Directory of {lang}.jsonl or {lang}.txt files; default: the embedded corpus.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the corpus; one without splits is used whole.")] = "test",
    masks: Annotated[
        str | None,
        typer.Option(
            help="Mask names or, if the server has a default method, languages, joined with commas; "
            "default: all masks of the server. `none` is always evaluated."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per language; default: all.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = 32,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the server to be ready.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap intervals.")] = 0,
) -> None:
    """Measure which language each mask takes away: perplexity for every mask and language.

    Writes matrix.json, matrix.csv, matrix.png and report.md. Exits with 1 if some items failed. A server that wants an
    API key gets the one in the environment variable CRANE_API_KEY; on the command line others could see it.
    """
    from rich.console import Console

    from clients import run
    from clients.client import AsyncCraneClient
    from relevance.corpus import EMBEDDED_CORPUS, Corpus

    texts = Corpus.load(corpus or EMBEDDED_CORPUS, split)
    names = None if masks is None else [name.strip() for name in masks.split(",") if name.strip()]
    console = Console()

    async def measure() -> "Matrix":
        async with AsyncCraneClient(server, concurrency=concurrency) as client:
            with _bar(console) as bar:
                task = bar.add_task("waiting for the server", total=None, rate="")

                def advance(progress: run.Progress) -> None:
                    if progress.done == progress.resumed:  # the scoring starts here, and so do the clocks
                        bar.reset(task, total=progress.total, completed=progress.done, description="scoring")
                    seconds = bar.tasks[task].elapsed
                    rate = f"{progress.tokens / seconds:,.0f} tokens/s" if seconds and progress.tokens else ""
                    bar.update(task, completed=progress.done, rate=rate)

                return await run.evaluate(
                    client, texts, out, masks=names, limit=limit, wait_s=wait, seed=seed, on_progress=advance
                )

    matrix = asyncio.run(measure())
    _show(matrix, out, console)
    if matrix.failed:
        raise typer.Exit(1)


def render(
    directory: Annotated[Path, typer.Argument(help="Directory of an evaluation, with its matrix.json.")],
) -> None:
    """Print the matrix of an evaluation and write its table, picture and report again."""
    from rich.console import Console

    from clients.matrix import Matrix
    from clients.report import write_all

    matrix = Matrix.read(directory)
    write_all(matrix, directory)
    _show(matrix, directory, Console())


def _bar(console: "Console") -> "Bar":
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
        console=console,
    )


def _show(matrix: "Matrix", directory: Path, console: "Console") -> None:
    from clients.report import FILES

    console.print(_table(matrix))
    console.print(f"{matrix.tokens_per_second:,.0f} tokens per second over {matrix.seconds:,.1f} s of scoring")
    for failure in matrix.failed[:_FAILURES_SHOWN]:
        what = f"{failure.mask} / {failure.language} / {failure.document}"
        console.print(f"failed: {what}: {failure.error}", style="red", markup=False, highlight=False)
    if len(matrix.failed) > _FAILURES_SHOWN:
        console.print(f"failed: {len(matrix.failed) - _FAILURES_SHOWN} more items, listed in the report", style="red")
    for name in FILES:
        console.print(str(directory / name), soft_wrap=True, markup=False, highlight=False)


def _table(matrix: "Matrix") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from clients.plan import UNMASKED
    from clients.report import cell_text, rows_by_method

    table = Table(title="Change in nats per token, with 95 % intervals over documents")
    table.add_column("mask")
    for language in matrix.languages:
        table.add_column(language, justify="right")
    table.add_row(UNMASKED, *("0" for _ in matrix.languages), end_section=True)
    for group in rows_by_method(matrix):
        for mask in group:
            own = matrix.mask_info[mask].language
            cells = [
                Text(cell_text(change), style="bold" if language == own else "")
                for language, change in matrix.delta_nats_per_token[mask].items()
            ]
            table.add_row(mask, *cells, end_section=mask == group[-1])
    return table
