"""Methods that score neurons, one per file. A new file with a subclass of Method is a new method."""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

from relevance.method import Method, MethodError


@cache
def available() -> Mapping[str, type[Method]]:
    """All methods of this package by name, in alphabetical order."""
    found: dict[str, type[Method]] = {}
    for module_info in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        module = importlib.import_module(module_info.name)
        for member in vars(module).values():
            if isinstance(member, type) and issubclass(member, Method) and member.__module__ == module.__name__:
                found[member.name] = member
    return MappingProxyType(dict(sorted(found.items())))


def find(name: str) -> type[Method]:
    """The method called `name`. Raises MethodError naming those that exist."""
    method = available().get(name)
    if method is None:
        raise MethodError(f"unknown method {name!r}; methods are {', '.join(available())}")
    return method


def find_all(names: Sequence[str] | None) -> list[type[Method]]:
    """The methods called `names`, each once, or all methods for None. Raises MethodError as `find` does."""
    if names is None:
        return list(available().values())
    if not names:
        raise MethodError(f"no method was named; methods are {', '.join(available())}")
    return [find(name) for name in dict.fromkeys(names)]
