"""Template: how a row of a data set becomes a prompt, a list of choices or an answer, in Jinja2."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler, JsonValue
from pydantic_core import CoreSchema, core_schema

from clients import bounded
from clients.bounded_process import environment
from clients.errors import EvaluationError

_SHOWN_CHARACTERS = 100

_T = TypeVar("_T")


class Template(str):
    """A Jinja2 template over the fields of a row, whose syntax is checked at once. It is a str with the template's
    text.

    It runs in Jinja2's immutable sandbox without autoescape, in a process with bounds of time and memory. A missing
    field is an error, a line feed at the end is kept, and there is a filter `regex_replace(pattern, replacement)`, as
    in lm-evaluation-harness, whose templates can be used here. Its methods raise EvaluationError naming the template,
    the problem, such as the bound that it went beyond, and the row's fields.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Template:
        template = super().__new__(cls, text)
        template._guarded(lambda: _check(text), {})
        return template

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())

    def render(self, row: Mapping[str, Any], **extra: Any) -> str:
        """The text for a row. extra: further fields, which override those of the row."""
        fields = {**row, **extra}
        return self._guarded(lambda: bounded.render(str(self), fields), fields)

    def value(self, row: Mapping[str, Any], **extra: Any) -> JsonValue:
        """The value of its expression, such as a list or a number, if the whole template is one `{{ expression }}`;
        else the text.

        Spaces around the braces do not count.
        """
        fields = {**row, **extra}
        value: JsonValue = self._guarded(lambda: bounded.value(str(self), fields), fields)
        return value

    def _guarded(self, work: Callable[[], _T], fields: Mapping[str, Any]) -> _T:
        """The result of `work`. All exceptions are caught, since parsing may raise any."""
        try:
            return work()
        except Exception as error:
            text = json.dumps(str(self), ensure_ascii=False)
            excerpt = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
            has = f"; the row has {', '.join(fields)}" if fields else ""
            raise EvaluationError(f"template {excerpt}: {str(error) or type(error).__name__}{has}") from error


def _check(text: str) -> None:
    """Refuse a template that cannot be parsed, or that has unknown filters or tests.

    Only parsed: Jinja2 runs constant parts of a template when it compiles it.
    """
    from jinja2 import TemplateAssertionError, nodes

    known = environment()
    for node in known.parse(text).find_all((nodes.Filter, nodes.Test)):
        kind, names = ("filter", known.filters) if isinstance(node, nodes.Filter) else ("test", known.tests)
        if node.name not in names:
            raise TemplateAssertionError(f"No {kind} named {node.name!r}.", node.lineno)
