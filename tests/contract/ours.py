"""What the project takes of vLLM, as its own source says: imports, what is wrapped, and names of attributes."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.contract.source import Function

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "crane_serve" / "engine"
_LOGGER = "vllm.crane"  # no module


@dataclass(frozen=True)
class Need:
    """Something that vLLM must have: `package.module` or `package.module:name`. place: of ours, file and line."""

    target: str
    place: str


@dataclass(frozen=True)
class Wrapping:
    """A call of `wrap`. by: our function, `module.function`; attribute: what it replaces, None if that is no text."""

    by: str
    attribute: str | None
    place: str


Alternatives = tuple[tuple[Need, ...], ...]
"""Ways to import, of which one must work: more than one for `try: from a import b` `except ImportError: ...`."""


@cache
def trees(root: Path) -> list[tuple[Path, ast.Module]]:
    return [(file, ast.parse(file.read_text(encoding="utf-8"))) for file in sorted(root.rglob("*.py"))]


def imports(root: Path = ROOT / "crane_serve") -> list[Alternatives]:
    """Every import from vLLM, also in functions, and every module of vLLM that is named in a text."""
    return [found for file, tree in trees(root) for found in _imports(tree, file)]


def _imports(node: ast.AST, file: Path) -> Iterator[Alternatives]:
    place = f"{file.parent.name}/{file.name}:{getattr(node, 'lineno', 0)}"
    if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "vllm":
        for alias in node.names:
            yield ((Need(f"{node.module}:{alias.name}", place),),)
    elif isinstance(node, ast.Import):
        yield from (((Need(alias.name, place),),) for alias in node.names if alias.name.startswith("vllm"))
    elif isinstance(node, ast.Constant) and re.fullmatch(r"vllm(\.\w+)+", str(node.value)) and node.value != _LOGGER:
        yield ((Need(node.value, place),),)
    elif isinstance(node, ast.Try) and (instead := _flat(node.handlers, file)):
        yield _flat(node.body, file), instead
    else:
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, file)


def _flat(nodes: list[ast.AST], file: Path) -> tuple[Need, ...]:
    return tuple(need for node in nodes for found in _imports(node, file) for need in found[0])


def variables(root: Path = ROOT / "crane_serve") -> set[str]:
    """vLLM's environment variables that are named."""
    texts = (node.value for _, tree in trees(root) for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {found for text in texts if isinstance(text, str) for found in re.findall(r"^VLLM_[A-Z0-9_]+", text)}


def functions(root: Path = ENGINE) -> dict[str, Function]:
    """Our functions by name: `module.function`, `module.Class.method`, `module.function.inner`."""
    return {
        f"{file.stem}.{'.'.join(path)}": node
        for file, tree in trees(root)
        for path, node in _named(tree, ())
        if isinstance(node, Function)
    }


def _named(node: ast.AST, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ast.AST]]:
    for child in ast.iter_child_nodes(node):
        inner = (*path, child.name) if isinstance(child, Function | ast.ClassDef) else path
        if inner != path:
            yield inner, child
        yield from _named(child, inner)


def wrappings(root: Path = ENGINE) -> list[Wrapping]:
    """Every call of `wrap`."""
    known = functions(root)
    found = []
    for file, tree in trees(root):
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        origins = {
            alias.asname or alias.name: f"{str(node.module).rpartition('.')[2]}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for path, function in _named(tree, ()):
            for call in _calls(function, "wrap") if isinstance(function, Function) else ():
                _, attribute, wrapper = call.args
                name = ast.unparse(wrapper)
                inner = f"{file.stem}.{'.'.join(path)}.{name}"
                by = inner if inner in known else origins.get(name, f"{file.stem}.{name}")
                what = attribute.value if isinstance(attribute, ast.Constant) else constants.get(ast.unparse(attribute))
                found.append(Wrapping(by, what, f"{file.name}:{call.lineno}"))
    return found


def added(root: Path = ENGINE) -> set[str]:
    """What `setattr` puts on something that is not `self`, as written: `EngineCore, live_masks.CHANGE_METHOD`."""
    return {
        ", ".join(map(ast.unparse, call.args[:2]))
        for _, tree in trees(root)
        for call in _calls(tree, "setattr")
        if isinstance(call.args[0], ast.Name) and call.args[0].id[0].isupper()
    }


def mixins(root: Path = ENGINE) -> set[str]:
    """Our classes that are put before or derived from one of vLLM's: those that call `super()` or have such a base."""
    found = set()
    for file, tree in trees(root):
        of_vllm = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vllm")
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                is_mixin = not node.bases and any(_calls(node, "super"))
                if is_mixin or of_vllm & {ast.unparse(base) for base in node.bases}:
                    found.add(f"{file.stem}.{node.name}")
    return found


def attributes(root: Path = ENGINE) -> dict[str, str]:
    """The names of attributes of anything but imported modules, each with a place where it is used."""
    found = {}
    for file, tree in trees(root):
        imported = {
            (alias.asname or alias.name).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            and not str(getattr(node, "module", node.names[0].name)).startswith("vllm")
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _root(node) not in imported:
                found[node.attr] = f"{file.name}:{node.lineno}"
        for call in (*_calls(tree, "getattr"), *_calls(tree, "hasattr")):
            if isinstance(call.args[1], ast.Constant):
                found[call.args[1].value] = f"{file.name}:{call.lineno}"
    return found


def own_names() -> set[str]:
    """The names that the project itself gives to functions, classes, fields and attributes."""
    names = set()
    for _, tree in trees(ROOT / "crane_serve"):
        for node in ast.walk(tree):
            if isinstance(node, Function | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        names.add(target.id)
                    elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                        names.add(target.attr)
    return names


def _calls(node: ast.AST, name: str) -> Iterator[ast.Call]:
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == name:
            yield call


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None
