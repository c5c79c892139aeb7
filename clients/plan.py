"""Plan: which document is scored under which mask, and in which order."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from pydantic import BaseModel, ConfigDict

from clients.answers import MaskSummary
from clients.errors import EvaluationError
from relevance.corpus import Corpus, Document

UNMASKED = "none"


@dataclass(frozen=True)
class Item:
    """One question to the server: the log-probability of a document (by id) of a language under a mask (by name)."""

    mask: str
    language: str
    document: str


class PlannedMask(BaseModel):
    """A mask as the server described it when the run began; for `none` everything but the name is absent.

    neurons: how many it switches or scales; budget: the fraction of all neurons it was allowed to take.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str | None = None
    neurons: int = 0
    language: str | None = None
    method: str | None = None
    budget: float | None = None

    @classmethod
    def of(cls, summary: MaskSummary) -> "PlannedMask":
        """The mask the server described."""
        return cls(**{field: getattr(summary, field) for field in cls.model_fields})


class Plan:
    """Every (mask, language, document) of a run; `none` is always among the masks, and first.

    masks: name -> mask; documents: language -> id -> document, at most `limit` per language, in file order.
    Raises EvaluationError if `limit` is below 1.
    """

    def __init__(self, corpus: Corpus, masks: Sequence[PlannedMask], limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise EvaluationError(f"limit is {limit}, expected at least 1 document per language")
        self.corpus = corpus
        self.limit = limit
        self.masks: dict[str, PlannedMask] = {UNMASKED: PlannedMask(name=UNMASKED)}
        self.masks.update({mask.name: mask for mask in masks if mask.name != UNMASKED})
        self.documents: Mapping[str, dict[str, Document]] = {
            language: {document.id: document for document in documents[:limit]}
            for language, documents in corpus.documents.items()
        }

    def items(self) -> Iterator[Item]:
        """All items: document by document through all languages, the masks innermost.

        Neighbours differ in their mask, so whatever the server batches together holds all masks alike.
        """
        for row in zip_longest(*self.documents.values()):
            for language, document in zip(self.documents, row, strict=True):
                if document is not None:
                    for mask in self.masks:
                        yield Item(mask, language, document)

    def text(self, item: Item) -> str:
        """The text of an item's document."""
        return self.documents[item.language][item.document].text

    def __len__(self) -> int:
        return len(self.masks) * sum(map(len, self.documents.values()))


def text_digest(text: str) -> str:
    """SHA-256 (hex) of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
