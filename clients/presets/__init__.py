"""Presets: settings of tasks over known data sets, one file `NAME.yaml` each, which a plan's own settings override."""

from functools import cache
from importlib.resources import files
from typing import Any

from clients.errors import EvaluationError

_SUFFIX = ".yaml"


@cache
def names() -> tuple[str, ...]:
    """All presets, in alphabetical order."""
    entries = (entry.name for entry in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in entries if name.endswith(_SUFFIX)))


def load(name: str) -> dict[str, Any]:
    """The settings of a preset, as a plan's task would give them. Raises EvaluationError naming those that exist."""
    import yaml

    if name not in names():
        raise EvaluationError(f"unknown preset {name!r}; there are {', '.join(names())}")
    settings: dict[str, Any] = yaml.safe_load((files(__name__) / f"{name}{_SUFFIX}").read_text(encoding="utf-8"))
    return settings
