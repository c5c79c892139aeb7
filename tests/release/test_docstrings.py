"""Docstrings say what a reader needs: shapes of tensors, units, errors, sources of methods.

Ruff sees to it that modules, classes and functions have one (D1 in pyproject.toml); here is what it cannot know.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import griffe
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("crane_serve", "relevance", "clients")
ARRAY = re.compile(r"\b(Tensor|ndarray|NDArray)\b")
# Tensors by name, whose shapes are the statistic's own affair, and functions of tensors.
ELSEWHERE = re.compile(r"\b(?:dict|Mapping)\[str, Tensor\]|\bCallable\[\[[^\]]*\], \w+\]")
SHAPE = re.compile(r"\[[^\]]+\]|\b(?:any|one|the same) shape\b|\bshape of\b|\bscalar\b")
PUBLICATION = re.compile(r"arXiv:\d{4}\.\d{4,5}|github\.com/|\bNo publication\b")
UNSPECIFIC = {"NotImplementedError", "AssertionError", "StopIteration", "Exit", "BadParameter"}


@cache
def packages() -> tuple[griffe.Module, ...]:
    loader = griffe.GriffeLoader(search_paths=[ROOT])
    loaded = tuple(loader.load(name) for name in PACKAGES)
    loader.resolve_aliases(implicit=True)
    return loaded  # type: ignore[return-value]


def described() -> Iterator[griffe.Function | griffe.Attribute]:
    """All public functions, methods and properties that stand in the packages."""

    def of(holder: griffe.Module | griffe.Class) -> Iterator[griffe.Function | griffe.Attribute]:
        for name, member in holder.members.items():
            if member.is_alias or name.startswith("_"):
                continue
            if isinstance(member, griffe.Function) or "property" in member.labels:
                yield member
            elif isinstance(member, griffe.Module | griffe.Class):
                yield from of(member)

    for package in packages():
        yield from of(package)


def functions() -> Iterator[griffe.Function]:
    return (found for found in described() if isinstance(found, griffe.Function))


def docstring(function: griffe.Function | griffe.Attribute) -> str | None:
    """The function's own, or that of the method of the project that it overrides."""
    if function.docstring is not None:
        return function.docstring.value
    if isinstance(function.parent, griffe.Class):
        for base in function.parent.mro():
            member = base.members.get(function.name)
            if member is not None and not member.is_alias and member.docstring is not None:
                return member.docstring.value
    return None


def annotations(function: griffe.Function) -> list[str]:
    given = [str(parameter.annotation) for parameter in function.parameters if parameter.annotation is not None]
    return given + ([] if function.returns is None else [str(function.returns)])


@cache
def definitions(file: Path) -> dict[int, ast.AST]:
    """The functions of a file by their first line, and by that of their first decorator."""
    found: dict[int, ast.AST] = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.lineno] = node
            found.update({decorator.lineno: node for decorator in node.decorator_list[:1]})
    return found


def raised(function: griffe.Function) -> set[str]:
    """The classes of errors that the function itself makes and raises."""
    pending = list(ast.iter_child_nodes(definitions(Path(str(function.filepath)))[function.lineno or 0]))
    names = set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            names.add(ast.unparse(node.exc.func).rpartition(".")[2])
        pending += ast.iter_child_nodes(node)
    return {name for name in names if name[0].isupper()} - UNSPECIFIC


def is_command(function: griffe.Function) -> bool:
    """Whether the docstring is the help text of a command."""
    return any("typer." in annotation for annotation in annotations(function))


def is_route(function: griffe.Function) -> bool:
    """Whether the docstring is the description of a route, whose errors are among its responses."""
    return any("router." in str(decorator.value) for decorator in function.decorators)


def test_the_packages_are_read() -> None:
    paths = {function.path for function in functions()}
    assert {"relevance.contrast.find_contrast", "clients.client.CraneClient.generate"} <= paths


def test_every_public_function_has_a_docstring_of_its_own_or_of_what_it_overrides() -> None:
    assert [found.path for found in described() if docstring(found) is None] == []


def test_tensors_and_arrays_have_a_shape() -> None:
    without = [
        function.path
        for function in functions()
        if any(ARRAY.search(ELSEWHERE.sub("", annotation)) for annotation in annotations(function))
        and not is_command(function)
        and not SHAPE.search(docstring(function) or "")
    ]
    assert without == []


def test_log_probabilities_losses_and_times_have_a_unit() -> None:
    units = {re.compile(r"log_?prob|^loss(?:es)?$"): "nats", re.compile(r"_s$"): "second"}
    without = [
        found.path
        for found in described()
        for name, unit in units.items()
        if name.search(found.name) and unit not in (docstring(found) or "").lower()
    ]
    assert without == []


def test_functions_say_which_errors_they_raise() -> None:
    silent = {
        function.path: missing
        for function in functions()
        if not is_command(function)
        and not is_route(function)
        and (missing := sorted(name for name in raised(function) if name not in (docstring(function) or "")))
    }
    assert silent == {}


def test_every_method_of_relevance_names_its_source() -> None:
    methods = packages()[PACKAGES.index("relevance")]["methods"]
    without = []
    for module in methods.modules.values():
        for found in module.classes.values():
            if not found.is_alias and "name" in found.members:
                said = "".join(part.docstring.value for part in (module, found) if part.docstring is not None)
                if not PUBLICATION.search(said):
                    without.append(found.path)
    assert without == []


@pytest.mark.parametrize("rule", ["IdentityRule", "NormRule", "ScaledGradient"])
def test_every_rule_of_the_backward_pass_names_its_source(rule: str) -> None:
    found = packages()[PACKAGES.index("relevance")]["rules"][rule]
    assert PUBLICATION.search(found.docstring.value), found.docstring.value
