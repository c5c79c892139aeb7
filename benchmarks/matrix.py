"""A whole matrix of masks x languages: all cells in one batch, or one mask at a time.

Run by `throughput.py --matrix`. The work is the same for all: every prompt of three languages (of the parallel
corpus) under each of four masks, once generated from and once scored.

- mixed: all cells in one batch, the plugin's way.
- plugin, mask by mask: the same engine, a batch per mask; what mixing alone gives.
- eager, mask by mask: the eager engine with patched MLPs, a batch per mask with all languages in it.
- eager, cell by cell: the same, a batch per mask and language.
- eager, an engine per mask: the same with a fresh engine for every mask, its start included.

Writes OUT/matrix.json.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleet import Fleet
from loads import LANGUAGES, text_prompts, warm_up, write_masks
from summary import machine, speed_ratio, spread, table
from worker import Job, Pass

from crane_serve.common.atomic import write_atomically

MASKS = ("m0", "m1", "m2", "m3")
PROMPT_TOKENS, OUTPUT_TOKENS, SCORED_TOKENS = 32, 32, 128
BASELINE, TARGET = "mixed", 3.0
ENGINES = {
    "mixed": "plugin",
    "plugin, mask by mask": "plugin",
    "eager, mask by mask": "patched, eager",
    "eager, cell by cell": "patched, eager",
}
ENGINE_PER_MASK = "eager, an engine per mask"

Prompts = dict[str, list[list[int]]]  # language -> prompts


def jobs(prompts: Prompts, options: dict[str, Any]) -> dict[str, Job]:
    """Per arm the job that fills the whole matrix."""
    every = [prompt for language in LANGUAGES for prompt in prompts[language]]
    together = {
        "prompts": every * len(MASKS),
        "masks": [mask for mask in MASKS for _ in every],
    }
    plugin_passes: list[Pass] = [{"prompts": every, "masks": [mask] * len(every)} for mask in MASKS]
    mask_passes: list[Pass] = [{"prompts": every, "mask": mask} for mask in MASKS]
    cell_passes: list[Pass] = [{"prompts": prompts[one], "mask": mask} for mask in MASKS for one in LANGUAGES]
    passes = {
        "mixed": [together],
        "plugin, mask by mask": plugin_passes,
        "eager, mask by mask": mask_passes,
        "eager, cell by cell": cell_passes,
    }
    return {arm: {"passes": passes[arm], **options} for arm in ENGINES}


def engine_per_mask(fleet: Fleet, works: dict[str, Job]) -> dict[str, dict[str, float]]:
    """Per work the seconds of four fresh engines one after another, each with its mask's batch, and their starts alone.

    One start serves all works in turn, but counts for each.
    """
    start_s, seconds = 0.0, dict.fromkeys(works, 0.0)
    fleet.end("patched, eager")
    for number in range(len(MASKS)):
        fleet.start("patched, eager")
        start_s += fleet.start_s("patched, eager") or 0.0
        for work, job in works.items():
            seconds[work] += fleet.ask("patched, eager", {**job, "passes": [job["passes"][number]]})["seconds"]
        fleet.end("patched, eager")
    return {work: {"seconds": seconds[work], "start_s": start_s} for work in works}


def run_matrix(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    began, about = time.time(), machine()
    count = options.prompts_per_language
    works = {
        "generate": jobs(text_prompts(options.model, count, PROMPT_TOKENS), {"max_tokens": OUTPUT_TOKENS}),
        "score": jobs(text_prompts(options.model, count, SCORED_TOKENS), {"max_tokens": 1, "score": True}),
    }
    measurements: list[dict[str, Any]] = []
    start_s: dict[str, list[float]] = {"plugin": [], "patched, eager": []}
    fresh: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        masks = Path(scratch) / "masks"
        write_masks(options.model, masks, len(MASKS))
        for number in range(options.rounds):
            with Fleet(options.model, masks, options.concurrency, Path(scratch), cold=options.cold) as fleet:
                # One after the other, since starts count; the second starts first in odd rounds.
                for name in list(start_s)[:: 1 if number % 2 == 0 else -1]:
                    fleet.start(name)
                    start_s[name].append(fleet.start_s(name) or 0.0)
                measurements += _measure(number, fleet, works, options.repetitions)
                if number == 0:
                    mask_by_mask = {work: by_arm["eager, mask by mask"] for work, by_arm in works.items()}
                    fresh = engine_per_mask(fleet, mask_by_mask)
    starts = {name: spread(values) for name, values in start_s.items()}
    summary = {work: _summarise(work, measurements, starts, fresh[work]) for work in works}
    requests = {work: len(by_arm["mixed"]["passes"][0]["prompts"]) for work, by_arm in works.items()}
    content = {
        "settings": {
            "model": str(options.model),
            "masks": len(MASKS),
            "languages": LANGUAGES,
            "prompts_per_language": count,
            "requests": requests,
            "prompt_tokens": PROMPT_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "scored_tokens": SCORED_TOKENS,
            "concurrency": options.concurrency,
            "rounds": options.rounds,
            "repetitions": options.repetitions,
            "cold_compile_cache": options.cold,
        },
        "machine": about,
        "took_s": time.time() - began,
        "start_s": start_s,
        "engine_per_mask": fresh,
        "summary": summary,
        "measurements": measurements,
    }
    write_atomically(options.out / "matrix.json", json.dumps(content, indent=2).encode() + b"\n")
    print(report(summary, requests))
    medians = {name: round(values["median"], 1) for name, values in starts.items()}
    cache = "empty at each start" if options.cold else "as earlier runs left it"
    print(f"\nengine starts in s, alone: {medians}; compile cache: {cache}; all in all {content['took_s']:.0f} s")


def _measure(number: int, fleet: Fleet, works: dict[str, dict[str, Job]], repetitions: int) -> list[dict[str, Any]]:
    measurements = []
    draw = random.Random(number)
    due = [(work, arm) for work in works for arm in ENGINES]
    for repetition in range(repetitions):
        draw.shuffle(due)
        for work, arm in due:
            job = works[work][arm]
            fleet.ask(ENGINES[arm], warm_up(job["passes"][0]["prompts"]))
            measured = fleet.ask(ENGINES[arm], job)
            measured.pop("answers")
            place = {"round": number, "repetition": repetition}
            measurements.append({"work": work, "arm": arm, **place, **measured})
            print(f"round {number} {work} {repetition} {arm}: {measured['seconds']:.2f} s", file=sys.stderr, flush=True)
    return measurements


def _summarise(
    work: str, measurements: Sequence[dict[str, Any]], starts: dict[str, dict[str, float]], fresh: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Arm -> seconds, and how many times longer than mixed: without engine starts, and with them."""
    own = [one for one in measurements if one["work"] == work]
    times: dict[str, dict[tuple[int, int], float]] = {arm: {} for arm in ENGINES}
    for one in own:
        times[one["arm"]][one["round"], one["repetition"]] = one["seconds"]
    summary: dict[str, dict[str, Any]] = {}
    for arm, engine in ENGINES.items():
        seconds = spread(list(times[arm].values()))
        others = max(one["others_cpu_s"] / one["seconds"] for one in own if one["arm"] == arm)
        summary[arm] = {
            "seconds": seconds,
            "seconds_with_start": seconds["median"] + starts[engine]["median"],
            # How often mixed would fit: the speed of mixed relative to this arm.
            "times_mixed": speed_ratio(times[arm], times[BASELINE]),
            "most_others_cpu_share": others,
        }
    summary[ENGINE_PER_MASK] = {
        "seconds": spread([fresh["seconds"]]),
        "seconds_with_start": fresh["seconds"] + fresh["start_s"],
        "times_mixed": {"ratio": fresh["seconds"] / summary[BASELINE]["seconds"]["median"], "interval": None},
        "most_others_cpu_share": None,
    }
    for figures in summary.values():
        figures["times_mixed_with_start"] = figures["seconds_with_start"] / summary[BASELINE]["seconds_with_start"]
        figures["times_mixed_already_started"] = figures["seconds_with_start"] / summary[BASELINE]["seconds"]["median"]
    return summary


def report(summary: dict[str, dict[str, Any]], requests: dict[str, int]) -> str:
    header = ["arm", "s", "range", "/ mixed", "95 %", "s with start", "/ mixed with start", "/ mixed without", "others"]
    blocks = []
    for work, arms in summary.items():
        rows = []
        for arm, figures in arms.items():
            seconds, ratio, others = figures["seconds"], figures["times_mixed"], figures["most_others_cpu_share"]
            rows.append(
                [
                    arm,
                    f"{seconds['median']:.2f}",
                    f"{seconds['min']:.2f}..{seconds['max']:.2f}",
                    f"{ratio['ratio']:.2f}",
                    "-" if ratio["interval"] is None else "{:.2f}..{:.2f}".format(*ratio["interval"]),
                    f"{figures['seconds_with_start']:.1f}",
                    f"{figures['times_mixed_with_start']:.2f}",
                    f"{figures['times_mixed_already_started']:.1f}",
                    "-" if others is None else f"{others:.2f}",
                ]
            )
        blocks.append(
            f"{work}: {requests[work]} requests, target {TARGET:g} times mixed "
            f"(last columns: with start against mixed with and without its start; most cores that others kept busy)\n"
            f"{table(header, rows)}"
        )
    return "\n\n".join(blocks)
