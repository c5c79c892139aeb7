"""Tests of engines once more, under vLLM's V2 model runner: `python -m tests.v2 [options of pytest]`."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process runs under `python -m tests.v2`, where engines are many times slower."""
