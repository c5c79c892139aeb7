"""CRANE's table from an evaluation by plan.yaml: `python examples/crane_table/table.py DIR`.

A row per mask: accuracy in MMLU, C-Eval and Belebele-vi, the mean of those three, and LangSpec-F1 in its absolute form
at beta 1. It clips gains: the signed changes, with intervals, are in DIR/report.html.
"""

import math
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clients import Evaluation
from crane_serve.common.numbers.langspec import Form, langspec_f1

COLUMNS = {"en": "mmlu", "zh": "c-eval", "vi": "belebele-vi"}


def accuracies(evaluation: Evaluation, mask: str) -> dict[str, float]:
    """By language, NaN where nothing was answered."""
    cells = {language: evaluation.cell(task, "accuracy", language, mask) for language, task in COLUMNS.items()}
    return {
        language: math.nan if cell is None or cell.level is None else cell.level.mean
        for language, cell in cells.items()
    }


def f1(baseline: dict[str, float], scores: dict[str, float], target: str | None) -> str:
    """LangSpec-F1 of a mask made for `target`; empty for one that was made for none of the languages."""
    return f"{langspec_f1(baseline, scores, target, Form.ABSOLUTE):.3f}" if target in COLUMNS else ""


def table(evaluation: Evaluation) -> Table:
    """The table, in the order of the evaluation's masks."""
    shown = Table("mask", *COLUMNS.values(), "mean", "F1", title=f"{evaluation.name}, {evaluation.model['name']}")
    baseline = accuracies(evaluation, "none")
    for name, mask in evaluation.masks.items():
        scores = accuracies(evaluation, name)
        figures = [*scores.values(), sum(scores.values()) / len(scores)]
        shown.add_row(name, *(f"{figure:.4f}" for figure in figures), f1(baseline, scores, mask.language))
    return shown


if __name__ == "__main__":
    Console().print(table(Evaluation.read(Path(sys.argv[1]))))
