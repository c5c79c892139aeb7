"""Sources of corpora: where `--corpus` may point."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crane_serve.common.text.corpus import Corpus, CorpusError, Document, Form, document_id, normalised, require_words
from crane_serve.common.text.language_files import check_language

_HUB = "hf:"
_PLACE = "{lang}"


@dataclass(frozen=True)
class TextSource:
    """A place for `load_corpus`, and how to read it. notice: called with warnings about the texts, a line each."""

    place: str
    text_column: str = "text"
    normalise: Form | None = None
    notice: Callable[[str], None] = lambda line: None


def load_corpus(
    source: str | Path,
    split: str | None = None,
    languages: Sequence[str] | None = None,
    text_column: str = "text",
    normalise: Form | None = None,
) -> Corpus:
    """The corpus at `source`: a directory (see `Corpus.load`), or `hf:NAME[:CONFIG]` for a dataset of the Hub.

    normalise: the form of Unicode that texts are converted to.

    In the name, configuration and `text_column` of a dataset, `{lang}` stands for the language; `languages` then names
    them, or gives the dataset's codes too: `vi=vie_Latn`. The documents' ids come from a column `id` if there is one;
    else they are `row-1`, `row-2`, ... Rows without text are left out.

    Raises CorpusError, also when the package `datasets` is not installed or the dataset cannot be reached.
    """
    if not str(source).startswith(_HUB):
        return Corpus.load(Path(source), split, languages, text_column, normalise)
    name, _, configuration = str(source).removeprefix(_HUB).partition(":")
    if not name:
        raise CorpusError(f"{source}: expected hf:NAME or hf:NAME:CONFIG")
    if split is None or not languages:
        raise CorpusError(f"{source}: a dataset of the Hub needs a split and the names of its languages")
    codes = _codes(languages, str(source))
    if len(codes) > 1 and _PLACE not in f"{name}{configuration}{text_column}":
        raise CorpusError(
            f"{source}: neither it nor the text column contains {_PLACE}, but there are {len(codes)} languages"
        )
    documents, sources = {}, {}
    for language, code in codes.items():
        placed = [part.replace(_PLACE, code) for part in (name, configuration, text_column)]
        dataset = _Dataset(placed[0], placed[1], placed[2], split)
        documents[language] = tuple(dataset.documents(normalise))
        sources[language] = str(dataset)
    return Corpus(documents, split, sources, normalised=normalise)


def _codes(languages: Sequence[str], where: str) -> dict[str, str]:
    """Language -> the dataset's code for it, from `vi` or `vi=vie_Latn`."""
    codes = {}
    for entry in languages:
        language, _, code = entry.partition("=")
        codes[check_language(language, f"{where} (write vi=vie_Latn for a name of your own)")] = code or language
    return codes


@dataclass(frozen=True)
class _Dataset:
    name: str
    configuration: str
    text_column: str
    split: str

    def __str__(self) -> str:
        return f"{_HUB}{self.name}" + (f":{self.configuration}" if self.configuration else "")

    def documents(self, normalise: Form | None) -> list[Document]:
        documents: list[Document] = []
        identifiers: set[str] = set()
        for number, row in enumerate(self._rows(), start=1):
            text = row.get(self.text_column)
            if not isinstance(text, str):
                columns = ", ".join(row)
                raise CorpusError(f"{self}: no text in column {self.text_column!r}; there are the columns {columns}")
            identifier = document_id(row["id"], f"{self}, row {number}") if "id" in row else f"row-{number}"
            if identifier in identifiers:
                raise CorpusError(f"{self}: id {identifier!r} stands there more than once")
            identifiers.add(identifier)
            if text.strip():
                documents.append(Document(identifier, normalised(text.strip(), normalise)))
        require_words([document.text for document in documents], f"{self} (split {self.split})")
        return documents

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise CorpusError(f"{self}: the package 'datasets' is not installed; pip install datasets") from error
        try:
            yield from load_dataset(self.name, self.configuration or None, split=self.split, trust_remote_code=False)
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # its own errors derive from these; so do those of networks
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CorpusError(f"{self} cannot be loaded: {reason}") from error
