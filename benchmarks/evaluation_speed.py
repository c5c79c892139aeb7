"""The same evaluation three ways: masks mixed in one stream, mask after mask, a masked checkpoint loaded for each mask.

    python benchmarks/evaluation_speed.py MODEL MASKS PLAN --base DIR --out DIR --mask NAME [--mask NAME ...]

- mixed: `clients.Run` as `crane eval` runs it, on a server that is up.
- one at a time: the same server, items and concurrency, but each mask's items only after the last of the mask before.
- reloaded: as CRANE's published code does, a copy of the checkpoint with the mask's neurons zeroed is written for every
  mask and served by a server of its own, without masks. Writing and starting are counted, and reported apart.

The first two take turns, in an order that changes with each repetition, after one repetition that does not count.
Writes OUT/evaluation_speed.json and prints a table. Answers of all ways are compared.
"""

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from http_service import Server
from safetensors.torch import load_file, save_file
from summary import machine, speed_ratio, spread, table

from clients import AsyncCraneClient, Plan, Run
from clients.task import Question, Scored
from crane_serve.common.atomic import write_atomically

CONCURRENCY = 64
WAYS = ("mixed", "one at a time")


def serve(model: Path, masks: Path, name: str, options: argparse.Namespace, log: Path) -> Server:
    """A server of `model` under a name, waited for."""
    crane = str(Path(sys.executable).with_name("crane"))
    flags = ["--dtype", options.dtype, "--max-model-len", "2048", "--max-num-seqs", str(CONCURRENCY)]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CRANE_")}
    environment = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **kept, "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [crane, "serve", str(model), "--masks", str(masks), *flags]
    return Server(name, command, environment, log, "/ready").wait()


async def ask(address: str, plan: Plan, base: Path, out: Path) -> float:
    """Seconds for what is missing of a plan."""
    async with (
        AsyncCraneClient(address, concurrency=CONCURRENCY) as client,
        Run.start(client, plan, out, base=base) as run,
    ):
        began = time.perf_counter()
        async for _ in run:
            pass
        assert not run.failures, run.failures[0]
        return time.perf_counter() - began


def answers(out: Path) -> dict[Question, Any]:
    """What a directory holds, by question."""
    from clients import Record

    return dict(Record.read(out).answers.answers)


def mixed(address: str, plan: Plan, base: Path, out: Path) -> float:
    """All masks in one stream."""
    return asyncio.run(ask(address, plan, base, out))


def one_at_a_time(address: str, plan: Plan, base: Path, out: Path) -> float:
    """None, then each mask; what is answered already is not asked again."""
    masks: Sequence[Any] = plan.masks or ()
    plans = [plan.model_copy(update={"masks": (mask,) if mask else ()}) for mask in ("", *masks)]
    return sum(asyncio.run(ask(address, part, base, out)) for part in plans)


def write_masked(model: Path, mask: Path, out: Path) -> float:
    """A copy of a checkpoint without a mask's neurons; the seconds that it took."""
    from crane_serve.common.masks import read_mask

    began = time.perf_counter()
    shutil.copytree(model, out)
    weights = load_file(out / "model.safetensors")
    zeroed = 0
    for layer, scales in enumerate(read_mask(mask).mask.intermediate):
        (name,) = [name for name in weights if name.endswith(f"layers.{layer}.mlp.down_proj.weight")]
        weights[name] = weights[name] * scales.to(weights[name].dtype)  # [hidden, neurons]
        zeroed += int((scales == 0).sum())
    assert zeroed
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return time.perf_counter() - began


def reloaded(plan: Plan, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """A checkpoint and a server for each mask, and one for none: seconds by part, and the answers by mask."""
    found: dict[str, Any] = {"write_s": 0.0, "start_s": 0.0, "ask_s": 0.0, "answers": {}}
    empty = scratch / "no-masks"
    empty.mkdir()
    for mask in ("none", *options.mask):
        model = options.model
        if mask != "none":
            model = scratch / options.model.name
            found["write_s"] += write_masked(options.model, options.masks / f"{mask}.safetensors", model)
        server = serve(model, empty, mask, options, options.out / f"{mask}.log")
        try:
            found["start_s"] += server.start_s
            out = scratch / f"reloaded-{mask}"
            plain = plan.model_copy(update={"masks": ()})
            found["ask_s"] += asyncio.run(ask(server.address, plain, options.base, out))
            found["answers"][mask] = answers(out)
        finally:
            server.stop()
        if mask != "none":
            shutil.rmtree(model)
    return found


def largest_difference(mixed: dict[Question, Any], by_mask: dict[str, dict[Question, Any]]) -> float:
    """In nats per token between scores of the mixed run and those of the reloaded checkpoints."""
    largest = 0.0
    for question, answer in mixed.items():
        other = by_mask[question.mask][Question(question.task, question.language, question.item, "none")]
        if isinstance(answer, Scored):
            for one, two in zip(answer.scores, other.scores, strict=True):
                largest = max(largest, abs(one.logprob - two.logprob) / max(1, one.tokens))
    return largest


def run(options: argparse.Namespace) -> None:
    """Measure all ways."""
    options.out.mkdir(parents=True, exist_ok=True)
    plan = Plan.read(options.plan).model_copy(update={"masks": tuple(options.mask), "model": None})
    times: dict[str, dict[tuple[int, int], float]] = {way: {} for way in WAYS}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        server = serve(options.model, options.masks, "crane", options, options.out / "crane.log")
        try:
            for repetition in range(options.repetitions + 1):
                for way in WAYS if repetition % 2 else WAYS[::-1]:
                    out = scratch / f"{way}-{repetition}"
                    seconds = (mixed if way == WAYS[0] else one_at_a_time)(server.address, plan, options.base, out)
                    print(f"{repetition} {way}: {seconds:.1f} s", file=sys.stderr, flush=True)
                    if repetition:
                        times[way][0, repetition] = seconds
        finally:
            server.stop()
        of_mixed = answers(scratch / f"{WAYS[0]}-1")
        again = {} if options.no_reload else reloaded(plan, options, scratch)
    items = len(of_mixed)
    ratio = speed_ratio(times["one at a time"], times["mixed"])
    base = spread(list(times["mixed"].values()))
    summary: dict[str, Any] = {
        "items": items,
        "mixed_s": base,
        "one_at_a_time_s": spread(list(times["one at a time"].values())),
        "mixed_is_so_many_times_faster_than_one_at_a_time": ratio,
        "machine": machine(),
    }
    rows = [
        ["mixed", f"{base['median']:.1f}", f"{items / base['median']:.1f}", "1"],
        [
            "one at a time",
            f"{summary['one_at_a_time_s']['median']:.1f}",
            f"{items / summary['one_at_a_time_s']['median']:.1f}",
            f"{ratio['ratio']:.2f}",
        ],
    ]
    if again:
        total = again["write_s"] + again["start_s"] + again["ask_s"]
        difference = largest_difference(of_mixed, again.pop("answers"))
        summary["reloaded"] = {**again, "total_s": total, "largest_difference_nats_per_token": difference}
        rows.append(["reloaded", f"{total:.1f}", f"{items / total:.1f}", f"{total / base['median']:.2f}"])
    write_atomically(options.out / "evaluation_speed.json", json.dumps(summary, indent=2).encode() + b"\n")
    print(table(["way", "s", "items/s", "/ mixed"], rows))
    if again:
        parts = ", ".join(f"{name} {again[f'{name}_s']:.1f} s" for name in ("write", "start", "ask"))
        print(f"reloaded: {parts}; largest difference to mixed {difference:.3g} nats per token")


def main() -> None:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("masks", type=Path, help="directory of mask files")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--mask", action="append", required=True, help="one of them; may be repeated")
    parser.add_argument("--base", type=Path, default=Path(), help="what relative paths of the plan start from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-reload", action="store_true", help="leave out the reloaded checkpoints")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
