"""docs/api.md and docs/evaluation.md: each of their examples runs, and prints what the page says."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Tiny
from tests.engines import Server

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
PAGES = ("api.md", "evaluation.md")
NAME = "tiny"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
RUNNERS = {"sh": ["bash", "-euo", "pipefail"], "python": [sys.executable]}


@dataclass(frozen=True)
class Example:
    """A program of a page, and what it prints; None if that depends on the model."""

    language: str
    text: str
    prints: str | None


def examples() -> Iterator[Example]:
    for page in PAGES:
        for language, text, prints in FENCE.findall((ROOT / "docs" / page).read_text()):
            if language in RUNNERS:
                yield Example(language, text, prints or None)


def test_the_pages_have_examples_of_every_client() -> None:
    everything = "".join(example.text for example in examples())
    assert all(name in everything for name in ("curl", "httpx", "openai", "lm_eval", "CraneClient", "crane eval"))


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.text.splitlines()[0][:60])
def test_an_example_runs_and_prints_what_the_page_says(
    example: Example, openai_server: Server, tiny: Tiny, tmp_path: Path
) -> None:
    """A page's model is replaced by a tiny one, and its address by the server's."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / NAME).symlink_to(tiny.checkpoint)

    def here(text: str) -> str:
        return text.replace("gemma-3-270m", NAME).replace("http://127.0.0.1:8000", openai_server.url)

    path = tmp_path / "example"
    path.write_text(here(example.text))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1",
    }
    run = subprocess.run(
        [*RUNNERS[example.language], str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    if example.prints is not None:
        assert run.stdout.strip() == here(example.prints).strip()
