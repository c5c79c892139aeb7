"""Template: how a row of a data set becomes a prompt, a list of choices or an answer, in Jinja2."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, cast

from pydantic import GetCoreSchemaHandler, JsonValue
from pydantic_core import CoreSchema, core_schema

from clients.errors import EvaluationError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

_SHOWN_CHARACTERS = 100


class Template(str):
    """A Jinja2 template over the fields of a row, whose syntax is checked at once. It is a str with the template's
    text.

    It runs in Jinja2's immutable sandbox without autoescape. A missing field is an error, a line feed at the end is
    kept, and there is a filter `regex_replace(pattern, replacement)`, as in lm-evaluation-harness, whose templates can
    be used here. Its methods raise EvaluationError naming the template, the problem and the row's fields.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Template:
        template = super().__new__(cls, text)
        template._guarded(lambda: _compiled(text), {})
        return template

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())

    def render(self, row: Mapping[str, Any], **extra: Any) -> str:
        """The text for a row. extra: further fields, which override those of the row."""
        fields = {**row, **extra}
        return cast(str, self._guarded(lambda: _compiled(str(self)).render(fields), fields))

    def value(self, row: Mapping[str, Any], **extra: Any) -> JsonValue:
        """The value of its expression, such as a list or a number, if the whole template is one `{{ expression }}`;
        else the text.

        Spaces around the braces do not count.
        """
        expression = _compiled_expression(str(self))
        if expression is None:
            return self.render(row, **extra)
        fields = {**row, **extra}
        return cast(JsonValue, self._guarded(lambda: _json_value(expression(fields)), fields))

    def _guarded(self, work: Callable[[], Any], fields: Mapping[str, Any]) -> Any:
        """The result of `work`. All exceptions are caught, since an expression in a template may raise any."""
        try:
            return work()
        except Exception as error:
            text = json.dumps(str(self), ensure_ascii=False)
            excerpt = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
            has = f"; the row has {', '.join(fields)}" if fields else ""
            raise EvaluationError(f"template {excerpt}: {str(error) or type(error).__name__}{has}") from error


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = _regex_replace
    return environment


@lru_cache(maxsize=1024)
def _compiled(text: str) -> Any:
    return _environment().from_string(text)


@lru_cache(maxsize=1024)
def _compiled_expression(text: str) -> Callable[[Mapping[str, Any]], Any] | None:
    """The expression of a template that is a single one, else None."""
    from jinja2 import nodes

    text = text.strip()
    body = _environment().parse(text).body
    if len(body) != 1 or not isinstance(body[0], nodes.Output) or not text.startswith("{{"):
        return None
    outputs = body[0].nodes
    if len(outputs) != 1 or isinstance(outputs[0], nodes.TemplateData):
        return None
    inner = text.removeprefix("{{").removesuffix("}}").removeprefix("-").removesuffix("-")
    return _environment().compile_expression(inner, undefined_to_none=False)


def _regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
    return re.sub(pattern, replacement, text, count=count)


def _json_value(value: Any) -> Any:
    """A value as JSON has it: sequences and iterators as lists. Raises UndefinedError for a field that is not there."""
    from jinja2 import Undefined

    if isinstance(value, Undefined):
        return str(value)  # which raises
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json_value(entry) for key, entry in value.items()}
    if isinstance(value, Iterable):
        return [_json_value(entry) for entry in value]
    return str(value)
