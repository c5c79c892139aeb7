"""`crane verify`: its options, and what it prints."""

from pathlib import Path
from typing import Annotated

import typer

from crane_serve.common.models.resolve import Revision


def verify(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub id")],
    revision: Revision = None,
    masks: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Try these mask files too")] = None,
    no_reference: Annotated[bool, typer.Option("--no-reference", help="Do not compare with transformers")] = False,
    no_throughput: Annotated[bool, typer.Option("--no-throughput", help="Do not measure throughput")] = False,
    report: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the report as JSON, too")] = None,
) -> None:
    """Prove on this machine that every request runs with exactly its mask. Further options are vLLM's engine flags.

    The exit code is 1 if any check fails.
    """
    from crane_serve.common.atomic import write_atomically
    from crane_serve.common.bars import bar
    from crane_serve.verify.session import VerifyOptions, run

    options = VerifyOptions(model, masks, not no_reference, not no_throughput, tuple(context.args), revision)
    with bar("verify", "steps", f"{model} by transformers, by vLLM and with masks", on_terminal=False) as progress_bar:
        result = run(options, progress_bar.say)
    for line in result.lines():
        typer.echo(line)
    if report is not None:
        write_atomically(report, (result.json() + "\n").encode())
    if not result.passed:
        raise typer.Exit(1)
