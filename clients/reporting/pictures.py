"""Pictures of an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from clients.evaluation import RANDOM, UNMASKED, Cell, Effect, Evaluation, TaskInfo
from clients.reporting.figures import Scale, mark, masks_by_method
from clients.reporting.layers import masks_with_layers
from clients.task import Metric
from crane_serve.common.reports.content import Picture
from crane_serve.common.reports.drawing import (
    DAMAGE,
    LABEL,
    SHADES,
    SMALL,
    TITLE,
    as_picture,
    blank_figure,
    drawable,
    hide_panels,
    legend_below,
    legend_columns,
    legend_height,
    line_styles,
    log_shares,
    panel_grid,
    show_changes,
    symlog,
)
from crane_serve.common.reports.numbers import interval_text, number_text

MATRIX, LAYERS, DOSES = "matrix", "layers", "dose-response"
_DETAILED_ROWS = 60  # with more masks, rows are low and have no intervals
_FAR = 2.0  # damage beyond which dose-response is logarithmic
_DARK = 0.1  # on the scale from blue (0) to orange (1), where white text reads better than black


@dataclass(frozen=True)
class _Dose:
    """Mean damage over the draws of one method, language and budget, in the metric's unit."""

    budget: float
    own: float
    others: float


def draw(evaluation: Evaluation) -> dict[str, tuple[Picture, ...]]:
    """Pictures by the section they belong to (MATRIX, DOSES, LAYERS), none where there is nothing to show."""
    pictures: dict[str, tuple[Picture, ...]] = {MATRIX: (), DOSES: (), LAYERS: ()}
    if evaluation.tasks and evaluation.tasks[0].languages:
        pictures[MATRIX] = (_matrix(evaluation, evaluation.tasks[0]),)
    pictures[DOSES] = tuple(
        _dose_picture(evaluation, task, doses)
        for task in evaluation.tasks
        if (doses := _doses(evaluation, task, task.metrics[0]))
    )
    if masks_with_layers(evaluation):
        pictures[LAYERS] = (_layers(evaluation),)
    return pictures


def _matrix(evaluation: Evaluation, task: TaskInfo) -> Picture:
    metric = task.metrics[0]
    groups = masks_by_method(evaluation, task.masks)
    masks = [mask for group in groups for mask in group]
    cells = {
        (mask, language): evaluation.cell(task.name, metric.name, language, mask)
        for mask in masks
        for language in task.languages
    }
    changes = {place: cell.change for place, cell in cells.items() if cell is not None and cell.change is not None}
    scale = Scale.of(change.mean for change in changes.values())
    detailed = len(masks) <= _DETAILED_ROWS
    width = 3.6 + 1.5 * len(task.languages)
    figure = blank_figure(max(width, 6.0), 1.9 + (0.55 if detailed else 0.26) * (len(masks) + 1))
    axes = figure.add_subplot()
    damage = np.full((len(masks) + 1, len(task.languages)), np.nan)
    for y, mask in enumerate(masks, 1):
        for x, language in enumerate(task.languages):
            if (change := changes.get((mask, language))) is not None:
                damage[y, x] = metric.damage(change.mean)
    norm = SymLogNorm(linthresh=scale.full / 5, vmin=-scale.full, vmax=scale.full, base=10)
    image = axes.imshow(damage, cmap=DAMAGE, norm=norm, aspect="auto")
    axes.set_facecolor("0.92")
    for x, language in enumerate(task.languages):
        unmasked = evaluation.cell(task.name, metric.name, language, UNMASKED)
        level = "-" if unmasked is None or unmasked.level is None else f"level {number_text(unmasked.level.mean, 3)}"
        axes.text(x, 0, level, ha="center", va="center", fontsize=SMALL)
        for y, mask in enumerate(masks, 1):
            dark = damage[y, x] < 0 and float(norm(damage[y, x])) < _DARK
            _write_cell(axes, x, y, cells[mask, language], scale, "white" if dark else "black", detailed)
            if evaluation.masks[mask].language == language:
                axes.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, fill=False, edgecolor="black", linewidth=1.8))
    edge = 0.5
    for group in groups:
        axes.axhline(edge, color="black", linewidth=0.8)
        edge += len(group)
    names = [f"{drawable(language)}\n{task.items.get(language, 0):,} items" for language in task.languages]
    axes.set_xticks(range(len(task.languages)), names, fontsize=LABEL)
    axes.set_yticks(range(len(masks) + 1), [UNMASKED, *map(drawable, masks)], fontsize=LABEL)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{drawable(task.name)}: change in {drawable(metric.unit)}", fontsize=TITLE)
    axes.set_xlabel("frame: the mask's own language; ●: q < 0.05, outside random masks; ○: q < 0.05", fontsize=SMALL)
    _color_bar(figure, axes, image, f"damage in {drawable(metric.unit)}: above 0 is worse")
    caption = (
        f"{metric.title} of {task.name}: what each mask (row) changed in each language (column), in {metric.unit}, "
        "with intervals; orange is worse than the unmasked model, blue better. The tables below hold the same figures."
    )
    return as_picture(MATRIX, caption, figure)


def _write_cell(axes: Axes, x: int, y: int, cell: Cell | None, scale: Scale, color: str, detailed: bool) -> None:
    if cell is None or cell.change is None:
        axes.text(x, y, "-", ha="center", va="center", fontsize=SMALL, color=color)
        return
    interval = interval_text(cell.change, scale.digits, signed=True) if detailed else ""
    text = f"{number_text(cell.change.mean, scale.digits, signed=True)} {mark(cell)}".strip()
    axes.text(x, y - (0.14 if interval else 0), text, ha="center", va="center", fontsize=LABEL, color=color)
    if interval:
        axes.text(x, y + 0.22, interval, ha="center", va="center", fontsize=6.5, color=color)


def _color_bar(figure: Figure, axes: Axes, image: AxesImage, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.3g}" if value else "0"))
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=SMALL)
    bar.set_label(label, fontsize=SMALL)


def _doses(evaluation: Evaluation, task: TaskInfo, metric: Metric) -> dict[str, dict[str, list[_Dose]]]:
    """By method and language, in the order of budgets; empty if no method has several budgets for a language."""
    curves: dict[tuple[str, str], dict[float, list[Effect]]] = {}
    for effect in evaluation.effects:
        mask = evaluation.masks[effect.mask]
        if (effect.task, effect.metric) == (task.name, metric.name) and mask.method is not None and mask.budget:
            curves.setdefault((mask.method, effect.language), {}).setdefault(mask.budget, []).append(effect)
    if not any(len(by_budget) > 1 for by_budget in curves.values()):
        return {}
    doses: dict[str, dict[str, list[_Dose]]] = {}
    for (method, language), by_budget in curves.items():
        doses.setdefault(method, {})[language] = [_dose(budget, by_budget[budget]) for budget in sorted(by_budget)]
    return doses


def _dose(budget: float, draws: Sequence[Effect]) -> _Dose:
    own, others = ([getattr(effect, name).mean for effect in draws] for name in ("own", "others"))
    return _Dose(budget, sum(own) / len(own), sum(others) / len(others))


def _dose_picture(evaluation: Evaluation, task: TaskInfo, doses: Mapping[str, Mapping[str, list[_Dose]]]) -> Picture:
    metric = task.metrics[0]
    languages = [language for language in task.languages if any(language in of for of in doses.values())]
    rows, columns = panel_grid(len(languages))
    figure = blank_figure(max(3.8 * columns, 7.0), 3.6 * rows + 0.3 + legend_height(len(doses) + 2, columns))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    hide_panels(grid.flat)
    styles = line_styles({method: method == RANDOM for method in doses})
    for number, (axes, language) in enumerate(zip(grid.flat, languages, strict=False)):
        for method, by_language in doses.items():
            points = by_language.get(language, [])
            budgets = [point.budget for point in points]
            axes.plot(budgets, [point.own for point in points], **styles[method])
            axes.plot(budgets, [point.others for point in points], linestyle="--", mfc="white", **styles[method])
        show_changes(axes)
        axes.set_title(f"masks of {drawable(language)}", fontsize=TITLE)
        axes.set_xlabel("fraction of all neurons", fontsize=LABEL)
        axes.tick_params(labelbottom=True)
        if number % columns == 0:
            axes.set_ylabel(f"damage, {drawable(metric.unit)}", fontsize=LABEL)
    points = [point for by_language in doses.values() for of in by_language.values() for point in of]
    log_shares(grid[0][0], [point.budget for point in points])
    damage = [value for point in points for value in (point.own, point.others)]
    if max(map(abs, damage)) > _FAR:
        symlog(grid[0][0], "y", damage)
    handles = [Line2D([], [], label=drawable(method), **style) for method, style in styles.items()]
    handles += [
        Line2D([], [], color="0.3", linestyle=line, label=label)
        for line, label in (("-", "own language"), ("--", "others, mean"))
    ]
    legend_below(figure, handles, legend_columns(columns))
    caption = (
        f"{metric.title} of {task.name}: damage in {metric.unit} to the language the masks were made for (solid) and "
        "on average to the others (dashed), by the fraction of neurons that each method may take."
    )
    return as_picture(f"{DOSES}-{task.name}", caption, figure)


def _layers(evaluation: Evaluation) -> Picture:
    masks = masks_with_layers(evaluation)
    layers = max(len(mask.neurons_per_layer) for mask in masks)
    shares = np.full((len(masks), layers), np.nan)
    for y, mask in enumerate(masks):
        counts = np.array(mask.neurons_per_layer, float)
        shares[y, : len(counts)] = 100 * counts / max(counts.sum(), 1.0)
    figure = blank_figure(max(4.5 + 0.2 * layers, 6.5), 1.4 + 0.24 * len(masks))
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap=SHADES, vmin=0, vmax=max(float(np.nanmax(shares)), 1.0), aspect="auto")
    axes.set_facecolor("0.92")
    axes.set_yticks(range(len(masks)), [drawable(mask.name) for mask in masks], fontsize=SMALL)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel("layer", fontsize=LABEL)
    axes.set_title("Where the neurons of each mask lie", fontsize=TITLE)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=SMALL)
    bar.set_label("% of the mask's neurons", fontsize=SMALL)
    caption = "Share of each mask's neurons (row) that lies in each layer (column), from white for none to dark blue."
    return as_picture(LAYERS, caption, figure)
