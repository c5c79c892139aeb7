"""Language files: which file of a corpus directory is which language. A file that could be one is never ignored
silently."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from crane_serve.common.text.records import FORMATS, CorpusError, format_of, listed

EXPECTED = f"{{lang}} with one of {', '.join(FORMATS)}"

_LANGUAGE = re.compile(r"[a-z0-9_-]+")
_CODE = re.compile(r"[A-Za-z]{2,3}([_-][A-Za-z0-9]+)*")  # the usual form of a language's name
_PAPERS = re.compile(  # files beside texts that are not texts, whatever their suffix
    "authors|changelog|citation|contributing|copying|dataset_infos?|datasheet|licen[cs]e|makefile|manifest|md5sums|notice|"
    "readme|sha256sums",
    re.IGNORECASE,
)
_NEVER_TEXT = re.compile(  # suffixes
    r"\.(bib|cff|cfg|css|gif|index|ini|ipynb|jpe?g|js|lock|log|md5|np[yz]|pickle|pkl|png|progress|pth?|pyc?|safetensors|sh|"
    r"sha1|sha256|svg|toml|ya?ml)",
    re.IGNORECASE,
)
_SELDOM_TEXT = (".bin", ".htm", ".html", ".md", ".pdf", ".rst")  # unless they have the name of a language
_BACKUPS = (".bak", ".orig", ".old", ".swp", ".tmp", "~")


def language_files(directory: Path, wanted: Sequence[str] | None = None) -> dict[str, Path]:
    """Language -> its file: of the `wanted` languages, in their order, or of all by name for None.

    Ignored are hidden files, files that describe the corpus (README, LICENSE), files of a kind without text, backups of
    a file that is read, and directories unless their name looks like a language. Every other entry has to be a file in
    a supported format.

    Raises CorpusError naming entries that are not, languages with two files, and wanted languages without a file.
    """
    if not directory.is_dir():
        raise CorpusError(f"{directory} is not a directory; expected one with files {EXPECTED}")
    files: dict[str, list[Path]] = {}
    unread: list[Path] = []
    for path in sorted(directory.iterdir()):
        suffix = format_of(path)
        language = path.name[: -len(suffix)] if suffix else path.name.partition(".")[0]
        if path.name.startswith((".", "_")) or _PAPERS.fullmatch(language):
            continue
        if suffix is None or path.is_dir():
            unread.append(path)
        else:
            files.setdefault(language, []).append(path)
    unread = [path for path in unread if _may_be_language(path, files)]
    if wanted is not None:
        unread = [path for path in unread if path.name.partition(".")[0] in wanted]
    if unread:
        raise CorpusError(
            f"{directory} holds {listed([path.name for path in unread])}, not read as "
            f"{'languages' if len(unread) > 1 else 'a language'}; expected files {EXPECTED}: "
            "convert or move away what is not, or name the languages to use"
        )
    if not files:
        raise CorpusError(f"{directory} holds no language; expected files {EXPECTED}")
    if wanted is not None and not wanted:
        raise CorpusError(f"no language of {directory} was asked for; it holds {', '.join(files)}")
    chosen = {}
    for language in files if wanted is None else wanted:
        if language not in files:
            raise CorpusError(f"{directory} holds no language {language!r}; it holds {', '.join(files)}")
        first, *more = files[language]
        check_language(language, str(first))
        if more:
            raise CorpusError(f"{directory} holds both {first.name} and {more[0].name}; expected one of them")
        chosen[language] = first
    return chosen


def check_language(name: str, where: str) -> str:
    """Return `name` if it can name a language; raise CorpusError, which begins with `where`, otherwise."""
    if not _LANGUAGE.fullmatch(name):
        raise CorpusError(f"{where}: {name!r} cannot name a language; expected characters of a-z, 0-9, _ and -")
    return name


def _may_be_language(path: Path, files: Collection[str]) -> bool:
    name = path.name.partition(".")[0]
    looks_like_one = _CODE.fullmatch(name) is not None
    if path.is_dir():
        has_texts = looks_like_one and any(format_of(child) for child in path.iterdir() if child.is_file())
        return has_texts or format_of(path) is not None
    suffix = path.suffix.lower()
    if path.name.endswith(_BACKUPS):
        return name not in files
    return not _NEVER_TEXT.fullmatch(suffix) and (suffix not in _SELDOM_TEXT or looks_like_one)
