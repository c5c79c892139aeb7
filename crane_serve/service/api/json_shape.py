"""The shape of a JSON body, bounded before anything parses it: what parsing and checking cost depends on it."""

import json

from crane_serve.service.api.errors import ApiError

MAX_VALUES = 2**17
"""Most values in a body: 1,024 prompts of 125 token ids, or 60 of 2,048."""

MAX_NODES = 2**14
"""Most objects, lists and names in a body."""

MAX_NAMES = 1024
"""Most names in one object."""

MAX_DEPTH = 64
"""How deeply objects and lists may be nested."""

_OPENING, _CLOSING = b"[{", b"]}"
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{}:"))


def check_shape(content: bytes) -> None:
    """Raises ApiError if the body has more values, objects, names or depth than the server reads.

    In time in proportion to its size, a few ms per MiB. A body that is no JSON may pass; its parser refuses it.
    """
    if json.detect_encoding(content) not in ("utf-8", "utf-8-sig"):
        raise ApiError(422, "malformed_body", "the body is not in UTF-8")
    plain = content.replace(rb"\\", b"").replace(rb"\"", b"")
    _require(plain.count(b'"') // 2, MAX_VALUES, "strings")
    outside = b"".join(plain.split(b'"')[::2])
    structure = outside.translate(None, _NOT_STRUCTURE)
    nodes = sum(map(structure.count, (b"[", b"{", b":")))
    _require(nodes, MAX_NODES, "objects, lists and names")
    _require(outside.count(b",") + nodes, MAX_VALUES, "values")
    names = [0]
    for sign in structure[: 2 * MAX_NODES]:  # beyond there are only ends of nothing
        if sign in _OPENING:
            names.append(0)
            _require(len(names) - 1, MAX_DEPTH, "levels")
        elif sign not in _CLOSING:
            names[-1] += 1
            _require(names[-1], MAX_NAMES, "names in one object")
        elif len(names) > 1:
            names.pop()


def _require(count: int, most: int, what: str) -> None:
    if count > most:
        message = f"the body has more than {most} {what}, the most that this server reads"
        raise ApiError(413, "body_too_complex", message)
