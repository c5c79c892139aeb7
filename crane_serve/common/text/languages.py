"""Which language a text is in, by py3langid's naive Bayes over byte n-grams (Lui and Baldwin, ACL 2012). Offline."""

import re
from collections.abc import Callable
from functools import cache

_CHARACTERS = 2000  # of a text that are read
_UNSURE = 0.5  # below this probability a text counts as not identified
_UNKNOWN = ("und", "zxx")

# Languages that this kind of identifier confuses even in good texts.
_CLOSE = (
    frozenset({"no", "nb", "nn", "da"}),
    frozenset({"bs", "hr", "sr", "sh"}),
    frozenset({"id", "ms"}),
    frozenset({"zh", "yue", "wuu"}),
    frozenset({"ar", "ary", "arz"}),
    frozenset({"pt", "gl"}),
    frozenset({"uz", "uzs"}),
)


def identify(text: str) -> str | None:
    """The code of the language of a text's first 2000 characters, None where it is too short or mixed to tell."""
    code = _identifier()[0](text[:_CHARACTERS])
    return None if code in _UNKNOWN else code


def known_languages() -> frozenset[str]:
    """The codes that `identify` tells apart."""
    return _identifier()[1]


def code_of(language: str) -> str:
    """What a language's name begins with: `zh` of `zh-hans`, `en` of `en_us`."""
    return re.split("[-_]", language)[0]


def same_language(code: str, other: str) -> bool:
    """Whether two codes name one language, or languages so close that identification confuses them."""
    return other == code or any({code, other} <= group for group in _CLOSE)


@cache
def _identifier() -> tuple[Callable[[str], str], frozenset[str]]:
    """A function from a text to the code of its language, and the codes that it knows."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=_UNSURE)

    def classify(text: str) -> str:
        return str(identifier.classify(text)[0])

    return classify, frozenset(identifier.labels)
