"""Doubts: warnings about a corpus that may not be what it should be, shown before it is used."""

from collections.abc import Sequence

from crane_serve.common.text.corpus import Corpus
from crane_serve.common.text.language_id import misnamed
from relevance.characters import remarks
from relevance.repeats import repeats


def doubts(corpus: Corpus, among: Sequence[str] | None = None) -> list[str]:
    """A line for each: languages that look like others, odd characters, and documents that other splits repeat.

    among: the other splits that matter; all for None.
    """
    return [*map(str, misnamed(corpus)), *remarks(corpus), *map(str, repeats(corpus, among))]
