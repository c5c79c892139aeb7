"""Language identification: does a corpus hold the languages that its files are named after?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from crane_serve.common.text.corpus import Corpus, Document
from crane_serve.common.text.languages import code_of, identify, known_languages, same_language

SAMPLE = 50  # documents of a language that are identified


@dataclass(frozen=True)
class Suspicion:
    """Most documents of a sample look like other languages than the one of their file.

    source: where the texts came from; sampled: number of documents in the sample; differing: how many of them look like
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
    suspicions = []
    for language, documents in corpus.documents.items():
        code = code_of(language)
        if code not in known_languages():
            continue
        sampled = _spread(documents, sample)
        counts = Counter(identify(document.text) for document in sampled)
        others = Counter({other: count for other, count in counts.items() if other and not same_language(code, other)})
        if 2 * others.total() > len(sampled):
            looks_like, differing = others.most_common(1)[0]
            source = corpus.sources.get(language, language)
            suspicions.append(Suspicion(source, language, len(sampled), differing, looks_like))
    return suspicions


def _spread(documents: Sequence[Document], sample: int) -> list[Document]:
    count = min(sample, len(documents))
    return [documents[index * len(documents) // count] for index in range(count)]
