"""Sources of corpora: datasets of the Hub (by a stand-in of the package), SQuAD-form JSON and line-aligned text."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from crane_serve.cli import app
from crane_serve.common.text.corpus import Corpus, CorpusError, Document
from relevance.corpus_import import Unit, line_parts, parse_splits, squad_parts, write_corpus
from relevance.sources import load_corpus


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str], list[dict[str, Any]]]:
    """Datasets by name, configuration and split, which a module `datasets` gives out."""
    stored: dict[tuple[str, str | None, str], list[dict[str, Any]]] = {}

    def load_dataset(
        name: str, configuration: str | None, *, split: str, trust_remote_code: bool
    ) -> list[dict[str, Any]]:
        assert not trust_remote_code
        if (name, configuration, split) not in stored:
            raise ValueError(f'Unknown split "{split}" of {name}.\nSecond line.')
        return stored[name, configuration, split]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return stored


# --- datasets of the Hub


def test_a_configuration_per_language(hub: Any) -> None:
    hub["facebook/flores", "eng_Latn", "dev"] = [{"id": 1, "text": " One two. "}, {"id": 2, "text": "Three."}]
    hub["facebook/flores", "vie_Latn", "dev"] = [{"id": 1, "text": "Một hai."}, {"id": 2, "text": "  "}]
    corpus = load_corpus("hf:facebook/flores:{lang}", "dev", ["en=eng_Latn", "vi=vie_Latn"])
    assert corpus.split == "dev"
    assert dict(corpus.documents) == {
        "en": (Document("1", "One two."), Document("2", "Three.")),
        "vi": (Document("1", "Một hai."),),
    }
    assert corpus.sources["vi"] == "hf:facebook/flores:vie_Latn"
    assert corpus.digest == Corpus(corpus.documents).digest


def test_a_dataset_per_language_and_ids_by_row(hub: Any) -> None:
    hub["news-vi", None, "train"] = [{"text": "Một hai."}, {"text": ""}, {"text": "Ba."}]
    corpus = load_corpus("hf:news-{lang}", "train", ["vi"])
    assert corpus.documents["vi"] == (Document("row-1", "Một hai."), Document("row-3", "Ba."))


def test_a_column_per_language(hub: Any) -> None:
    hub["talks", "all", "test"] = [{"text_en": "One two.", "text_vi": "Một hai."}]
    corpus = load_corpus("hf:talks:all", "test", ["en", "vi"], text_column="text_{lang}")
    assert [documents[0].text for documents in corpus.documents.values()] == ["One two.", "Một hai."]


def test_a_directory_is_a_source_too(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("One two.")
    assert load_corpus(str(tmp_path)) == load_corpus(tmp_path) == Corpus.load(tmp_path)


@pytest.mark.parametrize(
    ("source", "split", "languages", "message"),
    [
        ("hf:", "dev", ["en"], "expected hf:NAME or hf:NAME:CONFIG"),
        ("hf:x", "dev", None, "needs a split and the names of its languages"),
        ("hf:x", None, ["en"], "needs a split and the names of its languages"),
        (
            "hf:x:all",
            "dev",
            ["en", "vi"],
            "neither it nor the text column contains {lang}, but there are 2 languages",
        ),
        ("hf:x:{lang}", "dev", ["eng_Latn"], "'eng_Latn' cannot name a language"),
        ("hf:x:{lang}", "dev", ["en"], 'hf:x:en cannot be loaded: Unknown split "dev" of x.'),
        ("hf:empty", "dev", ["en"], "hf:empty (split dev) holds no documents"),
        ("hf:columns", "dev", ["en"], "no text in column 'text'; there are the columns id, sentence"),
        ("hf:twice", "dev", ["en"], "id '7' stands there more than once"),
    ],
)
def test_datasets_that_cannot_be_used(
    hub: Any, source: str, split: str | None, languages: list[str] | None, message: str
) -> None:
    hub["empty", None, "dev"] = [{"text": " "}]
    hub["columns", None, "dev"] = [{"id": "1", "sentence": "One."}]
    hub["twice", None, "dev"] = [{"id": 7, "text": "One."}, {"id": 7, "text": "Two."}]
    with pytest.raises(CorpusError) as caught:
        load_corpus(source, split, languages)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_package_or_the_network(monkeypatch: pytest.MonkeyPatch, hub: Any) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'x' on the Hub")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", offline)
    with pytest.raises(CorpusError, match="hf:x cannot be loaded: Couldn't reach 'x' on the Hub"):
        load_corpus("hf:x", "dev", ["en"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match="hf:x: the package 'datasets' is not installed; pip install datasets"):
        load_corpus("hf:x", "dev", ["en"])


# --- SQuAD-form JSON


def write_squad(path: Path, *articles: list[str]) -> None:
    data = [{"title": "T", "paragraphs": [{"context": text, "qas": []} for text in texts]} for texts in articles]
    path.write_text(json.dumps({"version": "1.1", "data": data}, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def squad(tmp_path: Path) -> str:
    write_squad(tmp_path / "xquad.en.json", ["First one.", "Second one."], ["Another."], ["Third.", "Fourth."])
    write_squad(tmp_path / "xquad.vi.json", ["Đoạn một.", "Đoạn hai."], ["Đoạn khác."], ["Ba.", "Bốn."])
    (tmp_path / "notes.en.json").write_text("{}")
    return str(tmp_path / "xquad.{lang}.json")


def test_a_document_per_paragraph(squad: str) -> None:
    parts = squad_parts(squad)
    assert list(parts) == ["en", "vi"]
    assert [(part.id, part.text) for part in parts["vi"][:3]] == [
        ("article-1-paragraph-1", "Đoạn một."),
        ("article-1-paragraph-2", "Đoạn hai."),
        ("article-2-paragraph-1", "Đoạn khác."),
    ]
    assert [part.id for part in parts["en"]] == [part.id for part in parts["vi"]]


def test_imported_paragraphs_are_a_corpus(squad: str, tmp_path: Path) -> None:
    paths = write_corpus(squad_parts(squad), {"relevance": 0.67, "test": 0.33}, tmp_path / "out")
    assert [path.name for path in paths] == ["en.jsonl", "vi.jsonl"]
    by_split = {split: Corpus.load(tmp_path / "out", split).documents["en"] for split in ("relevance", "test")}
    assert [document.text for document in by_split["relevance"]] == ["First one.", "Second one.", "Another."]
    assert [document.id for document in by_split["test"]] == ["article-3-paragraph-1", "article-3-paragraph-2"]


def test_translations_that_are_not_parallel(squad: str, tmp_path: Path) -> None:
    write_squad(tmp_path / "xquad.vi.json", ["Đoạn một."], ["Đoạn khác."], ["Ba.", "Bốn."])
    with pytest.raises(
        CorpusError, match=r"xquad\.vi\.json are not parallel: only one of them has article-1-paragraph-2"
    ):
        squad_parts(squad)


@pytest.mark.parametrize("content", ["[]", "{}", '{"data": 3}', '{"data": [{"paragraphs": [{"context": 1}]}]}', "text"])
def test_json_of_another_form(squad: str, tmp_path: Path, content: str) -> None:
    (tmp_path / "xquad.vi.json").write_text(content)
    with pytest.raises(CorpusError, match=r"xquad\.vi\.json is not of the form"):
        squad_parts(squad)


def test_an_empty_paragraph(squad: str, tmp_path: Path) -> None:
    write_squad(tmp_path / "xquad.vi.json", ["Đoạn một.", " "])
    with pytest.raises(CorpusError, match=r"xquad\.vi\.json: paragraph 2 of article 1 is empty"):
        squad_parts(squad)


def test_files_of_languages(squad: str, tmp_path: Path) -> None:
    assert list(squad_parts(squad, ["vi"])) == ["vi"]
    with pytest.raises(CorpusError, match=r"there is no .*xquad\.zh\.json for the language 'zh'"):
        squad_parts(squad, ["en", "zh"])
    with pytest.raises(CorpusError, match="no file fits"):
        squad_parts(str(tmp_path / "tydi.{lang}.json"))
    with pytest.raises(CorpusError, match="'EN' cannot name a language"):
        squad_parts(squad, ["EN"])
    for pattern in ("xquad.json", "{lang}/xquad.{lang}.json", "{lang}/xquad.json"):
        with pytest.raises(CorpusError, match=r"expected \{lang\} in the name of the file, once"):
            squad_parts(pattern)


# --- line-aligned text

LINES = {"en": "a one\na two\n\nb one\nc one\nc two\n", "vi": "a một\na hai\nb không\nb một\nc một\n\n"}
IDS = "a\na\nb\nb\nc\nc\n"


@pytest.fixture
def lines(tmp_path: Path) -> str:
    for language, content in LINES.items():
        (tmp_path / f"talks.{language}.txt").write_text(content, encoding="utf-8")
    (tmp_path / "ids").write_text(IDS)
    return str(tmp_path / "talks.{lang}.txt")


def test_a_document_per_line_without_those_blank_in_some_language(lines: str) -> None:
    parts = line_parts(lines)
    assert [(part.id, part.text) for part in parts["en"]] == [
        ("line-1", "a one"),
        ("line-2", "a two"),
        ("line-4", "b one"),
        ("line-5", "c one"),
    ]
    assert [(part.id, part.text) for part in parts["vi"]][2:] == [("line-4", "b một"), ("line-5", "c một")]


def test_a_document_per_id(lines: str, tmp_path: Path) -> None:
    parts = line_parts(lines, document_ids=tmp_path / "ids")
    assert [(part.id, part.text) for part in parts["en"]] == [("a", "a one\na two"), ("b", "b one"), ("c", "c one")]
    assert [part.text for part in parts["vi"]] == ["a một\na hai", "b một", "c một"]


def test_a_document_per_line_with_ids(lines: str, tmp_path: Path) -> None:
    parts = line_parts(lines, document_ids=tmp_path / "ids", unit=Unit.LINE)
    assert [(part.id, part.group) for part in parts["en"]] == [("a:1", "a"), ("a:2", "a"), ("b:2", "b"), ("c:1", "c")]
    assert [part.id for part in parts["en"]] == [part.id for part in parts["vi"]]


def test_a_document_blank_in_some_language_is_left_out_in_all(lines: str, tmp_path: Path) -> None:
    (tmp_path / "talks.vi.txt").write_text("a một\na hai\n\n\nc một\nc hai\n", encoding="utf-8")
    parts = line_parts(lines, document_ids=tmp_path / "ids")
    assert [part.id for part in parts["en"]] == [part.id for part in parts["vi"]] == ["a", "c"]


def test_the_last_line_feed_may_be_missing(lines: str, tmp_path: Path) -> None:
    (tmp_path / "talks.en.txt").write_text(LINES["en"].rstrip("\n"), encoding="utf-8")
    assert len(line_parts(lines)["en"]) == 4


def test_lines_that_are_not_aligned(lines: str, tmp_path: Path) -> None:
    (tmp_path / "talks.vi.txt").write_text("a một\na hai\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"different numbers of lines: .*talks\.en\.txt 6, .*talks\.vi\.txt 2"):
        line_parts(lines)
    (tmp_path / "ids").write_text("a\n")
    with pytest.raises(CorpusError, match=r"talks\.en\.txt 6, .*ids 1"):
        line_parts(lines, ["en"], tmp_path / "ids")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("a\nb\na\nb\nc\nc\n", "ids:3: document 'a' occurs again"),
        ("a\n\nb\nb\nc\nc\n", "ids:2: expected a"),
    ],
)
def test_ids_that_make_no_documents(lines: str, tmp_path: Path, ids: str, message: str) -> None:
    (tmp_path / "ids").write_text(ids)
    with pytest.raises(CorpusError, match=message):
        line_parts(lines, document_ids=tmp_path / "ids")


def test_documents_need_ids(lines: str) -> None:
    with pytest.raises(CorpusError, match="documents of several lines need a file of document ids"):
        line_parts(lines, unit=Unit.DOCUMENT)


def test_an_encoding_other_than_utf8(lines: str, tmp_path: Path) -> None:
    (tmp_path / "talks.vi.txt").write_bytes("một\nhai\nba\n".encode() + b"\xe9\n")
    with pytest.raises(CorpusError, match=r"talks\.vi\.txt cannot be read as UTF-8 text: byte 0xe9 in line 4"):
        line_parts(lines)


# --- splits


@pytest.mark.parametrize("unit", list(Unit))
def test_no_document_straddles_splits(tmp_path: Path, unit: Unit) -> None:
    ids = [f"talk-{talk}" for talk in range(10) for _ in range(talk % 4 + 1)]
    (tmp_path / "ids").write_text("\n".join(ids))
    for language in ("en", "vi"):
        (tmp_path / f"{language}.txt").write_text("\n".join(f"{language} line {number}" for number in range(len(ids))))
    parts = line_parts(str(tmp_path / "{lang}.txt"), document_ids=tmp_path / "ids", unit=unit)
    write_corpus(parts, {"relevance": 0.6, "validation": 0.2, "test": 0.2}, tmp_path / "out")
    talks = {}
    for split in ("relevance", "validation", "test"):
        corpus = Corpus.load(tmp_path / "out", split)
        of_language = [[document.id for document in documents] for documents in corpus.documents.values()]
        assert of_language[0] == of_language[1]
        talks[split] = list(dict.fromkeys(identifier.split(":")[0] for identifier in of_language[0]))
    assert talks == {
        "relevance": [f"talk-{talk}" for talk in range(6)],
        "validation": ["talk-6", "talk-7"],
        "test": ["talk-8", "talk-9"],
    }


def test_without_splits_the_corpus_is_whole(lines: str, tmp_path: Path) -> None:
    write_corpus(line_parts(lines), {}, tmp_path / "out")
    corpus = Corpus.load(tmp_path / "out", "relevance")
    assert (corpus.split, len(corpus.documents["en"])) == (None, 4)


def test_splits_are_parsed() -> None:
    assert parse_splits(None) == {}
    assert parse_splits(" relevance=0.6, test=0.4 ") == {"relevance": 0.6, "test": 0.4}
    assert parse_splits("a=0.1,b=0.2,c=0.7") == {"a": 0.1, "b": 0.2, "c": 0.7}


@pytest.mark.parametrize("listed", ["test", "test=", "=1", "test=x", "test=0", "a=-1,b=2", "a=0.5,a=0.5", "a=nan,b=1"])
def test_splits_that_are_none(listed: str) -> None:
    with pytest.raises(CorpusError, match="expected different names with fractions"):
        parse_splits(listed)


@pytest.mark.parametrize(("listed", "total"), [("a=0.5,b=0.4", "0.9"), ("a=0.5,b=0.6", "1.1")])
def test_fractions_have_to_add_up(listed: str, total: str) -> None:
    with pytest.raises(CorpusError, match=f"add up to {total}, expected 1"):
        parse_splits(listed)


def test_a_split_of_no_document(lines: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="split 'test' gets none of the 4 documents"):
        write_corpus(line_parts(lines), {"relevance": 0.95, "test": 0.05}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_language_of_one_word(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("Hello\n")
    with pytest.raises(CorpusError, match="en holds 1 word"):
        write_corpus(line_parts(str(tmp_path / "{lang}.txt"), ["en"]), {}, tmp_path / "out")


# --- the command


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


def test_the_command_imports_squad(squad: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("corpus", "import", "--squad", squad, "--out", out, "--splits", "relevance=0.5,test=0.5")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}/en.jsonl: 5 documents\n{out}/vi.jsonl: 5 documents\n"
    assert len(Corpus.load(out, "relevance").documents["en"]) == 3


def test_the_command_imports_lines(lines: str, tmp_path: Path) -> None:
    options = ("--lines", lines, "--document-ids", tmp_path / "ids", "--by", "line", "--languages", "vi,en")
    result = run("corpus", "import", *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert Corpus.load(tmp_path / "out").documents["vi"][2] == Document("b:2", "b một")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "expected either --squad or --lines"),
        (("--squad", "{lang}.json", "--lines", "{lang}.txt"), "expected either --squad or --lines"),
        (("--squad", "{lang}.json", "--by", "line"), "belong to --lines"),
        (("--lines", "nowhere/{lang}.txt"), "no file fits nowhere/{lang}.txt"),
        (("--lines", "{lang}.txt", "--splits", "test=2"), "split 'test=2'"),
    ],
)
def test_what_the_command_refuses(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run("corpus", "import", *options, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert message in result.stderr
