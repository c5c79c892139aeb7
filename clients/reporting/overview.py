"""Overview: model, masks, tasks, settings, and the limits of the figures."""

from collections.abc import Iterator

from clients.evaluation import UNMASKED, Evaluation, TaskInfo
from clients.reporting.figures import NOTHING, SIGNIFICANT, budget_text, estimate_cell, metric_title
from clients.task import Metric
from crane_serve.common.numbers.bootstrap import Estimate
from crane_serve.common.reports.content import Cell, Section, Table
from crane_serve.common.reports.numbers import number_text
from crane_serve.common.reports.render import cut
from crane_serve.common.reports.settings import SHORT, brief, flat

_FAILURES_SHOWN = 200


def overview_section(evaluation: Evaluation) -> Section:
    """Everything that a second person needs to judge and repeat the evaluation."""
    failures = (_failures(evaluation),) if evaluation.failures else ()
    return Section(
        "What was asked",
        (_size(evaluation), *_chance_warnings(evaluation), _comparisons(evaluation), _intervals(evaluation)),
        (_level_table(evaluation),),
        parts=(
            Section("Masks", tables=(_mask_table(evaluation),)),
            Section("Tasks", tables=(_task_table(evaluation),)),
            Section("Settings", tables=(_setting_table(evaluation),)),
            *failures,
        ),
    )


def at_chance(level: Estimate, chance: float, metric: Metric) -> str:
    """A warning if an unmasked level is not better than guessing; empty if it is."""
    low = level.mean if level.low is None else level.low
    high = level.mean if level.high is None else level.high
    if low <= chance <= high:
        return "at chance: a loss here cannot be seen"
    worse = high < chance if metric.higher_is_better else low > chance
    return "below chance: a loss here cannot be seen" if worse else ""


def _size(evaluation: Evaluation) -> str:
    masks = len(evaluation.masks) - (UNMASKED in evaluation.masks)
    work = evaluation.throughput
    sessions = "one session" if work.sessions == 1 else f"{work.sessions:,} sessions"
    failed = (
        f" {len(evaluation.failures):,} items failed; they are left out of every figure." if evaluation.failures else ""
    )
    return (
        f"{evaluation.model.get('name', 'The model')} under {masks:,} masks and without, in "
        f"{', '.join(evaluation.languages)}: {work.answers:,} answers, {work.tokens:,} tokens, in {work.seconds:,.1f} "
        f"s ({work.answers_per_s:,.1f} answers per second, {sessions}).{failed}"
    )


def _comparisons(evaluation: Evaluation) -> str:
    tested = [cell for cell in evaluation.cells if cell.p_value is not None and cell.q_value is not None]
    if not tested:
        return "No change was tested against chance."
    small = sum(cell.p_value is not None and cell.p_value < SIGNIFICANT for cell in tested)
    discoveries = sum(cell.q_value is not None and cell.q_value < SIGNIFICANT for cell in tested)
    return (
        f"{len(tested):,} changes were tested, those of random controls left out. If no mask did anything, about "
        f"{number_text(SIGNIFICANT * len(tested), 1)} of them would have p < {SIGNIFICANT:g} by chance; {small:,} "
        f"have. q is p after Benjamini and Hochberg over all of them: of the {discoveries:,} with q < {SIGNIFICANT:g}, "
        f"about {number_text(SIGNIFICANT * discoveries, 1)} or fewer are expected to be chance. Tests of one task "
        "share their items and are not independent."
    )


def _intervals(evaluation: Evaluation) -> str:
    how = evaluation.intervals
    return (
        f"[low, high] is a {how.confidence:.0%} interval: {how.method}, {how.resamples:,} resamples, seed {how.seed}. "
        "It covers the choice of items, not the choice of neurons, and is not corrected for the number of cells."
    )


def _chance_warnings(evaluation: Evaluation) -> tuple[str, ...]:
    languages_of: dict[tuple[str, str, str], list[str]] = {}
    for task, metric, language in _levels(evaluation):
        if words := _chance_words(evaluation, task, metric, language):
            languages_of.setdefault((task.name, metric.title, words), []).append(language)
    return tuple(
        f"{task} ({metric}) in {', '.join(languages)}: the unmasked model is {words}."
        for (task, metric, words), languages in languages_of.items()
    )


def _levels(evaluation: Evaluation) -> Iterator[tuple[TaskInfo, Metric, str]]:
    for task in evaluation.tasks:
        for metric in task.metrics:
            for language in task.languages:
                yield task, metric, language


def _chance_words(evaluation: Evaluation, task: TaskInfo, metric: Metric, language: str) -> str:
    chance = task.chance.get(metric.name, {}).get(language)
    level = _unmasked(evaluation, task, metric, language)
    return "" if chance is None or level is None else at_chance(level, chance, metric)


def _unmasked(evaluation: Evaluation, task: TaskInfo, metric: Metric, language: str) -> Estimate | None:
    cell = evaluation.cell(task.name, metric.name, language, UNMASKED)
    return None if cell is None else cell.level


def _level_table(evaluation: Evaluation) -> Table:
    rows = []
    for task, metric, language in _levels(evaluation):
        level = _unmasked(evaluation, task, metric, language)
        chance = task.chance.get(metric.name, {}).get(language)
        rows.append(
            (
                Cell(task.name),
                Cell(metric_title(metric)),
                Cell(language),
                Cell(f"{task.items.get(language, 0):,}"),
                estimate_cell(level, 3),
                Cell(NOTHING if chance is None else number_text(chance, 3)),
                Cell(_chance_words(evaluation, task, metric, language) or NOTHING),
            )
        )
    columns = ("task", "metric", "language", "items", "unmasked level", "chance", "note")
    return Table(columns, tuple(rows), "The model without a mask")


def _mask_table(evaluation: Evaluation) -> Table:
    columns = ("mask", "method", "made for", "budget", "seed", "neurons", "digest")
    rows = (
        (
            Cell(mask.name),
            Cell(mask.method or NOTHING),
            Cell(mask.language or NOTHING),
            Cell(budget_text(mask.budget)),
            Cell(NOTHING if mask.seed is None else str(mask.seed)),
            Cell(f"{mask.neurons:,}"),
            Cell(mask.digest[:SHORT] if mask.digest else NOTHING),
        )
        for mask in evaluation.masks.values()
    )
    return Table(columns, tuple(rows))


def _task_table(evaluation: Evaluation) -> Table:
    columns = ("task", "kind", "metrics, the headline first", "settings", "digests of the items")
    rows = (
        (
            Cell(task.name),
            Cell(task.kind),
            Cell("; ".join(map(metric_title, task.metrics))),
            Cell(_settings_text(task) or NOTHING),
            Cell(", ".join(f"{language} {digest[:SHORT]}" for language, digest in task.digests.items()) or NOTHING),
        )
        for task in evaluation.tasks
    )
    return Table(columns, tuple(rows), prose=True)


def _settings_text(task: TaskInfo) -> str:
    settings = {name: value for name, value in task.settings.items() if name not in ("kind", "name")}
    return "\n".join(f"{name}: {brief(value)}" for name, value in settings.items())


def _setting_table(evaluation: Evaluation) -> Table:
    seeds = sorted({mask.seed for mask in evaluation.masks.values() if mask.seed is not None})
    settings = {
        **{f"model {name}": brief(value) for name, value in flat(evaluation.model)},
        "server version": evaluation.server_version or NOTHING,
        **{f"version of {name}": version for name, version in evaluation.versions.items()},
        "seeds of drawn masks": ", ".join(map(str, seeds)) or NOTHING,
        "seed of intervals and tests": str(evaluation.intervals.seed),
        "made by": evaluation.created_by,
    }
    return Table(("setting", "value"), tuple((Cell(name), Cell(value)) for name, value in settings.items()))


def _failures(evaluation: Evaluation) -> Section:
    first_failures = evaluation.failures[:_FAILURES_SHOWN]
    rest = len(evaluation.failures) - len(first_failures)
    columns = ("task", "mask", "language", "item", "error")
    rows = (
        tuple(
            map(Cell, (failure.task, failure.mask, failure.language, cut(failure.item, 100), cut(failure.error, 300)))
        )
        for failure in first_failures
    )
    more = (f"{rest:,} more are listed in results.json.",) if rest else ()
    return Section(f"Failed items ({len(evaluation.failures):,})", more, (Table(columns, tuple(rows)),), folded=True)
