"""What the reference pages say of commands and routes, made from the commands and routes themselves.

A line `<!-- made: NAME -->` in a page is replaced when the site is built.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mkdocs.exceptions import PluginError

_MADE = re.compile(r"^<!-- made: (\S+) -->$", re.MULTILINE)
_SCHEMAS = "#/components/schemas/"

Schema = Mapping[str, Any]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is made. Raises PluginError for a name that stands for nothing."""

    def made(match: re.Match[str]) -> str:
        try:
            make = MADE[match[1]]
        except KeyError:
            raise PluginError(f"<!-- made: {match[1]} -->: expected one of {', '.join(MADE)}") from None
        return make()

    return _MADE.sub(made, markdown)


def commands() -> str:
    """Every command of `crane`, with its arguments and options."""
    import typer
    from typer.cli import get_docs_for_click

    from crane_serve.cli import app

    command = typer.main.get_command(app)
    with command.make_context("crane", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="crane", title="All commands")
    text = re.sub(r"\[default: \((.*?)\)", r"[default: \1", text.removeprefix("# All commands\n"))
    # In lists typer cuts what a command does after 45 characters.
    text = re.sub(
        r"^\* `([\w-]+)`: (.*)\.\.\.$", lambda match: f"* `{match[1]}`: {_said(command, match[2])}", text, flags=re.M
    )
    # Brackets of help texts are no links.
    return re.sub(r"(`[^`]*`)|\[", lambda match: match[1] or "\\[", text)


def _said(command: Any, beginning: str) -> str:
    """The first paragraph of the command below `command` whose help begins so."""
    pending, fitting = [command], []
    while pending:
        one = pending.pop()
        pending += [below for below in getattr(one, "commands", {}).values() if not below.hidden]
        paragraph = " ".join((one.help or "").split("\n\n")[0].split())
        if paragraph.startswith(beginning.rstrip(",")):
            fitting.append(paragraph)
    (only,) = fitting
    return only


def routes() -> str:
    """The service's own routes, from its OpenAPI document."""
    operations = [
        _operation(method, path, operation)
        for path, item in _document()["paths"].items()
        for method, operation in item.items()
    ]
    return "\n\n".join(operations)


def statuses() -> str:
    """What the statuses of errors mean, on whatever route."""
    answers = [
        answer
        for item in _document()["paths"].values()
        for operation in item.values()
        for answer in operation["responses"].items()
    ]
    meanings = {status: answer["description"] for status, answer in answers if _is_error(status)}
    return _table(("status", "meaning"), sorted(meanings.items()))


def schemas() -> str:
    """The bodies of requests and answers."""
    found = _document()["components"]["schemas"]
    return "\n\n".join(_schema(name, schema) for name, schema in sorted(found.items()))


def engine_routes() -> str:
    """vLLM's routes that the service answers."""
    from crane_serve.engine.vllm_routes import CARRYING
    from crane_serve.service.api.openai import ROUTES

    rows = [
        f"| `{method} {path}` | {'yes' if path in CARRYING else 'runs no model'} |" for path, method in ROUTES.items()
    ]
    return "\n".join(["| route | takes a mask |", "|---|---|", *rows])


def _document() -> dict[str, Any]:
    from crane_serve.service.api.app import create_app

    async def nothing() -> Any:
        raise RuntimeError("the reference needs no engine")

    return create_app(nothing).openapi()


def _operation(method: str, path: str, operation: Schema) -> str:
    lines = [f"### `{method.upper()} {path}`", operation.get("description") or operation["summary"]]
    if operation.get("parameters"):
        lines.append(_table(("parameter", "in", "type", "meaning"), map(_parameter, operation["parameters"])))
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        lines.append(f"Body, `{kind}`: {_type(content.get('schema', {}))}.")
    answers = operation["responses"]
    lines.append(_table(("status", "answer"), (row for row in _answers(answers))))
    lines.append(
        "Errors: " + ", ".join(sorted(filter(_is_error, answers))) + "." if any(map(_is_error, answers)) else ""
    )
    return "\n\n".join(lines)


def _is_error(status: str) -> bool:
    return int(status) >= 400


def _parameter(parameter: Schema) -> tuple[str, ...]:
    name = f"`{parameter['name']}`" + (" (required)" if parameter.get("required") else "")
    return name, parameter["in"], _type(parameter["schema"]), parameter.get("description", "")


def _answers(answers: Mapping[str, Schema]) -> Iterator[tuple[str, ...]]:
    for status, answer in answers.items():
        if not _is_error(status):
            bodies = [f"`{kind}`: {_type(part.get('schema', {}))}" for kind, part in answer.get("content", {}).items()]
            yield status, "; ".join(bodies) or answer["description"]


def _schema(name: str, schema: Schema) -> str:
    lines = [f"### {name}"]
    if "description" in schema:
        lines.append(schema["description"])
    if "properties" in schema:
        required = schema.get("required", ())
        rows = [_property(field, value, field in required) for field, value in schema["properties"].items()]
        lines.append(_table(("field", "type", "default", "meaning"), rows))
    elif "enum" in schema:
        lines.append("One of " + ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"]) + ".")
    return "\n\n".join(lines)


def _property(name: str, schema: Schema, required: bool) -> tuple[str, ...]:
    default = "required" if required else f"`{json.dumps(schema['default'])}`" if "default" in schema else ""
    return f"`{name}`", _type(schema), default, schema.get("description", "")


def _type(schema: Schema) -> str:
    """A schema in a few words, with links to those that have a name."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(_SCHEMAS)
        return f"[{name}](#{name.lower()})"
    for joined in ("anyOf", "oneOf", "allOf"):
        if joined in schema:
            return " or ".join(_type(part) for part in schema[joined])
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    kind = schema.get("type", "anything")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}{_bounds(schema)}"
    if schema.get("format") == "binary":
        return "bytes"
    return kind + _bounds(schema)


def _bounds(schema: Schema) -> str:
    names = {
        "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
        "minLength": "characters, at least", "maxLength": "characters, at most",
        "minItems": "of at least", "maxItems": "of at most",
    }  # fmt: skip
    found = [f"{words} {schema[key]}" for key, words in names.items() if key in schema]
    return f" ({', '.join(found)})" if found else ""


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


MADE: dict[str, Callable[[], str]] = {
    "commands": commands,
    "routes": routes,
    "statuses": statuses,
    "schemas": schemas,
    "engine-routes": engine_routes,
}

logging.getLogger("crane").setLevel(logging.ERROR)
