"""EngineService over two ranks of each kind, while masks come and go."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crane_serve.masks import Positions
from tests.conftest import Engines, Tiny
from tests.engine.offline import BLOCK_TOKENS, CHUNK_TOKENS
from tests.engines import Oracle

pytestmark = pytest.mark.engine

NATS_PER_TOKEN = 1e-4
FLAGS = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"]
FLAGS += ["--block-size", str(BLOCK_TOKENS), "--max-num-batched-tokens", str(CHUNK_TOKENS)]
RANKS = {
    "tensor parallel": ["--tensor-parallel-size", "2", "--enforce-eager"],
    "data parallel": ["--data-parallel-size", "2", "--enforce-eager"],
    # vLLM 0.32 on the CPU makes the buffers between stages only where it compiles.
    "pipeline parallel": ["--pipeline-parallel-size", "2"],
}


@pytest.fixture(scope="module", params=RANKS)
def result(request: pytest.FixtureRequest, engines: Engines, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory):
    """What requests were promised and got, over two ranks."""
    directory = tmp_path_factory.mktemp("service")
    script, out = Path(__file__).parent / "run_service.py", directory / "result.json"
    foreign = engines.directory / "other-masks" / "attnlrp-zh.safetensors"
    command = [sys.executable, str(script), str(tiny.checkpoint), str(tiny.masks), str(out), str(foreign)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    log = directory / "log"
    with log.open("wb") as output:
        code = subprocess.run(
            [*command, *FLAGS, *RANKS[request.param]],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=400,
            check=False,
        ).returncode
    assert code == 0, log.read_text(errors="replace")[-6000:]
    return {"name": request.param, **json.loads(out.read_text())}


def test_every_request_ran_with_the_mask_it_was_promised(result, tiny: Tiny, tiny_oracle: Oracle) -> None:
    assert result["ranks"] == (2 if result["name"] == "data parallel" else 1)
    promised = {answer["promised"] for answer in result["answers"]}
    assert len(promised) > 70  # of contents: those served, those a name went through, and the scaled ones
    for answer in result["answers"]:
        resolved = tiny.library.resolve(answer["promised"])
        prompt, tokens = answer["prompt"], answer["tokens"]
        masked = {
            Positions.ALL: slice(None),
            Positions.PROMPT: slice(len(prompt)),
            Positions.GENERATED: slice(len(prompt), None),
        }[Positions(answer["positions"])]
        expected = tiny_oracle.logprobs(prompt + tokens, None if resolved is None else resolved.mask, masked)
        expected = expected[-len(tokens) :]
        assert abs(sum(answer["logprobs"]) - sum(expected)) / len(expected) < NATS_PER_TOKEN, answer
        assert answer["logprobs"] == pytest.approx(expected, abs=1e-3), answer


@pytest.mark.parametrize(
    ("what", "outcome"),
    [
        ("removed name", "UnknownMask: unknown mask 'changing'"),
        ("removed digest", "UnknownMask: unknown mask"),
        ("in use", "kept"),
        ("after use", "forgotten"),
        ("full", "MaskTableFull"),
        ("foreign", "FingerprintError: mask 'attnlrp-zh'"),
        ("outputs", "MaskFileError: mask 'outputs' scales MLP output dimensions"),
        ("unknown", "UnknownMask: unknown mask 'nobody'"),
    ],
)
def test_what_cannot_be_is_refused_and_the_next_request_runs(result, what: str, outcome: str) -> None:
    assert result["refused"][what].startswith(outcome)
