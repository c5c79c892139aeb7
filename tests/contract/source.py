"""vLLM's source as syntax trees: what a module defines, what an instance of a class has. Nothing of it is imported."""

import ast
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """Where a name is defined. node: the definition, an assignment, or the module itself."""

    module: str
    node: ast.AST


class Source:
    """The Python files of one version of vLLM, read when they are asked for.

    root: the directory `vllm`. changed: by module, a text in place of its file's.
    """

    def __init__(self, root: Path, changed: Mapping[str, str] | None = None) -> None:
        self._root = root
        self._changed = changed or {}
        self.module = cache(self._module)
        self.members = cache(self._members)

    def find(self, target: str) -> Found | None:
        """What `package.module:Class.name` means, also if the module has it from another one; None if it is not there.

        A name of a class is one that its instances have. `a|b:name` is what the first of the modules has that has it.
        """
        modules, _, path = target.partition(":")
        found = (self._found(module, path) for module in modules.split("|"))
        return next((each for each in found if each is not None), None)

    def _found(self, module: str, path: str) -> Found | None:
        name, *attributes = path.split(".") if path else ("",)
        found = self._named(module, name) if name else self._whole(module)
        for attribute in attributes:
            if found is None or not isinstance(found.node, ast.ClassDef):
                return None
            found = self.members(found).get(attribute)
        return found

    def has(self, owner: Found, attribute: str) -> bool:
        """Whether instances of a class have an attribute, maybe from a class outside of vLLM."""
        return attribute in self.members(owner) or any(
            hasattr(base, attribute) for base in self._outside(owner) if base is not object
        )

    def elsewhere(self, name: str) -> list[str]:
        """Modules that define a class or a function of this name on their first level."""
        defines = re.compile(rf"^(class|def|async def) {re.escape(name)}\b", re.MULTILINE)
        return [module for module, text in self._texts("") if name in text and defines.search(text)]

    def routes(self) -> dict[str, str]:
        """The paths of vLLM's routes that take a body or are websockets, each with the module that declares it."""
        declared = re.compile(r"@\w*(?:router|app)\w*\.(?:post|put|patch|websocket|api_route)\(\s*\"(/[^\"]*)\"")
        return {path: module for module, text in self._texts("entrypoints") for path in declared.findall(text)}

    def text(self, module: str) -> str | None:
        """The source of a module; None if there is none."""
        file = self._file(module)
        return self._changed.get(module) or (None if file is None else file.read_text(encoding="utf-8"))

    def _texts(self, below: str) -> Iterator[tuple[str, str]]:
        for file in sorted((self._root / below).rglob("*.py")):
            module = ".".join(file.relative_to(self._root.parent).with_suffix("").parts).removesuffix(".__init__")
            yield module, self.text(module) or ""

    def _file(self, module: str) -> Path | None:
        place = self._root.parent.joinpath(*module.split("."))
        return next((file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()), None)

    def _module(self, module: str) -> ast.Module | None:
        text = self.text(module)
        return None if text is None else _parsed(text)

    def _whole(self, module: str) -> Found | None:
        tree = self.module(module)
        return None if tree is None else Found(module, tree)

    def _named(self, module: str, name: str) -> Found | None:
        tree = self.module(module)
        for node in () if tree is None else _level(tree):
            if isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                for alias in node.names:
                    if alias.name == "*" or (alias.asname or alias.name) == name:
                        found = self._named(origin, name if alias.name == "*" else alias.name)
                        if found is not None:
                            return found
                        if alias.name != "*" and origin.partition(".")[0] != "vllm":
                            return Found(module, node)
            elif name in _assigned(node):
                return Found(module, node)
        return self._whole(f"{module}.{name}")

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return str(node.module)
        file = self._file(module)
        package = module.split(".") if file is not None and file.name == "__init__.py" else module.split(".")[:-1]
        return ".".join([*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])])

    def _members(self, owner: Found) -> dict[str, Found]:
        """By name what instances of a class have: methods, fields, and attributes that a method assigns."""
        assert isinstance(owner.node, ast.ClassDef)
        members: dict[str, Found] = {}
        for base in reversed(self._bases(owner)):
            members |= self.members(base)
        own = list(_level(owner.node))
        for function in own:
            if isinstance(function, Function):
                members |= {name: Found(owner.module, node) for name, node in _set_on_self(function)}
        return members | {name: Found(owner.module, node) for node in own for name in _assigned(node)}

    def _bases(self, owner: Found) -> list[Found]:
        assert isinstance(owner.node, ast.ClassDef)
        found = (self._named(owner.module, name) for name in map(_name, owner.node.bases) if name is not None)
        return [base for base in found if base is not None and isinstance(base.node, ast.ClassDef)]

    def _outside(self, owner: Found) -> Iterator[type]:
        """The bases of a class that are not vLLM's, imported."""
        assert isinstance(owner.node, ast.ClassDef)
        for base in self._bases(owner):
            yield from self._outside(base)
        for name in map(_name, owner.node.bases):
            found = None if name is None else self._named(owner.module, name)
            if found is not None and isinstance(found.node, ast.ImportFrom):
                original = next(alias.name for alias in found.node.names if (alias.asname or alias.name) == name)
                yield getattr(importlib.import_module(str(found.node.module)), original)


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _level(node: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module or class, also those under `if`, `try` and `with`, but none of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _level(child)
        elif isinstance(child, ast.stmt):
            yield child


def _assigned(node: ast.AST) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, Function | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return set()


def _set_on_self(function: Function) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr, node


def _name(base: ast.expr) -> str | None:
    """Of a base class, also of Generic[...]."""
    if isinstance(base, ast.Subscript):
        base = base.value
    return base.id if isinstance(base, ast.Name) else None
