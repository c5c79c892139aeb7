"""Settings as text for readers."""

import json
from collections.abc import Iterator

from crane_serve.common.reports.render import cut

SHORT = 16  # characters of a digest that readers see
_LONGEST = 300
_HEX_DIGEST = 64


def flat(values: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Names and values of nested mappings, the names joined with spaces."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from flat(value, f"{path} {name}".strip())
    else:
        yield path, values


def brief(value: object) -> str:
    """A value in short form: a list of equal entries as one entry and their number, digests and long values cut."""
    if isinstance(value, list) and len(value) > 1 and all(entry == value[0] for entry in value):
        return f"{value[0]} x {len(value)}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:SHORT] if len(text) == _HEX_DIGEST and " " not in text else cut(text, _LONGEST)
