"""Every program in the documents is run by a test, or listed with the reason why not."""

import re

import pytest
import yaml

from tests.documents import DATA, PROGRAMS, README, ROOT, Block, blocks, differs, not_run, pages, programs, why_not
from tests.hostile.__main__ import cases as hostile_cases

COMMANDS = re.compile(
    r"^\$ |^(?:crane|curl|docker|helm|kubectl|make|pip|python3?|lm_eval|vllm|git|systemctl) ", re.MULTILINE
)


def test_a_block_is_a_program_or_data() -> None:
    assert [str(block) for page in pages() for block in blocks(page) if block.language not in PROGRAMS | DATA] == []


def test_no_command_hides_in_a_text() -> None:
    shown = [block for page in pages() for block in blocks(page) if block.language in DATA - {"yaml"}]
    assert [str(block) for block in shown if COMMANDS.search(block.text)] == []


def test_what_is_listed_as_not_run_is_there_once() -> None:
    found = {
        (page, start): [
            block for block in blocks(page) if block.language in PROGRAMS and block.first_line.startswith(start)
        ]
        for page, entries in not_run().items()
        for start in entries
    }
    assert [place for place, fitting in found.items() if len(fitting) != 1] == []
    assert all(len(why) > 20 for entries in not_run().values() for why in entries.values())


def test_programs_are_run_but_for_a_few() -> None:
    everything = list(programs())
    skipped = [block for block in everything if why_not(block) is not None]
    assert len(everything) - len(skipped) >= 20


@pytest.mark.parametrize("block", [b for page in pages() for b in blocks(page) if b.language == "yaml"], ids=str)
def test_yaml_can_be_read(block: Block) -> None:
    assert list(yaml.safe_load_all(block.text))


@pytest.mark.parametrize(
    ("printed", "expected", "wrong"),
    [
        ("a\nb\n", "a\nb\n", None),
        ("one 12 s\n", "one ... s", None),
        ("one 12 m\n", "one ... s", "one ... s"),
        ("a\nx\ny\nb\n", "a\n...\nb", None),
        ("a\nx\ny\n", "a\n...\nb", "b"),
        ("a\nx\n", "a\n...", None),
        ("a\nx\n", "a", "nothing more, got 'x'"),
        ("a\n", "a\nb", "b"),
    ],
)
def test_output_is_compared_with_the_page(printed: str, expected: str, wrong: str | None) -> None:
    assert differs(printed, expected) == wrong


def test_the_readme_is_short() -> None:
    assert len((ROOT / README).read_text().split()) <= 900


def test_what_shows_a_promise_of_security_is_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    rows = [row.rpartition(" | ")[2] for row in re.findall(r"^\| (.+) \|$", page, re.MULTILINE) if "ests/" in row]
    assert len(rows) >= 20
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    files = {name for name in named if name.startswith("tests/")}
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert named - files - {"make image"} <= hostile_cases().keys()
