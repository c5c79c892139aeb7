"""Characters: what in the encoding of texts could pass for language, with the number of documents and an example."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clients.sources import RowSource
from crane_serve.cli import app
from crane_serve.common.masks import read_mask
from crane_serve.common.text.corpus import EMBEDDED_CORPUS, Corpus, Document, Form
from relevance.characters import chinese_script, remarks
from relevance.corpus_import import line_parts, write_corpus
from relevance.scores import Scores

VIETNAMESE = ("Tuyết phủ trắng đồi.", "Bến cảng đóng băng.", "Chuông reo đến trưa.", "Tàu đến muộn.")
SIMPLIFIED = "这个国家的经济发展很快，人们说应该让学生读书。"
TRADITIONAL = "這個國家的經濟發展很快，人們說應該讓學生讀書。"


def nfd(texts: Sequence[str]) -> list[str]:
    return [unicodedata.normalize("NFD", text) for text in texts]


def corpus(**texts: Sequence[str]) -> Corpus:
    return Corpus(
        {
            name.replace("_", "-"): tuple(Document(f"d{number}", text) for number, text in enumerate(of))
            for name, of in texts.items()
        }
    )


@pytest.mark.parametrize("split", ["relevance", "validation", "test"])
def test_the_packaged_corpus_has_nothing_odd(split: str) -> None:
    assert remarks(Corpus.load(EMBEDDED_CORPUS, split)) == []


def test_decomposed_texts_are_counted() -> None:
    (remark,) = remarks(corpus(en=["One two."], vi=nfd(VIETNAMESE)))
    assert "vi has 4 of 4 documents" in remark
    assert "--normalise NFC" in remark
    (remark,) = remarks(corpus(fr=["C'était l'été."], vi=nfd(VIETNAMESE)))
    assert "which fr is in" in remark


@pytest.mark.parametrize(
    "texts",
    [
        [*nfd(VIETNAMESE[:2]), *VIETNAMESE[2:]],
        [nfd(VIETNAMESE)[0] + VIETNAMESE[1], "Xin.", "Ba.", "Ha."],
    ],
)
def test_mixed_forms_are_said_louder(texts: list[str]) -> None:
    (remark,) = remarks(corpus(vi=texts))
    assert "vi MIXES" in remark
    assert "'d0'" in remark


def test_other_splits_of_a_file_count_too(tmp_path: Path) -> None:
    rows = [("a", "relevance", nfd(VIETNAMESE)[0]), ("b", "test", VIETNAMESE[1])]
    (tmp_path / "vi.csv").write_text("id,split,text\n" + "".join(f"{i},{s},{t}\n" for i, s, t in rows), "utf-8")
    (remark,) = remarks(Corpus.load(tmp_path, "relevance"))
    assert "vi.csv MIXES" in remark
    assert remarks(Corpus.load(tmp_path, "test")) == []


def test_texts_that_are_brought_into_one_form(tmp_path: Path) -> None:
    (tmp_path / "vi.txt").write_text("\n".join(nfd(VIETNAMESE)), "utf-8")
    as_it_is, brought = Corpus.load(tmp_path), Corpus.load(tmp_path, normalise=Form.NFC)
    assert [document.text for document in brought.documents["vi"]] == list(VIETNAMESE)
    assert (as_it_is.normalised, brought.normalised) == (None, Form.NFC)
    assert as_it_is.digest != brought.digest
    (tmp_path / "vi.txt").write_text("\n".join(VIETNAMESE), "utf-8")
    assert Corpus.load(tmp_path).digest == brought.digest
    assert remarks(brought) == []


def test_other_forms_of_letters_stay_as_they_are(tmp_path: Path) -> None:
    texts = ["Ｗｉｄｅ ｌｅｔｔｅｒｓ ① ﬁ", "hoà bình hòa bình", "می\u200cخواهم رفت"]
    (tmp_path / "xx.txt").write_text("\n".join(texts), "utf-8")
    loaded = Corpus.load(tmp_path, normalise=Form.NFC)
    assert [document.text for document in loaded.documents["xx"]] == texts
    assert remarks(loaded) == []


def test_rows_of_tasks_can_be_brought_into_one_form(tmp_path: Path) -> None:
    decomposed = nfd(VIETNAMESE)
    (tmp_path / "x.csv").write_text(f"id,question\n{decomposed[1]},{decomposed[0]}\n", "utf-8")
    (row,) = RowSource(files="x.csv", normalise=Form.NFC).rows("vi", tmp_path)
    assert row == {"id": decomposed[1], "question": VIETNAMESE[0]}
    (tmp_path / "x.json").write_text(f'[{{"id": 1, "choices": ["{decomposed[0]}", {{"a": "{decomposed[1]}"}}]}}]')
    (row,) = RowSource(files="x.json", normalise=Form.NFC).rows("vi", tmp_path)
    assert row["choices"] == [VIETNAMESE[0], {"a": VIETNAMESE[1]}]


# --- byte order marks and other strays


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("en.txt", "\ufeffOne two.\nThree.\n\ufeffFour.\n\n\ufeffFive.\n"),
        (
            "en.jsonl",
            '\ufeff{"id": 1, "text": "One two."}\n{"id": 2, "text": "Three."}\n\ufeff{"id": 3, "text": "Four."}\n\n'
            '\ufeff{"id": 4, "text": "Five."}\n',
        ),
        ("en.csv", "\ufefftext\nThree.\n\ufeffFour.\n\n\ufeffFive.\n"),
    ],
)
def test_byte_order_marks_where_files_were_joined(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    loaded = Corpus.load(tmp_path)
    assert not any("\ufeff" in document.text for document in loaded.documents["en"])
    (remark,) = remarks(loaded)
    assert f"{name}: lines 3, 5 began with a byte order mark" in remark


def test_a_joined_file_of_lines_is_said_at_import(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("One two.\n\ufeffThree.\n", "utf-8")
    notices: list[str] = []
    parts = line_parts(str(tmp_path / "{lang}.txt"), notice=notices.append)
    assert [part.text for part in parts["en"]] == ["One two.", "Three."]
    assert "en.txt: line 2 began" in notices[0]


@pytest.mark.parametrize(("sign", "code"), [("\ufeff", "U+FEFF"), ("\ufffd", "U+FFFD"), ("\u200b", "U+200B")])
def test_strays_inside_a_text(sign: str, code: str) -> None:
    (remark,) = remarks(corpus(en=["One two.", f"Thr{sign}ee."], th=["สวัสดีครับ"]))
    assert remark.startswith(f"en: 1 of 2 documents hold {code}")
    assert "'d1'" in remark


def test_a_space_of_no_width_belongs_to_thai() -> None:
    assert remarks(corpus(th=["สวัสดี\u200bครับ"])) == []


# --- Chinese


def test_scripts_by_hand() -> None:
    assert chinese_script(SIMPLIFIED) == "Simplified"
    assert chinese_script(TRADITIONAL) == "Traditional"
    assert chinese_script("山水人木") is None
    assert chinese_script("日本語の国") is None
    assert chinese_script("書") is None
    assert chinese_script("One two.") is None


@pytest.mark.parametrize("name", ["zh_hant", "zh_tw", "zh_hk", "zht", "zho_hant", "zh_hant_hk", "yue_hant"])
def test_simplified_text_under_a_traditional_name(name: str) -> None:
    (remark,) = remarks(corpus(**{name: [SIMPLIFIED, TRADITIONAL]}))
    assert "1 of 2 documents, such as 'd0', are in Simplified Chinese" in remark
    assert remarks(corpus(**{name: [TRADITIONAL]})) == []


@pytest.mark.parametrize("name", ["zh_hans", "zh_cn", "zh_sg", "zhs", "cmn_hans"])
def test_traditional_text_under_a_simplified_name(name: str) -> None:
    (remark,) = remarks(corpus(**{name: [TRADITIONAL, TRADITIONAL]}))
    assert "2 of 2 documents, such as 'd0', are in Traditional Chinese" in remark
    assert remarks(corpus(**{name: [SIMPLIFIED]})) == []


def test_both_scripts_under_a_name_that_says_none() -> None:
    (remark,) = remarks(corpus(zh=[SIMPLIFIED, TRADITIONAL]))
    assert "1 in Simplified" in remark
    assert remarks(corpus(zh=[SIMPLIFIED])) == remarks(corpus(zh=[TRADITIONAL])) == []
    assert remarks(corpus(en=[SIMPLIFIED, TRADITIONAL])) == []


def test_import_brings_texts_into_a_form(tmp_path: Path) -> None:
    (tmp_path / "vi.txt").write_text("\n".join(nfd(VIETNAMESE)), "utf-8")
    write_corpus(line_parts(str(tmp_path / "{lang}.txt")), {}, tmp_path / "out", Form.NFC)
    assert [document.text for document in Corpus.load(tmp_path / "out").documents["vi"]] == list(VIETNAMESE)


def test_commands_agree_on_column_and_form(checkpoint: Path, tmp_path: Path) -> None:
    for language, texts in {
        "vi": VIETNAMESE,
        "fr": ("L'été fut très sec.", "Où êtes-vous né ?", "Ça va.", "À bientôt."),
    }.items():
        splits = ("relevance", "relevance", "validation", "test")
        rows = [f"{split},{unicodedata.normalize('NFD', text)}\n" for split, text in zip(splits, texts, strict=True)]
        (tmp_path / f"{language}.csv").write_text("split,body\n" + "".join(rows), "utf-8")
    scores, options = (
        tmp_path / "scores.safetensors",
        ("--corpus", tmp_path, "--text-column", "body", "--device", "cpu"),
    )

    def run(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    said = run("relevance", checkpoint, *options, "--methods", "magnitude", "--out", tmp_path / "raw.safetensors")
    assert "vi.csv has 2 of 2 documents that are not in Unicode's normal form NFC" in said
    said = run("relevance", checkpoint, *options, "--normalise", "NFC", "--methods", "magnitude", "--out", scores)
    assert "normal form" not in said
    assert Scores.load(scores).info.normalised is Form.NFC
    assert Scores.load(tmp_path / "raw.safetensors").info.normalised is None

    run("learn", checkpoint, scores, *options, "--steps", 1, "--documents", 1, "--budget", 0.01)
    run("learn", checkpoint, tmp_path / "raw.safetensors", *options, "--steps", 1, "--documents", 1, "--budget", 0.01)
    other = ("--normalise", "NFC", "--steps", 1, "--replace")
    assert "is not the corpus" in run("learn", checkpoint, tmp_path / "raw.safetensors", *options, *other, code=1)
    run("select", scores, "--method", "magnitude", "--out", tmp_path / "masks")
    mask = read_mask(tmp_path / "masks" / "magnitude-vi.safetensors")
    assert mask.info.parameters["normalised"] == "NFC"
    short = ("--effect", 0, "--budgets", 0.01, "--no-published", "--methods", "magnitude")
    said = run("validate", checkpoint, scores, *options, *short, "--out", tmp_path / "validation")
    assert "normal form" not in said
    masks = ("--masks", tmp_path / "masks", "--out", tmp_path / "pair")
    assert "normal form" in run("masks", "compare", checkpoint, checkpoint, *masks, *options)
    assert "normal form" not in run(
        "masks",
        "compare",
        checkpoint,
        checkpoint,
        *masks[:2],
        "--out",
        tmp_path / "nfc",
        *options,
        "--normalise",
        "NFC",
    )
    assert "'NFKD' is not" in run("relevance", checkpoint, *options, "--normalise", "NFKD", code=2)
