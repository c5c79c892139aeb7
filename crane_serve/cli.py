"""The `crane` command. Commands are defined in the package that they run; here they get their names and error
handling."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import crane_serve
from clients import commands as client_commands
from clients.errors import CraneError
from crane_serve import sharing, sizing
from crane_serve.common.bars import bar
from crane_serve.common.hub_name import HUB_NAME
from crane_serve.common.models.fetch import SOURCES, FetchError
from crane_serve.common.models.fetch import fetch as fetch_model
from crane_serve.common.models.resolve import Revision, resolve_checkpoint
from crane_serve.demo import DemoError, run_demo
from crane_serve.service.options import option_name, with_options
from crane_serve.service.settings import SECRETS, ServeSettings, SettingError, SettingSource, load_settings
from crane_serve.verify.command import verify
from relevance import commands as relevance_commands
from relevance import search_commands

_P = ParamSpec("_P")
_R = TypeVar("_R")

app = typer.Typer(no_args_is_help=True, help="Find the neurons a language needs, and serve a model without them.")
model_app = typer.Typer(no_args_is_help=True, help="Demonstration models.")
masks_app = typer.Typer(no_args_is_help=True, help="Mask files.")
app.add_typer(model_app, name="model")
app.add_typer(masks_app, name="masks")
corpus_app = typer.Typer(no_args_is_help=True, help="Texts to measure relevance on.")
app.add_typer(corpus_app, name="corpus")


def one_line_errors(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Turn the errors a user can cause into one line on stderr and exit code 1."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except (ValueError, FetchError, DemoError, CraneError, OSError) as error:
            message = Text.assemble(("error:", "red"), f" {error}")  # no markup: messages hold brackets
            Console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(1) from error

    return run


def _renamed(command: Callable[_P, _R], name: str) -> Callable[_P, _R]:
    """A command under its old name, which says the new one on stderr."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        typer.echo(f"this command is now `{name}`", err=True)
        return command(*args, **kwargs)

    return run


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(crane_serve.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show version.")] = False,
) -> None:
    """Options that stand before the command."""


@model_app.command("fetch")
@one_line_errors
def fetch(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(sorted(SOURCES))}")],
    to: Annotated[Path, typer.Option("--to", help="Directory to make")],
) -> None:
    """Fetch a small demonstration model and make it a Hugging Face checkpoint."""
    with bar("fetch", "steps", on_terminal=False):  # it reports its own steps
        fetch_model(name, to, report=typer.echo)


@masks_app.command("list")
@one_line_errors
def list_masks(masks: Annotated[str, typer.Argument(help=f"Directory of mask files, or {HUB_NAME}")]) -> None:
    """List the mask files of a directory."""
    from crane_serve.common.masks.files import SUFFIX, MaskFileError, read_mask
    from crane_serve.common.masks.hub import mask_directory

    directory = mask_directory(masks)
    if not directory.is_dir():
        raise MaskFileError(f"{directory} is not a directory of mask files")
    table = Table("name", "language", "method", "budget", "neurons", "digest")
    broken = []
    for path in sorted(directory.glob(f"[!.]*{SUFFIX}")):
        try:
            stored = read_mask(path)
        except MaskFileError as error:
            broken.append(str(error))
            continue
        info = stored.info
        budget = "" if info.budget is None else f"{info.budget:.4g}"
        language, method = escape(info.language), escape(info.method)
        method += "" if info.transferred_from is None else ", transferred"
        neurons = str(stored.mask.neurons)
        neurons += f", {stored.mask.experts_off} experts" if stored.mask.experts_off else ""
        table.add_row(stored.name, language, method, budget, neurons, stored.mask.digest[:12])
    Console().print(table)
    if broken:
        raise MaskFileError("\n".join(broken))


@masks_app.command("show")
@one_line_errors
def show_masks(
    masks: Annotated[str, typer.Argument(help=f"A mask file, a directory of them, or {HUB_NAME}")],
    names: Annotated[list[str] | None, typer.Argument(help="Names in that directory; default all")] = None,
) -> None:
    """Show masks in full, as JSON: provenance, digest, and the neurons of each layer with what becomes of them."""
    from crane_serve.common.masks.files import SUFFIX, MaskFileError, check_name, read_mask
    from crane_serve.common.masks.hub import mask_directory

    path = mask_directory(masks)
    if path.is_dir():
        files = [path / f"{check_name(name)}{SUFFIX}" for name in names or []] or sorted(path.glob(f"[!.]*{SUFFIX}"))
    else:
        files = [path]
    if not files:
        raise MaskFileError(f"{path} holds no mask files")
    for file in files:
        stored = read_mask(file)
        content = {"name": stored.name, "digest": stored.mask.digest, **stored.info.model_dump(mode="json")}
        content |= {"neurons": stored.mask.neuron_sets(), **stored.mask.neuron_values()}
        if stored.mask.router is not None:
            content["experts_off"] = [(row == 0).nonzero().flatten().tolist() for row in stored.mask.router]
        Console(soft_wrap=True).print_json(data=content, indent=None)


@masks_app.command("transfer")
@one_line_errors
def transfer(
    masks: Annotated[str, typer.Argument(help=f"Directory of mask files, or {HUB_NAME}")],
    to: Annotated[str, typer.Option("--to", help="Checkpoint directory or hub id that the masks shall be used on")],
    out: Annotated[Path, typer.Option(help="Another directory, for the new mask files")],
    names: Annotated[list[str] | None, typer.Argument(help="Names of masks; default all")] = None,
    revision: Revision = None,
) -> None:
    """Make masks usable on another checkpoint of the same shape; the new files name both models."""
    from crane_serve.common.masks.fingerprint import Fingerprint
    from crane_serve.common.masks.hub import mask_directory
    from crane_serve.common.masks.transfer import transfer_masks

    fingerprint = Fingerprint.of(resolve_checkpoint(to, revision))
    for path in transfer_masks(mask_directory(masks), fingerprint, out, names or ()):
        typer.echo(path)


@masks_app.command("bake")
@one_line_errors
def bake_mask(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub id")],
    mask: Annotated[Path, typer.Argument(help="A mask file of that model")],
    out: Annotated[Path, typer.Option(help="Directory for the new checkpoint; must not exist")],
    revision: Revision = None,
) -> None:
    """Write a checkpoint with the mask in its weights, for programs that know nothing of masks."""
    from crane_serve.common.masks.bake import bake
    from crane_serve.common.masks.files import read_mask

    bake(resolve_checkpoint(model, revision), read_mask(mask), out)
    typer.echo(out)


@masks_app.command("import-lape")
@one_line_errors
def import_lape_file(
    file: Annotated[Path, typer.Argument(help="LAPE's published file: list[language][layer] of LongTensor")],
    languages: Annotated[str, typer.Option(help="Labels of its languages in order, joined with commas")],
    model: Annotated[str, typer.Option(help="Checkpoint directory or hub id that the file was made for")],
    out: Annotated[Path, typer.Option(help="Directory for the mask files")],
    revision: Revision = None,
) -> None:
    """Turn a published LAPE neuron file into mask files `lape-{label}`."""
    from crane_serve.common.masks.fingerprint import Fingerprint
    from crane_serve.common.masks.lape import import_lape

    labels = [label.strip() for label in languages.split(",")]
    for path in import_lape(file, labels, Fingerprint.of(resolve_checkpoint(model, revision)), out):
        typer.echo(path)


_FLAGS_OF_VLLM = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=_FLAGS_OF_VLLM)
@one_line_errors
@with_options(ServeSettings, leave={"model", "engine_flags", *SECRETS})
def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Checkpoint directory or hub id", show_default=False)] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML, YAML or JSON file of settings; else what CRANE_CONFIG names")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the effective settings as JSON, and start nothing")
    ] = False,
    **options: str | bool | None,
) -> None:
    """Serve a model with its masks. Further options (--dtype, --max-model-len, ...) are vLLM's flags.

    Each option can also be set by an environment variable (--mask-rows by CRANE_MASK_ROWS) or in a file (mask_rows).
    API keys can be set only there (user_key, admin_key).
    """
    engine_flags: list[str] = context.args
    if model is not None and model.startswith("-"):  # no model is given: typer took a flag of vLLM for it
        engine_flags, model = [model, *engine_flags], None
    flags: dict[str, Any] = {**options, "model": model, "engine_flags": tuple(engine_flags) or None}
    try:
        loaded = load_settings({name: value for name, value in flags.items() if value is not None}, config)
    except SettingError as error:
        if error.source in (SettingSource.FLAG, None):
            hint = "'MODEL'" if error.setting == "model" else f"'{option_name(error.setting)}'"
            raise typer.BadParameter(str(error), param_hint=hint) from None
        raise
    if print_config:
        content = {"settings": loaded.settings.model_dump(mode="json"), "sources": loaded.sources}
        typer.echo(json.dumps(content, indent=2))
        return
    from crane_serve.service.process import serve as run_server

    raise typer.Exit(run_server(loaded.settings))


@app.command()
@one_line_errors
def demo(
    model: Annotated[Path, typer.Option(help="Where the demonstration model is, or will be")],
    out: Annotated[Path, typer.Option(help="Directory for masks, matrix and report")],
    documents: Annotated[int, typer.Option(min=2, help="Test documents per language")] = 10,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running")] = False,
) -> None:
    """Run the whole path on Gemma-3-270M: text, relevance, masks, server, matrix."""
    run_demo(model, out, documents=documents, keep=keep, report=typer.echo)


masks_app.command("push")(one_line_errors(sharing.push))
masks_app.command("pull")(one_line_errors(sharing.pull))
app.command("size")(one_line_errors(sizing.size))
app.command("verify", context_settings=_FLAGS_OF_VLLM)(one_line_errors(verify))
app.command("relevance")(one_line_errors(relevance_commands.relevance))
app.command("refine")(one_line_errors(search_commands.refine))
app.command("learn")(one_line_errors(search_commands.learn))
app.command("select")(one_line_errors(relevance_commands.select))
masks_app.command("compare")(one_line_errors(search_commands.compare_masks))
app.command("transfer", hidden=True)(one_line_errors(_renamed(search_commands.compare_masks, "crane masks compare")))
app.command("validate")(one_line_errors(search_commands.validate))
corpus_app.command("import")(one_line_errors(relevance_commands.import_corpus))
app.command("eval")(one_line_errors(client_commands.evaluate))
app.command("report")(one_line_errors(client_commands.render))
app.command("compare")(one_line_errors(client_commands.compare))
