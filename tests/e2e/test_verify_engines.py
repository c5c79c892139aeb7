"""`crane verify` on real engines: all is well with the plugin, and a plugin that skips a layer is found out."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from crane_serve.verify import checks, session
from crane_serve.verify.checks import Status
from crane_serve.verify.plan import ProcessPlan
from tests.engines import random_masks
from tests.tiny import tiny_model

pytestmark = pytest.mark.engine

FLAGS = ("--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "512")
SABOTAGE = """
import sys

from crane_serve.engine.masked_mlp import MaskedProjection
from crane_serve.verify.worker import main

honest, layers = MaskedProjection.forward, {}


def forward(self, x):
    proved = id(self) in layers  # installation runs each layer once, in order, to see that it obeys
    layer = layers.setdefault(id(self), len(layers))
    return self.projection(x) if proved and layer == 1 else honest(self, x)


MaskedProjection.forward = forward
sys.exit(main(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("verify") / "tiny")


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM binds every engine to the first core by default, where those of other tests are.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(1 % (os.cpu_count() or 1)))


@pytest.mark.release
def test_verify_passes_on_this_machine(checkpoint: Path, tmp_path: Path) -> None:
    masks, report = tmp_path / "masks", tmp_path / "report.json"
    random_masks(checkpoint, masks, share=0.4)
    arguments = (str(checkpoint), "--masks", str(masks), "--report", str(report), *FLAGS)
    result = subprocess.run(
        [sys.executable, "-m", "crane_serve", "verify", *arguments],
        capture_output=True,
        text=True,
        timeout=540,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    written = json.loads(report.read_text())
    found = {check["name"]: check["status"] for check in written["checks"]}
    assert list(found) == list(checks.ALL)
    speed = found.pop(checks.THROUGHPUT)  # of a machine that other tests keep busy
    assert found == dict.fromkeys(found, Status.PASS), result.stdout
    assert "idle / no plugin" in result.stdout
    assert "masks 3 of" in result.stdout
    assert result.returncode == int(speed == Status.FAIL)


def test_verify_finds_a_layer_that_is_not_masked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sabotaged.py").write_text(SABOTAGE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def launch(module: str, plan: Path, environment: Mapping[str, str], log: Path) -> str | None:
        if ProcessPlan.load(plan).masks is None:
            return "left out"
        return session.run_process("sabotaged", plan, {**environment, "PYTHONPATH": str(tmp_path)}, log)

    options = session.VerifyOptions(str(checkpoint), reference=False, throughput=False, flags=FLAGS)
    report = session.run(options, print, launch)
    assert not report.passed
    layers = next(check for check in report.checks if check.name == checks.LAYERS)
    assert layers.status is Status.FAIL
    assert layers.problem == (
        "layer 1 switched off: expected other log-probabilities than unmasked, got a change of 0 nats"
    )
    others = {check.name for check in report.checks if check.status is Status.FAIL} - {checks.ENGINES, checks.IDLE}
    assert others == {checks.LAYERS}
