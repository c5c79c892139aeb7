import json
import subprocess
import sys
from pathlib import Path

import pytest

from crane_serve.common.text.corpus import EMBEDDED_CORPUS, Corpus, CorpusError, Document


def write_jsonl(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_jsonl(
        tmp_path / "en.jsonl",
        {"id": "a", "text": "One.", "split": "relevance"},
        {"id": "b", "text": "Two.", "split": "test"},
    )
    write_jsonl(
        tmp_path / "zh.jsonl",
        {"id": "a", "text": "一。", "split": "relevance"},
        {"id": "b", "text": "二。", "split": "test"},
    )
    return tmp_path


def test_embedded_corpus_is_parallel_in_three_languages() -> None:
    corpus = Corpus.load(EMBEDDED_CORPUS)
    assert corpus.languages == ("en", "vi", "zh")
    ids = [[document.id for document in documents] for documents in corpus.documents.values()]
    assert ids[0] == ids[1] == ids[2]
    sizes = {split: len(Corpus.load(EMBEDDED_CORPUS, split).documents["vi"]) for split in ("relevance", "test")}
    assert len(ids[0]) >= 160
    assert sizes == {"relevance": 94, "test": 38}


def test_a_split_is_picked(directory: Path) -> None:
    corpus = Corpus.load(directory, "test")
    assert corpus.split == "test"
    assert dict(corpus.documents) == {"en": (Document("b", "Two."),), "zh": (Document("b", "二。"),)}


def test_without_a_split_the_corpus_is_whole(directory: Path) -> None:
    corpus = Corpus.load(directory)
    assert corpus.split is None
    assert [document.id for document in corpus.documents["en"]] == ["a", "b"]


def test_a_corpus_without_splits_is_whole_whatever_split_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "vi.txt").write_text("\n Xin chào. \n\nTạm biệt.\r\n", encoding="utf-8")
    write_jsonl(tmp_path / "en.jsonl", {"id": "x", "text": "Hello there."})
    corpus = Corpus.load(tmp_path, "relevance")
    assert corpus.split is None
    assert corpus.documents["vi"] == (Document("line-2", "Xin chào."), Document("line-4", "Tạm biệt."))
    assert corpus.documents["en"] == (Document("x", "Hello there."),)


def test_line_separators_of_unicode_do_not_end_a_document(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("One\u2028still one\x0cand still.\nTwo.", encoding="utf-8")
    assert len(Corpus.load(tmp_path).documents["en"]) == 2


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("One two.", encoding="utf-8-sig")
    assert Corpus.load(tmp_path).documents["en"] == (Document("line-1", "One two."),)


def test_languages_are_picked_in_the_given_order(directory: Path) -> None:
    assert Corpus.load(directory, languages=["zh", "en", "zh"]).languages == ("zh", "en")


def test_the_digest_is_of_the_content(directory: Path) -> None:
    digest = Corpus.load(directory, "test").digest
    assert digest == Corpus.load(directory, "test", ["zh", "en"]).digest
    assert digest != Corpus.load(directory, "relevance").digest
    assert digest != Corpus.load(directory, "test", ["zh"]).digest
    assert Corpus({"en": (Document("ab", "c"),)}).digest != Corpus({"en": (Document("a", "bc"),)}).digest


def test_an_unknown_split_names_those_that_exist(directory: Path) -> None:
    with pytest.raises(CorpusError, match=r"no documents of split 'train'; it has relevance, test"):
        Corpus.load(directory, "train")


def test_a_document_without_a_split_among_others_is_an_error(directory: Path) -> None:
    write_jsonl(directory / "vi.jsonl", {"id": "a", "text": "Một hai."})
    with pytest.raises(CorpusError, match=r"vi\.jsonl:1: document 'a' has no split"):
        Corpus.load(directory, "test")


def test_a_missing_language_names_those_that_exist(directory: Path) -> None:
    with pytest.raises(CorpusError, match="no language 'fr'; it holds en, zh"):
        Corpus.load(directory, languages=["fr"])


def test_no_language_asked_for(directory: Path) -> None:
    with pytest.raises(CorpusError, match=r"no language of .* was asked for"):
        Corpus.load(directory, languages=[])


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nowhere is not a directory"):
        Corpus.load(tmp_path / "nowhere")


def test_a_directory_without_languages(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("text")
    with pytest.raises(CorpusError, match="holds no language"):
        Corpus.load(tmp_path)


def test_two_files_of_one_language(directory: Path) -> None:
    (directory / "en.txt").write_text("One.")
    with pytest.raises(CorpusError, match=r"both en\.jsonl and en\.txt"):
        Corpus.load(directory)


def test_a_name_that_is_no_language(directory: Path) -> None:
    (directory / "EN US.txt").write_text("One.")
    with pytest.raises(CorpusError, match="'EN US' cannot name a language"):
        Corpus.load(directory)


@pytest.mark.parametrize("content", ["", "\n  \n"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_an_empty_file(tmp_path: Path, content: str, suffix: str) -> None:
    (tmp_path / f"en.{suffix}").write_text(content)
    with pytest.raises(CorpusError, match=rf"en\.{suffix} holds no documents"):
        Corpus.load(tmp_path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"id": "b", "text": ', "not JSON"),
        ('["b", "text"]', "expected an object"),
        ('{"id": "b"}', "'text' is missing or empty"),
        ('{"id": "b", "text": " "}', "'text' is missing or empty"),
        ('{"id": 7.5, "text": "Two."}', r"'id' is a number, 7\.5; expected a string or a whole number"),
        ('{"id": true, "text": "Two."}', "'id' is true or false, True; expected"),
        ('{"id": [7], "text": "Two."}', "'id' is a list"),
        ('{"id": null, "text": "Two."}', "'id' is missing or empty"),
        ('{"id": "b", "text": 7}', "'text' is a number; expected a string"),
        ('{"text": "Two."}', "'id' is missing or empty"),
        ('{"id": "b", "text": "Two.", "split": 1}', "'split' is 1"),
        ('{"id": "a", "text": "Two."}', "id 'a' is already used in line 1"),
        ('{"id": "b", "text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "en.jsonl").write_text('{"id": "a", "text": "One."}\n' + line + "\n")
    with pytest.raises(CorpusError, match=rf"en\.jsonl:2: .*{problem}"):
        Corpus.load(tmp_path)


def test_lines_of_json_that_are_called_text(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text('\n{"text": "One thing here"}\n{"text": "Another thing there"}\n')
    with pytest.raises(CorpusError, match=r"en\.txt:2 .*\.jsonl"):
        Corpus.load(tmp_path)
    (tmp_path / "en.txt").write_text("{a set} of braces\n{}x is a text too\n")
    assert len(Corpus.load(tmp_path).documents["en"]) == 2


def test_a_line_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "fr.txt").write_bytes("un café noir\nun thé vert\n".encode() + "encore un café\n".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"fr\.txt cannot be read as UTF-8 text: byte 0xe9 in line 3 is of another"):
        Corpus.load(tmp_path)


def test_the_line_is_right_behind_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "fr.txt").write_bytes(b"\xef\xbb\xbfun th\xc3\xa9\n\xe9\n")
    with pytest.raises(CorpusError, match="byte 0xe9 in line 2"):
        Corpus.load(tmp_path)


@pytest.mark.parametrize(
    ("encoding", "message"), [("utf-16", "byte 0xff in line 1"), ("utf-16-le", r"txt:1 holds a NUL")]
)
def test_text_that_is_utf16(tmp_path: Path, encoding: str, message: str) -> None:
    (tmp_path / "en.txt").write_bytes("One two three.\n".encode(encoding))
    with pytest.raises(CorpusError, match=message):
        Corpus.load(tmp_path)


def test_a_jsonl_file_of_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "zh.jsonl").write_bytes('{"id": "a", "text": "长城在北方"}\n'.encode("gb18030"))
    with pytest.raises(CorpusError, match=r"zh\.jsonl cannot be read as UTF-8 text: byte 0xb3 in line 1"):
        Corpus.load(tmp_path)


@pytest.mark.parametrize("word", ["Hello", "Hello!\n\n", "好。", "ไ", "..."])
def test_a_file_of_one_word(tmp_path: Path, word: str) -> None:
    (tmp_path / "en.txt").write_text(word, encoding="utf-8")
    with pytest.raises(CorpusError, match=r"en\.txt holds (1 word|no words); expected texts in the language"):
        Corpus.load(tmp_path)


@pytest.mark.parametrize("text", ["Hello there", "Hello\nthere", "你好", "สวัสดี", "ありがとう"])
def test_two_words_are_text_with_spaces_between_or_without(tmp_path: Path, text: str) -> None:
    (tmp_path / "en.txt").write_text(text, encoding="utf-8")
    assert Corpus.load(tmp_path).languages == ("en",)


def test_a_corpus_knows_its_files(directory: Path) -> None:
    assert dict(Corpus.load(directory, "test").sources) == {"en": "en.jsonl", "zh": "zh.jsonl"}
    assert Corpus.load(directory, "test") == Corpus(Corpus.load(directory, "test").documents, "test")


def test_the_module_imports_no_torch() -> None:
    program = "import sys, relevance.sources, relevance.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_documents_are_spread_evenly_and_stay_parallel() -> None:
    whole = Corpus(
        {
            "en": tuple(Document(f"d{n}", f"a river {n}") for n in range(10)),
            "vi": tuple(Document(f"d{n}", f"con sông {n}") for n in range(10)),
            "zh": (Document("d0", "河"), Document("d1", "江")),
        },
        "test",
    )
    few = whole.spread(4)
    assert [document.id for document in few.documents["en"]] == ["d0", "d2", "d5", "d7"]
    assert [document.id for document in few.documents["vi"]] == ["d0", "d2", "d5", "d7"]
    assert few.documents["zh"] == whole.documents["zh"]
    assert few.split == "test"
    assert few.digest != whole.digest
    assert whole.spread(None) is whole
    assert whole.spread(10) == whole
