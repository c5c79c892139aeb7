"""What masks cost: vLLM's offline engine without the plugin, with it but unmasked, and with many masks in one batch.

    python benchmarks/overhead.py MODEL --out overhead.json [--rounds 3] [--masks 8]

Each variant lives in a process of its own; the variants take turns for `--rounds` rounds, and one round of one variant
is a process that generates and scores the same prompts. Prints medians, spreads, ratios to the engine without the
plugin, and whether the unmasked answers are bit-identical to it.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VARIANTS = ("no plugin", "unmasked", "masked")
PROMPT_TOKENS, OUTPUT_TOKENS, REQUESTS = 128, 32, 32


def write_masks(model: Path, directory: Path, count: int) -> None:
    from crane_serve.masks import Fingerprint, MaskInfo, NeuronMask, write_mask

    fingerprint = Fingerprint.of(model)
    for seed in range(count):
        draw = random.Random(seed)
        neurons = [draw.sample(range(size), size // 100) for size in fingerprint.intermediate_sizes]
        mask = NeuronMask.switching_off(neurons, fingerprint.intermediate_sizes)
        write_mask(directory, f"m{seed}", mask, MaskInfo(language="en", method="random", fingerprint=fingerprint))


def measure(variant: str, model: Path, masks: int, out: Path) -> None:
    """In a process of its own: run the work three times, keep the last two."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(model), max_model_len=512, max_num_seqs=REQUESTS, enable_prefix_caching=False)
    draw = random.Random(0)
    prompts = [{"prompt_token_ids": [2, *draw.choices(range(1000, 20000), k=PROMPT_TOKENS)]} for _ in range(REQUESTS)]

    def parameters(request: int) -> SamplingParams:
        extra = {"crane_mask": f"m{request % masks}"} if variant == "masked" else None
        return SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, logprobs=0, extra_args=extra)

    seconds, answers = [], []
    for _ in range(3):
        began = time.perf_counter()
        results = llm.generate(prompts, [parameters(request) for request in range(REQUESTS)], use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        answers = [
            [(token, step[token].logprob) for token, step in zip(o.token_ids, o.logprobs, strict=True)]
            for o in (result.outputs[0] for result in results)
        ]
    out.write_text(json.dumps({"seconds": seconds[1:], "answers": answers}))


def run(variant: str, model: Path, masks_dir: Path, masks: int, scratch: Path) -> dict[str, list]:
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **os.environ}
    if variant == "no plugin":
        environment["VLLM_PLUGINS"] = ""
    else:
        environment["CRANE_MASKS"] = str(masks_dir)
    out = scratch / "measured.json"
    command = [sys.executable, __file__, str(model), "--variant", variant, "--masks", str(masks), "--out", str(out)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--masks", type=int, default=8)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        measure(arguments.variant, arguments.model, arguments.masks, arguments.out)
        return

    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    answers: dict[str, list] = {}
    with tempfile.TemporaryDirectory() as scratch:
        masks_dir = Path(scratch) / "masks"
        write_masks(arguments.model, masks_dir, arguments.masks)
        for _ in range(arguments.rounds):
            for variant in VARIANTS:
                measured = run(variant, arguments.model, masks_dir, arguments.masks, Path(scratch))
                seconds[variant] += measured["seconds"]
                answers[variant] = measured["answers"]
    baseline = statistics.median(seconds["no plugin"])
    tokens = REQUESTS * (PROMPT_TOKENS + 1 + OUTPUT_TOKENS)
    report = {
        variant: {
            "median_s": round(statistics.median(times), 3),
            "min_s": round(min(times), 3),
            "max_s": round(max(times), 3),
            "tokens_per_s": round(tokens / statistics.median(times), 1),
            "throughput_ratio": round(baseline / statistics.median(times), 3),
        }
        for variant, times in seconds.items()
    }
    identical = answers["no plugin"] == answers["unmasked"]
    report["unmasked answers bit-identical to no plugin"] = identical
    report["masked answers differ"] = answers["masked"] != answers["unmasked"]
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
