"""`crane masks push` and `crane masks pull`: masks travel over the Hugging Face Hub."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crane_serve.common.hub_name import HUB_NAME, HubName
from crane_serve.common.models.resolve import Revision, resolve_checkpoint

if TYPE_CHECKING:
    from clients.evaluation import Evaluation
    from crane_serve.common.masks.files import StoredMask
    from crane_serve.common.reports.content import Section
    from relevance.validation.result import Validation


class SharingError(ValueError):
    """The card of the masks cannot say what it is to say."""


def push(
    masks: Annotated[list[Path], typer.Argument(help="Mask files, or directories of them")],
    to: Annotated[str, typer.Argument(help="hf:OWNER/NAME, a repository on the Hugging Face Hub")],
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is made now: for its owner only")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are not ours, too")] = False,
    base_model: Annotated[
        str | None,
        typer.Option(help="The masks' model as a hub id: compared with their fingerprint, and named in the card"),
    ] = None,
    revision: Revision = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="Of the masks, as the Hub abbreviates it: apache-2.0")
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="The tokens that they are meant for, as in a request.", show_default="what the card says, else all"
        ),
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Directory that `crane validate` wrote: what the masks cost, for the card")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Directory that `crane eval` wrote: what the masks cost, for the card")
    ] = None,
) -> None:
    """Commit masks and a card that describes them to a repository of the Hub, which is made if it is missing.

    The token is the Hub's own: HF_TOKEN, or that of `hf auth login`.
    """
    from crane_serve.common.masks.card import base_model_of, mask_card, positions_of
    from crane_serve.common.masks.files import read_mask
    from crane_serve.common.masks.fingerprint import Fingerprint
    from crane_serve.common.masks.hub import push_masks
    from crane_serve.common.masks.positions import Positions
    from crane_serve.common.masks.transfer import read_masks

    try:
        meant = None if positions is None else Positions.parse(positions)
    except ValueError as error:
        raise SharingError(f"--positions {error}") from None
    repository = HubName.parse(to)
    stored = [mask for path in masks for mask in (read_masks(path) if path.is_dir() else [read_mask(path)])]
    commit = None
    if base_model is not None:
        if Path(base_model).is_dir():
            raise SharingError(f"--base-model {base_model} is a directory; expected a hub id, which others can load")
        checkpoint = resolve_checkpoint(base_model, revision)
        fingerprint = Fingerprint.of(checkpoint)
        for mask in stored:
            fingerprint.require(mask.info.fingerprint, f"mask {mask.name!r}")
        commit = checkpoint.name
    elif revision is not None:
        raise SharingError("--revision is of --base-model, which is not given")

    def write_card(all_masks: Sequence["StoredMask"], earlier: Mapping[str, Any]) -> str:
        model = (base_model, commit) if base_model else base_model_of(earlier, all_masks[0].info.fingerprint)
        known = earlier.get("license")
        return mask_card(
            repository.repository,
            all_masks,
            base_model=model[0],
            base_commit=model[1],
            licence=licence or (known if isinstance(known, str) else None),
            positions=meant or positions_of(earlier),
            effects=_effects({mask.mask.digest: mask.name for mask in all_masks}, validation, evaluation),
        )

    typer.echo(push_masks(repository, stored, write_card, private=private, force=force))


def pull(
    masks: Annotated[str, typer.Argument(help=f"{HUB_NAME}, a repository of masks on the Hugging Face Hub")],
    to: Annotated[Path, typer.Option("--to", help="Directory for the mask files")],
    force: Annotated[bool, typer.Option("--force", help="Replace other masks of the same names")] = False,
) -> None:
    """Copy the masks of a repository of the Hub into a directory."""
    from crane_serve.common.masks.hub import pull_masks

    source = HubName.parse(masks)
    commit, paths = pull_masks(source, to, force=force)
    for path in paths:
        typer.echo(path)
    typer.echo(HubName(source.repository, commit))


def _effects(names: Mapping[str, str], validation: Path | None, evaluation: Path | None) -> list["Section"]:
    """What masks cost. names: of the masks by digest. Raises SharingError for a result without any of them."""
    from clients.evaluation import Evaluation
    from relevance.validation.result import Validation

    sections = []
    if validation is not None:
        sections.append(_of_validation(Validation.load(validation), names))
    if evaluation is not None:
        sections.append(_of_evaluation(Evaluation.read(evaluation), names))
    for section, path in zip(sections, [path for path in (validation, evaluation) if path is not None], strict=True):
        if not any(table.rows for table in section.tables):
            raise SharingError(f"{path} has no figures of {', '.join(names.values())}; expected a result with a mask")
    return sections


def _of_validation(result: "Validation", names: Mapping[str, str]) -> "Section":
    from crane_serve.common.reports.content import Cell, Section, Table
    from crane_serve.common.reports.numbers import interval_text, number_text
    from relevance.validation.result import REPORT

    effects = {names[effect.digest]: effect for effect in result.effects if effect.digest in names}
    rows = tuple(
        (
            Cell(name),
            *(
                Cell(
                    number_text(change.mean, signed=True),
                    interval_text(change, signed=True),
                    strong=language == effect.language,
                )
                for language in result.languages
                for change in [effect.changes[language]]
            ),
        )
        for name, effect in sorted(effects.items())
    )
    documents = ", ".join(f"{language} {count:,}" for language, count in result.texts[REPORT].documents.items())
    about = (
        f"In nats per token, above 0 for a loss, with 95 % intervals. Documents: {documents}. Bold: its own language."
    )
    return Section("What the masks cost, by validation", (about,), (Table(("mask", *result.languages), rows),))


def _of_evaluation(result: "Evaluation", names: Mapping[str, str]) -> "Section":
    from clients.reporting.changes import change_table
    from clients.reporting.figures import metric_title
    from crane_serve.common.reports.content import Section

    ours = [name for name, mask in result.masks.items() if mask.digest in names]
    tables = []
    for task in result.tasks:
        of_task = task.model_copy(update={"masks": tuple(name for name in task.masks if name in ours)})
        table = change_table(result, of_task, task.metrics[0])
        tables.append(replace(table, title=f"{task.name}, {metric_title(task.metrics[0])}. {table.title}"))
    about = "Masked minus unmasked, with 95 % intervals. Bold: the mask's own language."
    return Section("What the masks cost, by evaluation", (about,), tuple(tables))
