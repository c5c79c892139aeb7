"""Whether one version of vLLM has what the engine needs of it, by its source alone."""

import ast
import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from crane_serve.engine.vllm_routes import CARRYING
from tests.contract import expected, ours
from tests.contract.source import Found, Function, Source

BODIES = Path(__file__).with_name("bodies.json")
"""By version, a digest of each body of `expected.BODIES` as it was when it was read."""


@dataclass
class Report:
    """What was checked, how much of each kind; what is broken; and what changed without a name or argument of ours."""

    version: str
    checked: Counter[str] = field(default_factory=Counter)
    breaches: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.checked.items())
        lines = [f"vLLM {self.version}: {self.checked.total()} things checked ({kinds})"]
        lines += [f"  BROKEN  {breach}" for breach in self.breaches]
        lines += [f"  changed {notice}" for notice in self.notices]
        count = f"{len(self.breaches)} broken" if self.breaches else "nothing is broken"
        return "\n".join([*lines, f"vLLM {self.version}: {count}, {len(self.notices)} changed"])


def check(source: Source, version: str) -> Report:
    """Compare a version's source with our own source and `expected`."""
    report = Report(version)
    for check_kind in (_imports, _variables, _wrapped, _mixed_in, _added, _called, _read, _returns, _says, _routes):
        for kind, problem in check_kind(source):
            report.checked[kind] += 1
            if problem is not None:
                report.breaches.append(problem)
    report.checked["bodies"] = len(expected.BODIES)
    report.notices += _changed_bodies(source, version)
    report.notices += [
        f"{path} ({module}) is a new route: read whether a mask reaches the engine from there"
        for path, module in source.routes().items()
        if path not in expected.ROUTES
    ]
    return report


Checked = Iterator[tuple[str, str | None]]
"""Kinds of things that were checked, each with what is wrong with it."""


def _imports(source: Source) -> Checked:
    for alternatives in ours.imports():
        missing = [[need for need in needs if source.find(need.target) is None] for needs in alternatives]
        problem = None
        if all(missing):
            need = missing[0][0]
            problem = f"{need.target} is imported in {need.place}, and is not there{_instead(source, need.target)}"
        yield "imports", problem


def _variables(source: Source) -> Checked:
    for name in sorted(ours.variables()):
        there = (found := source.find("vllm.envs")) is not None and name in ast.unparse(found.node)
        yield "variables", None if there else f"the environment variable {name} is not in vllm.envs"


def _wrapped(source: Source) -> Checked:
    our_functions = ours.functions()
    for by, targets in expected.WRAPPED.items():
        for target in targets:
            yield "wrapped", _unfit(source, our_functions[by], target, f"{by} replaces it")


def _mixed_in(source: Source) -> Checked:
    for by, target in expected.MIXED_IN.items():
        for name, function in ours.functions().items():
            method = name.removeprefix(f"{by}.")
            if method != name:
                yield "overridden", _unfit(source, function, f"{target}.{method}", f"{by} overrides it")


def _unfit(source: Source, function: Function, target: str, why: str) -> str | None:
    """Why our function cannot stand for vLLM's: it is not there, or takes what ours does not."""
    found = source.find(target)
    if found is None:
        return None if _is_inherited(source, target) else f"{target} is not there{_instead(source, target)}; {why}"
    if not isinstance(found.node, Function):
        return f"{target} is no function any more; {why}"
    mine, theirs = function.args, found.node.args
    my_names, their_names = _positional(mine), _positional(theirs)
    if my_names[:1] == ["original"]:
        my_names = my_names[1:]
    if my_names[:1] != ["self"] and their_names[:1] in (["self"], ["cls"]):
        their_names = their_names[1:]
    by_position = [*their_names[len(my_names) :], *(["*"] if theirs.vararg else [])]
    by_name = [*(name for name in _keywords(theirs) if name not in _keywords(mine)), *(["**"] if theirs.kwarg else [])]
    if their_names[: len(my_names)] != my_names:
        problem = "other names"
    elif (by_position and mine.vararg is None) or ([*by_position, *by_name] and mine.kwarg is None):
        problem = f"also {', '.join([*by_position, *by_name])}"
    else:
        return None
    return f"{target} takes {problem}: ({ast.unparse(theirs)}), ours ({ast.unparse(mine)}); {why}"


def _is_inherited(source: Source, target: str) -> bool:
    """Whether the class has it from a base outside of vLLM."""
    owner, _, attribute = target.rpartition(".")
    found = source.find(owner)
    return found is not None and isinstance(found.node, ast.ClassDef) and source.has(found, attribute)


def _positional(arguments: ast.arguments) -> list[str]:
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]


def _keywords(arguments: ast.arguments) -> list[str]:
    return [argument.arg for argument in arguments.kwonlyargs]


def _added(source: Source) -> Checked:
    for target in expected.ADDED.values():
        owner = target.rpartition(".")[0]
        problem = None
        if source.find(owner) is None:
            problem = f"{owner} is not there{_instead(source, owner)}; we add methods to it"
        elif source.find(target) is not None:
            problem = f"{target} is a name of vLLM's own now; we add a method of this name"
        yield "added", problem


def _called(source: Source) -> Checked:
    for target, call in expected.CALLED.items():
        found = source.find(target)
        if found is None or not isinstance(found.node, Function):
            yield "called", f"{target} is not there{_instead(source, target)}; we call it"
            continue
        arguments = found.node.args
        names = _positional(arguments)
        if names[:1] in (["self"], ["cls"]):
            names = names[1:]
        passed = [part for part in call.split(", ") if part]
        by_position = [part for part in passed if part.isidentifier()]
        by_name = [part[:-1] for part in passed if part.endswith("=")]
        required = names[: len(names) - len(arguments.defaults)]
        required += [
            name for name, default in zip(_keywords(arguments), arguments.kw_defaults, strict=True) if default is None
        ]
        fits = (
            names[: len(by_position)] == by_position
            and (set(by_name) <= {*names, *_keywords(arguments)} or arguments.kwarg is not None)
            and set(required) <= {*by_position, *by_name}
            and ("*" not in passed or arguments.vararg is not None)
        )
        yield "called", None if fits else f"{target} takes ({ast.unparse(arguments)}), we pass ({call})"


def _read(source: Source) -> Checked:
    for target, names in expected.READ.items():
        found = source.find(target)
        for name in names.split():
            yield "attributes", _unreadable(source, target, found, name)


def _unreadable(source: Source, target: str, found: Found | None, name: str) -> str | None:
    if found is None:
        return f"{target} is not there{_instead(source, target)}; we read its {name}"
    if not isinstance(found.node, ast.ClassDef):
        there = source.find(f"{target}:{name}") is not None
        return None if there else f"{target} has no {name}{_instead(source, f'{target}:{name}')}"
    if source.has(found, name):
        return None
    near = difflib.get_close_matches(name, source.members(found), n=3, cutoff=0.5)
    return f"{target} has no {name}" + (f"; near: {', '.join(near)}" if near else "")


def _returns(source: Source) -> Checked:
    for target, count in expected.RETURNS.items():
        found = source.find(target)
        values = [node.value for node in ast.walk(found.node) if isinstance(node, ast.Return)] if found else []
        fits = [isinstance(value, ast.Tuple) and len(value.elts) == count for value in values]
        yield "returned", None if fits and all(fits) else f"{target} does not return {count} things any more"


def _says(source: Source) -> Checked:
    for target, texts in expected.SAYS.items():
        found = source.find(target)
        said = "" if found is None else ast.unparse(found.node)
        for text in texts:
            _, there, rest = said.partition(text)
            yield "lines", None if there else f"{target} does not say {text!r} where we expect it"
            said = rest if there else said


def _routes(source: Source) -> Checked:
    routes = source.routes()
    for path in CARRYING:
        yield "routes", None if path in routes else f"there is no route {path}, from which a mask was carried"


def _changed_bodies(source: Source, version: str) -> Iterator[str]:
    """Those that are not as they were when this version was read, or if it has not been read, the one before."""
    recorded: dict[str, dict[str, str]] = json.loads(BODIES.read_text())
    read = version if version in recorded else max(recorded, key=lambda name: tuple(map(int, name.split("."))))
    for target, digest in body_digests(source).items():
        if digest != recorded[read].get(target):
            yield f"{target} is not as it was read in {read}; look at: {expected.BODIES[target]}"


def body_digests(source: Source) -> dict[str, str]:
    """Of each function or class in `expected.BODIES`: its syntax without docstrings, annotations and positions."""
    found = {target: source.find(target) for target in expected.BODIES}
    return {target: _digest(each.node) if each is not None else "" for target, each in found.items()}


def _digest(node: ast.AST) -> str:
    return hashlib.sha256(repr(_shape(node)).encode()).hexdigest()[:16]


def _shape(node: object) -> object:
    """Nested tuples that are the same in every version of Python."""
    if isinstance(node, list):
        is_text = [isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant) for child in node]
        return tuple(_shape(child) for child, text in zip(node, is_text, strict=True) if not text)
    if not isinstance(node, ast.AST):
        return repr(node)
    skipped = ("annotation", "returns", "type_comment", "type_params", "kind", "ctx")
    fields = ((name, value) for name, value in ast.iter_fields(node) if name not in skipped and value not in (None, []))
    return type(node).__name__, *((name, _shape(value)) for name, value in fields)


def _instead(source: Source, target: str) -> str:
    """Where else a class or function of this name is, as a remark."""
    name = target.rpartition(":")[2].rpartition(".")[2]
    places = [module for module in source.elsewhere(name) if module not in target]
    return f" (there is one in {', '.join(places[:3])})" if places else ""
