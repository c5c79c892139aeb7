"""Tests of engines once more, as vLLM runs on GPUs: `python -m tests.runners v1|v2 [options of pytest]`.

Asynchronous scheduling, which plans a step while the last one is computed, is vLLM's default there; its CPU platform
switches it off. V2 is the default model runner there; it needs Triton, whose interpreter is slow.
"""

import os
from pathlib import Path

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process runs V2 through Triton's interpreter, where engines are many times slower."""

ASYNCHRONOUS = "CRANE_TEST_ASYNC_SCHEDULING"
"""The environment variable by which `sitecustomize.py` leaves asynchronous scheduling on."""


def environment(runner: str, *, asynchronous: bool = True) -> dict[str, str]:
    """What a process needs in its environment to run engines so; runner: "v1" or "v2"."""
    here = Path(__file__).parent
    path = [str(here), str(here.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    added = {"PYTHONPATH": os.pathsep.join(path)}
    if asynchronous:
        added[ASYNCHRONOUS] = "1"
    if runner == "v2":
        added |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    return added
