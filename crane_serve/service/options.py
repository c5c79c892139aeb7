"""Options of a command, made from the fields of a settings model."""

import inspect
from collections.abc import Callable, Collection
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_R = TypeVar("_R")
_METAVARS = {int: "<int>", float: "<float>", Path: "<path>"}


def with_options(settings: type[BaseModel], leave: Collection[str]) -> Callable[[Callable[..., _R]], Callable[..., _R]]:
    """Give a command that takes `**options` an option for each field of `settings` except those in `leave`.

    An option that is not used is None. Values stay strings, which the model parses, so that every source is checked in
    the same way. A field that is true or false has two flags without a value, --name and --no-name.
    """

    def decorate(command: Callable[..., _R]) -> Callable[..., _R]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        of_settings = [_parameter(name, field) for name, field in settings.model_fields.items() if name not in leave]
        parameters = [*own, *of_settings]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def option_name(field: str) -> str:
    """The flag of a field: `mask_rows` is --mask-rows."""
    return f"--{field.replace('_', '-')}"


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    default: Any = None if field.is_required() else field.default
    if field.annotation is bool:
        switch = typer.Option(
            f"{option_name(name)}/--no-{option_name(name)[2:]}", help=field.description, show_default=str(default)
        )
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[bool | None, switch]
        )
    option = typer.Option(
        option_name(name),
        metavar=_metavar(field.annotation),
        help=field.description,
        show_default=False if default in (None, ()) else str(default),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )


def _metavar(annotation: Any) -> str:
    if inspect.isclass(annotation) and issubclass(annotation, StrEnum):
        return f"<{'|'.join(annotation)}>"
    kinds = getattr(annotation, "__args__", (annotation,))
    return next((_METAVARS[kind] for kind in kinds if kind in _METAVARS), "<str>")
