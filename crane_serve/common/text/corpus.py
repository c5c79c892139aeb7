"""Corpus: documents per language, read from a directory with a file for each."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from crane_serve.common.text.language_files import language_files
from crane_serve.common.text.records import TEXT_FORMATS, Record, format_of, is_table, kind_of, listed, read_records
from crane_serve.common.text.records import CorpusError as CorpusError

EMBEDDED_CORPUS = Path(__file__).parent / "parallel_corpus"

_LANGUAGE_PLACE = "{lang}"

# A word, or one character of a script that sets no spaces: Thai, Lao, Burmese, Khmer, kana, Han.
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]|\w+")


class Form(StrEnum):
    """A normal form of Unicode that texts can be brought into."""

    NFC = "NFC"


@dataclass(frozen=True)
class Document:
    """A text with an id that is unique within its language."""

    id: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents per language, in file order, of one split.

    documents: language -> its documents; split: the split they belong to, or None for a whole corpus; sources: language
    -> the origin of its texts for messages, such as a file's name; others: language -> split -> the documents of the
    file's other splits; joints: language -> lines that began with a byte order mark, which was taken away; normalised:
    the form that the texts were converted to, None if they are unchanged.
    """

    documents: Mapping[str, tuple[Document, ...]]
    split: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    others: Mapping[str, Mapping[str, tuple[Document, ...]]] = field(default_factory=dict, compare=False, repr=False)
    joints: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    normalised: Form | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("documents", "sources", "others", "joints"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @classmethod
    def load(
        cls,
        directory: Path,
        split: str | None = None,
        languages: Sequence[str] | None = None,
        text_column: str = "text",
        normalise: Form | None = None,
    ) -> "Corpus":
        """Read a corpus directory, which has a file for each language in one of the formats of `read_records`.

        A row has a text, in the field or column `text_column` (`{lang}` in it stands for the language), and maybe a
        `split`. Its `id` is a string or a whole number; in a table (.csv, .tsv, .parquet) the column may be missing,
        and ids are then `row-1`, `row-2`, ...; in a .txt a line is a document, with ids `line-1`, `line-2`, ...
        `languages` picks and orders them (default: all, by name). If no document of a corpus has a split, all of it is
        used, and `split` is ignored. normalise: the form of Unicode that texts are brought into.

        Raises CorpusError for a missing directory, language or split, for malformed, empty or ambiguous files, for a
        file that may be a language but is not read (see `language_files`), and for a file with fewer than two words.
        """
        files = language_files(directory, languages)
        contents = {
            language: _LanguageFile.read(path, text_column.replace(_LANGUAGE_PLACE, language), normalise)
            for language, path in files.items()
        }
        sources = {language: path.name for language, path in files.items()}
        joints = {language: of.joints for language, of in contents.items() if of.joints}
        if split is None or all(entry.split is None for of in contents.values() for entry in of.documents):
            whole = {language: of.whole for language, of in contents.items()}
            return cls(whole, sources=sources, joints=joints, normalised=normalise)
        by_split = {language: of.by_split(split) for language, of in contents.items()}
        of_split = {language: of.pop(split) for language, of in by_split.items()}
        return cls(of_split, split, sources, by_split, joints, normalise)

    def spread(self, limit: int | None) -> "Corpus":
        """At most `limit` documents of each language, at even distances; all for None.

        They come from as many of a split's sources as possible, and from the same places in parallel languages.
        """
        if limit is None:
            return self
        documents = {
            language: of if len(of) <= limit else tuple(of[index * len(of) // limit] for index in range(limit))
            for language, of in self.documents.items()
        }
        return replace(self, documents=documents)

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
class _PlacedDocument:
    """A document with its place. where: the file and the place in it; split: of its row, if it has one."""

    where: str
    document: Document
    split: str | None


@dataclass(frozen=True)
class _LanguageFile:
    path: Path
    documents: tuple[_PlacedDocument, ...]
    joints: tuple[int, ...]

    @classmethod
    def read(cls, path: Path, text_column: str, normalise: Form | None) -> "_LanguageFile":
        """Raises CorpusError for rows that are not documents, and for a duplicate id."""
        records = read_records(path)
        if format_of(path) in TEXT_FORMATS:
            text_column = "text"
        documents: list[_PlacedDocument] = []
        first: dict[str, Record] = {}
        for record in records.rows:
            where = record.where(path)
            entry = _PlacedDocument(where, *_document(record, where, text_column, is_table(path), normalise))
            before = first.setdefault(entry.document.id, record)
            if before is not record:
                raise CorpusError(f"{where}: id {entry.document.id!r} is already used in {before.place}")
            documents.append(entry)
        require_words([entry.document.text for entry in documents], str(path))
        return cls(path, tuple(documents), records.joints)

    @property
    def whole(self) -> tuple[Document, ...]:
        return tuple(entry.document for entry in self.documents)

    def by_split(self, wanted: str) -> dict[str, tuple[Document, ...]]:
        """Split -> its documents. Raises CorpusError for a document without a split, and for none of `wanted`."""
        splits: dict[str, list[Document]] = {}
        for entry in self.documents:
            if entry.split is None:
                raise CorpusError(f"{entry.where}: document {entry.document.id!r} has no split, but others have")
            splits.setdefault(entry.split, []).append(entry.document)
        if wanted not in splits:
            raise CorpusError(f"{self.path} has no documents of split {wanted!r}; it has {', '.join(splits)}")
        return {split: tuple(documents) for split, documents in splits.items()}


def normalised(text: str, form: Form | None) -> str:
    """`text` in a normal form of Unicode; unchanged for None."""
    return text if form is None else unicodedata.normalize("NFC", text)


def _document(
    record: Record, where: str, text_column: str, table: bool, normalise: Form | None
) -> tuple[Document, str | None]:
    """The document of a row, and its split."""
    fields = record.fields
    text = fields.get(text_column)
    if table and text_column not in fields:
        raise CorpusError(
            f"{where}: there is no column {text_column!r} for the text; there are {listed(fields)} "
            "(--text-column names another)"
        )
    if text is None or (isinstance(text, str) and not text.strip()):
        raise CorpusError(f"{where}: {text_column!r} is missing or empty; expected a string")
    if not isinstance(text, str):
        raise CorpusError(f"{where}: {text_column!r} is {kind_of(text)}; expected a string")
    split = fields.get("split") or None
    if split is not None and not isinstance(split, str):
        raise CorpusError(f"{where}: 'split' is {split!r}; expected a string")
    identifier = f"row-{record.number}" if table and "id" not in fields else document_id(fields.get("id"), where)
    return Document(identifier, normalised(text, normalise)), split


def document_id(value: object, where: str) -> str:
    """An id that a row gives, a string or a whole number. Raises CorpusError, which begins with `where`, for others."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise CorpusError(f"{where}: 'id' is missing or empty; expected a string or a whole number")
    if not isinstance(value, str):
        raise CorpusError(f"{where}: 'id' is {kind_of(value)}, {value!r}; expected a string or a whole number")
    return value
