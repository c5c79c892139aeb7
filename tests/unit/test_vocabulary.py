"""A token that the tokenizer has and the model has not is named, with the document that holds it."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from crane_serve.cli import app
from crane_serve.common.models.vocabulary import UnknownTokenError, require_known
from crane_serve.common.text.corpus import Document
from relevance.encoding import encode
from tests.tiny import byte_tokenizer, tiny_model

TOKEN = "<image_soft_token>"
VOCABULARY = 258


def test_the_first_unknown_token_is_named() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([TOKEN])
    require_known(tokenizer, [0, VOCABULARY - 1], VOCABULARY, "en")
    with pytest.raises(UnknownTokenError, match=f"en: document 'b' .*{TOKEN}.* id 258.* {VOCABULARY} tokens"):
        encode(tokenizer, "en", [Document("a", "one"), Document("b", f"two {TOKEN}")], 64, VOCABULARY)
    cut = encode(tokenizer, "en", [Document("b", f"two {TOKEN}")], 4, VOCABULARY)
    assert len(cut.token_ids[0]) == 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer has one token more than its model, scores from before, and texts with the token."""
    directory = tmp_path_factory.mktemp("vocabulary")
    checkpoint = tiny_model("llama", directory / "model")
    for name, text in (("clean", "snow"), ("odd", f"snow {TOKEN}")):
        (directory / name).mkdir()
        for language in ("en", "vi"):
            rows = [
                {"id": f"{split}-{n}", "text": f"{language} {split} {text} {n}", "split": split}
                for split in ("relevance", "validation", "test")
                for n in range(2)
            ]
            (directory / name / f"{language}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _run(
        0,
        "relevance",
        checkpoint,
        "--corpus",
        directory / "clean",
        "--methods",
        "magnitude",
        "--out",
        _scores(directory),
    )
    _run(0, "select", _scores(directory), "--method", "magnitude", "--out", directory / "masks")
    shutil.copytree(checkpoint, directory / "added")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens([TOKEN])
    tokenizer.save_pretrained(directory / "added")
    return directory


def _scores(directory: Path) -> Path:
    return directory / "scores.safetensors"


def _run(code: int, *arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


def test_every_command_that_runs_a_model_over_texts_names_it(place: Path, tmp_path: Path) -> None:
    model, odd = place / "added", ("--corpus", place / "odd", "--device", "cpu")
    output = _run(1, "relevance", model, *odd, "--methods", "magnitude", "--out", tmp_path / "s.safetensors")
    assert "error: en: document 'relevance-0' holds the token '<image_soft_token>' with the id 258" in output
    output = _run(1, "validate", model, _scores(place), *odd, "--out", tmp_path / "v")
    assert "error: en: document 'validation-0' holds the token" in output
    output = _run(1, "masks", "compare", model, model, "--masks", place / "masks", *odd, "--out", tmp_path / "p")
    assert "error: en: document 'test-0' holds the token" in output
    output = _run(0, "relevance", model, "--corpus", place / "clean", "--methods", "magnitude", "--out", tmp_path / "s")
    assert "error" not in output
