"""Generate without the plugin, compiled and eager: `VLLM_PLUGINS= python baseline.py CHECKPOINT OUT`."""

import json
import os
import sys
from pathlib import Path

from offline import PROMPTS, generate, start


def generated(checkpoint: Path, **options: object) -> list[dict]:
    """One prompt after the other."""
    llm = start(checkpoint, **options)
    assert "crane" not in llm.llm_engine.vllm_config.additional_config
    answers = [generate(llm, [prompt], [None])[0] for prompt in PROMPTS]
    llm.llm_engine.engine_core.shutdown()
    return answers


def main() -> None:
    checkpoint, out = map(Path, sys.argv[1:])
    answers = {"compiled": generated(checkpoint)}
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
    answers["eager"] = generated(checkpoint, enforce_eager=True, distributed_executor_backend="uni")
    out.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
