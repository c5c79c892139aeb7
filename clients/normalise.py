"""Normalisation of short answers before they are compared: words by script, F1 and exact match, numbers in texts.

Words are SQuAD v1.1's (Rajpurkar et al., arXiv:1606.05250) in the multilingual form of MLQA (Lewis et al.,
arXiv:1910.07475): lower case, no punctuation, none of the language's articles. Two rules are additions. First, texts
are converted to Unicode's compatibility form (NFKC), so that full-width letters, half-width kana and Vietnamese in
combining marks equal the usual forms. Second, scripts without spaces are split by character in every language, not only
in Chinese. So the words depend only on the text: a Chinese answer to an English question has as many words as one to a
Chinese question.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

from crane_serve.common.text.languages import code_of

# A character of a script that sets no spaces (Thai, Lao, Burmese, Khmer, kana, Han), or a run of others.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")

_ARTICLES = {
    "en": {"a", "an", "the"},
    "es": {"un", "una", "unos", "unas", "el", "la", "los", "las"},
    "de": {"ein", "eine", "einen", "einem", "eines", "einer", "der", "die", "das", "den", "dem", "des"},
    "vi": {"của", "là", "cái", "chiếc", "những"},
}

# Languages that write 1.234,5 for what English writes 1,234.5.
# fmt: off
_DECIMAL_COMMA = {
    "ca", "cs", "da", "de", "el", "es", "fi", "fr", "hr", "hu", "id", "it", "lt", "lv", "nb", "nl", "nn", "no", "pl",
    "pt", "ro", "ru", "sk", "sl", "sr", "sv", "tr", "uk", "vi",
}
# fmt: on
_NUMBER_SIGNS = str.maketrans("－\u2212．，\u066b\u066c", "--.,.,")  # full-width, mathematical and Arabic
_NO_BREAK_SPACE = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3})")
_MINUS = r"(?:(?<![\w)])-)?"
_BY_COMMA = r"[1-9]\d{0,2}(?:,\d{2,3})*,\d{3}(?!\d)(?:\.\d+)?"  # in groups of two as well: 1,00,000
_BY_POINT = r"[1-9]\d{0,2}(?:\.\d{3})+(?!\d)(?:,\d+)?"
_POINT_NUMBER = re.compile(rf"{_MINUS}(?:{_BY_COMMA}|\d+(?:\.\d+)?)")
_COMMA_NUMBER = re.compile(rf"{_MINUS}(?:{_BY_POINT}|{_BY_COMMA}|\d+(?:[.,]\d+)?)")


def words(text: str) -> list[str]:
    """The words of a text as F1 and repetition count them, in lower case and without punctuation.

    In scripts without spaces each character is a word; elsewhere a run between spaces is. Punctuation is kept if the
    text has nothing else.
    """
    lowered = unicodedata.normalize("NFKC", text).lower()
    bare = "".join(character for character in lowered if not _is_punctuation(character))
    return _WORD.findall(bare) or _WORD.findall(lowered)


def answer_words(text: str, language: str) -> list[str]:
    """The words of an answer without its language's articles, unless it has no others."""
    all_words = words(text)
    articles = _ARTICLES.get(code_of(language), ())
    return [word for word in all_words if word not in articles] or all_words


def exact_match(answer: str, accepted: Sequence[str], language: str) -> float:
    """1 if an answer has the same words in the same order as an accepted answer, else 0."""
    words_of_answer = answer_words(answer, language)
    return float(any(words_of_answer == answer_words(text, language) for text in accepted))


def f1(answer: str, accepted: Sequence[str], language: str) -> float:
    """The best F1 of an answer's words against an accepted answer, 0 to 1; repeated words count repeatedly."""
    words_of_answer = answer_words(answer, language)
    return max(_f1(words_of_answer, answer_words(text, language)) for text in accepted)


def last_number(text: str, language: str) -> Decimal | None:
    """The last number of a text, None if it has none. Digits may be of any script.

    Groups of three after a comma are thousands. In languages with a decimal comma, those after a point are as well:
    1.500 is 1500 in Vietnamese and one and a half in English. No-break and thin spaces between groups are left out;
    other spaces end a number. A minus counts unless a word, digit or bracket stands before it.
    """
    digits = "".join(str(unicodedata.decimal(character, character)) for character in _NO_BREAK_SPACE.sub("", text))
    decimal_comma = code_of(language) in _DECIMAL_COMMA
    numbers = (_COMMA_NUMBER if decimal_comma else _POINT_NUMBER).findall(digits.translate(_NUMBER_SIGNS))
    return _decimal(numbers[-1], decimal_comma) if numbers else None


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _f1(actual: list[str], expected: list[str]) -> float:
    shared = (Counter(actual) & Counter(expected)).total()
    return 2 * shared / (len(actual) + len(expected)) if shared else 0.0


def _decimal(number: str, decimal_comma: bool) -> Decimal:
    """The value of a match of one of the patterns."""
    if re.fullmatch("-?" + _BY_COMMA, number):
        return Decimal(number.replace(",", ""))
    if decimal_comma and re.fullmatch("-?" + _BY_POINT, number):
        number = number.replace(".", "")
    return Decimal(number.replace(",", "."))
