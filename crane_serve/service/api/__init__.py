"""The HTTP service: FastAPI routes over EngineService. Knows nothing of vLLM."""
