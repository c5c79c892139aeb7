"""The shape of a body: what is within the bounds passes, what is beyond is named, and neither takes long to tell."""

import json
import random
import sys
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from crane_serve.service.api.errors import ApiError
from crane_serve.service.api.json_shape import MAX_DEPTH, MAX_NAMES, MAX_NODES, MAX_VALUES, check_shape


def counts(value: Any) -> tuple[int, int, int, int]:
    """Of a JSON value inside another: values with names, objects, lists and names, most names in one object, depth."""
    if not isinstance(value, dict | list):
        return 1, 0, 0, 0
    children = [counts(child) for child in (value.values() if isinstance(value, dict) else value)]
    names = len(value) if isinstance(value, dict) else 0
    return (
        1 + names + sum(child[0] for child in children),
        1 + names + sum(child[1] for child in children),
        max((names, *(child[2] for child in children))),
        1 + max((child[3] for child in children), default=0),
    )


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def names(count: int) -> bytes:
    return b"{%b}" % b",".join(b'"%d":0' % number for number in range(count))


HONEST = {
    "nothing": b"",
    "a text": b'{"prompt": "Hi"}',
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "Hi"}',
    "prompts": json.dumps({"prompt": ['Say, {please}: ["a", \\\\]'] * 1024}).encode(),
    "token ids": json.dumps({"prompt": [list(range(125))] * 1024}).encode(),
    "contexts": json.dumps({"prompt": [[100_000] * 2048] * 60}).encode(),
    "signs in a text": json.dumps({"prompt": '[{",:' * 200_000}).encode(),
    "conversations": json.dumps({"messages": [[{"role": "user", "content": "a"}] * 3] * 1024}).encode(),
    "biases": json.dumps({"logit_bias": {str(number): 1 for number in range(MAX_NAMES)}}).encode(),
    "depth": nested(MAX_DEPTH),
}
HOSTILE = {
    "values": (b"[%b0]" % (b"0," * MAX_VALUES), f"{MAX_VALUES} values"),
    "texts": (b'[%b""]' % (b'"",' * MAX_VALUES), f"{MAX_VALUES} strings"),
    "lists": (b"[%b[]]" % (b"[]," * MAX_NODES), f"{MAX_NODES} objects, lists and names"),
    "objects": (b"[%b{}]" % (b"{}," * MAX_NODES), f"{MAX_NODES} objects, lists and names"),
    "names": (names(16_000), f"{MAX_NAMES} names in one object"),
    "names within": (b'{"a":[%b]}' % names(MAX_NAMES + 1), f"{MAX_NAMES} names in one object"),
    "depth": (nested(MAX_DEPTH + 1), f"{MAX_DEPTH} levels"),
    "no end": (b"[" * 100_000, "objects, lists and names"),
    "no end of a text": (b'{"a":"' + b"x" * 100 + nested(MAX_DEPTH + 1), None),
    "quotes": (b'"' * 1_000_000, "strings"),
    "ends": (b"]" * 1_000_000, None),
}


@pytest.mark.parametrize("content", HONEST.values(), ids=HONEST)
def test_honest_bodies_pass(content: bytes) -> None:
    check_shape(content)


@pytest.mark.parametrize(("content", "bound"), HOSTILE.values(), ids=HOSTILE)
def test_a_bound_is_named(content: bytes, bound: str | None) -> None:
    if bound is None:
        check_shape(content)  # no parser goes on after its first bytes
        with pytest.raises(json.JSONDecodeError):
            json.loads(content)
        return
    with pytest.raises(ApiError, match=bound) as caught:
        check_shape(content)
    assert (caught.value.status, caught.value.code) == (413, "body_too_complex")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_other_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(ApiError, match="not in UTF-8"):
        check_shape('{"prompt": "Hi"}'.encode(encoding))


def test_counts_are_those_of_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    texts = ("", "a,b", "[{", "}]:", '"', "\\", '\\"', '\\\\"', "\u6e2f")

    def value(depth: int) -> Any:
        kind = draw.randrange(5 if depth < 5 else 2)
        if kind < 2:
            return draw.choice((0, 1.5, None, *texts))
        children = [value(depth + 1) for _ in range(draw.randrange(4))]
        return children if kind == 2 else {f"{draw.choice(texts)}{number}": c for number, c in enumerate(children)}

    module = sys.modules[check_shape.__module__]
    for _ in range(300):
        body = [value(0)]
        found = counts(body)
        content = json.dumps(body, ensure_ascii=draw.random() < 0.5, indent=draw.choice((None, 1))).encode()
        values, *others = found
        bounds = {
            "MAX_VALUES": values + others[0],
            **dict(zip(("MAX_NODES", "MAX_NAMES", "MAX_DEPTH"), others, strict=True)),
        }
        for name, most in bounds.items():
            monkeypatch.setattr(module, name, most)
        check_shape(content)
        for name in [name for name, most in bounds.items() if most and name != "MAX_VALUES"]:
            monkeypatch.setattr(module, name, bounds[name] - 1)
            with pytest.raises(ApiError):
                check_shape(content)
            monkeypatch.setattr(module, name, bounds[name])


@pytest.mark.parametrize("path", ["/generate", "/score", "/languages", "/v1/completions", "/tokenize"])
async def test_every_route_is_behind_it(client: httpx.AsyncClient, app: FastAPI, path: str) -> None:
    headers = {"content-type": "application/json"}
    for content in (names(16_000), b"[" * 100_000):
        answer = await client.post(path, content=content, headers=headers)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (413, "body_too_complex", None)
