"""Corpus: documents per language, read from a directory of `{lang}.jsonl` or `{lang}.txt` files."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

EMBEDDED_CORPUS = Path(__file__).parent / "parallel_corpus"

_LANGUAGE = re.compile(r"[a-z0-9_-]+")
_SUFFIXES = (".jsonl", ".txt")


class CorpusError(ValueError):
    """A corpus cannot be read or used; the message names the file, and the line where there is one."""


@dataclass(frozen=True)
class Document:
    """A text with an id that is unique within its language."""

    id: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents per language, in file order, of one split.

    documents: language -> its documents; split: the split they belong to, or None for a whole corpus.
    """

    documents: Mapping[str, tuple[Document, ...]]
    split: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "documents", MappingProxyType(dict(self.documents)))

    @classmethod
    def load(cls, directory: Path, split: str | None = None, languages: Sequence[str] | None = None) -> "Corpus":
        """Read a corpus directory.

        Each language is `{lang}.jsonl` (a line is `{"id", "text"}`, optionally with `"split"`) or `{lang}.txt` (one
        document a line, with ids `line-1`, `line-2`, ...); blank lines are skipped. `languages` picks and orders
        them (default: all, by name). A corpus in which no document has a split is used whole, whatever `split` says.

        Raises CorpusError for a missing directory, language or split, and for malformed, empty or ambiguous files.
        """
        files = _language_files(directory)
        wanted = tuple(files) if languages is None else tuple(dict.fromkeys(languages))
        if not wanted:
            raise CorpusError(f"no language of {directory} was asked for; it holds {', '.join(files)}")
        for language in wanted:
            if language not in files:
                raise CorpusError(f"{directory} holds no language {language!r}; it holds {', '.join(files)}")
        lines = {language: _read(files[language]) for language in wanted}
        if split is None or not any(line.split is not None for of_language in lines.values() for line in of_language):
            return cls({language: tuple(line.document for line in lines[language]) for language in wanted})
        return cls({language: _of_split(files[language], lines[language], split) for language in wanted}, split)

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.documents)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of every language, id and text; the order of the languages does not matter."""
        content = hashlib.sha256()
        for language in sorted(self.documents):
            for document in self.documents[language]:
                content.update(json.dumps([language, document.id, document.text]).encode())
        return content.hexdigest()


@dataclass(frozen=True)
class _Line:
    number: int
    document: Document
    split: str | None


def _language_files(directory: Path) -> dict[str, Path]:
    if not directory.is_dir():
        raise CorpusError(f"{directory} is not a directory; expected one with {{lang}}.jsonl or {{lang}}.txt files")
    files: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix not in _SUFFIXES or path.name.startswith("."):
            continue
        language = path.stem
        if not _LANGUAGE.fullmatch(language):
            raise CorpusError(f"{path}: {language!r} cannot name a language; expected characters of a-z, 0-9, _ and -")
        if language in files:
            raise CorpusError(f"{directory} holds both {files[language].name} and {path.name}; expected one of them")
        files[language] = path
    if not files:
        raise CorpusError(f"{directory} holds no language; expected {{lang}}.jsonl or {{lang}}.txt files")
    return files


def _read(path: Path) -> list[_Line]:
    parse = _from_json if path.suffix == ".jsonl" else _from_text
    lines: list[_Line] = []
    first_line: dict[str, int] = {}
    for number, content in _content_lines(path):
        try:
            line = parse(number, content)
            line.document.text.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(f"{path}:{number}: the text holds a surrogate that is no character") from error
        except ValueError as error:
            raise CorpusError(f"{path}:{number}: {error}") from error
        identifier = line.document.id
        if identifier in first_line:
            raise CorpusError(f"{path}:{number}: id {identifier!r} stands already in line {first_line[identifier]}")
        first_line[identifier] = number
        lines.append(line)
    if not lines:
        raise CorpusError(f"{path} holds no documents")
    return lines


def _content_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, content in enumerate(file, start=1):
                if stripped := content.strip():
                    yield number, stripped
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _from_text(number: int, content: str) -> _Line:
    return _Line(number, Document(f"line-{number}", content), None)


def _from_json(number: int, content: str) -> _Line:
    try:
        fields: Any = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(fields, dict):
        raise ValueError(f'expected an object {{"id", "text"}}, found {type(fields).__name__}')
    for field in ("id", "text"):
        value = fields.get(field)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{field!r} is missing or empty; expected a string")
    split = fields.get("split")
    if split is not None and not isinstance(split, str):
        raise ValueError(f"'split' is {split!r}; expected a string")
    return _Line(number, Document(fields["id"], fields["text"]), split)


def _of_split(path: Path, lines: list[_Line], split: str) -> tuple[Document, ...]:
    for line in lines:
        if line.split is None:
            raise CorpusError(f"{path}:{line.number}: document {line.document.id!r} has no split, but others have")
    documents = tuple(line.document for line in lines if line.split == split)
    if not documents:
        existing = ", ".join(dict.fromkeys(line.split for line in lines if line.split is not None))
        raise CorpusError(f"{path} has no documents of split {split!r}; it has {existing}")
    return documents
