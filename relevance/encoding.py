"""From documents to batches of token ids."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from crane_serve.common.models.prefix import encode_from_start
from crane_serve.common.models.vocabulary import require_known
from crane_serve.common.text.corpus import CorpusError, Document


@dataclass(frozen=True)
class EncodedDocuments:
    """The usable documents of one language as token ids, each beginning with the model's start token.

    skipped: ids of documents without a token to predict; truncated: ids of documents that were cut.
    """

    token_ids: tuple[list[int], ...]
    skipped: tuple[str, ...] = field(default=())
    truncated: tuple[str, ...] = field(default=())

    @property
    def tokens(self) -> int:
        """Number of tokens after the start tokens: those that are predicted and counted."""
        return sum(len(ids) - 1 for ids in self.token_ids)


def encode(
    tokenizer: Any, language: str, documents: Sequence[Document], max_tokens: int, vocabulary: int
) -> EncodedDocuments:
    """Encode `documents`, cut to `max_tokens` with the start token; those without a target token are skipped.

    vocabulary: how many tokens the model has. Raises UnknownTokenError for a document with an unknown token, and
    CorpusError if no document is left.
    """
    encoded: list[list[int]] = []
    skipped: list[str] = []
    truncated: list[str] = []
    for document in documents:
        token_ids = encode_from_start(tokenizer, document.text)
        if len(token_ids) < 2:
            skipped.append(document.id)
            continue
        if len(token_ids) > max_tokens:
            truncated.append(document.id)
        encoded.append(token_ids[:max_tokens])
        require_known(tokenizer, encoded[-1], vocabulary, f"{language}: document {document.id!r}")
    if not encoded:
        raise CorpusError(f"no document of {language} has a token to predict")
    return EncodedDocuments(tuple(encoded), tuple(skipped), tuple(truncated))


@dataclass(frozen=True)
class Batch:
    """Documents padded on the right. token_ids: [documents, tokens]; lengths: [documents]."""

    token_ids: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, documents: Sequence[list[int]], device: torch.device) -> "Batch":
        """Pad documents, lists of token ids, to the longest of them."""
        longest = max(map(len, documents))
        padded = [ids + ids[:1] * (longest - len(ids)) for ids in documents]  # any token will do
        return cls(
            torch.tensor(padded, device=device),
            torch.tensor([len(ids) for ids in documents], device=device),
        )

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.token_ids)

    @cached_property
    def tokens(self) -> int:
        """Number of counted tokens."""
        return int(self.predicted.sum())

    @property
    def predicted(self) -> Tensor:
        """int64 [documents]: counted tokens of each document, which are those that are predicted."""
        return self.lengths - 1

    @cached_property
    def real(self) -> Tensor:
        """bool [documents, tokens]: not padding."""
        position = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        return position < self.lengths.unsqueeze(1)

    @cached_property
    def counted(self) -> Tensor:
        """bool [documents, tokens]: not the start token, not padding."""
        counted = self.real.clone()
        counted[:, 0] = False
        return counted

    @cached_property
    def keys(self) -> Tensor:
        """int64 [documents] on the CPU: a hash of each document's tokens, independent of its batch."""
        rows = zip(self.token_ids.tolist(), self.lengths.tolist(), strict=True)
        return torch.tensor([hashed(token_ids[:length]) for token_ids, length in rows])

    def sum_of(self, values: Tensor) -> Tensor:
        """Sums over the counted tokens of each document. values: [documents, tokens, n] -> [documents, n].

        Sums are in float32, or in float64 for values of that dtype.
        """
        wide = torch.promote_types(values.dtype, torch.float32)
        return (self.counted.to(wide).unsqueeze(1) @ values.to(wide)).squeeze(1)


def hashed(token_ids: Sequence[int]) -> int:
    """A hash of a document's tokens, 64 bits with a sign."""
    digest = hashlib.blake2b(",".join(map(str, token_ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def batches(documents: Sequence[list[int]], batch_tokens: int, device: torch.device) -> Iterator[Batch]:
    """Batches of similar lengths, longest first, of at most `batch_tokens` with padding (or of one document)."""
    pending: list[list[int]] = []
    for ids in sorted(documents, key=len, reverse=True):
        if pending and (len(pending) + 1) * len(pending[0]) > batch_tokens:
            yield Batch.of(pending, device)
            pending = []
        pending.append(ids)
    if pending:
        yield Batch.of(pending, device)
