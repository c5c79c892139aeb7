"""Tests of engines once more, under vLLM's V2 model runner: `python -m tests.v2 [options of pytest]`."""
