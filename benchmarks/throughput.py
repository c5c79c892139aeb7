"""What masks cost: speed of an engine with masks in its batch against vLLM without the plugin, and against older ways.

    python benchmarks/throughput.py MODEL --out results/throughput [--rounds 2] [--repetitions 6] [--load decode]
    python benchmarks/throughput.py MODEL --out results/throughput --matrix

Arms:
- no-plugin: vLLM without the plugin, compiled. Every ratio is to it.
- no-plugin-again: the same engine measured a second time, so that the noise can be seen.
- no-plugin-other: a second process of the same, for differences between processes (not by default).
- idle: with the plugin, no request masked.
- masks-K: with the plugin, K distinct masks mixed in the batch. With more masks than requests, they rotate from one
  measurement to the next.
- windows-K: the same, but only the last 4 tokens of each prompt and the first 16 generated ones are masked.
- offsets-K: as masks-K, with masks that set neurons to a value instead of zero, on an engine of its own that has a
  table of offsets; offsets-0 is that engine without masks.
- gates: as idle, on an engine of its own that could show act(gate) and up; nobody asks.
- eager-K: the work of masks-K, one mask at a time in an eager vLLM engine without the plugin with patched MLPs. The
  same with an engine start for every mask is computed from this and the measured start.
- transformers: `generate` with hooks on one padded batch, one mask.

Every engine is a process of its own. All are alive together, and all but the one that is measured are stopped
(SIGSTOP). Arms take turns in an order that is shuffled for each repetition; all arms on the plugin share one engine. A
round starts all processes anew.

Before the first measurement it checks that unmasked answers of the plugin are bit-identical (tokens and
log-probabilities) to vLLM without it, compiled and eager, and that masked ones are those of the patched engine.
Writes OUT/throughput.json and OUT/throughput.png. With --matrix see matrix.py.
"""

import argparse
import json
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet import Fleet, with_offsets
from loads import LOADS, WINDOW, fill_table, mixed, one_by_one, random_prompts, settings, warm_up, write_masks
from summary import machine, plot_ratios, speed_ratio, spread, table
from worker import MAX_BATCHED_TOKENS, MAX_MODEL_LEN, Job

from crane_serve.common.atomic import write_atomically

BASELINE = "no-plugin"
DEFAULT_ARMS = (
    "no-plugin,no-plugin-again,idle,masks-1,masks-2,masks-16,masks-64,masks-256,eager-1,eager-16,transformers"
)
CHECKED_REQUESTS, CHECKED_TOKENS = 32, 32
OFFSET = 0.01  # the value of neurons under offsets-K


@dataclass(frozen=True)
class Arm:
    """What is measured: an engine, how many masks its requests are under, and for which tokens (None: all). `slow`:
    measured less often."""

    name: str
    engine: str
    masks: int = 0
    slow: bool = False
    positions: str | None = None

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """Raises argparse.ArgumentTypeError for a name that means nothing."""
        plain = {
            BASELINE: "no plugin",
            "no-plugin-again": "no plugin",
            "no-plugin-other": "no plugin, second process",
            "idle": "plugin",
            "offsets-0": "plugin, offsets",
            "gates": "plugin, gates",
        }
        if name in plain:
            return cls(name, plain[name])
        if name == "transformers":
            return cls(name, "transformers", masks=1, slow=True)
        counted = re.fullmatch(r"(masks|windows|offsets|eager)-([1-9]\d*)", name)
        if counted is None:
            raise argparse.ArgumentTypeError(
                f"unknown arm {name!r}, expected one of {', '.join(plain)}, masks-K, windows-K, offsets-K, eager-K, "
                "transformers"
            )
        kind, masks = counted[1], int(counted[2])
        if kind == "eager":
            return cls(name, "patched, eager", masks, slow=True)
        engine = "plugin, offsets" if kind == "offsets" else "plugin"
        return cls(name, engine, masks, positions=WINDOW if kind == "windows" else None)

    @property
    def target(self) -> float | None:
        """The speed, relative to the baseline, that we want at least."""
        if not self.engine.startswith("plugin"):
            return None
        if self.masks == 0:
            return 0.99
        return 0.97 if self.masks <= 64 else 0.95

    def job(self, prompts: list[list[int]], output_tokens: int, turn: int) -> Job:
        if self.engine.startswith(("plugin", "no plugin")):
            return mixed(prompts, output_tokens, self.masks, turn, self.positions)
        return one_by_one(prompts, output_tokens, self.masks, turn)


def arms_of(names: str) -> list[Arm]:
    return [Arm.parse(name) for name in names.split(",")]


def measure(fleet: Fleet, arm: Arm, job: Job, prompts: list[list[int]]) -> dict[str, Any]:
    """One measurement, after a short warm-up of the engine that has just been woken."""
    fleet.ask(arm.engine, warm_up(prompts))
    answer = fleet.ask(arm.engine, job)
    answer.pop("answers")
    return answer


def check_identity(fleet: Fleet, prompts: list[list[int]]) -> dict[str, Any]:
    """Answers that must be equal bit by bit: tokens and log-probabilities of the same batch in two engines."""

    def answers(engine: str, masks: int = 0) -> list[Any]:
        build = one_by_one if engine.startswith("patched") else mixed
        job = {**build(prompts, CHECKED_TOKENS, masks), "answers": True}
        return list(fleet.ask(engine, job)["answers"])

    def comparison(first: list[Any], second: list[Any]) -> dict[str, Any]:
        tokens = [[[step[0] for step in answer] for answer in answers] for answers in (first, second)]
        return {"identical": first == second, "same_tokens": tokens[0] == tokens[1], "requests": len(first)}

    found: dict[str, Any] = {}
    if {"no plugin", "plugin"} <= fleet.engines.keys():
        unmasked = answers("plugin")
        found["compiled, unmasked: plugin against no plugin"] = comparison(unmasked, answers("no plugin"))
        found["compiled: masked answers differ from unmasked ones"] = answers("plugin", masks=1) != unmasked
    if "patched, eager" in fleet.engines:
        fleet.start("plugin, eager")
        for what, masks in (("unmasked: plugin against no plugin", 0), ("one mask: plugin against patched", 1)):
            pair = answers("plugin, eager", masks), answers("patched, eager", masks)
            found[f"eager, {what}"] = comparison(*pair)
        fleet.end("plugin, eager")
    return found


def run_round(number: int, fleet: Fleet, arms: Sequence[Arm], options: argparse.Namespace) -> dict[str, Any]:
    """Start the engines, measure, stop them. Returns measurements, start times and (in round 0) what was checked."""
    wanted = list(dict.fromkeys(arm.engine for arm in arms))
    together = [name for name in wanted if not name.startswith(("patched", "transformers"))]
    fleet.start(*(together if number % 2 == 0 else reversed(together)))
    for name in wanted:
        if name not in together:
            fleet.start(name)  # alone, since its start counts
    result: dict[str, Any] = {
        "start_s": {name: fleet.start_s(name) for name in wanted},
        "started_together": together,
        "checks": None,
        "measurements": [],
    }
    if number == 0 and not options.no_checks:
        result["checks"] = check_identity(fleet, random_prompts(options.model, LOADS["decode"], CHECKED_REQUESTS))
        for what, outcome in result["checks"].items():
            print(f"{what}: {outcome}", flush=True)
    for engine in {"plugin", "plugin, offsets"}.intersection(wanted):
        fleet.ask(engine, fill_table(max(arm.masks for arm in arms if arm.engine == engine) or 1))

    draw = random.Random(number)
    for load in options.loads:
        prompts = random_prompts(options.model, LOADS[load], options.requests)
        for repetition in range(options.repetitions):
            turn = number * options.repetitions + repetition
            due = [arm for arm in arms if not arm.slow or repetition < options.slow_repetitions]
            draw.shuffle(due)
            for position, arm in enumerate(due):
                measured = measure(fleet, arm, arm.job(prompts, LOADS[load].output_tokens, turn), prompts)
                place = {"round": number, "repetition": repetition, "position": position}
                result["measurements"].append({"load": load, "arm": arm.name, **place, **measured})
                progress = f"round {number} {load} repetition {repetition} {arm.name}: {measured['seconds']:.2f} s"
                print(progress, file=sys.stderr, flush=True)
    return result


def summarise(arms: Sequence[Arm], rounds: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Load -> arm -> figures."""
    measurements = [one for result in rounds for one in result["measurements"]]
    loads = dict.fromkeys(one["load"] for one in measurements)
    return {
        load: {
            arm.name: _summarise_arm(arm, [one for one in measurements if one["load"] == load], rounds) for arm in arms
        }
        for load in loads
    }


def _summarise_arm(
    arm: Arm, measurements: Sequence[dict[str, Any]], rounds: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    own = [one for one in measurements if one["arm"] == arm.name]
    times = {(one["round"], one["repetition"]): one["seconds"] for one in own}
    baseline = {(one["round"], one["repetition"]): one["seconds"] for one in measurements if one["arm"] == BASELINE}
    seconds = spread(list(times.values()))
    tokens = own[0]["output_tokens"], own[0]["prompt_tokens"] + own[0]["output_tokens"]
    summary: dict[str, Any] = {
        "slow": arm.slow,
        "target": arm.target,
        "measurements": len(own),
        "seconds": seconds,
        "output_tokens_per_s": tokens[0] / seconds["median"],
        "total_tokens_per_s": tokens[1] / seconds["median"],
        "ttft_s": statistics.median(one["ttft_s"] for one in own),
        "tpot_s": statistics.median(one["tpot_s"] for one in own),
        "most_others_cpu_share": max(one["others_cpu_s"] / one["seconds"] for one in own),
        "speed": speed_ratio(baseline, times),
    }
    if arm.engine.startswith("patched"):
        start_s = statistics.median(result["start_s"][arm.engine] for result in rounds)
        with_starts = seconds["median"] + start_s * own[0]["passes"]
        summary["seconds_with_a_start_per_mask"] = with_starts
        if baseline:
            summary["ratio_with_a_start_per_mask"] = statistics.median(baseline.values()) / with_starts
    return summary


def report(summaries: dict[str, dict[str, Any]]) -> str:
    blocks = []
    for load, arms in summaries.items():
        rows = []
        for name, arm in arms.items():
            seconds, speed = arm["seconds"], arm["speed"]
            rows.append(
                [
                    name,
                    f"{seconds['median']:.2f}",
                    f"{seconds['min']:.2f}..{seconds['max']:.2f}",
                    f"{seconds['lower_quartile']:.2f}..{seconds['upper_quartile']:.2f}",
                    f"{arm['output_tokens_per_s']:.0f}",
                    f"{arm['total_tokens_per_s']:.0f}",
                    f"{arm['ttft_s'] * 1000:.0f}",
                    f"{arm['tpot_s'] * 1000:.1f}",
                    "-" if speed["ratio"] is None else f"{speed['ratio']:.3f}",
                    "-" if speed["interval"] is None else "{:.3f}..{:.3f}".format(*speed["interval"]),
                    "-" if arm["target"] is None else f"{arm['target']:.2f}",
                    f"{arm['most_others_cpu_share']:.2f}",
                ]
            )
            if "seconds_with_a_start_per_mask" in arm:
                slow, ratio = arm["seconds_with_a_start_per_mask"], arm.get("ratio_with_a_start_per_mask")
                ratio_text = "-" if ratio is None else f"{ratio:.3f}"
                blank = ["-"] * 6
                rows.append([f"{name}, a start per mask", f"{slow:.2f}", *blank, ratio_text, "-", "-", "-"])
        header = ["arm", "s", "range", "quartiles", "out tok/s", "tok/s", "TTFT ms", "TPOT ms"]
        header += ["ratio", "95 %", "target", "others"]
        blocks.append(
            f"{load} (others: most cores that other processes kept busy in a measurement)\n{table(header, rows)}"
        )
    return "\n\n".join(blocks)


def run(options: argparse.Namespace) -> None:
    arms: list[Arm] = options.arms
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    about = machine()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        masks = Path(scratch) / "masks"
        for directory, offset in ((masks, 0.0), (with_offsets(masks), OFFSET)):
            write_masks(options.model, directory, max(1, *(arm.masks for arm in arms)), offset)
        for number in range(options.rounds):
            with Fleet(options.model, masks, options.concurrency, Path(scratch)) as fleet:
                rounds.append(run_round(number, fleet, arms, options))
            summaries = summarise(arms, rounds)
            content = {
                "settings": {
                    "model": str(options.model),
                    "dtype": "bfloat16",
                    "loads": settings(),
                    "requests": options.requests,
                    "concurrency": options.concurrency,
                    "max_model_len": MAX_MODEL_LEN,
                    "max_num_batched_tokens": MAX_BATCHED_TOKENS,
                    "prefix_caching": False,
                    "rounds": options.rounds,
                    "repetitions": options.repetitions,
                    "slow_repetitions": options.slow_repetitions,
                },
                "machine": about,
                "took_s": time.time() - began,
                "checks": rounds[0]["checks"],
                "summary": summaries,
                "rounds": [{key: result[key] for key in result if key != "checks"} for result in rounds],
            }
            # After every round, so that a failure in a later one loses nothing.
            write_atomically(options.out / "throughput.json", json.dumps(content, indent=2).encode() + b"\n")
    plot_ratios(summaries, options.out / "throughput.png", f"{options.model.name}, {options.concurrency} at once")
    print(report(summaries))
    starts = {name: [round(result["start_s"][name], 1) for result in rounds] for name in rounds[0]["start_s"]}
    print(f"\nengine starts in s, by round: {starts}; all in all {time.time() - began:.0f} s")
    if rounds[0]["checks"]:
        wrong = [
            what
            for what, outcome in rounds[0]["checks"].items()
            if not (outcome["identical"] if isinstance(outcome, dict) else outcome)
        ]
        if wrong:
            sys.exit(f"not bit-identical: {'; '.join(wrong)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=6, help="of every arm in a round")
    parser.add_argument("--slow-repetitions", type=int, default=1, help="of eager-K and transformers in a round")
    parser.add_argument("--load", choices=[*LOADS, "both"], default="decode")
    parser.add_argument("--arms", type=arms_of, default=arms_of(DEFAULT_ARMS))
    parser.add_argument("--requests", type=int, default=32, help="of one measurement")
    parser.add_argument("--concurrency", type=int, default=32, help="max_num_seqs of the engines")
    parser.add_argument("--no-checks", action="store_true", help="skip the comparison of answers")
    parser.add_argument("--matrix", action="store_true", help="4 masks x 3 languages in one batch, or one by one")
    parser.add_argument("--prompts-per-language", type=int, default=8, help="of the matrix")
    parser.add_argument("--cold", action="store_true", help="of the matrix: start engines with empty compile caches")
    options = parser.parse_args()
    options.loads = list(LOADS) if options.load == "both" else [options.load]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the engines are stopped
    if options.matrix:
        from matrix import run_matrix

        run_matrix(options)
    else:
        run(options)


if __name__ == "__main__":
    main()
