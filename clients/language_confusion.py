"""Language confusion: whether a generated text is in the expected language line by line and word by word, and which
language takes over where it is not.

The two pass rates are those of Marchisio et al., Understanding and Mitigating Language Confusion in LLMs
(arXiv:2406.20052): by line, the share of answers whose every line is in the language; by word, the share of those
which also have no word of another. There the words are English ones, looked up in a dictionary, in languages that are
not written in Latin letters. Here they are told by their script, whichever it is, in every language whose scripts are
known; like there, names and abbreviations are left alone.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from clients.normalise import words
from crane_serve.common.text.languages import code_of, identify, known_languages, same_language

UNIDENTIFIED = "unidentified"
_LINE_WORDS = 5  # lines with fewer are too short to identify
_SHORT_WORD = 3  # letters; shorter words of scripts with capitals may be abbreviations, units, names of choices
_LETTERS = re.compile(r"[^\W\d_]+")

# Script, as in the names of Unicode's characters -> languages that are written in it; the others have Latin letters.
_LANGUAGES = {
    "ARABIC": "ar ary arz az fa ku pa ps sdh ug ur uzs",
    "ARMENIAN": "hy",
    "BENGALI": "as bn",
    "BOPOMOFO": "zh",
    "CJK": "ja ko wuu yue zh",
    "CYRILLIC": "az ba be bg bs crh kk ky mk mn ru sr tg tk tt uk uz",
    "DEVANAGARI": "gom hi mr ne sa",
    "ETHIOPIC": "am",
    "GEORGIAN": "ka",
    "GREEK": "el grc",
    "GUJARATI": "gu",
    "GURMUKHI": "pa",
    "HANGUL": "ko",
    "HEBREW": "hbo he",
    "HIRAGANA": "ja",
    "KANNADA": "gom kn",
    "KATAKANA": "ja",
    "KHMER": "km",
    "LAO": "lo",
    "LATIN": "az bs crh gom kk ku sr tk uz",  # beside others
    "MALAYALAM": "ml",
    "MONGOLIAN": "mn",
    "MYANMAR": "my",
    "ORIYA": "or",
    "SINHALA": "si",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
    "TIBETAN": "dz",
}


@dataclass(frozen=True)
class Confusion:
    """What a text says about its language.

    by_line: whether a line is in the expected language and none in another; by_word: whether it then has no word in
    another script, None if `by_line` is not so, or the language's scripts are not known; substitute: the language that
    most of it is in which is not in the expected one, UNIDENTIFIED if that cannot be told, None if `by_line` is so.
    """

    by_line: bool
    by_word: bool | None
    substitute: str | None

    @classmethod
    def of(cls, text: str, language: str) -> "Confusion":
        """language: the expected one, as tasks name it.

        Lines of fewer than five words (characters in scripts without spaces) are not judged, unless there are no
        others; then the text is judged as one line. A line whose language cannot be identified, such as one of numbers,
        is not in another.
        """
        expected = code_of(language)
        lines = [line for line in text.splitlines() if len(words(line)) >= _LINE_WORDS] or [text]
        characters: Counter[str] = Counter()
        for line in lines:
            characters[identify(line) or UNIDENTIFIED] += len(line)
        del characters[UNIDENTIFIED]
        others = {code: count for code, count in characters.items() if not same_language(expected, code)}
        if others:
            return cls(False, None, min(others, key=lambda code: (-others[code], code)))
        if not characters:
            return cls(False, None, UNIDENTIFIED)
        known = _scripts_of(expected)
        return cls(True, None if known is None else all(script in known for script in _scripts(text)), None)


def _scripts_of(code: str) -> frozenset[str] | None:
    """The scripts that a language is written in; None for one that cannot be identified."""
    listed = frozenset(script for script, codes in _LANGUAGES.items() if code in codes.split())
    return listed or (frozenset({"LATIN"}) if code in known_languages() else None)


def _scripts(text: str) -> Iterator[str]:
    """The script of each word of a text. Of words with capitals only those count that are written small and are longer
    than three letters."""
    for letters in _LETTERS.findall(unicodedata.normalize("NFKC", text)):
        for script, run in groupby(letters, key=_script):
            word = "".join(run)
            has_case = word.lower() != word.upper()
            if script is not None and (not has_case or (word.islower() and len(word) > _SHORT_WORD)):
                yield script


@cache
def _script(letter: str) -> str | None:
    """None for what belongs to no script, or to one of no language above."""
    script = unicodedata.name(letter, "").partition(" ")[0]
    return script if script in _LANGUAGES else None
