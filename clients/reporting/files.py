"""Files of values for other programs: every cell, and every answer."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.evaluation import Cell, Evaluation, TaskInfo
from clients.task import Answers, Question
from crane_serve.common.atomic import write_atomically
from crane_serve.common.numbers.bootstrap import Estimate

if TYPE_CHECKING:
    import pyarrow as pa

_TEXTS = ("task", "metric", "unit", "language", "mask", "mask_digest", "method", "mask_language")
_FLAGS = ("higher_is_better", "own_language", "beyond_band")
_COUNTS = ("seed", "neurons", "items", "band_draws")
_NUMBERS = (
    *("budget", "chance", "level", "level_low", "level_high", "change", "change_low", "change_high"),
    *("relative", "relative_low", "relative_high", "damage", "p_value", "q_value"),
    *("band_mean", "band_low", "band_high"),
)
_DICTIONARY_BYTES = 64 << 20  # of one column and row group: room for all prompts of a language, each stored once


def cell_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A row for each task, metric, language and mask, by column; None for what does not exist.

    Estimates take three columns: the value, `_low` and `_high`. damage: the change with the sign that makes values
    above 0 worse.
    """
    return [_cell_row(evaluation, cell) for cell in evaluation.cells]


def csv_content(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Comma-separated values under the names of the columns, in UTF-8; None is an empty value. Empty if there are no
    rows."""
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return buffer.getvalue().encode("utf-8", "replace")


def columns_of(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    """The value under `name` and the ends of its interval under `name`_low and `name`_high."""
    ends = (None, None, None) if estimate is None else (estimate.mean, estimate.low, estimate.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def write_cells_csv(evaluation: Evaluation, path: Path) -> None:
    """The rows of `cell_rows` at full precision; empty for None."""
    write_atomically(path, csv_content(cell_rows(evaluation)))


def write_cells_parquet(evaluation: Evaluation, path: Path) -> None:
    """The rows of `cell_rows`, typed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = ((_TEXTS, pa.string()), (_FLAGS, pa.bool_()), (_COUNTS, pa.int64()), (_NUMBERS, pa.float64()))
    types = {name: kind for names, kind in kinds for name in names}
    rows = cell_rows(evaluation)
    schema = pa.schema([(name, types[name]) for name in (rows[0] if rows else types)])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, compression="zstd")
    write_atomically(path, buffer.getvalue())


def write_items(evaluation: Evaluation, answers: Answers, path: Path) -> None:
    """Every answer in long form: a row for each answered item, mask and metric, in the order asked.

    Columns: task, language, item, item_digest, mask, mask_digest, prompt, answer (as readers see it), metric, total,
    weight; a metric's level is sum(total) / sum(weight). Texts are dictionary-encoded: a prompt is stored once however
    many masks it is asked under. Each task and language is a row group.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.dictionary(pa.int32(), pa.string())
    names = ("task", "language", "item", "item_digest", "mask", "mask_digest", "prompt", "answer", "metric")
    schema = pa.schema([*((name, text) for name in names), ("total", pa.float64()), ("weight", pa.float64())])
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd", dictionary_pagesize_limit=_DICTIONARY_BYTES) as writer:
        for task in evaluation.tasks:
            for language in task.languages:
                rows = list(_item_rows(evaluation, answers, task, language))
                columns = zip(*rows, strict=True) if rows else ((),) * len(schema)
                arrays = [_array(column, field) for column, field in zip(columns, schema, strict=True)]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    write_atomically(path, buffer.getvalue())


def _array(values: tuple[Any, ...], field: "pa.Field") -> "pa.Array":
    import pyarrow as pa

    if not pa.types.is_dictionary(field.type):
        return pa.array(values, field.type)
    whole = [None if value is None else value.encode("utf-8", "replace").decode() for value in values]
    return pa.array(whole, pa.string()).dictionary_encode().cast(field.type)


def _item_rows(evaluation: Evaluation, answers: Answers, info: TaskInfo, language: str) -> Iterator[tuple[Any, ...]]:
    task = answers.tasks.get(info.name)
    if task is None:
        return
    items = [(item, item.digest) for item in answers.items.get(info.name, {}).get(language, ())]
    for mask in evaluation.masks.values():
        for item, digest in items:
            answer = answers.answers.get(Question(info.name, language, item.id, mask.name))
            if answer is None:
                continue
            text = task.shown(item, answer)
            for metric, value in task.measure(item, answer).items():
                yield (
                    *(info.name, language, item.id, digest, mask.name, mask.digest),
                    *(item.prompt, text, metric, value.total, value.weight),
                )


def _cell_row(evaluation: Evaluation, cell: Cell) -> dict[str, Any]:
    task, mask = evaluation.task(cell.task), evaluation.masks[cell.mask]
    metric = task.metric(cell.metric)
    return {
        "task": cell.task,
        "metric": cell.metric,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "language": cell.language,
        "mask": cell.mask,
        "mask_digest": mask.digest,
        "method": mask.method,
        "mask_language": mask.language,
        "own_language": mask.language == cell.language,
        "budget": mask.budget,
        "seed": mask.seed,
        "neurons": mask.neurons,
        "items": cell.items,
        "chance": task.chance.get(cell.metric, {}).get(cell.language),
        **columns_of("level", cell.level),
        **columns_of("change", cell.change),
        **columns_of("relative", cell.relative),
        "damage": None if cell.change is None else metric.damage(cell.change.mean),
        "p_value": cell.p_value,
        "q_value": cell.q_value,
        "band_mean": None if cell.band is None else cell.band.mean,
        "band_low": None if cell.band is None else cell.band.low,
        "band_high": None if cell.band is None else cell.band.high,
        "band_draws": None if cell.band is None else cell.band.draws,
        "beyond_band": cell.beyond_band,
    }
