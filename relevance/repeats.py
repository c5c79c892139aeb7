"""Repeats: documents of one split that are also in another, word for word or nearly."""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crane_serve.common.text.corpus import Corpus, Document

NEAR = 0.8  # two texts nearly repeat each other from this Jaccard similarity of their character n-grams on

_Hashes = NDArray[np.uint64]

_CHARACTERS = 4_000  # only the beginning of a text is compared
_DOCUMENTS = 20_000  # of a split are searched for near repeats
_FEWEST = 20  # texts with fewer n-grams have no near repeats
_BANDS, _ROWS = 16, 4  # of MinHash: texts of similarity 0.8 share a band with probability 0.9998
_BUCKET, _CANDIDATES = 16, 32  # texts kept by band, and compared with one text
_KEY_BYTES = 8

_DENSE = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]"
)  # characters with more information
_DENSE_N, _N = 3, 5

_draw = np.random.default_rng(0)
_POSITIONS: _Hashes = _draw.integers(2**64, size=_N, dtype=np.uint64) | np.uint64(1)
_MINHASHES: _Hashes = _draw.integers(2**64, size=(_BANDS * _ROWS, 1), dtype=np.uint64) | np.uint64(1)


@dataclass(frozen=True)
class Repeats:
    """Documents of other splits that repeat documents of `split` in one language.

    source: origin of the texts; exact: number of word-for-word repeats; near: number of near repeats; by_split: number
    per split; example: the split and id of one of them, and the id of the document that it repeats.
    """

    source: str
    split: str
    exact: int
    near: int
    by_split: Mapping[str, int]
    example: tuple[str, str, str]

    def __str__(self) -> str:
        total = self.exact + self.near
        places = " and ".join(f"{count} of split {split!r}" for split, count in self.by_split.items())
        other, repeating, repeated = self.example
        return (
            f"{self.source}: {places} repeat{'s' * (total == 1)} documents of split {self.split!r} "
            f"({self.exact} word for word, {self.near} nearly), such as {repeating!r} of {other!r}, which repeats "
            f"{repeated!r}"
        )


def repeats(corpus: Corpus, among: Sequence[str] | None = None) -> list[Repeats]:
    """Repeats of the documents of `corpus` in other splits of each language's file. among: in these splits only.

    Word for word: equal except for white space, case and canonical equivalence of Unicode. Nearly: a share `NEAR` of
    the character n-grams is equal (n = 5, or 3 in Chinese, Japanese and Korean), within the first 4,000 characters.
    Candidates come from MinHash with locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of
    Massive Datasets, chapter 3). Texts of fewer than 20 n-grams have no near repeats.
    """
    lines = []
    for language, others in corpus.others.items():
        compared = {split: of for split, of in others.items() if among is None or split in among}
        source = corpus.sources.get(language, language)
        if compared and (repeated := _of_language(corpus.documents[language], corpus.split or "", compared, source)):
            lines.append(repeated)
    return lines


def text_key(text: str) -> str:
    """A short digest (16 hexadecimal digits), equal for texts that repeat each other word for word."""
    return hashlib.blake2b(_folded(text).encode(), digest_size=_KEY_BYTES).hexdigest()


def text_keys(corpus: Corpus) -> dict[str, str]:
    """Language -> the 20,000 smallest `text_key` of its documents, sorted and concatenated."""
    return {
        language: "".join(sorted({text_key(document.text) for document in documents})[:_DOCUMENTS])
        for language, documents in corpus.documents.items()
    }


def repeated_keys(corpus: Corpus, keys: Mapping[str, str]) -> list[str]:
    """A warning for each language with documents that are also in other texts, word for word. keys: `text_keys` of
    those texts."""
    lines = []
    for language, documents in corpus.documents.items():
        of_language, width = keys.get(language, ""), 2 * _KEY_BYTES
        known = {of_language[start : start + width] for start in range(0, len(of_language), width)}
        repeating = [document.id for document in documents if text_key(document.text) in known]
        if repeating:
            lines.append(
                f"{corpus.sources.get(language, language)}: {len(repeating)} documents of split {corpus.split!r} stand "
                f"word for word in the texts that the scores come from, such as {repeating[0]!r}"
            )
    return lines


def _of_language(
    documents: Sequence[Document], split: str, others: Mapping[str, Sequence[Document]], source: str
) -> Repeats | None:
    exact = {text_key(document.text): document.id for document in reversed(documents)}
    index: _Index | None = None
    counts, by_split = {True: 0, False: 0}, dict.fromkeys(others, 0)
    example: tuple[str, str, str] | None = None
    for other, of_split in others.items():
        for number, document in enumerate(of_split):
            repeated = exact.get(text_key(document.text))
            is_exact = repeated is not None
            if repeated is None and number < _DOCUMENTS:
                index = index or _Index(documents[:_DOCUMENTS])
                repeated = index.near(document.text)
            if repeated is not None:
                counts[is_exact] += 1
                by_split[other] += 1
                example = example or (other, document.id, repeated)
    if example is None:
        return None
    return Repeats(source, split, counts[True], counts[False], {of: n for of, n in by_split.items() if n}, example)


class _Index:
    """Documents by the bands of their MinHash."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self._buckets: dict[tuple[int, bytes], list[int]] = {}
        for number, document in enumerate(documents):
            for band in _bands(_shingles(document.text)):
                bucket = self._buckets.setdefault(band, [])
                if len(bucket) < _BUCKET:
                    bucket.append(number)

    def near(self, text: str) -> str | None:
        """The id of the first document that `text` nearly repeats."""
        shingles = _shingles(text)
        candidates = {number for band in _bands(shingles) for number in self._buckets.get(band, ())}
        for number in sorted(candidates)[:_CANDIDATES]:
            others = _shingles(self._documents[number].text)
            common = len(np.intersect1d(shingles, others, assume_unique=True))
            if common >= NEAR * (len(shingles) + len(others) - common):
                return self._documents[number].id
        return None


def _folded(text: str) -> str:
    folded = unicodedata.normalize("NFC", text).casefold()
    return unicodedata.normalize("NFC", " ".join(folded.split()))


def _shingles(text: str) -> _Hashes:
    """Hashes of the different n-grams of characters of a text, [n-grams]."""
    folded = _folded(text[:_CHARACTERS])
    n = _DENSE_N if 2 * len(_DENSE.findall(folded)) > len(folded) else _N
    codes = np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    if len(codes) < n:
        return np.empty(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(codes, n)  # [n-grams, n]
    hashes = (windows * _POSITIONS[:n]).sum(axis=1, dtype=np.uint64)
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(29)
    unique: _Hashes = np.unique(hashes)
    return unique


def _bands(shingles: _Hashes) -> Iterator[tuple[int, bytes]]:
    """The bands of a text's MinHash; none for a text that is too short."""
    if len(shingles) < _FEWEST:
        return
    smallest = (_MINHASHES * shingles).min(axis=1)  # [bands * rows]
    for band in range(_BANDS):
        yield band, smallest[band * _ROWS : (band + 1) * _ROWS].tobytes()
