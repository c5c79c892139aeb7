"""A tiny checkpoint with a corpus and scores, for the commands that search and validate."""

import json
from pathlib import Path

from typer.testing import CliRunner

from crane_serve.cli import app
from tests.tiny import tiny_model

_TEXTS = {
    "en": "the river runs past old stone walls",
    "vi": "con sông chảy qua bức tường đá cũ",
    "zh": "河水流过老石墙边",
}


def run_crane(*arguments: object, fails: bool = False) -> str:
    """What a command says, in one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code != 0) == fails, result.output
    return " ".join(result.output.split())


def scored_tiny(directory: Path, methods: str) -> dict[str, Path]:
    """A model, a corpus with three splits, and the scores of its first."""
    model, corpus = tiny_model("llama", directory / "model"), directory / "corpus"
    corpus.mkdir()
    for language, text in _TEXTS.items():
        lines = [
            {"id": f"{split}-{number}", "text": f"{text} {number} {split}", "split": split}
            for split in ("relevance", "validation", "test")
            for number in range(5)
        ]
        (corpus / f"{language}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = directory / "scores.safetensors"
    run_crane("relevance", model, "--corpus", corpus, "--methods", methods, "--out", scores)
    return {"model": model, "corpus": corpus, "scores": scores, "directory": directory}
