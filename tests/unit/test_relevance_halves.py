"""Scores from two halves of a corpus, beside those of the whole."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from crane_serve.cli import app
from relevance.scores import Scores
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    for language, text in {"en": "rain falls on the roof", "vi": "mưa rơi trên mái nhà"}.items():
        lines = [json.dumps({"id": f"d{n}", "text": f"{text} {'so' * n} {n}"}) for n in range(9)]
        (directory / f"{language}.jsonl").write_text("\n".join(lines))
    return directory


def _run(*arguments: object, fails: bool = False) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code != 0) == fails, result.output
    return " ".join(result.output.split())


def test_halves_are_of_half_the_documents_and_the_whole_is_the_whole(
    checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    common = ("--corpus", corpus, "--methods", "all", "--batch-tokens", 128, "--dtype", "float32")
    _run("relevance", checkpoint, *common, "--out", tmp_path / "one.safetensors")
    _run("relevance", checkpoint, *common, "--halves", "--out", tmp_path / "two.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.safetensors",
        "two-first.safetensors",
        "two-second.safetensors",
        "two.safetensors",
    ]
    one, two, first, second = (
        Scores.load(tmp_path / f"{name}.safetensors") for name in ("one", "two", "two-first", "two-second")
    )
    assert first.info.documents == (5, 5)
    assert second.info.documents == (4, 4)
    assert [sum(tokens) for tokens in zip(first.info.tokens, second.info.tokens, strict=True)] == list(one.info.tokens)
    assert one.info == two.info
    for method, scores in one.by_method.items():
        torch.testing.assert_close(two.of(method), scores, rtol=1e-5, atol=1e-5 * float(scores.abs().max()))
    # Relevance is a mean over documents, so the whole is the weighted mean of its halves.
    mean = (5 * first.of("attnlrp") + 4 * second.of("attnlrp")) / 9
    torch.testing.assert_close(mean, one.of("attnlrp"), rtol=1e-4, atol=1e-7)
    assert not torch.allclose(first.of("attnlrp"), second.of("attnlrp"))


def test_a_half_must_have_enough_documents(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    said = _run("relevance", checkpoint, "--corpus", corpus, "--limit", 7, "--methods", "crane", "--halves", fails=True)
    assert "crane needs at least 4 documents of every language, found 3 of en" in said


def test_halves_need_at_most_two_workers(corpus: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model", layers=1)
    said = _run("relevance", model, "--corpus", corpus, "--workers", 3, "--halves", fails=True)
    assert "halves are dealt out to 1 or 2 workers, not to 3" in said
