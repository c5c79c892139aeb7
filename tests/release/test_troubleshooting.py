"""docs/troubleshooting.md quotes messages that the code, or the library it names, really has."""

import ast
import errno
import importlib.util
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
OURS = ("crane_serve", "relevance", "clients")
OF_VLLM = {
    "Available memory on node ... on kv cache allocation is less than requested memory for kv ...": "cpu_worker",
    "To serve at least one request with the model's max seq len ...": "kv_cache_utils",
}
OF_THE_SYSTEM = {"Address already in use": errno.EADDRINUSE}
GAP = "\x00"  # where a message is filled in


def headings() -> list[str]:
    return re.findall(r"^### `(.+)`$", PAGE.read_text(), re.MULTILINE)


def text_of(node: ast.expr) -> str | None:
    """A string with gaps for what is filled in; None for any other expression."""
    match node:
        case ast.Constant(value=str()):
            return re.sub(r"%[sdr]|\{\w*\}", GAP, node.value)
        case ast.JoinedStr():
            return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
    return None


def texts(files: Iterator[Path]) -> list[str]:
    found = (
        text_of(node) for file in files for node in ast.walk(ast.parse(file.read_text())) if hasattr(node, "lineno")
    )
    return [text for text in found if text]


@cache
def ours() -> list[str]:
    return texts(file for package in OURS for file in (ROOT / package).rglob("*.py"))


@cache
def of_vllm(module: str) -> list[str]:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return texts(Path(spec.origin).parent.rglob(f"{module}.py"))


def quotes(message: str, text: str) -> bool:
    """Whether the fixed parts of a message stand in a text, in order."""
    parts = [part for part in re.split(r"\.\.\.", message) if part.strip()]
    return re.search(".*?".join(map(re.escape, parts)), text, re.DOTALL) is not None


@pytest.mark.parametrize("message", headings())
def test_the_message_is_in_the_code(message: str) -> None:
    if message in OF_THE_SYSTEM:
        assert os.strerror(OF_THE_SYSTEM[message]) == message
        return
    known = of_vllm(OF_VLLM[message]) if message in OF_VLLM else ours()
    assert any(quotes(message, text) for text in known), f"no code says {message!r}"


def test_other_messages_in_the_text_are_in_the_code() -> None:
    """What stands in backquotes behind a colon is a message, too."""
    page = PAGE.read_text()
    also = [
        match.replace("\n", " ") for match in re.findall(r"(?:say|says|speaks of|^\d+:) `([^`]+)`", page, re.MULTILINE)
    ]
    assert also
    pydantic = ["Extra inputs are not permitted"]
    logged = ["the server failed: OSError: [Errno 98] Address already in use", "desired CPU memory utilization"]
    known = ours()
    for message in also:
        assert message in (*pydantic, *logged) or any(quotes(message, text) for text in known), message


def test_messages_are_in_the_order_of_the_alphabet() -> None:
    for part in PAGE.read_text().split("\n## ")[1:]:
        found = re.findall(r"^### `(.+)`$", part, re.MULTILINE)
        assert found == sorted(found, key=str.lower), part.splitlines()[0]


def test_every_code_of_the_service_is_explained_on_its_page() -> None:
    """The page of the service lists all codes; so do its readers find what this one leaves out."""
    page = (ROOT / "docs" / "api.md").read_text()
    codes = {text for text in ours() if re.fullmatch(r"[a-z]+(?:_[a-z]+)+", text)}
    source = "".join(file.read_text() for file in (ROOT / "crane_serve").rglob("*.py"))
    raised = set(re.findall(r"(?:ApiError\(\s*\d+,|TooBusy\(|BadRequest\(|_unauthorized\()\s*\"([a-z_]+)\"", source))
    assert raised <= codes
    assert sorted(code for code in raised if f"`{code}`" not in page) == []
