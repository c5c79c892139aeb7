"""Repeats: the same text in two splits is found, word for word or nearly, and different texts are not."""

import json
import unicodedata
from pathlib import Path
from time import perf_counter

import pytest
from typer.testing import CliRunner, Result

from crane_serve.cli import app
from crane_serve.common.text.corpus import EMBEDDED_CORPUS, Corpus, CorpusError, Document
from relevance.corpus_import import line_parts, write_corpus
from relevance.repeats import repeated_keys, repeats, text_key, text_keys

EN = "The harbour froze in the night, and the ferries to the islands stayed away until the ice broke in March."
VI = "Bến cảng đóng băng trong đêm, và các chuyến phà ra đảo nghỉ chạy cho đến khi băng tan vào tháng ba."
ZH = "港口在夜里结了冰，开往各个岛屿的渡轮停航，直到三月冰面破裂为止，岛上的居民只能等待。"
OTHER = "A committee of seven members discussed the price of bread at length and came to no decision at all."


def corpus(mine: str, theirs: str) -> Corpus:
    return Corpus(
        {"xx": (Document("mine", mine), Document("also", OTHER))},
        "relevance",
        others={"xx": {"test": (Document("theirs", theirs),)}},
    )


@pytest.mark.parametrize("split", ["relevance", "validation", "test"])
def test_the_packaged_corpus_repeats_nothing(split: str) -> None:
    assert repeats(Corpus.load(EMBEDDED_CORPUS, split)) == []


@pytest.mark.parametrize(
    "theirs",
    [EN, EN.upper(), f"  {EN.replace(' ', '  ')}\n", EN.replace(" ", "\n")],
)
def test_white_space_and_case_make_no_other_text(theirs: str) -> None:
    (found,) = repeats(corpus(EN, theirs))
    assert (found.exact, found.near, found.example) == (1, 0, ("test", "theirs", "mine"))


def test_neither_does_the_normal_form() -> None:
    (found,) = repeats(corpus(VI, unicodedata.normalize("NFD", VI)))
    assert (found.exact, found.near) == (1, 0)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (EN, EN.replace("March", "April")),
        (EN, EN.replace(", and", " and").replace(".", "!")),
        (EN, EN + " (AP)"),
        (VI, VI.replace("tháng ba", "tháng tư")),
        (ZH, ZH.replace("三月", "四月")),
    ],
)
def test_near_repeats(mine: str, theirs: str) -> None:
    (found,) = repeats(corpus(mine, theirs))
    assert (found.exact, found.near, found.example) == (0, 1, ("test", "theirs", "mine"))


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (EN, "The harbour in the north thawed, and ferries to all islands left in the morning as if it were July."),
        (EN, VI),
        ("Chapter 12.", "Chapter 13."),
        (EN, EN[: len(EN) // 2]),
        ("", ""),
    ],
)
def test_different_texts_repeat_nothing(mine: str, theirs: str) -> None:
    if mine:
        assert repeats(corpus(mine, theirs)) == []
    assert repeats(corpus(theirs or "a", mine or "b")) == []


def test_only_the_splits_that_matter() -> None:
    assert repeats(corpus(EN, EN), ["validation"]) == []
    assert len(repeats(corpus(EN, EN), ["test"])) == 1


def test_the_cost_is_bounded_where_all_texts_are_nearly_the_same() -> None:
    texts = tuple(Document(f"d{number}", f"{EN} {number}") for number in range(600))
    start = perf_counter()
    (found,) = repeats(Corpus({"en": texts[:300]}, "a", others={"en": {"b": texts[300:]}}))
    assert found.near == 300
    assert perf_counter() - start < 30


def test_keys_are_of_the_text_alone() -> None:
    assert text_key(EN) == text_key(f" {EN.upper()} ") != text_key(OTHER)
    keys = text_keys(corpus(EN, EN))
    assert len(keys["xx"]) == 2 * 16
    (line,) = repeated_keys(Corpus({"xx": (Document("a", VI), Document("b", EN.lower()))}, "test"), keys)
    assert "1 documents of split 'test'" in line
    assert "'b'" in line
    assert repeated_keys(Corpus({"yy": (Document("b", EN),)}, "test"), keys) == []


# --- in the commands


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write(directory: Path, **texts: dict[str, list[str]]) -> Path:
    directory.mkdir(exist_ok=True)
    for language, by_split in texts.items():
        rows = [
            {"id": f"{split}-{number}", "text": text, "split": split}
            for split, of in by_split.items()
            for number, text in enumerate(of)
        ]
        (directory / f"{language}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_every_command_warns(checkpoint: Path, tmp_path: Path) -> None:
    leaking = write(
        tmp_path / "leaking",
        en={
            "relevance": [EN, "Snow lies on the hill."],
            "validation": [OTHER, EN.replace("March", "April")],
            "test": [EN.upper(), "Rain fell."],
        },
        vi={"relevance": [VI], "validation": ["Mưa rơi suốt đêm."], "test": ["Tuyết phủ trắng đồi."]},
    )
    scores = tmp_path / "scores.safetensors"
    options = ("--corpus", leaking, "--dtype", "float32", "--device", "cpu")
    scored = run("relevance", checkpoint, "--methods", "magnitude", "--out", scores, *options)
    assert scored.exit_code == 0, scored.output
    both = "1 of split 'validation' and 1 of split 'test' repeat documents of split 'relevance'"
    assert f"warning: en.jsonl: {both} (1 word for word, 1 nearly)" in scored.stderr
    assert "vi.jsonl" not in scored.stderr
    assert "warning" not in scored.stdout

    learned = run("learn", checkpoint, scores, "--steps", 1, "--budget", 0.01, *options)
    assert learned.exit_code == 0, learned.output
    assert both in learned.stderr
    refined = run(
        "refine", checkpoint, scores, "--from", "magnitude", "--candidates", 4, "--group", 2, "--documents", 1, *options
    )
    assert refined.exit_code == 0, refined.output
    assert both in refined.stderr

    short = ("--budgets", 0.01, "--effect", 0, "--no-published", "--methods", "magnitude")
    validated = run("validate", checkpoint, scores, "--out", tmp_path / "out", *short, *options)
    assert validated.exit_code == 0, validated.output
    choice, report = (line for line in validated.stderr.splitlines() if "repeat" in line)
    assert "1 of split 'relevance' and 1 of split 'test' repeat documents of split 'validation' (0 word" in choice
    assert "1 of split 'relevance' repeats documents of split 'test' (1 word for word, 0 nearly)" in report

    elsewhere = write(
        tmp_path / "elsewhere",
        en={"relevance": ["Something else."], "validation": [OTHER], "test": [f"{EN} "]},
        vi={"relevance": ["Điều khác."], "validation": ["Mưa rơi suốt đêm."], "test": ["Tuyết phủ trắng đồi."]},
    )
    options = ("--corpus", elsewhere, *options[2:])
    validated = run("validate", checkpoint, scores, "--out", tmp_path / "other", *short, *options)
    assert validated.exit_code == 0, validated.output
    assert "en.jsonl: 1 documents of split 'test' stand word for word in the texts that the scores" in validated.stderr


def test_import_leaves_repeats_out_of_later_splits(tmp_path: Path) -> None:
    en = [EN, "One more.", OTHER, EN.upper(), "The last line.", OTHER.replace("seven", "eight")]
    vi = [f"Dòng thứ {number}." for number in range(6)]
    (tmp_path / "en.txt").write_text("\n".join(en))
    (tmp_path / "vi.txt").write_text("\n".join(vi), "utf-8")
    out = tmp_path / "out"
    result = run(
        "corpus", "import", "--lines", tmp_path / "{lang}.txt", "--splits", "relevance=0.5,test=0.5", "--out", out
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}/en.jsonl: 5 documents\n{out}/vi.jsonl: 5 documents\n"
    assert "1 documents are left out in all languages" in result.stderr
    assert "'line-4', which repeats 'line-1' in en" in result.stderr
    assert "1 of split 'test' repeats documents of split 'relevance' (0 word for word, 1 nearly)" in result.stderr
    for language in ("en", "vi"):
        by_split = {split: Corpus.load(out, split).documents[language] for split in ("relevance", "test")}
        assert [document.id for document in by_split["relevance"]] == ["line-1", "line-2", "line-3"]
        assert [document.id for document in by_split["test"]] == ["line-5", "line-6"]


def test_import_refuses_a_split_of_repeats_alone(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text(f"{EN}\n{EN}\n")
    with pytest.raises(CorpusError, match="all documents of split 'test' repeat one of an earlier split"):
        write_corpus(line_parts(str(tmp_path / "{lang}.txt")), {"relevance": 0.5, "test": 0.5}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
