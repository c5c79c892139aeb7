"""Language identification: files named after the wrong language are noticed, and no others."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from crane_serve.cli import app
from crane_serve.common.text.corpus import EMBEDDED_CORPUS, Corpus, Document
from crane_serve.common.text.language_id import Suspicion, misnamed
from relevance.sources import load_corpus

EMBEDDED = Corpus.load(EMBEDDED_CORPUS, "relevance")


def named(**languages: str) -> Corpus:
    """The embedded documents of a language under another name."""
    return Corpus({name.replace("_", "-"): EMBEDDED.documents[language] for name, language in languages.items()})


def test_the_embedded_corpus_is_what_it_says() -> None:
    assert misnamed(EMBEDDED) == []


def test_english_in_a_file_of_vietnamese() -> None:
    (suspicion,) = misnamed(named(en="en", vi="en", zh="zh"))
    assert suspicion == Suspicion("vi", "vi", sampled=50, differing=50, looks_like="en")
    assert str(suspicion) == "vi: 50 of 50 documents look like en"


def test_names_that_begin_with_a_code_are_checked_by_it() -> None:
    found = misnamed(named(zh_hans="zh", en_us="en", vi_vn="zh"))
    assert [suspicion.language for suspicion in found] == ["vi-vn"]
    assert found[0].looks_like in ("zh", "yue", "wuu")


def test_names_that_are_no_code_are_not_checked() -> None:
    assert misnamed(named(formal="en", qqq="zh", english="vi")) == []


@pytest.mark.parametrize(("wrong", "suspicious"), [(24, False), (25, False), (26, True)])
def test_more_than_half_have_to_differ(wrong: int, suspicious: bool) -> None:
    documents = EMBEDDED.documents["en"][:wrong] + EMBEDDED.documents["vi"][: 50 - wrong]
    found = misnamed(Corpus({"vi": documents}))
    assert [(of.differing, of.sampled) for of in found] == ([(wrong, 50)] if suspicious else [])


def test_the_sample_is_spread_over_the_documents() -> None:
    english, vietnamese = EMBEDDED.documents["en"], EMBEDDED.documents["vi"]
    documents = english[:20] + vietnamese[:80]
    assert misnamed(Corpus({"vi": documents}), sample=10) == []
    assert [of.differing for of in misnamed(Corpus({"en": documents}), sample=10)] == [8]


def test_what_cannot_be_identified_counts_for_no_language() -> None:
    numbers = tuple(Document(str(number), f"{number} {number + 1} {number + 2}") for number in range(20))
    assert misnamed(Corpus({"vi": numbers})) == []


def test_the_file_is_named(tmp_path: Path) -> None:
    for name, language in (("en", "en"), ("vi", "zh")):
        lines = [document.text for document in EMBEDDED.documents[language]]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    (suspicion,) = misnamed(load_corpus(tmp_path))
    assert str(suspicion).startswith("vi.txt: 50 of 50 documents look like ")


def test_crane_relevance_warns(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for name, language in (("en", "en"), ("vi", "en"), ("zh", "zh")):
        lines = [document.text for document in EMBEDDED.documents[language][:20]]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    options = ["relevance", str(tmp_path / "no-model"), "--corpus", str(tmp_path), "--device", "cpu"]
    result = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, options)
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: vi.txt: 20 of 20 documents look like en"]
