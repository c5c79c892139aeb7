"""JSON objects whose names are unique: of a name that is given twice, Python's parser would drop all values but one."""

from collections import Counter
from typing import Any

_SHOWN = 80  # characters of a name that errors show


class RepeatedName(ValueError):
    """A JSON object has a name twice."""


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of a strict parser. Raises RepeatedName."""
    content = dict(pairs)
    if len(content) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise RepeatedName(f"{name[:_SHOWN]!r} is given twice")
    return content
