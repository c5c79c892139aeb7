"""The programs of README.md and docs/ run, and print what the page says.

tests/docs_not_run.yaml lists those that do not, with the reason.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Engines
from tests.documents import ROOT, TUTORIAL, Block, differs, programs, why_not
from tests.engines import Server
from tests.tiny import BOS

pytestmark = [pytest.mark.engine, pytest.mark.release]

NAME = "tiny"
RUNNERS = {"sh": ["bash", "-euo", "pipefail"], "python": [sys.executable]}
RUN = [block for block in programs() if why_not(block) is None and block.page != TUTORIAL]


def test_the_pages_have_examples_of_every_client() -> None:
    everything = "".join(block.text for block in RUN)
    wanted = ("curl", "httpx", "openai", "lm_eval", "CraneClient", "crane eval", "crane relevance", "crane validate")
    assert [name for name in wanted if name not in everything] == []


@pytest.fixture(scope="module")
def directories(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each page, with the models that pages speak of: tiny ones."""
    made = {}
    for page in {block.page for block in RUN}:
        made[page] = tmp_path_factory.mktemp("page")
        (made[page] / "models").mkdir()
        (made[page] / "models" / NAME).symlink_to(engines.tiny.checkpoint)
        (made[page] / "models" / "chat").symlink_to(engines.directory / "other")
    return made


@pytest.mark.parametrize("block", RUN, ids=str)
def test_an_example_runs_and_prints_what_the_page_says(
    block: Block, tiny_server: Server, directories: dict[str, Path]
) -> None:
    """A page's model is replaced by a tiny one with its own start token, and its address by the server's."""

    def here(text: str) -> str:
        text = text.replace("gemma-3-270m", NAME).replace("<bos>", BOS)
        return text.replace("http://127.0.0.1:8000", tiny_server.url)

    directory = directories[block.page]
    path = directory / "example"
    path.write_text(here(block.text))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1",
    }
    run = subprocess.run(
        [*RUNNERS[block.language], str(path)],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    if block.prints is not None:
        assert differs(run.stdout, here(block.prints)) is None, run.stdout
