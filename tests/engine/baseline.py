"""Generate unmasked, for comparison: `python baseline.py CHECKPOINT OUT [eager]`; VLLM_PLUGINS="" for no plugin."""

import json
import sys
from pathlib import Path

from offline import PROMPTS, generate, start


def main() -> None:
    checkpoint, out, *eager = sys.argv[1:]
    llm = start(Path(checkpoint), **({"enforce_eager": True, "distributed_executor_backend": "uni"} if eager else {}))
    generations = [generate(llm, [prompt], [None])[0] for prompt in PROMPTS]
    masks = "crane" in llm.llm_engine.vllm_config.additional_config
    Path(out).write_text(json.dumps({"solo": generations, "masks": masks}))


if __name__ == "__main__":
    main()
