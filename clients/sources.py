"""RowSource: where a task's rows come from: files, a corpus directory or a data set of the Hugging Face Hub."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import to_jsonable_python

from clients.errors import EvaluationError
from crane_serve.common.text.corpus import EMBEDDED_CORPUS, Corpus, CorpusError, Form, normalised
from crane_serve.common.text.language_files import language_files
from crane_serve.common.text.records import format_of, read_records

Row = dict[str, JsonValue]

EMBEDDED = "embedded"
PLACES = ("files", "corpus", "dataset")
_LANGUAGE = "{lang}"
_HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"  # alone, `text` would be a reader of all files in the working directory
_ID_COLUMNS = ("id", "idx")

_Text = Annotated[str, Field(min_length=1)]


class RowSource(BaseModel):
    """Where rows come from: exactly one of files, corpus and dataset.

    files: a path with `{lang}` for the language, or language -> path; relative paths start from the plan's directory.
    The suffix says the format, as `read_records` has it: .jsonl, .json (a list of objects, or SQuAD's form), .csv,
    .tsv, .txt, each perhaps with .gz, and .parquet. corpus: a directory as `Corpus` reads it, or the word `embedded`
    for the one that comes with this package; rows of id and text. dataset: NAMESPACE/NAME on the Hugging Face Hub,
    `{lang}` allowed, which needs the package `datasets`.

    config: of a dataset, `{lang}` allowed; if there are several, their rows are joined, with the config's name in a
    field `config` and before their ids. revision: of a dataset's repository: a commit, branch or tag. `datasets` 4 and
    later refuse data sets with a loading script; the Hub has copies of some as revision refs/convert/parquet. split: of
    a dataset or corpus, or of files whose rows have a field `split`; columns: field of the row -> column of the source
    that it comes from, `{lang}` allowed; codes: language -> value of `{lang}`, if that is not its name (vi: vie_Latn);
    id: the column that identifies a row, or several; normalise: NFC, the normal form of Unicode that all texts except
    ids are converted to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: _Text | dict[str, _Text] | None = None
    corpus: _Text | None = None
    dataset: _Text | None = None
    config: _Text | Annotated[tuple[_Text, ...], Field(min_length=1)] | None = None
    revision: _Text | None = None
    split: _Text | None = None
    columns: dict[str, _Text] = {}
    codes: dict[str, _Text] = {}
    normalise: Form | None = None
    id: _Text | Annotated[tuple[_Text, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        places = [place for place in PLACES if getattr(self, place) is not None]
        if len(places) != 1:
            raise ValueError(f"expected one of {', '.join(PLACES)}; found {' and '.join(places) or 'none'}")
        if self.dataset is not None and self.split is None:
            raise ValueError("a dataset needs a split, such as test")
        if self.dataset is None and (self.config is not None or self.revision is not None):
            raise ValueError("config and revision belong to a dataset")
        return self

    def describe(self, language: str) -> str:
        """Its name in messages, such as `hf:facebook/xnli:vi (split test)`."""
        if self.files is not None:
            place = self.files if isinstance(self.files, str) else self.files.get(language, f"files of {language}")
        elif self.corpus is not None:
            place = f"{self.corpus} corpus" if self.corpus == EMBEDDED else self.corpus
            place = f"{place}, language {self._code(language)}"
        else:
            place = f"hf:{self.dataset}" + (f":{self.config}" if isinstance(self.config, str) else "")
        return self._placed(place, language) + (f" (split {self.split})" if self.split else "")

    def rows(self, language: str, base: Path) -> list[Row]:
        """All rows of a language in the order of the source, each with a string `id` that no other row has.

        The id comes from the columns that `id` names (several are joined by `/`), else from a column id or idx; else it
        is `row-N`, and in text files `line-N`, counted from 1. base: directory for relative paths.

        Raises EvaluationError naming the source, the place in it, and what was expected.
        """
        where = self.describe(language)
        try:
            rows = self._read(language, base)
        except CorpusError as error:
            raise EvaluationError(str(error)) from error
        if not rows:
            raise EvaluationError(f"{where} holds no rows; expected one at least")
        identified: dict[str, Row] = {}
        for number, row in enumerate(rows, start=1):
            renamed = self._renamed(row, language, f"{where}, row {number}")
            identifier = self._identifier(renamed if self.id is None else row, number, where)
            if identifier in identified:
                raise EvaluationError(
                    f"{where}, row {number}: id {identifier!r} is already used; expected different ones, "
                    "for which `id` may name other columns"
                )
            identified[identifier] = {**_normalised(renamed, self.normalise), "id": identifier}
        return list(identified.values())

    def _code(self, language: str) -> str:
        return self.codes.get(language, language)

    def _placed(self, pattern: str, language: str) -> str:
        return pattern.replace(_LANGUAGE, self._code(language))

    def _read(self, language: str, base: Path) -> list[Row]:
        if self.files is not None:
            return self._of_split(_read_file(self._path(language, base)), language)
        if self.corpus is not None:
            directory = EMBEDDED_CORPUS if self.corpus == EMBEDDED else base / self._placed(self.corpus, language)
            code = self._code(language)
            documents = Corpus.load(directory, self.split, [code]).documents[code]
            return [{"id": document.id, "text": document.text} for document in documents]
        return self._dataset_rows(language)

    def local(self, language: str, base: Path) -> tuple[Path, ...]:
        """The files of this machine that the rows of a language come from; for a corpus that cannot be read, its
        directory. base: as of `rows`. None are of the packaged corpus or of the Hub."""
        if self.files is not None:
            return (self._path(language, base),)
        if self.corpus in (None, EMBEDDED):
            return ()
        directory = base / self._placed(str(self.corpus), language)
        try:
            return (directory, *language_files(directory, [self._code(language)]).values())
        except (CorpusError, OSError):
            return (directory,)

    def _path(self, language: str, base: Path) -> Path:
        if isinstance(self.files, dict) and language not in self.files:
            raise EvaluationError(f"no file for the language {language!r}; there are files for {', '.join(self.files)}")
        pattern = self.files[language] if isinstance(self.files, dict) else str(self.files)
        return base / self._placed(pattern, language)

    def _of_split(self, rows: list[Row], language: str) -> list[Row]:
        if self.split is None:
            return rows
        splits = dict.fromkeys(str(row["split"]) for row in rows if "split" in row)
        if self.split not in splits:
            available = f"there are {', '.join(splits)}" if splits else "its rows have no field `split`"
            raise EvaluationError(f"{self.describe(language)}: no row is of this split; {available}")
        return [row for row in rows if row.get("split") == self.split]

    def _dataset_rows(self, language: str) -> list[Row]:
        if not isinstance(self.config, tuple):
            return self._downloaded(self.config, language)
        return [{**row, "config": config} for config in self.config for row in self._downloaded(config, language)]

    def _downloaded(self, config: str | None, language: str) -> list[Row]:
        where = self.describe(language)
        name = self._placed(str(self.dataset), language)
        placed = None if config is None else self._placed(config, language)
        if isinstance(self.config, tuple):
            where = f"{where}, config {placed}"
        if not re.fullmatch(_HUB_NAME, name) or Path(name).exists():
            raise EvaluationError(
                f"{where}: expected NAMESPACE/NAME of the Hub, and no path; data sets on this machine are `files`"
            )
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise EvaluationError(
                f"{where}: the package 'datasets' is not installed; pip install datasets, or give `files`"
            ) from error
        try:
            # No loading script of a data set runs, whatever `datasets` would do by itself.
            records = load_dataset(name, placed, split=self.split, revision=self.revision, trust_remote_code=False)
            return _rows_of(records)
        except (OSError, ValueError, RuntimeError) as error:  # base classes of its own errors and of network errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            advice = "check its name and the network"
            if "scripts are no longer supported" in reason:
                advice = "give a `revision` with data files (refs/convert/parquet, if the Hub has one)"
            raise EvaluationError(
                f"{where} cannot be loaded: {reason}; {advice}, or download it and give `files`"
            ) from error

    def _renamed(self, row: Row, language: str, where: str) -> Row:
        taken = {field: self._placed(column, language) for field, column in self.columns.items()}
        for column in taken.values():
            _require(row, column, where)
        rest = {column: value for column, value in row.items() if column not in taken.values()}
        return {**rest, **{field: row[column] for field, column in taken.items()}}

    def _identifier(self, row: Row, number: int, where: str) -> str:
        if self.id is None:
            columns: tuple[str, ...] = tuple(column for column in _ID_COLUMNS if row.get(column) is not None)[:1]
        else:
            columns = (self.id,) if isinstance(self.id, str) else self.id
        for column in columns:
            value = _require(row, column, f"{where}, row {number}")
            if isinstance(value, bool | dict | list) or value is None or not str(value).strip():
                raise EvaluationError(
                    f"{where}, row {number}: id column {column!r} holds {value!r}; expected text or a number"
                )
        identifier = "/".join(str(row[column]) for column in columns)
        if isinstance(self.config, tuple) and identifier:
            return f"{row['config']}/{identifier}"
        return identifier or f"row-{number}"


def _normalised(row: Row, form: Form | None) -> Row:
    return row if form is None else {name: _normal(value, form) for name, value in row.items()}


def _normal(value: JsonValue, form: Form) -> JsonValue:
    if isinstance(value, str):
        return normalised(value, form)
    if isinstance(value, list):
        return [_normal(entry, form) for entry in value]
    return {name: _normal(entry, form) for name, entry in value.items()} if isinstance(value, dict) else value


def _require(row: Row, column: str, where: str) -> JsonValue:
    if column not in row:
        raise EvaluationError(f"{where}: there is no column {column!r}; there are {', '.join(row)}")
    return row[column]


def _rows_of(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Records where values without a form in JSON, such as dates, are text."""
    return [to_jsonable_python(dict(record), bytes_mode="base64", fallback=str) for record in records]


def _read_file(path: Path) -> list[Row]:
    if format_of(path) is not None and not path.is_file():
        raise EvaluationError(f"there is no file {path}")
    return _rows_of(record.fields for record in read_records(path).rows)
