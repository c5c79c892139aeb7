"""Language identification: does a corpus hold the languages that its files are named after?

Identification is py3langid's naive Bayes over byte n-grams (Lui and Baldwin, ACL 2012), which works offline.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from relevance.corpus import Corpus, Document

SAMPLE = 50  # documents of a language that are identified
_CHARACTERS = 2000  # of a document that are read
_UNSURE = 0.5  # below this probability a document counts as not identified
_UNKNOWN = ("und", "zxx")

# Languages that this kind of identifier confuses even in good texts. Their files are not suspicious for that.
_CLOSE = (
    frozenset({"no", "nb", "nn", "da"}),
    frozenset({"bs", "hr", "sr", "sh"}),
    frozenset({"id", "ms"}),
    frozenset({"zh", "yue", "wuu"}),
    frozenset({"ar", "ary", "arz"}),
    frozenset({"pt", "gl"}),
    frozenset({"uz", "uzs"}),
)


@dataclass(frozen=True)
class Suspicion:
    """Most documents of a sample look like other languages than the one they stand under.

    source: where the texts came from; sampled: documents looked at; differing: how many of them look like
    `looks_like`, the commonest of the other languages.
    """

    source: str
    language: str
    sampled: int
    differing: int
    looks_like: str

    def __str__(self) -> str:
        return f"{self.source}: {self.differing} of {self.sampled} documents look like {self.looks_like}"


def misnamed(corpus: Corpus, sample: int = SAMPLE) -> list[Suspicion]:
    """The languages of which more than half of `sample` documents, spread evenly, look like other languages.

    Only names that begin with a code that the identifier knows are checked: `en`, `zh`, also `zh-hans` and `en_us`.
    Documents that cannot be identified count for no language.
    """
    identify, known = _identifier()
    suspicions = []
    for language, documents in corpus.documents.items():
        code = re.split("[-_]", language)[0]
        if code not in known:
            continue
        looked_at = _spread(documents, sample)
        found = Counter(identify(document.text[:_CHARACTERS]) for document in looked_at)
        others = Counter({other: count for other, count in found.items() if not _same(code, other)})
        if 2 * others.total() > len(looked_at):
            looks_like, differing = others.most_common(1)[0]
            source = corpus.sources.get(language, language)
            suspicions.append(Suspicion(source, language, len(looked_at), differing, looks_like))
    return suspicions


def _same(code: str, other: str) -> bool:
    return other == code or other in _UNKNOWN or any({code, other} <= group for group in _CLOSE)


def _spread(documents: Sequence[Document], sample: int) -> list[Document]:
    count = min(sample, len(documents))
    return [documents[index * len(documents) // count] for index in range(count)]


@cache
def _identifier() -> tuple[Callable[[str], str], frozenset[str]]:
    """What says the code of a text's language, and the codes it knows."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=_UNSURE)

    def identify(text: str) -> str:
        return str(identifier.classify(text)[0])

    return identify, frozenset(identifier.labels)
