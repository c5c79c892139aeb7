"""The only part that knows vLLM's internals. Written against vLLM 0.32.0; see docs/design.md."""
