"""Corpus: documents per language, read from a directory of `{lang}.jsonl` or `{lang}.txt` files."""

import codecs
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

EMBEDDED_CORPUS = Path(__file__).parent / "parallel_corpus"

_LANGUAGE = re.compile(r"[a-z0-9_-]+")
_SUFFIXES = (".jsonl", ".txt")

# A word, or one character of a script that sets no spaces: Thai, Lao, Burmese, Khmer, kana, Han.
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]|\w+")


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

    documents: language -> its documents; split: the split they belong to, or None for a whole corpus;
    sources: language -> what messages call the place its texts came from, such as a file's name.
    """

    documents: Mapping[str, tuple[Document, ...]]
    split: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "documents", MappingProxyType(dict(self.documents)))
        object.__setattr__(self, "sources", MappingProxyType(dict(self.sources)))

    @classmethod
    def load(cls, directory: Path, split: str | None = None, languages: Sequence[str] | None = None) -> "Corpus":
        """Read a corpus directory.

        Each language is `{lang}.jsonl` (a line is `{"id", "text"}`, optionally with `"split"`) or `{lang}.txt` (one
        document a line, with ids `line-1`, `line-2`, ...); blank lines are skipped. `languages` picks and orders
        them (default: all, by name). A corpus in which no document has a split is used whole, whatever `split` says.

        Raises CorpusError for a missing directory, language or split, for malformed, empty or ambiguous files, and for
        a file that holds no more than one word.
        """
        files = _language_files(directory)
        wanted = tuple(files) if languages is None else tuple(dict.fromkeys(languages))
        if not wanted:
            raise CorpusError(f"no language of {directory} was asked for; it holds {', '.join(files)}")
        for language in wanted:
            if language not in files:
                raise CorpusError(f"{directory} holds no language {language!r}; it holds {', '.join(files)}")
        lines = {language: _read(files[language]) for language in wanted}
        sources = {language: files[language].name for language in wanted}
        if split is None or not any(line.split is not None for of_language in lines.values() for line in of_language):
            whole = {language: tuple(line.document for line in lines[language]) for language in wanted}
            return cls(whole, sources=sources)
        of_split = {language: _of_split(files[language], lines[language], split) for language in wanted}
        return cls(of_split, split, sources)

    def spread(self, limit: int | None) -> "Corpus":
        """At most `limit` documents of each language, at even distances; all for None.

        They come from as many of a split's sources as they can, and from the same places in parallel languages.
        """
        if limit is None:
            return self
        documents = {
            language: of if len(of) <= limit else tuple(of[index * len(of) // limit] for index in range(limit))
            for language, of in self.documents.items()
        }
        return Corpus(documents, self.split, self.sources)

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages in the order of the documents."""
        return tuple(self.documents)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of every language, id and text; the order of the languages does not matter."""
        content = hashlib.sha256()
        for language in sorted(self.documents):
            for document in self.documents[language]:
                content.update(json.dumps([language, document.id, document.text]).encode())
        return content.hexdigest()


def check_language(name: str, where: str) -> str:
    """Return `name` if it can name a language; raise CorpusError, which begins with `where`, otherwise."""
    if not _LANGUAGE.fullmatch(name):
        raise CorpusError(f"{where}: {name!r} cannot name a language; expected characters of a-z, 0-9, _ and -")
    return name


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, stripped, blank ones too. Only line feeds and carriage returns end a line.

    Raises CorpusError, naming the line, for bytes that are not UTF-8 and for NUL characters, which betray UTF-16.
    """
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise CorpusError(
            f"{path} cannot be read as UTF-8 text: byte 0x{content[error.start]:02x} in line {number} is of another "
            "encoding; convert the whole file to UTF-8"
        ) from error
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise CorpusError(f"{path}:{number} holds a NUL character; expected UTF-8 text, not UTF-16 or binary data")
    return lines


def require_words(texts: Sequence[str], where: str) -> None:
    """Raise CorpusError, which begins with `where`, unless there are documents, with two words at least among them."""
    if not texts:
        raise CorpusError(f"{where} holds no documents")
    words = 0
    for text in texts:
        words += len(_WORD.findall(text))
        if words > 1:
            return
    raise CorpusError(f"{where} holds {words or 'no'} word{'s' * (words == 0)}; expected texts in the language")


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
        language = check_language(path.stem, str(path))
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
    for number, content in enumerate(read_lines(path), start=1):
        if not content:
            continue
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
    require_words([line.document.text for line in lines], str(path))
    return lines


def _from_text(number: int, content: str) -> _Line:
    return _Line(number, Document(f"line-{number}", content), None)


def _from_json(number: int, content: str) -> _Line:
    try:
        fields: Any = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(fields, dict):
        raise ValueError(f'expected an object {{"id", "text"}}, found {type(fields).__name__}')
    for key in ("id", "text"):
        value = fields.get(key)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{key!r} is missing or empty; expected a string")
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
