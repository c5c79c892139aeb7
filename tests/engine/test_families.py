"""Every model family under masks, in float32, against transformers with the same neurons scaled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crane_serve.masks import Fingerprint, MaskLibrary
from tests.engines import Oracle, random_masks
from tests.tiny import FAMILIES, tiny_model

pytestmark = pytest.mark.engine

NATS_PER_TOKEN = 1e-4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        random_masks(tiny_model(family, directory / family), directory / f"{family}-masks", share=0.4)
    return directory


@pytest.fixture(scope="module")
def answers(checkpoints: Path) -> dict[str, list[dict] | str]:
    """What one process, with an engine per family one after the other, generated."""
    script, out = Path(__file__).parent / "families.py", checkpoints / "answers.json"
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [sys.executable, str(script), str(checkpoints), str(out)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=420, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_logprobs_equal_transformers(
    checkpoints: Path, answers: dict[str, list[dict] | str], family: str
) -> None:
    generated = answers[family]
    assert isinstance(generated, list), generated
    oracle = Oracle(checkpoints / family)
    masks = checkpoints / f"{family}-masks"
    library = MaskLibrary.load(masks, Fingerprint.of(checkpoints / family), "attnlrp")
    for answer in generated:
        resolved = library.resolve(answer["mask"])
        expected = oracle.logprobs(answer["prompt"] + answer["tokens"], None if resolved is None else resolved.mask)
        logprobs = answer["prompt_logprobs"] + answer["logprobs"]
        assert len(logprobs) == len(expected)
        assert abs(sum(logprobs) - sum(expected)) / len(expected) < NATS_PER_TOKEN
