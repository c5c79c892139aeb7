"""Characters: peculiarities in the encoding of texts that a method could mistake for their language."""

import re
import unicodedata
from collections.abc import Iterator, Sequence

from crane_serve.common.text.corpus import Corpus, Document

_LINES_SHOWN = 5
_NOTICEABLE = 0.1  # from this share on, documents in the other Chinese script are reported

_STRAY = {
    "\ufeff": "a byte order mark",
    "\ufffd": "the sign for characters that were lost",
    "\u200b": "a space of no width",
    "\u2060": "a joiner of no width",
}
_SPACED_BY_NO_WIDTH = ("bo", "dz", "km", "lo", "my", "th")  # U+200B separates words in these languages

_SIMPLIFIED = re.compile(r"(?:zh|zho|cmn|chi)[_-](?:hans\b|hans[_-]|cn\b|sg\b).*|zhs|chs|.*[_-]hans")
_TRADITIONAL = re.compile(r"(?:zh|zho|cmn|chi)[_-](?:hant\b|hant[_-]|tw\b|hk\b|mo\b).*|zht|cht|.*[_-]hant")
_CHINESE = re.compile(r"(?:zh|zho|cmn|chi|zhs|zht|chs|cht)(?:[_-].*)?")
_HAN = re.compile(r"[\u4e00-\u9fff]")
_SCRIPTS = ("Simplified", "Traditional")


def remarks(corpus: Corpus) -> list[str]:
    """Warnings about the characters of a corpus, a line each, with the number of documents and an example.

    They are about texts that are not in Unicode's normal form NFC, byte order marks and other characters that do not
    belong in texts, and Chinese in another script than the language's name says, or in both.
    """
    warnings = [*_normal_forms(corpus)]
    for language, documents in corpus.documents.items():
        source = corpus.sources.get(language, language)
        warnings += [*_joints(corpus, language, source), *_strays(documents, language, source)]
        warnings += _chinese(documents, language, source)
    return warnings


def chinese_script(text: str) -> str | None:
    """`Simplified` or `Traditional`, None for a text with too few characters that belong to only one of them.

    Characters of GB 2312 that Big5 lacks are Simplified, those of Big5 that GB 2312 lacks are Traditional.
    """
    simplified = traditional = 0
    for character in _HAN.findall(text):
        in_gb, in_big5 = _has("gb2312", character), _has("big5", character)
        simplified += in_gb and not in_big5
        traditional += in_big5 and not in_gb
    if max(simplified, traditional) < 2 or max(simplified, traditional) <= 2 * min(simplified, traditional):
        return None
    return _SCRIPTS[traditional > simplified]


def _has(charset: str, character: str) -> bool:
    try:
        character.encode(charset)
    except UnicodeEncodeError:
        return False
    return True


def _normal_forms(corpus: Corpus) -> Iterator[str]:
    decomposed = {
        language: [document for document in documents if not unicodedata.is_normalized("NFC", document.text)]
        for language, documents in corpus.documents.items()
    }
    if not any(decomposed.values()):
        return
    composed = {language: _composed(_all_documents(corpus, language)) for language in corpus.languages}
    for language, documents in decomposed.items():
        if not documents:
            continue
        source = corpus.sources.get(language, language)
        others = [other for other in corpus.languages if composed[other] and other != language]
        count = f"{len(documents)} of {len(corpus.documents[language])} documents"
        inside = sum(not unicodedata.is_normalized("NFD", document.text) for document in documents)
        if composed[language] or inside:
            what = f"{source} MIXES Unicode's normal forms: {count} are not"
            what += f" in NFC, such as {documents[0].id!r}, {composed[language]} of the file's are"
        else:
            what = f"{source} has {count} that are not in Unicode's normal "
            what += "form NFC" + (f", which {', '.join(others)} is in" if others else "")
        yield (
            f"{what}. The same letters are other tokens then, and what is found may be neurons of the "
            "encoding; --normalise NFC brings all texts into one form"
        )


def _all_documents(corpus: Corpus, language: str) -> Iterator[Document]:
    yield from corpus.documents[language]
    for documents in corpus.others.get(language, {}).values():
        yield from documents


def _composed(documents: Iterator[Document]) -> int:
    """How many documents are in NFC and would not be the same in NFD."""
    return sum(
        unicodedata.is_normalized("NFC", of.text) and not unicodedata.is_normalized("NFD", of.text) for of in documents
    )


def _joints(corpus: Corpus, language: str, source: str) -> Iterator[str]:
    if lines := corpus.joints.get(language):
        yield joints_remark(source, lines)


def joints_remark(source: str, lines: Sequence[int]) -> str:
    """The warning about lines of `source` that began with a byte order mark."""
    numbers = ", ".join(map(str, lines[:_LINES_SHOWN])) + (", ..." if len(lines) > _LINES_SHOWN else "")
    return (
        f"{source}: line{'s' * (len(lines) > 1)} {numbers} began with a byte order mark (U+FEFF), as where files are "
        "joined; it was taken away"
    )


def _strays(documents: Sequence[Document], language: str, source: str) -> Iterator[str]:
    for character, name in _STRAY.items():
        if character == "\u200b" and re.split("[-_]", language)[0] in _SPACED_BY_NO_WIDTH:
            continue
        holding = [document.id for document in documents if character in document.text]
        if holding:
            yield (
                f"{source}: {len(holding)} of {len(documents)} documents hold U+{ord(character):04X} ({name}), such as "
                f"{holding[0]!r}"
            )


def _chinese(documents: Sequence[Document], language: str, source: str) -> Iterator[str]:
    if (
        not _CHINESE.fullmatch(language)
        and not _SIMPLIFIED.fullmatch(language)
        and not _TRADITIONAL.fullmatch(language)
    ):
        return
    by_script: dict[str, list[str]] = {script: [] for script in _SCRIPTS}
    for document in documents:
        if script := chinese_script(document.text):
            by_script[script].append(document.id)
    named = (
        "Simplified" if _SIMPLIFIED.fullmatch(language) else "Traditional" if _TRADITIONAL.fullmatch(language) else None
    )
    enough = [script for script, ids in by_script.items() if len(ids) >= max(1, _NOTICEABLE * len(documents))]
    if named is None and len(enough) == 2:
        counts = " and ".join(f"{len(ids)} in {script} (such as {ids[0]!r})" for script, ids in by_script.items())
        yield f"{source}: of {len(documents)} documents {counts} Chinese; expected one script in a language"
    for script in enough:
        if named not in (None, script):
            ids = by_script[script]
            yield (
                f"{source}: {len(ids)} of {len(documents)} documents, such as {ids[0]!r}, are in {script} Chinese; the "
                f"language's name says {named}"
            )
