"""Generate without the plugin, for comparison: `python baseline.py CHECKPOINT OUT` with VLLM_PLUGINS set empty."""

import json
import sys
from pathlib import Path

from offline import PROMPTS, generate, start


def main() -> None:
    checkpoint, out = Path(sys.argv[1]), Path(sys.argv[2])
    llm = start(checkpoint)
    generations = [generate(llm, [prompt], [None])[0] for prompt in PROMPTS]
    mixed = generate(llm, PROMPTS, [None] * len(PROMPTS))
    out.write_text(json.dumps({"solo": generations, "batch": mixed}))


if __name__ == "__main__":
    main()
