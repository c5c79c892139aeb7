"""Records: the rows of a file in any of the formats that texts come in, each with the place where it stands."""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GZIP = ".gz"
_LONGEST_FIELD = 2**31 - 1  # of a CSV file, in characters; the csv module's default is too small for documents
_BYTE_ORDER_MARK = "\ufeff"
_NAMES_SHOWN, _NAME_SHOWN = 8, 40  # in messages; characters of a name
_SQUAD_FORM = '{"data": [{"paragraphs": [{"context": text, "qas": [{"id", "question", "answers": [{"text"}]}]}]}]}'


class CorpusError(ValueError):
    """A corpus or its files cannot be read or used; the message names the file, and the line where there is one."""


@dataclass(frozen=True)
class Text:
    """The content of a UTF-8 file. joints: the lines from the second on that began with a byte order mark, which is
    taken away: files were joined there."""

    content: str
    joints: tuple[int, ...]

    @property
    def lines(self) -> list[str]:
        """All lines, stripped, blank ones too. Only line feeds and carriage returns end a line."""
        return [line.strip() for line in _with_line_feeds(self.content).split("\n")]


@dataclass(frozen=True)
class Record:
    """A row. number: counted from 1; line: where it begins, in formats that have lines."""

    number: int
    fields: dict[str, Any]
    line: int | None = None

    @property
    def place(self) -> str:
        """Its place in the file, for messages."""
        return f"row {self.number}" if self.line is None else f"line {self.line}"

    def where(self, path: Path) -> str:
        """The file and the place in it, for messages."""
        return f"{path}, row {self.number}" if self.line is None else f"{path}:{self.line}"


@dataclass(frozen=True)
class Records:
    """All rows of a file. joints: as of Text."""

    rows: tuple[Record, ...]
    joints: tuple[int, ...] = ()


def format_of(path: Path) -> str | None:
    """The format that the name of a file says, such as `.csv` or `.csv.gz`; None if it is not one that is read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    for suffix in ("".join(suffixes), suffixes[-1] if suffixes else ""):
        if suffix in FORMATS:
            return suffix
    return None


def is_table(path: Path) -> bool:
    """Whether the rows of a file have columns in common, which its header or schema names."""
    return (format_of(path) or "").removesuffix(_GZIP) in _TABLES


def read_records(path: Path) -> Records:
    """The rows of a file, by the format that its name says: one of FORMATS.

    .jsonl: an object per line; .json: a list of objects, or SQuAD's form, of which every question becomes a row of
    id, context, question, answers and title; .csv and .tsv: with a header line; .txt: a row of id and text per line;
    .parquet. All but the last may be compressed by gzip (.jsonl.gz). Blank lines are skipped.

    Raises CorpusError naming the file, the line or row, and what was expected.
    """
    suffix = format_of(path)
    if suffix is None:
        raise CorpusError(f"{path}: unknown format {path.suffix!r}; expected one of {', '.join(FORMATS)}")
    if suffix == ".parquet":
        return Records(tuple(_parquet_rows(path)))
    text = read_text(path)
    return Records(tuple(_READERS[suffix.removesuffix(_GZIP)](text, path)), text.joints)


def read_text(path: Path) -> Text:
    """The content of a UTF-8 text file, decompressed if its name ends in .gz.

    Raises CorpusError, naming the line, for bytes that are not UTF-8 and for NUL characters, which indicate UTF-16.
    """
    content = _content(path).removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise CorpusError(
            f"{path} cannot be read as UTF-8 text: byte 0x{content[error.start]:02x} in line {number} is of another "
            "encoding; convert the whole file to UTF-8"
        ) from error
    if "\0" in text:
        number = _with_line_feeds(text[: text.index("\0")]).count("\n") + 1
        raise CorpusError(f"{path}:{number} holds a NUL character; expected UTF-8 text, not UTF-16 or binary data")
    if _BYTE_ORDER_MARK not in text:
        return Text(text, ())
    lines = text.split("\n")
    joints = tuple(number for number, line in enumerate(lines, start=1) if line.startswith(_BYTE_ORDER_MARK))
    return Text("\n".join(line.removeprefix(_BYTE_ORDER_MARK) for line in lines), joints)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, as `read_text` reads it and `Text.lines` has them."""
    return read_text(path).lines


def listed(names: Iterable[str]) -> str:
    """Names for messages, shortened where there are many or where they are long."""
    excerpts = [name if len(name) <= _NAME_SHOWN else f"{name[:_NAME_SHOWN]}..." for name in names]
    return ", ".join(excerpts[:_NAMES_SHOWN]) + (", ..." if len(excerpts) > _NAMES_SHOWN else "")


def _content(path: Path) -> bytes:
    try:
        if path.suffix.lower() != _GZIP:
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path} cannot be decompressed: {error}") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error


def _with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _jsonl_rows(text: Text, path: Path) -> Iterator[Record]:
    number = 0
    for place, line in enumerate(text.lines, start=1):
        if line:
            number += 1
            where = f"{path}:{place}"
            yield Record(number, _object(_parsed(line, where), where), place)


def _json_rows(text: Text, path: Path) -> Iterator[Record]:
    if not text.content.strip():
        return
    content = _parsed(text.content, str(path))
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = list(_squad_rows(content["data"], path))
    if not isinstance(content, list):
        raise CorpusError(f"{path}: expected a list of objects or {_SQUAD_FORM}; found {kind_of(content)}")
    for number, entry in enumerate(content, start=1):
        yield Record(number, _object(entry, f"{path}, row {number}"))


def _squad_rows(articles: Any, path: Path) -> Iterator[dict[str, Any]]:
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {
                        "id": question["id"],
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": list(dict.fromkeys(answer["text"] for answer in question["answers"])),
                        "title": article.get("title", ""),
                    }
    except (KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path} is not of SQuAD's form {_SQUAD_FORM}: {type(error).__name__}: {error}") from error


def _table_rows(delimiter: str) -> Callable[[Text, Path], Iterator[Record]]:
    def rows(text: Text, path: Path) -> Iterator[Record]:
        csv.field_size_limit(_LONGEST_FIELD)
        table = csv.reader(io.StringIO(text.content, newline=""), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        number, line, top = 0, 1, 1
        try:
            for cells in table:
                place, line = line, table.line_num + 1
                where = f"{path}:{place}"
                if not cells:
                    continue
                if header is None:
                    header, top = _header(cells, where), place
                elif cells == header:
                    raise CorpusError(f"{where} is the header again; files were joined there")
                elif len(cells) != len(header):
                    raise CorpusError(f"{where}: {len(cells)} cells; expected {len(header)} as in line {top}")
                else:
                    number += 1
                    yield Record(number, dict(zip(header, cells, strict=True)), place)
        except csv.Error as error:
            raise CorpusError(f"{path}:{line}: {error}, in the row that begins there") from error

    return rows


def _header(cells: list[str], where: str) -> list[str]:
    if len(set(cells)) < len(cells) or not all(cells):
        raise CorpusError(f"{where}: expected a header of different names; found {listed(map(repr, cells))}")
    return cells


def _text_rows(text: Text, path: Path) -> Iterator[Record]:
    number = 0
    for place, line in enumerate(text.lines, start=1):
        if line:
            number += 1
            if number == 1 and _is_object(line):
                expected = "a file with an object per line is named .jsonl"
                raise CorpusError(f"{path}:{place} is a JSON object, not a text; {expected}")
            yield Record(number, {"id": f"line-{place}", "text": line}, place)


def _parquet_rows(path: Path) -> Iterator[Record]:
    from pyarrow import parquet

    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except FileNotFoundError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or 'there is no such file'}") from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # what its own errors derive from
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CorpusError(f"{path} cannot be read as Parquet: {reason}") from error
    for number, row in enumerate(rows, start=1):
        yield Record(number, row)


def _parsed(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        hint = "; a file with an object per line is named .jsonl" if error.msg == "Extra data" else ""
        raise CorpusError(f"{where}: not JSON: {error.msg} at {line}column {error.colno}{hint}") from error
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where}: a text holds a surrogate that is no character") from error
    except RecursionError as error:
        raise CorpusError(f"{where}: JSON that is nested too deeply") from error
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorpusError(f"{where}: expected an object; found {kind_of(value)}")
    return value


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def kind_of(value: Any) -> str:
    """The JSON type of a value, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


_TABLES = (".csv", ".tsv", ".parquet")
_READERS: Mapping[str, Callable[[Text, Path], Iterator[Record]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _table_rows(","),
    ".tsv": _table_rows("\t"),
    ".txt": _text_rows,
}
TEXT_FORMATS = (".txt", f".txt{_GZIP}")
FORMATS = (*_READERS, ".parquet", *(f"{suffix}{_GZIP}" for suffix in _READERS))
