"""The process that runs what others wrote into a plan, templates and regular expressions, within bounds of the kernel.

Run as a program by `clients.bounded`, for which it imports nothing of ours: a line of JSON for each call, and a line
for each answer. It ends with its input.
"""

import json
import math
import re
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_S = 2
MEMORY_BYTES = 512 << 20
CHARACTERS = 4 << 20
_OF_A_MESSAGE = 1000


@cache
def environment() -> "ImmutableSandboxedEnvironment":
    """Jinja2's immutable sandbox, without autoescape."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    made.filters["regex_replace"] = _regex_replace
    return made


def render(text: str, fields: Mapping[str, Any]) -> str:
    """The text that a template makes."""
    return str(_compiled(text).render(fields))


def value(text: str, fields: Mapping[str, Any]) -> Any:
    """The value, as JSON has it, of a template that is one expression; else the text that it makes."""
    expression = _compiled_expression(text)
    return render(text, fields) if expression is None else _json_value(expression(fields))


def first_groups(pattern: str, text: str) -> list[str | None]:
    """What the first group of a regular expression matches, at each of its places in a text."""
    return [match[1] for match in re.finditer(pattern, text)]


@lru_cache(maxsize=1024)
def _compiled(text: str) -> Any:
    return environment().from_string(text)


@lru_cache(maxsize=1024)
def _compiled_expression(text: str) -> Callable[[Mapping[str, Any]], Any] | None:
    from jinja2 import nodes

    text = text.strip()
    body = environment().parse(text).body
    if len(body) != 1 or not isinstance(body[0], nodes.Output) or not text.startswith("{{"):
        return None
    outputs = body[0].nodes
    if len(outputs) != 1 or isinstance(outputs[0], nodes.TemplateData):
        return None
    inner = text.removeprefix("{{").removesuffix("}}").removeprefix("-").removesuffix("-")
    return environment().compile_expression(inner, undefined_to_none=False)


def _regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
    return re.sub(pattern, replacement, text, count=count)


def _json_value(content: Any) -> Any:
    """A value as JSON has it: sequences and iterators as lists. Raises UndefinedError for a field that is not there."""
    from jinja2 import Undefined

    if isinstance(content, Undefined):
        return str(content)  # which raises
    if content is None or isinstance(content, str | int | float | bool):
        return content
    if isinstance(content, Mapping):
        return {str(key): _json_value(entry) for key, entry in content.items()}
    if isinstance(content, Iterable):
        return [_json_value(entry) for entry in content]
    return str(content)


_WORK: dict[str, Callable[..., Any]] = {work.__name__: work for work in (render, value, first_groups)}


def _answer(name: str, arguments: list[Any]) -> str:
    """The answer as JSON. All exceptions are caught, since an expression in a template may raise any."""
    try:
        answer = json.dumps([_WORK[name](*arguments), None], ensure_ascii=False)
    except MemoryError:
        return json.dumps([None, f"it needs more than {MEMORY_BYTES >> 20} MiB"])
    except Exception as error:
        return json.dumps([None, str(error)[:_OF_A_MESSAGE] or type(error).__name__])
    if len(answer) > CHARACTERS:
        return json.dumps([None, f"it makes more than {CHARACTERS:,} characters"])
    return answer


def _allow_cpu() -> None:
    """Let this process run so many seconds more; then the kernel ends it, whatever it is doing."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    until = math.ceil(used.ru_utime + used.ru_stime) + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (until if most == resource.RLIM_INFINITY else min(until, most), most))


def main() -> None:
    """Answer the calls of standard input, each within CPU_S and MEMORY_BYTES."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    environment()
    for line in sys.stdin.buffer:
        _allow_cpu()
        name, arguments = json.loads(line)
        sys.stdout.buffer.write(_answer(name, arguments).encode("utf-8", "surrogatepass") + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
