"""crane-serve: per-request language masks for MLP neurons, found by relevance and served with vLLM."""

__version__ = "0.1.0"
