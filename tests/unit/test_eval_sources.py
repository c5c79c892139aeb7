"""Rows of tasks: every format of file, corpora, datasets of the Hub (by a stand-in of the package), ids and columns."""

import json
import sys
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from clients.errors import EvaluationError
from clients.sources import RowSource
from crane_serve.common.text.corpus import EMBEDDED_CORPUS, Corpus


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str, str | None], list[dict[str, Any]]]:
    """Datasets by name, configuration, split and revision, which a module `datasets` gives out."""
    stored: dict[tuple[str, str | None, str, str | None], list[dict[str, Any]]] = {}

    def load_dataset(
        name: str, config: str | None, *, split: str, revision: str | None, trust_remote_code: bool
    ) -> list[dict[str, Any]]:
        assert not trust_remote_code
        if (name, config, split, revision) not in stored:
            raise ValueError(f"no {name} {config} {split} {revision}\nsecond line")
        return stored[name, config, split, revision]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return stored


# --- formats


def test_json_lines(tmp_path: Path) -> None:
    write(tmp_path / "vi.jsonl", '\ufeff{"id": 7, "text": "Một"}\n\n{"id": "b", "text": "a\u2028b"}\r\n')
    assert RowSource(files="{lang}.jsonl").rows("vi", tmp_path) == [
        {"id": "7", "text": "Một"},
        {"id": "b", "text": "a\u2028b"},
    ]


def test_a_list_in_json(tmp_path: Path) -> None:
    write(tmp_path / "x.json", '[{"q": "one"},\n {"q": "two"}]')
    assert RowSource(files="x.json").rows("en", tmp_path) == [{"id": "row-1", "q": "one"}, {"id": "row-2", "q": "two"}]


def test_squad_form(tmp_path: Path) -> None:
    answers = [{"text": "1066", "answer_start": 3}, {"text": "1066"}, {"text": "in 1066"}]
    paragraph = {
        "context": "In 1066.",
        "qas": [
            {"id": "q1", "question": "When?", "answers": answers},
            {"id": "q2", "question": "Why?", "answers": []},
        ],
    }
    write(tmp_path / "x.json", json.dumps({"version": "1", "data": [{"title": "T", "paragraphs": [paragraph]}]}))
    assert RowSource(files="x.json").rows("en", tmp_path) == [
        {"id": "q1", "context": "In 1066.", "question": "When?", "answers": ["1066", "in 1066"], "title": "T"},
        {"id": "q2", "context": "In 1066.", "question": "Why?", "answers": [], "title": "T"},
    ]


def test_tables(tmp_path: Path) -> None:
    write(tmp_path / "x.csv", 'question,answer\r\n"a, ""b""\nc",0\r\n\r\nd,1\r\n')
    assert RowSource(files="x.csv").rows("en", tmp_path) == [
        {"id": "row-1", "question": 'a, "b"\nc', "answer": "0"},
        {"id": "row-2", "question": "d", "answer": "1"},
    ]
    write(tmp_path / "x.tsv", "idx\tword\n4\tmột hai\n5\t\n")
    assert RowSource(files="x.tsv").rows("en", tmp_path) == [
        {"id": "4", "idx": "4", "word": "một hai"},
        {"id": "5", "idx": "5", "word": ""},
    ]


def test_text_lines_have_the_ids_of_a_corpus(tmp_path: Path) -> None:
    write(tmp_path / "en.txt", "One two.\n\n  Three four.  \n")
    rows = RowSource(files="{lang}.txt").rows("en", tmp_path)
    assert rows == [{"id": "line-1", "text": "One two."}, {"id": "line-3", "text": "Three four."}]
    assert rows == RowSource(corpus=".").rows("en", tmp_path)


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"id": [1, 2], "choices": [["a", "b"], ["c"]], "day": [date(2024, 5, 1), None]}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert RowSource(files="x.parquet").rows("en", tmp_path) == [
        {"id": "1", "choices": ["a", "b"], "day": "2024-05-01"},
        {"id": "2", "choices": ["c"], "day": None},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \xff}\n', "x.jsonl cannot be read as UTF-8 text: byte 0xff in line 2"),
        ("x.jsonl", '{"a": 1}\n{"a": \n', "x.jsonl:2: not JSON: Expecting value at column 6"),
        ("x.jsonl", '{"a": 1}\n[1]\n', "x.jsonl:2: expected an object; found a list"),
        ("x.jsonl", '{"a": "\\ud800"}\n', "x.jsonl:1: a text holds a surrogate that is no character"),
        ("x.jsonl", "\n", "x.jsonl holds no rows; expected one at least"),
        ("x.json", '[{"a": 1},\n{"a": }]', "x.json: not JSON: Expecting value at line 2, column 7"),
        ("x.json", '[{"a": 1}, "b"]', "x.json, row 2: expected an object; found a string"),
        ("x.json", '{"rows": []}', "x.json: expected a list of objects or .*; found an object"),
        ("x.json", "7", "x.json: expected a list of objects or .*; found a number"),
        ("x.json", '{"data": [{"title": "T"}]}', "x.json is not of SQuAD's form .*: KeyError: 'paragraphs'"),
        ("x.json", "", "x.json holds no rows"),
        ("x.csv", "a,b\n1,2\n3\n", "x.csv:3: 1 cells; expected 2 as in line 1"),
        ("x.csv", "a,a\n1,2\n", "x.csv:1: expected a header of different names; found 'a', 'a'"),
        ("x.csv", 'a\n"b', "x.csv:2: unexpected end of data"),
        ("x.csv", b"a\n\xff\n", "x.csv cannot be read as UTF-8 text: byte 0xff in line 2"),
        ("x.tsv", "a\tb\n", "x.tsv holds no rows"),
        ("x.txt", "\n\n", "x.txt holds no rows"),
        ("x.txt", b"a\0b", "x.txt:1 holds a NUL character"),
        ("x.parquet", "no", "x.parquet cannot be read as Parquet: "),
        ("x.xml", "<a/>", r"x.xml: unknown format '.xml'; expected one of .jsonl, .json, .csv, .tsv, .txt, .parquet"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    write(tmp_path / name, content)
    with pytest.raises(EvaluationError, match=message):
        RowSource(files=name).rows("en", tmp_path)


def test_missing_files_and_languages(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"there is no file .*fr\.jsonl"):
        RowSource(files="{lang}.jsonl").rows("fr", tmp_path)
    with pytest.raises(EvaluationError, match=r"no file for the language 'fr'; .* en, vi"):
        RowSource(files={"en": "a.txt", "vi": "b.txt"}).rows("fr", tmp_path)


# --- places


def test_files_by_language_and_absolute_paths(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "One.")
    source = RowSource(files={"en": str(tmp_path / "a.txt")})
    assert source.rows("en", Path("/nowhere")) == [{"id": "line-1", "text": "One."}]
    assert source.describe("en") == str(tmp_path / "a.txt")


def test_a_split_of_a_file(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", '{"a": 1, "split": "test"}\n{"a": 2, "split": "dev"}\n{"a": 3, "split": "test"}\n')
    rows = RowSource(files="x.jsonl", split="test").rows("en", tmp_path)
    assert [row["a"] for row in rows] == [1, 3]
    with pytest.raises(EvaluationError, match=r"x.jsonl \(split train\): no row is of this split; there are test, dev"):
        RowSource(files="x.jsonl", split="train").rows("en", tmp_path)
    write(tmp_path / "y.jsonl", '{"a": 1}\n')
    with pytest.raises(EvaluationError, match="its rows have no field `split`"):
        RowSource(files="y.jsonl", split="test").rows("en", tmp_path)


def test_the_embedded_corpus() -> None:
    rows = RowSource(corpus="embedded", split="test").rows("vi", Path("/nowhere"))
    expected = Corpus.load(EMBEDDED_CORPUS, "test", ["vi"]).documents["vi"]
    assert rows == [{"id": document.id, "text": document.text} for document in expected]
    with pytest.raises(EvaluationError, match="holds no language 'xx'"):
        RowSource(corpus="embedded").rows("xx", Path())
    with pytest.raises(EvaluationError, match="has no documents of split 'dev'"):
        RowSource(corpus="embedded", split="dev").rows("vi", Path())


def test_datasets(hub: Any) -> None:
    hub["facebook/belebele", "vie_Latn", "test", None] = [{"q": "Một?"}, {"q": "Hai?"}]
    source = RowSource(dataset="facebook/belebele", config="{lang}", split="test", codes={"vi": "vie_Latn"})
    assert source.rows("vi", Path()) == [{"id": "row-1", "q": "Một?"}, {"id": "row-2", "q": "Hai?"}]
    assert source.describe("vi") == "hf:facebook/belebele:vie_Latn (split test)"
    with pytest.raises(
        EvaluationError,
        match=r"hf:facebook/belebele:en \(split test\) cannot be loaded: no facebook/belebele en test None; check",
    ):
        source.rows("en", Path())


def test_several_configurations(hub: Any) -> None:
    hub["some/exam", "law", "val", "v1"] = [{"id": 0, "q": "a"}, {"id": 1, "q": "b"}]
    hub["some/exam", "logic", "val", "v1"] = [{"id": 0, "q": "c"}]
    source = RowSource(dataset="some/exam", config=("law", "logic"), split="val", revision="v1")
    assert source.rows("zh", Path()) == [
        {"id": "law/0", "config": "law", "q": "a"},
        {"id": "law/1", "config": "law", "q": "b"},
        {"id": "logic/0", "config": "logic", "q": "c"},
    ]
    with pytest.raises(EvaluationError, match=r"hf:some/exam \(split val\), config art cannot be loaded"):
        RowSource(dataset="some/exam", config=("law", "art"), split="val", revision="v1").rows("zh", Path())


def test_a_dataset_with_a_loading_script(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found mgsm.py")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", refuse)
    with pytest.raises(EvaluationError, match=r"found mgsm\.py; give a `revision` with data files .*, or download it"):
        RowSource(dataset="some/x", split="test").rows("en", Path())


@pytest.mark.parametrize(
    "name",
    [
        "text",
        "json",
        "here/there",
        "/etc",
        "../x",
        "./x",
        "a/b/c",
        "https://x/y",
        "hf://datasets/a",
        "a/..",
        "buckets/a/b/c",
    ],
)
def test_a_dataset_is_a_name_of_the_hub_and_no_path(
    hub: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` reads a directory of that name, and by `text` all texts of the working directory."""
    (tmp_path / "here" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    hub[name, None, "test", None] = [{"id": "1"}]
    with pytest.raises(EvaluationError, match="expected NAMESPACE/NAME of the Hub, and no path"):
        RowSource(dataset="{lang}", split="test", codes={"en": name}).rows("en", Path())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        EvaluationError, match=r"hf:some/x .*'datasets' is not installed; pip install datasets, or give"
    ):
        RowSource(dataset="some/x", split="test").rows("en", Path())


# --- ids and columns


def test_columns_are_renamed_by_language(tmp_path: Path) -> None:
    write(tmp_path / "x.csv", "key,en,vi,n\nk1,one,một,1\n")
    source = RowSource(files="x.csv", columns={"text": "{lang}", "id": "key"})
    assert source.rows("vi", tmp_path) == [{"id": "k1", "text": "một", "en": "one", "n": "1"}]
    with pytest.raises(EvaluationError, match=r"x.csv, row 1: there is no column 'fr'; there are key, en, vi, n"):
        source.rows("fr", tmp_path)


def test_ids_of_columns(tmp_path: Path) -> None:
    write(tmp_path / "x.csv", "link,number\nu,1\nu,2\n")
    assert [row["id"] for row in RowSource(files="x.csv", id=("link", "number")).rows("en", tmp_path)] == ["u/1", "u/2"]
    with pytest.raises(EvaluationError, match=r"x.csv, row 2: id 'u' is already used"):
        RowSource(files="x.csv", id="link").rows("en", tmp_path)
    with pytest.raises(EvaluationError, match=r"x.csv, row 1: there is no column 'key'; there are link, number"):
        RowSource(files="x.csv", id="key").rows("en", tmp_path)
    write(tmp_path / "y.jsonl", '{"key": null}')
    with pytest.raises(EvaluationError, match=r"y.jsonl, row 1: id column 'key' holds None; expected text"):
        RowSource(files="y.jsonl", id="key").rows("en", tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected one of files, corpus, dataset; found none"),
        ({"files": "a", "corpus": "b"}, "found files and corpus"),
        ({"dataset": "a"}, "a dataset needs a split"),
        ({"files": "a", "config": "b"}, "config and revision belong to a dataset"),
        ({"files": "a", "revision": "b"}, "config and revision belong to a dataset"),
        ({"files": "a", "place": "b"}, "place"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RowSource.model_validate(settings)
