"""The common style of pictures: colours, sizes and axes. Drawn without a display and without matplotlib's global
state."""

import io
import math
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from crane_serve.common.reports.content import Picture
from crane_serve.common.reports.render import cut

# Okabe and Ito (2008) without their yellow, too pale for lines on white; languages take the first of these.
# Then colours of Tol's "muted" scheme (2021). Both schemes are told apart with every common colour blindness, mixed
# they are not always: lines of methods have markers of their own as well.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MORE = ("#882255", "#999933", "#332288", "#AA4499", "#44AA99")
_GREYS = ("#6b6b6b", "#a8a8a8")  # of random masks
_MARKERS = "osD^v<>phdH8PX*"
_DPI = 150
LINEAR = 0.1  # below this the axes are linear in the change, above it logarithmic
TITLE, LABEL, SMALL = 12, 10, 9  # points
SHADES: Colormap = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#8fbfe0", "#0072B2", "#00304d"])
DAMAGE: Colormap = LinearSegmentedColormap.from_list("damage", ["#0072B2", "#ffffff", "#D55E00"])
_LOSSES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_MOST_TICKS = 9
_TICKS = (*(-loss for loss in reversed(_LOSSES)), 0.0, *_LOSSES)


def as_picture(name: str, caption: str, figure: Figure) -> Picture:
    """The figure as a PNG of its own file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return Picture(name, caption, buffer.getvalue())


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure of this many inches, on white."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def line_styles(drawn: dict[str, bool]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every line, grey for random masks; among sixty coloured lines no two have the same pair."""
    colored = zip(cycle((*PALETTE, *_MORE)), cycle(_MARKERS), strict=False)
    grey = zip(cycle(_GREYS), cycle(_MARKERS), strict=False)
    styles: dict[str, dict[str, Any]] = {}
    for name, random in drawn.items():
        color, marker = next(grey if random else colored)
        styles[name] = {"color": color, "marker": marker, "markersize": 5.5, "linewidth": 1.5}
    return styles


def symlog(axes: Axes, axis: str, changes: Sequence[float]) -> None:
    """Scale, limits and plain ticks for changes that may be large, such as those in nats per token."""
    low, high = min(0.0, *changes), max(LINEAR, *changes)
    ticks = [tick for tick in _TICKS if 1.3 * low <= tick <= 1.3 * high]
    if len(ticks) > _MOST_TICKS:
        ticks = [tick for tick in ticks if tick == 0 or math.log10(abs(tick)).is_integer()]
    scale, limits, of = (
        (axes.set_xscale, axes.set_xlim, axes.xaxis)
        if axis == "x"
        else (axes.set_yscale, axes.set_ylim, axes.yaxis)
    )  # fmt: skip
    scale("symlog", linthresh=LINEAR, linscale=0.6)
    limits(1.3 * low - 0.02, 1.3 * high)
    of.set_major_locator(FixedLocator(ticks))
    of.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    of.set_minor_locator(NullLocator())


def log_shares(axes: Axes, shares: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each share, in percent. Without shares it stays as it is."""
    if not shares:
        return
    axes.set_xscale("log")
    ticks = sorted({float(f"{share:.2g}") for share in shares})
    apart = [tick for number, tick in enumerate(ticks) if number == 0 or tick > 1.25 * ticks[number - 1]]
    axes.xaxis.set_major_locator(FixedLocator(apart))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    axes.xaxis.set_minor_locator(NullLocator())


def panel_grid(languages: int) -> tuple[int, int]:
    """Rows and columns of a grid with a panel for each language."""
    columns = 2 if languages in (2, 4) else min(languages, 3)
    return -(-languages // columns), columns


def hide_panels(panels: Iterable[Axes]) -> None:
    """Hide the panels; each is shown when something is drawn in it."""
    for axes in panels:
        axes.set_visible(False)


def show_changes(axes: Axes) -> None:
    """A panel of changes, with its line at 0."""
    axes.set_visible(True)
    axes.axhline(0, color="0.3", linewidth=0.8, zorder=1)
    grid_lines(axes)


def drawable(text: str, length: int = 60) -> str:
    """A text as the font of pictures can show it: without the signs that start formulas, and with "?" for unknown
    characters."""
    known = "".join(character if " " <= character <= "\u024f" and character != "\x7f" else "?" for character in text)
    return cut(known, length).replace("$", r"\$")


def grid_lines(axes: Axes) -> None:
    """Pale lines behind the data and no frame above and to the right."""
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, handles: Sequence[Line2D], columns: int) -> None:
    """One legend for all panels, below them."""
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=LABEL, frameon=False)


def legend_columns(panels: int) -> int:
    """How many entries fit beside each other below so many columns of panels."""
    return 3 if panels < 3 else 5


def legend_height(entries: int, panels: int) -> float:
    """Inches that a legend of so many entries takes below so many panels."""
    return 0.22 * -(-entries // legend_columns(panels)) + 0.1
