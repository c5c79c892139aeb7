"""Methods that score neurons, one per file. A new file with a subclass of Method is a new method."""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

from crane_serve.common.models.families import available as families
from relevance.method import Method, MethodError, Pass, ScoredMethod, needs_family
from relevance.rules import ATTNLRP

ALL = "all"


@cache
def available() -> Mapping[str, type[Method]]:
    """All methods of this package by name, in alphabetical order."""
    methods: dict[str, type[Method]] = {}
    for module_info in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        module = importlib.import_module(module_info.name)
        for member in vars(module).values():
            here = isinstance(member, type) and issubclass(member, Method) and member.__module__ == module.__name__
            if here and "name" in vars(member):
                methods[member.name] = member
    return MappingProxyType(dict(sorted(methods.items())))


@cache
def scored() -> Mapping[str, type[ScoredMethod]]:
    """Those of `available` whose scores `crane relevance` makes."""
    return MappingProxyType({name: kind for name, kind in available().items() if issubclass(kind, ScoredMethod)})


def find(name: str) -> type[Method]:
    """The method called `name`. Raises MethodError naming those that exist."""
    method = available().get(name)
    if method is None:
        raise MethodError(f"unknown method {name!r}; methods are {', '.join(available())}")
    return method


def find_scored(names: Sequence[str] | None, architecture: str | None = None) -> list[type[ScoredMethod]]:
    """The methods called `names`, each once, of those that can be scored; "all" names every one of them.

    None names the methods that together cost one AttnLRP pass: those that need it, a forward pass, or nothing. For an
    architecture without a family it names those that need no more than its neurons and plain gradients. Those of
    experts are among all these only where an architecture is named; it is for the caller to leave out what its model is
    `lacking`.
    Raises MethodError for an unknown name, and for methods whose scores another command writes.
    """
    if names is None:
        if architecture is not None and architecture not in families():
            return [kind for kind in scored().values() if needs_family(kind) is None]
        of_attnlrp = [
            kind for kind in scored().values() if not isinstance(kind.source, Pass) or kind.source.rules is ATTNLRP
        ]
        return [kind for kind in of_attnlrp if architecture is not None or not kind.of_experts]
    if not names:
        raise MethodError(f"no method was named; methods are {', '.join(scored())}")
    if ALL in names:
        return [kind for kind in scored().values() if architecture is not None or not kind.of_experts]
    for name in names:
        if name not in scored():
            find(name)
            raise MethodError(f"scores of {name} come from another command; methods here are {', '.join(scored())}")
    return [scored()[name] for name in dict.fromkeys(names)]
