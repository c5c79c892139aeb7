"""Which file of a corpus directory holds which language: none is lost in silence, and what is no text is no trouble."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from clients.errors import EvaluationError
from clients.sources import RowSource
from crane_serve.common.text.corpus import Corpus, CorpusError, Document
from crane_serve.common.text.language_files import language_files
from relevance.sources import load_corpus

ROWS = [
    {"id": "a", "text": 'He said: "one,\ntwo".', "split": "relevance"},
    {"id": "b", "text": "Ba\tbốn năm.", "split": "test"},
]


def table(delimiter: str) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


CONTENTS = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".csv": table(",").encode(),
    ".tsv": table("\t").encode(),
    ".parquet": as_parquet(ROWS),
}
CONTENTS |= {f"{suffix}.gz": gzip.compress(of, mtime=0) for suffix, of in CONTENTS.items() if suffix != ".parquet"}


# --- formats


@pytest.mark.parametrize("suffix", CONTENTS)
def test_every_format_holds_the_same_documents(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"vi{suffix}").write_bytes(CONTENTS[suffix])
    corpus = Corpus.load(tmp_path, "test")
    assert corpus.documents["vi"] == (Document("b", ROWS[1]["text"]),)
    assert Corpus.load(tmp_path).documents["vi"] == tuple(Document(row["id"], row["text"]) for row in ROWS)
    rows = RowSource(files="{lang}" + suffix).rows("vi", tmp_path)
    assert rows == ROWS


def test_lines_that_are_compressed(tmp_path: Path) -> None:
    (tmp_path / "vi.txt.gz").write_bytes(gzip.compress("Một hai.\n\nBa.\n".encode()))
    assert Corpus.load(tmp_path).documents["vi"] == (Document("line-1", "Một hai."), Document("line-3", "Ba."))


def test_the_four_files_of_a_report_are_four_languages(tmp_path: Path) -> None:
    for name in ("en.jsonl", "vi.jsonl", "zh.json", "de.jsonl.gz"):
        (tmp_path / name).write_bytes(CONTENTS[name.partition(".")[2].join([".", ""])])
    assert Corpus.load(tmp_path, "relevance").languages == ("de", "en", "vi", "zh")


def test_a_table_needs_no_ids_and_names_its_text_column(tmp_path: Path) -> None:
    (tmp_path / "vi.csv").write_text("vi,en\nMột hai.,One two.\nBa.,Three.\n", encoding="utf-8")
    corpus = load_corpus(tmp_path, text_column="{lang}")
    assert corpus.documents["vi"] == (Document("row-1", "Một hai."), Document("row-2", "Ba."))
    with pytest.raises(CorpusError, match=r"vi\.csv:2: there is no column 'text' .* vi, en"):
        load_corpus(tmp_path)


def test_whole_numbers_are_ids(tmp_path: Path) -> None:
    (tmp_path / "en.jsonl").write_text('{"id": 7, "text": "One two."}\n{"id": "7", "text": "Three."}\n')
    with pytest.raises(CorpusError, match=r"en\.jsonl:2: id '7' is already used in line 1"):
        Corpus.load(tmp_path)
    (tmp_path / "en.jsonl").write_text('{"id": 7, "text": "One two."}\n')
    assert Corpus.load(tmp_path).documents["en"] == (Document("7", "One two."),)
    (tmp_path / "en.jsonl").unlink()
    (tmp_path / "en.parquet").write_bytes(as_parquet([{"id": 7, "text": "One two."}]))
    assert Corpus.load(tmp_path).documents["en"] == (Document("7", "One two."),)


def test_a_long_document_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "en.csv").write_text(f"text\n{'one two ' * 40_000}\n")
    assert len(Corpus.load(tmp_path).documents["en"][0].text) > 300_000


LATIN = gzip.compress(b"text\n\xff\n", mtime=0)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("en.jsonl.gz", cut(CONTENTS[".jsonl.gz"]), "en.jsonl.gz cannot be decompressed: "),
        ("en.jsonl.gz", CONTENTS[".jsonl"], "en.jsonl.gz cannot be decompressed: Not a gzipped file"),
        ("en.jsonl.gz", CONTENTS[".jsonl.gz"][:-8] + bytes(8), "en.jsonl.gz cannot be decompressed: CRC check failed"),
        (
            "en.csv.gz",
            gzip.compress(b"text\n\xff\n", mtime=0),
            "en.csv.gz cannot be read as UTF-8 text: byte 0xff in line 2",
        ),
        ("en.parquet", cut(CONTENTS[".parquet"]), "en.parquet cannot be read as Parquet: "),
        ("en.parquet", b"", "en.parquet cannot be read as Parquet: "),
        ("en.parquet", as_parquet([{"text": 7}]), "en.parquet, row 1: 'text' is a number; expected a string"),
        ("en.parquet", as_parquet([{"text": "a b"}, {"text": None}]), "en.parquet, row 2: 'text' is missing or empty"),
        ("en.csv", "The harbour froze.\nIt was cold.\n", r"en.csv:2: there is no column 'text' .*The harbour froze"),
        ("en.csv", "id;text\n1;a b\n", "en.csv:2: there is no column 'text' .*id;text"),
        ("en.csv", "id,text\n1,a b\n2,c,d\n", "en.csv:3: 3 cells; expected 2 as in line 1"),
        ("en.csv", 'id,text\n1,"a\nb"\n2,"c\nd\n', "en.csv:4: unexpected end of data"),
        ("en.csv", 'id,text\n1,a\n2,"b"c\n', "en.csv:3: "),
        ("en.csv", "id,text\n1,a b\nid,text\n2,c d\n", "en.csv:3 is the header again"),
        ("en.csv", "id,text\n1,a b\n1,c d\n", "en.csv:3: id '1' is already used in line 2"),
        ("en.csv", "id,text\n,a b\n", "en.csv:2: 'id' is missing or empty"),
        ("en.tsv", "id\ttext\n1\t\n", "en.tsv:2: 'text' is missing or empty"),
        ("en.csv", "id,text\n", "en.csv holds no documents"),
        ("en.json", '{"id": "a", "text": "b c"}\n{"id": "b", "text": "d"}\n', "an object per line is named .jsonl"),
        ("en.json", '["a b", "c d"]', "en.json, row 1: expected an object; found a string"),
        ("en.json", "[" * 100_000, "en.json: JSON that is nested too deeply"),
        ("en.json", '[{"id": "a", "text": "b c"}, {"id": "a", "text": "d"}]', "row 2: id 'a' is already used in row 1"),
    ],
)
def test_damaged_files_are_named_with_the_place(tmp_path: Path, name: str, content: bytes | str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CorpusError, match=message) as refused:
        Corpus.load(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content"), [("en.jsonl.gz", b"no"), ("en.parquet", cut(CONTENTS[".parquet"])), ("en.xlsx", b"no")]
)
def test_rows_of_tasks_are_refused_alike(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError, match=name):
        RowSource(files=name).rows("en", tmp_path)


# --- directories


def touch(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text("x")


def folder(name: str, *files: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        (directory / name).mkdir()
        for file in files:
            (directory / name / file).write_text("x")

    return make


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "en.jsonl").write_bytes(CONTENTS[".jsonl"])
    return tmp_path


@pytest.mark.parametrize(
    "beside",
    [
        *map(touch, ("README.md", "README.txt", "readme", "LICENSE", "LICENSE.txt", "NOTICE.md", "Makefile")),
        *map(touch, (".gitattributes", ".DS_Store", "_SUCCESS", "dataset_infos.json", "CITATION.cff")),
        *map(touch, ("prepare.py", "run.sh", "masks.safetensors", "scores.safetensors", "figure.png", "notes.md")),
        *map(touch, ("en.jsonl.bak", "en.jsonl~", "en.jsonl.tmp", "en.old", "plan.yaml", "report.html")),
        *map(folder, ("validation", "fr", "__pycache__", ".git", "scores.safetensors.progress")),
        folder("results", "results.json"),
    ],
)
def test_what_is_no_text_is_passed_over(directory: Path, beside: Callable[[Path], None]) -> None:
    beside(directory)
    assert list(language_files(directory)) == ["en"]


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        *(
            (touch(name), name)
            for name in (
                "de.xlsx",
                "de.jsonl.zst",
                "de.jsonl.bz2",
                "de.parquet.gz",
                "de.zip",
                "de.ndjson",
                "de.arrow",
                "de.md",
                "de.html",
                "de.xml",
                "de",
                "german.docx",
                "german",
                "de.jsonl.bak",
                "de.gz",
            )
        ),
        (folder("fr", "train.jsonl"), "fr"),
        (folder("vie_Latn", "data.parquet"), "vie_Latn"),
        (folder("fr.parquet"), "fr.parquet"),
    ],
)
def test_what_may_be_a_language_is_refused_by_name(directory: Path, beside: Callable[[Path], None], name: str) -> None:
    beside(directory)
    with pytest.raises(CorpusError, match=rf" holds {name}, not read as a language"):
        Corpus.load(directory)
    assert Corpus.load(directory, languages=["en"]).languages == ("en",)
    with pytest.raises(CorpusError, match=name):
        Corpus.load(directory, languages=[name.partition(".")[0]])


@pytest.mark.parametrize("other", ["en.jsonl.gz", "en.txt", "en.csv", "en.parquet", "en.JSON"])
def test_two_files_of_one_language_are_refused(directory: Path, other: str) -> None:
    (directory / "vi.txt").write_text("Một hai.")
    touch(other)(directory)
    with pytest.raises(CorpusError, match=f"holds both .*{other}"):
        Corpus.load(directory)
    assert Corpus.load(directory, languages=["vi"]).languages == ("vi",)


def test_a_name_in_capitals_is_no_language_but_is_not_lost(directory: Path) -> None:
    touch("DE.JSONL")(directory)
    with pytest.raises(CorpusError, match="'DE' cannot name a language"):
        Corpus.load(directory)
