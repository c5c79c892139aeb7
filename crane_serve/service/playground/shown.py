"""What the page shows, as HTML: cards of completions, tables of losses, layers and overlaps, heat maps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clients.answers import MaskNeurons, Scores
from clients.evaluation import Evaluation
from clients.reporting.changes import change_table
from crane_serve.common.masks.library import UNMASKED
from crane_serve.common.reports.content import Cell, Section, Table
from crane_serve.common.reports.numbers import number_text
from crane_serve.common.reports.render import html_fragment, html_sections
from crane_serve.service.playground.comparison import Column
from crane_serve.service.playground.prompts import EXAMPLES

_LANGUAGES = {
    "ar": "Arabic",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "hi": "Hindi",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "pt": "Portuguese",
    "ru": "Russian",
    "th": "Thai",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
_FINISHED = {"stop": "the model ended it", "length": "as many as were allowed"}
_LEVEL = 2  # of the headings


def language_name(code: str | None) -> str:
    """What a reader is told of a detected language."""
    if code is None:
        return "not identified"
    return f"{_LANGUAGES[code]} ({code})" if code in _LANGUAGES else code


def status(text: str, *, is_error: bool = False) -> str:
    """A line that screen readers read out when it changes."""
    return html_fragment("status.html.jinja", text=text, is_error=is_error)


def examples(field: str, *, texts: bool = False) -> str:
    """Buttons that fill the field of this element id with a prompt, or a text, of ours."""
    groups = [(example, (example.text,) if texts else example.prompts) for example in EXAMPLES]
    return html_fragment("examples.html.jinja", groups=groups, field=field)


def cards(prompt: str, columns: Sequence[Column]) -> str:
    """The completions side by side."""
    return html_fragment(
        "cards.html.jinja", prompt=prompt, columns=columns, language_name=language_name, finished=_FINISHED
    )


def losses(answers: Sequence[tuple[str, Scores | str]]) -> str:
    """Nats per token under each mask; an answer is the score of one text, or what went wrong."""
    levels = {mask: _loss(answer) for mask, answer in answers if isinstance(answer, Scores)}
    base = levels.get(UNMASKED)
    changes = {mask: level - base for mask, level in levels.items() if base is not None and mask != UNMASKED}
    full = max((abs(change) for change in changes.values() if math.isfinite(change)), default=1.0) or 1.0

    def row(mask: str, answer: Scores | str) -> tuple[Cell, ...]:
        if isinstance(answer, str):
            return (Cell(mask), Cell(answer), Cell("-"), Cell("-"))
        change = changes.get(mask)
        shown = Cell("-") if change is None else Cell(number_text(change, 3, signed=True), change=change, full=full)
        return (Cell(mask), Cell(number_text(levels[mask], 3)), shown, Cell(f"{answer.scores[0].tokens:,}"))

    columns = ("mask", "loss in nats per token", "change against none", "tokens")
    return html_sections(
        (Section("Loss", tables=(Table(columns, tuple(row(*pair) for pair in answers), "Loss of the text"),)),), _LEVEL
    )


def _loss(answer: Scores) -> float:
    score = answer.scores[0]
    return -score.logprob / score.tokens if score.tokens else math.nan


@dataclass(frozen=True)
class LayerBars:
    """How many neurons of each layer a mask scales."""

    name: str
    counts: tuple[int, ...]

    @property
    def summary(self) -> str:
        """In words, for those who do not see the bars."""
        most = max(range(len(self.counts)), key=self.counts.__getitem__, default=0)
        total = sum(self.counts)
        if not total:
            return f"{self.name} scales no neurons"
        used = sum(count > 0 for count in self.counts)
        return (
            f"{self.name}: {total:,} neurons in {used} of {len(self.counts)} layers, "
            f"most of them, {self.counts[most]:,}, in layer {most}"
        )


def layers_and_overlap(masks: Sequence[MaskNeurons]) -> str:
    """Where the neurons of masks sit, as bars and figures, and what each two share."""
    bars = [LayerBars(mask.name, tuple(len(layer.neurons) for layer in mask.layers)) for mask in masks]
    most = max((count for bar in bars for count in bar.counts), default=0) or 1
    picture = html_fragment("layers.html.jinja", bars=bars, most=most)
    sections = (
        Section(
            "Overlap",
            ("Shared neurons as a share of those that are in either mask (Jaccard index), and how many they are.",),
            (_overlap_table(masks),),
        ),
        Section("Neurons per layer, in figures", tables=(_layer_table(bars, most),), folded=True),
    )
    return picture + html_sections((Section("", parts=sections),), _LEVEL - 1)


def _layer_table(bars: Sequence[LayerBars], most: int) -> Table:
    layers = max(len(bar.counts) for bar in bars)
    rows = tuple(
        (Cell(bar.name), *(Cell(f"{count:,}", change=-count, full=most) for count in bar.counts)) for bar in bars
    )
    return Table(("mask", *map(str, range(layers))), rows, "Neurons that each mask scales, by layer")


def _overlap_table(masks: Sequence[MaskNeurons]) -> Table:
    places = {mask.name: {(layer.layer, neuron) for layer in mask.layers for neuron in layer.neurons} for mask in masks}

    def shown(first: str, second: str) -> Cell:
        shared, either = len(places[first] & places[second]), len(places[first] | places[second])
        index = shared / either if either else 0.0
        depth = None if first == second else -index  # blue, for what is neither good nor bad
        return Cell(number_text(index, 3), f"{shared:,} shared", change=depth, full=1.0)

    rows = tuple(
        (Cell(f"{first} ({len(places[first]):,})"), *(shown(first, second) for second in places)) for first in places
    )
    return Table(("mask (neurons)", *places), rows, "Overlap of masks")


def task_names(evaluation: Evaluation) -> list[str]:
    """The choices for `heat_map`: each task with its metrics."""
    return [f"{task.name}: {metric.title}" for task in evaluation.tasks for metric in task.metrics]


def heat_map(evaluation: Evaluation, choice: str | None) -> str:
    """What each mask changed in one task and metric. choice: of `task_names`; the first for any other."""
    pairs = [(task, metric) for task in evaluation.tasks for metric in task.metrics]
    names = task_names(evaluation)
    task, metric = pairs[names.index(choice) if choice in names else 0]
    about = (
        f"{evaluation.name}: {evaluation.model.get('name', 'the model')}, {len(evaluation.masks) - 1} masks, "
        f"{sum(task.items.values()):,} items. Masked minus unmasked, with 95 % intervals; orange is worse, blue "
        "better, bold the language that the mask was made for. ● q < 0.05 and outside what random masks do, ○ q < 0.05."
    )
    return html_sections(
        (Section(f"{task.name}: {metric.title}", (about,), (change_table(evaluation, task, metric),)),), _LEVEL
    )
