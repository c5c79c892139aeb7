"""The programs in the documents: every fenced block of README.md and docs/, what it prints, and which are not run."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
README = "README.md"
TUTORIAL = "docs/tutorial.md"
NOT_RUN = Path(__file__).parent / "docs_not_run.yaml"
PROGRAMS = frozenset({"sh", "python"})
DATA = frozenset({"text", "yaml", "toml", "json", "jsonl", "ini", "nginx"})  # shown, not run
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_OUTPUT = re.compile(r"\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_REST = "..."


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. prints: the block of text right behind it, None if there is none."""

    page: str
    language: str
    text: str
    prints: str | None = None

    @property
    def first_line(self) -> str:
        return self.text.splitlines()[0]

    def __str__(self) -> str:
        return f"{self.page}: {self.first_line[:70]}"


@cache
def pages() -> tuple[str, ...]:
    return (README, *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))))


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """All blocks of a page in order; those that show the output of the one before are no blocks of their own."""
    content = (ROOT / page).read_text()
    found, end = [], 0
    for match in _FENCE.finditer(content):
        if match.start() < end:
            continue
        indent, language, text = match.groups()
        output = _OUTPUT.match(content, match.end()) if language in PROGRAMS else None
        end = match.end() if output is None else output.end()
        text = "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
        found.append(Block(page, language, text, None if output is None else output[1]))
    return tuple(found)


@cache
def not_run() -> dict[str, dict[str, str]]:
    """By page: the beginning of the first line of a block that is not run -> why."""
    listed: dict[str, dict[str, str]] = yaml.safe_load(NOT_RUN.read_text())
    return listed


def why_not(block: Block) -> str | None:
    """Why a program is not run; None if it is."""
    reasons = [why for start, why in not_run().get(block.page, {}).items() if block.first_line.startswith(start)]
    return reasons[0] if reasons else None


def programs() -> Iterator[Block]:
    """Every program of every page, run or not."""
    return (block for page in pages() for block in blocks(page) if block.language in PROGRAMS)


def differs(printed: str, expected: str) -> str | None:
    """The first line of what a page says that was not printed; None if all was.

    `...` in a line stands for anything; a line of its own stands for any number of lines.
    """
    lines = [line.rstrip() for line in printed.strip().splitlines()]
    wanted = [line.rstrip() for line in expected.strip().splitlines()]
    at, skipping = 0, False
    for line in wanted:
        if line.strip() == _REST:
            skipping = True
            continue
        pattern = re.compile(".*".join(map(re.escape, line.split(_REST))))
        if skipping:
            while at < len(lines) and not pattern.fullmatch(lines[at]):
                at += 1
        if at >= len(lines) or not pattern.fullmatch(lines[at]):
            return line
        at, skipping = at + 1, False
    return None if skipping or at == len(lines) else f"nothing more, got {lines[at]!r}"
