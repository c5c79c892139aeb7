"""Pictures of a validation, drawn without a display and without matplotlib's global state."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from crane_serve.common.reports.content import Picture
from crane_serve.common.reports.drawing import (
    LABEL,
    LINEAR,
    PALETTE,
    SHADES,
    SMALL,
    TITLE,
    as_picture,
    blank_figure,
    grid_lines,
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
from relevance.validation.result import MATCHED, Validation
from relevance.validation.tables import Draws, by_budget, collateral_order, method_overlaps

_FAR = 4.0  # collateral beyond which the axis is logarithmic
_SAME: dict[str, Any] = {"color": "0.6", "linestyle": ":", "linewidth": 1}  # where all languages lose as much
_RING: dict[str, Any] = {"linestyle": "", "markersize": 10, "markerfacecolor": "white", "markeredgewidth": 2}


@dataclass(frozen=True)
class _Point:
    """Means over draws. share: fraction of all neurons switched off; own, others: nats per token lost."""

    share: float
    own: float
    others: float

    @classmethod
    def of(cls, draws: Draws) -> "_Point":
        return cls(
            draws.mean(lambda effect: effect.budget),
            draws.mean(lambda effect: effect.own.mean),
            draws.mean(lambda effect: effect.others),
        )


@dataclass(frozen=True)
class _Line:
    """The cost of one method: points by language in the order of budgets, and at matched effect."""

    name: str
    style: dict[str, Any]
    points: dict[str, list[_Point]]
    matched: dict[str, _Point]


def draw(result: Validation) -> list[Picture]:
    """All pictures that `result` has data for, in the order of the reports."""
    pictures = []
    lines = _lines(result)
    if any(effect.collateral is not None for effect in result.of_rule(MATCHED)):
        caption = (
            "Collateral at matched effect: bars are means over the languages, points with their intervals the "
            "languages; every draw of random neurons is a point. Intervals that are far longer than others are cut."
        )
        pictures.append(as_picture("collateral", caption, _collateral(result)))
    if lines:
        caption = (
            "What the own language (solid) and the others on average (dashed) lose, by the share of neurons taken."
        )
        pictures.append(as_picture("dose-response", caption, _dose_response(result, lines)))
        caption = "What the others lose by what the own language loses, a point for each budget; lower right is good."
        pictures.append(as_picture("trade-off", caption, _trade_off(result, lines)))
    if len({method for overlap in result.overlaps for method, _ in (overlap.first, overlap.second)}) > 1:
        caption = "Jaccard overlap of the neurons that two methods take for the same language, mean over languages."
        pictures.append(as_picture("overlap", caption, _overlap(result)))
    if result.layers:
        caption = "Number of neurons that each method takes from each layer, by language."
        pictures.append(as_picture("layers", caption, _layers(result)))
    return pictures


def _lines(result: Validation) -> list[_Line]:
    points: dict[str, dict[str, list[_Point]]] = {}
    drawn: dict[str, bool] = {}
    for draws_of_budget in by_budget(result).values():
        for draws in draws_of_budget:
            points.setdefault(draws.name, {}).setdefault(draws.language, []).append(_Point.of(draws))
            drawn[draws.name] = draws.drawn
    matched: dict[str, dict[str, _Point]] = {}
    for draws in Draws.group(result.of_rule(MATCHED)):
        matched.setdefault(draws.name, {})[draws.language] = _Point.of(draws)
    styles = line_styles(drawn)
    ordered = {
        name: {language: sorted(of, key=lambda point: point.share) for language, of in by_language.items()}
        for name, by_language in points.items()
    }
    return [_Line(name, styles[name], of, matched.get(name, {})) for name, of in ordered.items()]


def _dose_response(result: Validation, lines: Sequence[_Line]) -> Figure:
    rows, columns = panel_grid(len(result.languages))
    figure = blank_figure(max(3.6 * columns, 8.0), 6.6 * rows + legend_height(len(lines), columns))
    grid = figure.subplots(2 * rows, columns, sharex=True, sharey=True, squeeze=False)
    hide_panels(grid.flat)
    for number, language in enumerate(result.languages):
        row, column = divmod(number, columns)
        own, others = grid[2 * row][column], grid[2 * row + 1][column]
        for line in lines:
            points = line.points.get(language, [])
            shares = [point.share for point in points]
            own.plot(shares, [point.own for point in points], **line.style)
            others.plot(shares, [point.others for point in points], linestyle="--", **line.style)
        for axes in (own, others):
            show_changes(axes)
        own.set_title(f"masks of {language}", fontsize=TITLE)
        if column == 0:
            own.set_ylabel("own language: loss, nats per token", fontsize=LABEL)
            others.set_ylabel("others, mean: loss, nats per token", fontsize=LABEL)
        others.set_xlabel("fraction of all neurons", fontsize=LABEL)
        others.tick_params(labelbottom=True)
    shares = [point.share for line in lines for points in line.points.values() for point in points]
    log_shares(grid[0][0], [share for share in shares if share > 0])
    symlog(grid[0][0], "y", [change for line in lines for change in _changes(line)])
    legend_below(figure, _handles(lines), legend_columns(columns))
    return figure


def _trade_off(result: Validation, lines: Sequence[_Line]) -> Figure:
    rows, columns = panel_grid(len(result.languages))
    figure = blank_figure(max(3.9 * columns, 8.0), 4.1 * rows + legend_height(len(lines) + 2, columns))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    hide_panels(grid.flat)
    changes = [change for line in lines for change in _changes(line)]
    reach = (0.0, 1.05 * max([LINEAR, *changes]))
    for number, (axes, language) in enumerate(zip(grid.flat, result.languages, strict=False)):
        axes.plot(reach, reach, zorder=1, **_SAME)
        axes.axvline(0, color="0.3", linewidth=0.8, zorder=1)
        for line in lines:
            points = line.points.get(language, [])
            axes.plot([point.own for point in points], [point.others for point in points], alpha=0.9, **line.style)
            if (matched := line.matched.get(language)) is not None:
                axes.plot(matched.own, matched.others, zorder=5, **{**line.style, **_RING})
        show_changes(axes)
        axes.set_title(f"masks of {language}", fontsize=TITLE)
        axes.set_xlabel("own language: loss, nats per token", fontsize=LABEL)
        axes.tick_params(labelbottom=True)
        if number % columns == 0:
            axes.set_ylabel("others, mean: loss, nats per token", fontsize=LABEL)
    for axis in "xy":
        symlog(grid[0][0], axis, changes)
    handles = _handles(lines)
    if any(line.matched for line in lines):
        handles.append(Line2D([], [], label="at matched effect", color="0.3", marker="o", **_RING))
    handles.append(Line2D([], [], label="all lose the same", **_SAME))
    legend_below(figure, handles, legend_columns(columns))
    return figure


def _collateral(result: Validation) -> Figure:
    groups: dict[str, dict[str, Draws]] = {}
    for draws in Draws.group(result.of_rule(MATCHED)):
        groups.setdefault(draws.name, {})[draws.language] = draws
    missing = {method for method, _ in result.unreached}
    methods = [method for method in result.plan.methods if method in groups or method in missing]
    methods.sort(key=collateral_order(result))
    figure = blank_figure(9.0, 1.9 + (0.3 + 0.07 * len(result.languages)) * len(methods))
    axes = figure.add_subplot()
    axes.set_title(f"Collateral where the own language loses {result.plan.effect:g} nats per token", fontsize=TITLE)
    for place, method in enumerate(methods):
        mean = result.collateral_at_matched_effect(method)
        if mean is not None:
            axes.barh(place, mean, height=0.72, color="0.85", zorder=1)
        for offset, color, draws in _spread(result, groups.get(method, {})):
            _collateral_points(axes, place + offset, color, draws)
    names = [_name_with_missing(result, method, groups.get(method, {})) for method in methods]
    axes.set_yticks(range(len(methods)), names, fontsize=LABEL)
    _collateral_limits(axes, result)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.axvline(0, color="0.3", linewidth=0.8, zorder=2)
    axes.axvline(1, zorder=2, **_SAME)
    axes.set_xlabel("nats per token that the others lose for each that the own language loses", fontsize=LABEL)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.92", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [
        Line2D([], [], color=color, marker="o", linestyle="-", label=language)
        for language, color in zip(result.languages, PALETTE, strict=False)
    ]
    handles.append(Line2D([], [], label="all lose the same", **_SAME))
    legend_below(figure, handles, 7)
    return figure


def _spread(result: Validation, by_language: dict[str, Draws]) -> Iterator[tuple[float, str, Draws]]:
    """The position of each language's point in a method's bar, -0.25 to 0.25, with its colour."""
    last = max(len(result.languages) - 1, 1)
    for number, language in enumerate(result.languages):
        if language in by_language:
            yield 0.5 * number / last - 0.25, PALETTE[number % len(PALETTE)], by_language[language]


def _collateral_points(axes: Axes, height: float, color: str, draws: Draws) -> None:
    for effect in draws.effects:
        if (estimate := effect.collateral) is not None:
            if estimate.low is not None and estimate.high is not None:
                axes.plot([estimate.low, estimate.high], [height, height], color=color, linewidth=1.6, zorder=3)
            axes.plot(estimate.mean, height, marker="o", markersize=5.5, color=color, zorder=4)


def _collateral_limits(axes: Axes, result: Validation) -> None:
    """Room for all means, and for intervals as far as twice that; logarithmic above 1 if a mean is far above."""
    estimates = [effect.collateral for effect in result.of_rule(MATCHED) if effect.collateral is not None]
    means = [estimate.mean for estimate in estimates]
    ends = [end for estimate in estimates for end in (estimate.low, estimate.high) if end is not None]
    lowest, highest = min(0.0, *means), max(1.0, *means)
    span = highest - lowest
    if highest > _FAR:
        axes.set_xscale("symlog", linthresh=1.0)
        axes.xaxis.set_major_locator(FixedLocator([-10, -1, 0, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000, 10000]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left = max(min([lowest, *ends]), lowest - span)
    right = min(max([highest, *ends]), highest + span)
    axes.set_xlim(left - 0.03 * span if left < 0 else 0.0, right + 0.1 * span)


def _name_with_missing(result: Validation, method: str, draws_by_language: dict[str, Draws]) -> str:
    """The method, and below it the languages that do not reach the effect with all neurons."""
    notes = []
    for language in result.languages:
        if short := result.unreached.count((method, language)):
            draws = len(draws_by_language[language].effects) if language in draws_by_language else 0
            notes.append(f"{language} ({short} of {short + draws} draws)" if draws else language)
    return "\n".join([method, f"not reached: {', '.join(notes)}"] if notes else [method])


def _overlap(result: Validation) -> Figure:
    methods, means = method_overlaps(result)
    size = 0.62 * len(methods)
    names = 0.09 * max(map(len, methods))
    figure = blank_figure(max(2.0 + names + size, 5.5), 1.2 + 0.7 * names + size)
    axes = figure.add_subplot()
    axes.set_title(f"Overlap of methods at {100 * result.overlap_budget:g} % of all neurons", fontsize=TITLE)
    values = [[float("nan") if value is None else value for value in row] for row in means]
    image = axes.imshow(values, cmap=SHADES, vmin=0, vmax=1, aspect="auto")
    axes.set_facecolor("0.9")
    for y, row in enumerate(means):
        for x, value in enumerate(row):
            text = "-" if value is None else "1" if x == y else f"{value:.3f}".lstrip("0")
            color = "white" if value is not None and value > 0.5 else "black"
            axes.text(x, y, text, ha="center", va="center", fontsize=SMALL, color=color)
    axes.set_xticks(range(len(methods)), methods, rotation=40, ha="right", rotation_mode="anchor", fontsize=LABEL)
    axes.set_yticks(range(len(methods)), methods, fontsize=LABEL)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02)
    bar.set_label("Jaccard overlap", fontsize=LABEL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def _layers(result: Validation) -> Figure:
    columns = min(3, len(result.layers))
    rows = -(-len(result.layers) // columns)
    figure = blank_figure(max(4.2 * columns, 6.0), 0.9 + 2.3 * rows)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    panels = [axes for row in grid for axes in row]
    colors = dict(zip(result.languages, PALETTE, strict=False))
    for axes, (method, by_language) in zip(panels, result.layers.items(), strict=False):
        for language, counts in by_language.items():
            edges = [layer - 0.5 for layer in range(len(counts) + 1)]
            axes.stairs(counts, edges, color=colors[language], fill=True, alpha=0.14)
            axes.stairs(counts, edges, color=colors[language], linewidth=1.7)
        axes.set_title(method, fontsize=TITLE)
        axes.set_ylim(bottom=0)
        axes.set_xlim(-0.5, result.fingerprint.layers - 0.5)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        grid_lines(axes)
    for number, axes in enumerate(panels):
        if number >= len(result.layers):
            axes.set_visible(False)
        elif number + columns >= len(result.layers):
            axes.set_xlabel("layer", fontsize=LABEL)
            axes.tick_params(labelbottom=True)
        if number % columns == 0:
            axes.set_ylabel("neurons", fontsize=LABEL)
    handles = [Line2D([], [], color=color, linewidth=2.5, label=language) for language, color in colors.items()]
    legend_below(figure, handles, len(handles))
    return figure


def _changes(line: _Line) -> Iterator[float]:
    for points in (*line.points.values(), line.matched.values()):
        for point in points:
            yield from (point.own, point.others)


def _handles(lines: Sequence[_Line]) -> list[Line2D]:
    return [Line2D([], [], label=line.name, **line.style) for line in lines]
