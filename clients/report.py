"""The matrix for readers: a heat map and a page of Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from clients.matrix import MATRIX_FILE, TABLE_FILE, Matrix
from clients.plan import UNMASKED
from crane_serve.statistics import Estimate

PICTURE_FILE = "matrix.png"
REPORT_FILE = "report.md"
FILES = (MATRIX_FILE, TABLE_FILE, PICTURE_FILE, REPORT_FILE)

_LINEAR_NATS = 1.0  # below this the colours are linear in the change, above it logarithmic
_FAILURES_SHOWN = 200


def write_all(matrix: Matrix, directory: Path) -> None:
    """Write matrix.json, matrix.csv, matrix.png and report.md."""
    matrix.write_json(directory)
    matrix.write_csv(directory)
    write_picture(matrix, directory)
    write_report(matrix, directory)


def rows_by_method(matrix: Matrix) -> list[list[str]]:
    """Mask names grouped by method, methods and masks in the order of the run; `none` is left out."""
    groups: dict[str | None, list[str]] = {}
    for mask in matrix.masks:
        if mask != UNMASKED:
            groups.setdefault(matrix.mask_info[mask].method, []).append(mask)
    return list(groups.values())


def write_picture(matrix: Matrix, directory: Path) -> Path:
    """Draw the heat map `matrix.png` and return its path.

    Rows are masks grouped by method, columns languages; a cell shows the change in nats per token and its interval,
    and a frame marks the language a mask was made for.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FixedLocator, FuncFormatter

    groups = rows_by_method(matrix)
    rows = [UNMASKED, *(mask for group in groups for mask in group)]
    changes = [[matrix.delta_nats_per_token[mask][language] for language in matrix.languages] for mask in rows]
    values = np.array([[np.nan if change is None else change.mean for change in row] for row in changes])
    limit = max(1.0, float(np.nanmax(np.abs(values), initial=0.0)))

    width = 3.4 + 1.5 * len(matrix.languages)
    height = 1.7 + 0.55 * len(rows)
    figure = Figure(figsize=(max(width, 6.0), height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    norm = SymLogNorm(linthresh=_LINEAR_NATS, vmin=-limit, vmax=limit, base=10)
    image = axes.imshow(values, cmap="RdBu_r", norm=norm, aspect="auto")
    axes.set_facecolor("0.85")

    for y, row in enumerate(changes):
        for x, change in enumerate(row):
            dark = change is not None and abs(float(norm(change.mean)) - 0.5) > 0.33
            color = "white" if dark else "black"
            if change is None or rows[y] == UNMASKED:
                axes.text(x, y, "-" if change is None else "0", ha="center", va="center", fontsize=9, color=color)
                continue
            offset = 0.0 if change.low is None else 0.14
            axes.text(x, y - offset, f"{change.mean:+.2f}", ha="center", va="center", fontsize=10, color=color)
            if change.low is not None:
                axes.text(x, y + 0.22, _interval(change), ha="center", va="center", fontsize=6.5, color=color)
            if matrix.mask_info[rows[y]].language == matrix.languages[x]:
                frame = Rectangle((x - 0.46, y - 0.45), 0.92, 0.90, fill=False, edgecolor="black", linewidth=1.8)
                axes.add_patch(frame)
    boundary = 0.5
    for group in groups:
        axes.axhline(boundary, color="black", linewidth=0.8)
        boundary += len(group)

    axes.set_xticks(range(len(matrix.languages)), [_column(matrix, language) for language in matrix.languages])
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("What each mask does to each language's loss", fontsize=11)
    axes.set_xlabel("mean and 95 % interval over documents; frame: the mask's own language", fontsize=8)
    decades = [10.0**power for power in range(-1, 4) if 10.0**power <= limit]
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.ax.yaxis.set_major_locator(FixedLocator([-tick for tick in reversed(decades)] + [0.0] + decades))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    bar.ax.minorticks_off()
    bar.set_label("change in nats per token", fontsize=9)
    path = directory / PICTURE_FILE
    figure.savefig(path)
    return path


def write_report(matrix: Matrix, directory: Path) -> Path:
    """Write `report.md` and return its path."""
    sections = [
        "# What each mask does to each language",
        _summary(matrix),
        f"![Change in nats per token, masks by languages]({PICTURE_FILE})",
        "## Change in nats per token",
        "Mean over the tokens of all documents, with a 95 % interval over documents. Positive: the masked model "
        "predicts the language worse. Bold: the language the mask was made for.",
        _change_table(matrix),
        "## Own language against the others",
        "\n".join(f"- {sentence(matrix, mask)}" for group in rows_by_method(matrix) for mask in group)
        or "No mask but `none` was evaluated.",
        "## Absolute figures",
        "Perplexity per token / bits per byte.",
        _level_table(matrix),
        "## Settings",
        _settings(matrix),
        "## How this was made",
        _method(matrix),
    ]
    if matrix.failed:
        sections += ["## Failed items", _failures(matrix)]
    path = directory / REPORT_FILE
    path.write_text("\n\n".join(sections) + "\n")
    return path


def cell_text(change: Estimate | None) -> str:
    """A change with its interval, as tables show it."""
    if change is None:
        return "-"
    return f"{change.mean:+.2f}" if change.low is None else f"{change.mean:+.2f} {_interval(change)}"


def sentence(matrix: Matrix, mask: str) -> str:
    """What the numbers say about one mask's selectivity."""
    language = matrix.mask_info[mask].language
    profile = matrix.profile(mask)
    if language not in matrix.languages:
        others = "nothing measured" if profile.others is None else f"{profile.others:+.2f} nats per token on average"
        made_for = "no language in particular" if language is None else f"{language}, which is not in this corpus"
        return f"`{mask}` was made for {made_for}: {others}."
    if profile.own is None:
        return f"`{mask}`: {language} was not measured."
    own = f"`{mask}` changes {language} by {cell_text(profile.own)}"
    if profile.others is None:
        return f"{own}; there is no other language to compare with."
    return f"{own} and the others by {profile.others:+.2f} on average: {_verdict(profile.own, profile.others)}."


def _verdict(own: Estimate, others: float) -> str:
    gap = own.mean - others
    measured = f"selectivity {gap:+.2f} nats per token"
    if own.low is not None and own.low <= 0:
        return f"{measured}, but its own language's change cannot be told from none or is a gain"
    if gap <= 0:
        return f"{measured}, so it does not single out its language"
    if others <= 0:
        return f"{measured}, and the others do not get worse"
    return f"{measured}, {own.mean / others:,.1f} times the others' change"


def _summary(matrix: Matrix) -> str:
    cells = len(matrix.masks) * len(matrix.languages)
    text = (
        f"{len(matrix.masks)} masks x {len(matrix.languages)} languages ({cells} cells) on "
        f"{matrix.model.get('name', 'the model')}, {matrix.tokens_per_second:,.0f} tokens per second "
        f"({matrix.seconds:,.1f} s of scoring)."
    )
    if matrix.failed:
        text += f" **{len(matrix.failed)} items failed**; they are listed at the end and left out of every figure."
    return text


def _change_table(matrix: Matrix) -> str:
    def cell(mask: str, language: str) -> str:
        if mask == UNMASKED:
            return "0"
        text = cell_text(matrix.delta_nats_per_token[mask][language])
        return f"**{text}**" if matrix.mask_info[mask].language == language else text

    rows = [UNMASKED, *(mask for group in rows_by_method(matrix) for mask in group)]
    return _table(
        ["mask", *matrix.languages],
        ([f"`{mask}`", *(cell(mask, language) for language in matrix.languages)] for mask in rows),
    )


def _level_table(matrix: Matrix) -> str:
    def cell(mask: str, language: str) -> str:
        perplexity, bits = matrix.perplexity[mask][language], matrix.bits_per_byte[mask][language]
        if bits is None:
            return "-"
        return f"{'beyond range' if perplexity is None else f'{perplexity:,.1f}'} / {bits:.3f}"

    return _table(
        ["mask", *matrix.languages],
        ([f"`{mask}`", *(cell(mask, language) for language in matrix.languages)] for mask in matrix.masks),
    )


def _settings(matrix: Matrix) -> str:
    corpus = matrix.corpus
    split = "used whole" if corpus.split is None else f"split `{corpus.split}`"
    limit = "" if corpus.limit is None else f", at most {corpus.limit} documents per language"
    model = ", ".join(f"{key} {_brief(value)}" for key, value in matrix.model.items() if key != "name")
    masks = _table(
        ["mask", "method", "language", "neurons", "budget", "digest"],
        (
            [
                f"`{name}`",
                info.method or "-",
                info.language or "-",
                f"{info.neurons:,}",
                "-" if info.budget is None else f"{info.budget:g}",
                f"`{info.digest[:16]}`" if info.digest else "-",
            ]
            for name, info in matrix.mask_info.items()
        ),
    )
    texts = _table(
        ["language", "documents", "tokens"],
        ([language, str(matrix.documents[language]), f"{matrix.tokens[language]:,}"] for language in matrix.languages),
    )
    return "\n\n".join(
        [
            f"- Model: {matrix.model.get('name', 'unnamed')} ({model})\n"
            f"- Corpus: digest `{corpus.digest[:16]}`, {split}{limit}\n"
            f"- Made by: {matrix.created_by}",
            masks,
            texts,
        ]
    )


def _method(matrix: Matrix) -> str:
    intervals = matrix.intervals
    return (
        "Every document was scored once under every mask: the log-probability of all its tokens after the BOS token, "
        "in nats. Requests with different masks were sent interleaved, document by document, so that they shared the "
        "server's batches. The change of a cell is the sum over documents of (loss with the mask - loss without), "
        "divided by the number of tokens. "
        f"Intervals: {intervals.method}, {intervals.confidence:.0%}, {intervals.resamples} resamples, seed "
        f"{intervals.seed}. They cover the choice of documents, not the choice of neurons, and are not corrected for "
        "the number of cells. Selectivity is the change of a mask's own language minus the mean change of the others."
    )


def _failures(matrix: Matrix) -> str:
    shown = matrix.failed[:_FAILURES_SHOWN]
    rest = len(matrix.failed) - len(shown)
    table = _table(
        ["mask", "language", "document", "error"],
        (
            [f"`{failure.mask}`", failure.language, _inline(failure.document), _inline(failure.error)]
            for failure in shown
        ),
    )
    return table + (f"\n\n... and {rest} more, listed in matrix.json" if rest else "")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _column(matrix: Matrix, language: str) -> str:
    return f"{language}\n{matrix.documents[language]} documents"


def _interval(change: Estimate) -> str:
    return f"[{change.low:+.2f}, {change.high:+.2f}]"


def _brief(value: object) -> str:
    if isinstance(value, list) and len(value) > 1 and all(entry == value[0] for entry in value):
        return f"{value[0]} x {len(value)}"
    text = str(value)
    return f"`{text[:16]}`" if len(text) == 64 else text
