"""The commands `crane relevance` and `crane select`. What is wrong with the input is raised as a ValueError."""

from pathlib import Path
from typing import Annotated

import typer

from relevance.corpus import EMBEDDED_CORPUS, Corpus


def relevance(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.")],
    corpus: Annotated[
        Path, typer.Option(help="Directory of {lang}.jsonl or {lang}.txt; default: the packaged parallel corpus.")
    ] = EMBEDDED_CORPUS,
    split: Annotated[
        str, typer.Option(help="Split of the corpus to use; a corpus without splits is used whole.")
    ] = "relevance",
    languages: Annotated[str | None, typer.Option(help="Comma-separated languages; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="File to write the scores to.")] = Path("scores.safetensors"),
    methods: Annotated[str | None, typer.Option(help="Comma-separated methods; default: all.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a batch, with padding; default: 512 on the CPU, else 2048.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Documents are cut to so many tokens.")] = 2048,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default: float32 on the CPU, else bfloat16.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda where there is one.")] = None,
) -> None:
    """Score how much each language needs each MLP neuron of MODEL."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    texts = Corpus.load(corpus, split, _names(languages))

    from crane_serve.checkpoints.resolve import resolve_checkpoint
    from relevance.methods import find_all
    from relevance.model import pick_device, pick_dtype
    from relevance.scoring import score

    chosen = find_all(_names(methods))
    torch_device = pick_device(device)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("relevance", total=None)
        scores = score(
            resolve_checkpoint(model),
            texts,
            chosen,
            batch_tokens=batch_tokens or (512 if torch_device.type == "cpu" else 2048),
            max_tokens=max_tokens,
            dtype=pick_dtype(dtype, torch_device),
            device=torch_device,
            start=lambda documents: progress.update(task, total=documents),
            advance=lambda documents: progress.advance(task, documents),
        )
    info = scores.info
    for language, truncated, skipped in zip(info.languages, info.truncated, info.skipped, strict=True):
        if truncated:
            console.print(f"[yellow]{language}: {truncated} document(s) cut to {info.max_tokens} tokens")
        if skipped:
            console.print(f"[yellow]{language}: {skipped} document(s) without a token to predict skipped")
    scores.save(out)
    counts = ", ".join(
        f"{language} {documents} documents, {tokens} tokens"
        for language, documents, tokens in zip(info.languages, info.documents, info.tokens, strict=True)
    )
    typer.echo(f"{out}: {', '.join(scores.by_method)} ({counts})")


def select(
    scores: Annotated[Path, typer.Argument(help="File written by `crane relevance`.")],
    method: Annotated[str, typer.Option(help="Method whose scores rank the neurons.")],
    budget: Annotated[float, typer.Option(help="Fraction of all neurons to switch off, 0 to 1.")] = 0.01,
    match: Annotated[
        str | None,
        typer.Option(help="Take as many neurons per layer as this method, none of its own; 'none' to rank freely."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of methods that draw.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory of masks to write to.")] = Path("masks"),
) -> None:
    """Write one mask per language: the neurons that METHOD ranks highest."""
    from relevance.scores import Scores
    from relevance.selection import select as select_neurons

    loaded = Scores.load(scores)
    selection = select_neurons(loaded, method, budget, match, seed)
    for path, mask in zip(selection.write(out, loaded), selection.masks.values(), strict=True):
        typer.echo(f"{path}: {mask.neurons} neurons of {loaded.shape.neurons}")


def _names(listed: str | None) -> list[str] | None:
    return None if listed is None else [name.strip() for name in listed.split(",") if name.strip()]
