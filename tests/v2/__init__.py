"""Tests of engines once more, under vLLM's V2 model runner: `python -m tests.v2 [options of pytest]`."""

import os
from pathlib import Path

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process runs under `python -m tests.v2`, where engines are many times slower."""


def environment() -> dict[str, str]:
    """What a process needs in its environment to run V2 through Triton's interpreter."""
    here = Path(__file__).parent
    path = [str(here), str(here.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
