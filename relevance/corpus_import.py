"""Import: parallel texts of other forms, SQuAD's or line-aligned, as a corpus directory with splits."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from crane_serve.common.atomic import write_atomically
from crane_serve.common.text.corpus import CorpusError, Form, normalised, require_words
from crane_serve.common.text.language_files import check_language
from crane_serve.common.text.records import read_lines, read_text
from relevance.characters import joints_remark

_PLACE = "{lang}"
_ROUNDING = 1e-6  # tolerance of the sum of the fractions, which must be 1


class Unit(StrEnum):
    """The document of a line-aligned text: a line, or the consecutive lines with one document id."""

    LINE = "line"
    DOCUMENT = "document"


@dataclass(frozen=True)
class Part:
    """A document to be written to a corpus directory. Parts of one group are never put into different splits."""

    id: str
    group: str
    text: str


Parts = dict[str, list[Part]]  # language -> its parts, the same ids in the same order for each


def squad_parts(pattern: str, languages: Sequence[str] | None = None) -> Parts:
    """One document per paragraph of SQuAD-form JSON files, `{lang}` in `pattern` standing for the language.

    Ids are `article-1-paragraph-1` and so on, which makes translations parallel; an article is a group.
    Raises CorpusError for missing or malformed files, and for languages that do not have the same paragraphs.
    """
    files = _files(pattern, languages)
    parts = {language: _squad_parts(path) for language, path in files.items()}
    _require_parallel(files, {language: [part.id for part in of_language] for language, of_language in parts.items()})
    return parts


def _squad_parts(path: Path) -> list[Part]:
    parts = []
    try:
        articles = json.loads("\n".join(read_lines(path)))["data"]
        for article, content in enumerate(articles, start=1):
            for paragraph, entry in enumerate(content["paragraphs"], start=1):
                text = entry["context"].strip()
                if not text:
                    raise CorpusError(f"{path}: paragraph {paragraph} of article {article} is empty")
                group = f"article-{article}"
                parts.append(Part(f"{group}-paragraph-{paragraph}", group, text))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        form = '{"data": [{"paragraphs": [{"context": text}]}]}'
        raise CorpusError(f"{path} is not of the form {form}: {type(error).__name__}: {error}") from error
    return parts


def line_parts(
    pattern: str,
    languages: Sequence[str] | None = None,
    document_ids: Path | None = None,
    unit: Unit | None = None,
    notice: Callable[[str], None] = lambda line: None,
) -> Parts:
    """Documents of line-aligned text files, `{lang}` in `pattern` standing for the language.

    document_ids: a file that gives the document of each line; its consecutive lines are a group, and, by
    `Unit.DOCUMENT`, one document, joined with line feeds. By `Unit.LINE` each line is a document. None: by document
    where there are ids. A line that is blank in some language is left out in all. notice: called with a warning about
    byte order marks at the start of lines, which are removed.

    Raises CorpusError for missing files, files of different lengths, and ids whose lines are not consecutive.
    """
    files = _files(pattern, languages)
    lines = {language: _aligned_lines(path, notice) for language, path in files.items()}
    ids = None if document_ids is None else _aligned_lines(document_ids, notice)
    if unit is Unit.DOCUMENT and ids is None:
        raise CorpusError("documents of several lines need a file of document ids")
    _require_equal_lengths({str(files[language]): len(of_language) for language, of_language in lines.items()})
    length = len(next(iter(lines.values())))
    if ids is not None:
        _require_equal_lengths({str(next(iter(files.values()))): length, str(document_ids): len(ids)})
    complete = [number for number in range(length) if all(of_language[number] for of_language in lines.values())]
    if ids is None:
        return {
            language: [Part(f"line-{number + 1}", f"line-{number + 1}", of_language[number]) for number in complete]
            for language, of_language in lines.items()
        }
    groups = _groups(ids, str(document_ids))
    by_line = unit is Unit.LINE
    return {language: _grouped(of_language, groups, set(complete), by_line) for language, of_language in lines.items()}


def _aligned_lines(path: Path, notice: Callable[[str], None]) -> list[str]:
    """All lines of a file; a line feed at the end of the last is optional."""
    text = read_text(path)
    if text.joints:
        notice(joints_remark(str(path), text.joints))
    lines = text.lines
    return lines if lines[-1] else lines[:-1]


def _grouped(lines: list[str], groups: Mapping[str, range], complete: set[int], by_line: bool) -> list[Part]:
    parts = []
    for group, numbers in groups.items():
        of_group = [number for number in numbers if number in complete]
        if by_line:
            parts += [Part(f"{group}:{number - numbers.start + 1}", group, lines[number]) for number in of_group]
        elif of_group:
            parts.append(Part(group, group, "\n".join(lines[number] for number in of_group)))
    return parts


def _groups(ids: Sequence[str], where: str) -> dict[str, range]:
    """Document id -> its lines, counted from 0."""
    groups: dict[str, range] = {}
    for number, identifier in enumerate(ids):
        if not identifier:
            raise CorpusError(f"{where}:{number + 1}: expected a document id, found a blank line")
        start = groups[identifier].start if identifier in groups else number
        if identifier in groups and groups[identifier].stop != number:
            raise CorpusError(f"{where}:{number + 1}: document {identifier!r} occurs again after another")
        groups[identifier] = range(start, number + 1)
    return groups


def write_corpus(
    parts: Parts,
    splits: Mapping[str, float],
    directory: Path,
    normalise: Form | None = None,
    notice: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write `{lang}.jsonl` for every language of parallel `parts` into `directory`; returns the paths.

    splits: name -> fraction of the groups, which are divided in their order, so always in the same way; empty for
    documents without a split. A part that repeats a part of an earlier split word for word in some language is left out
    in all languages, so that they stay parallel; notice: called with a message about that. normalise: the form of
    Unicode that texts are converted to.

    Raises CorpusError for impossible splits, for languages without text, and for splits without a remaining document.
    """
    for language, of_language in parts.items():
        check_language(language, str(directory))
        require_words([part.text for part in of_language], language)
    groups = list(dict.fromkeys(part.group for part in next(iter(parts.values()))))
    split_of = _assigned(groups, splits)
    repeating = _repeating(parts, split_of, list(splits))
    if repeating:
        identifier, (repeated, language) = next(iter(repeating.items()))
        notice(
            f"{len(repeating)} documents are left out in all languages, since they repeat one of an earlier split word "
            f"for word, such as {identifier!r}, which repeats {repeated!r} in {language}"
        )
    distinct = {language: [part for part in of if part.id not in repeating] for language, of in parts.items()}
    for split in splits:
        if not any(split_of[part.group] == split for part in next(iter(distinct.values()))):
            raise CorpusError(f"all documents of split {split!r} repeat one of an earlier split word for word")
    paths = []
    for language, of_language in distinct.items():
        rows = (
            {
                "id": part.id,
                **({"split": split_of[part.group]} if splits else {}),
                "text": normalised(part.text, normalise),
            }
            for part in of_language
        )
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths.append(directory / f"{language}.jsonl")
        write_atomically(paths[-1], content.encode())
    return paths


def _repeating(parts: Parts, split_of: Mapping[str, str], order: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Id of a part that repeats a part of an earlier split -> the id of that part, and the language in which it
    does."""
    from relevance.repeats import text_key

    repeating: dict[str, tuple[str, str]] = {}
    for language, of_language in parts.items() if order else ():
        first: dict[str, Part] = {}
        for part in sorted(of_language, key=lambda part: order.index(split_of[part.group])):
            before = first.setdefault(text_key(part.text), part)
            if split_of[before.group] != split_of[part.group]:
                repeating.setdefault(part.id, (before.id, language))
    return repeating


def parse_splits(listed: str | None) -> dict[str, float]:
    """Splits from `relevance=0.6,validation=0.2,test=0.2`. Raises CorpusError unless the fractions add up to 1."""
    splits: dict[str, float] = {}
    for entry in (listed or "").split(","):
        if not entry.strip():
            continue
        name, _, share = (part.strip() for part in entry.partition("="))
        try:
            fraction = float(share)
        except ValueError:
            fraction = math.nan
        if not name or name in splits or not 0 < fraction <= 1:
            raise CorpusError(f"split {entry.strip()!r}; expected different names with fractions, as in test=0.2")
        splits[name] = fraction
    if splits and abs(sum(splits.values()) - 1) > _ROUNDING:
        raise CorpusError(f"the fractions of the splits add up to {sum(splits.values()):.4g}, expected 1")
    return splits


def _assigned(groups: Sequence[str], splits: Mapping[str, float]) -> dict[str, str]:
    """Group -> split: each split takes the next groups in order."""
    assigned: dict[str, str] = {}
    begin, total = 0, 0.0
    for name, fraction in splits.items():
        total += fraction
        end = round(total * len(groups))
        if end == begin:
            raise CorpusError(f"split {name!r} gets none of the {len(groups)} documents; expected a larger fraction")
        assigned |= dict.fromkeys(groups[begin:end], name)
        begin = end
    return assigned


def _files(pattern: str, languages: Sequence[str] | None) -> dict[str, Path]:
    """Language -> its file: of `languages`, or of every file that fits `pattern`."""
    file_name = Path(pattern).name
    if file_name.count(_PLACE) != 1 or pattern.count(_PLACE) != 1:
        raise CorpusError(f"{pattern}: expected {_PLACE} in the name of the file, once")
    before, after = file_name.split(_PLACE)
    if languages is None:
        fitting = sorted(Path(pattern).parent.glob(f"{before}*{after}"))
        languages = [path.name[len(before) : len(path.name) - len(after)] for path in fitting if path.is_file()]
    if not languages:
        raise CorpusError(f"no file fits {pattern}")
    files = {check_language(language, pattern): Path(pattern.replace(_PLACE, language)) for language in languages}
    for language, path in files.items():
        if not path.is_file():
            raise CorpusError(f"there is no {path} for the language {language!r}")
    return files


def _require_parallel(files: Mapping[str, Path], ids: Mapping[str, list[str]]) -> None:
    first = next(iter(ids))
    for language, of_language in ids.items():
        if of_language != ids[first]:
            different = next(iter(sorted(set(of_language) ^ set(ids[first]))))
            raise CorpusError(
                f"{files[first]} and {files[language]} are not parallel: only one of them has {different}"
            )


def _require_equal_lengths(lengths: Mapping[str, int]) -> None:
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{path} {length}" for path, length in lengths.items())
        raise CorpusError(f"line-aligned files have different numbers of lines: {listed}")
