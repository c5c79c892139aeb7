"""Base masks on a second checkpoint of the same shape."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from crane_serve.cli import app
from crane_serve.common.masks import Fingerprint, MaskInfo, NeuronMask, write_mask
from crane_serve.common.models.families import take_apart
from crane_serve.common.models.load import load_tokenizer
from relevance.causal import losses, masked
from relevance.encoding import encode
from relevance.model import load_model
from relevance.sources import load_corpus
from relevance.transfer_effects import TransferEffects
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    base = tiny_model("llama", directory / "base", seed=1)
    tiny_model("llama", directory / "chat", seed=2)
    tiny_model("llama", directory / "longer", seed=1, layers=4)
    for language, text in {"en": "snow lies on the hill", "vi": "tuyết phủ trên đồi"}.items():
        lines = [json.dumps({"id": str(n), "text": f"{text} {n}", "split": "test"}) for n in range(4)]
        (directory / f"{language}.jsonl").write_text("\n".join(lines))
    fingerprint = Fingerprint.of(base)
    for language, neurons in {"en": [[1, 2], [3], []], "vi": [[], [7, 8, 9], [0]]}.items():
        mask = NeuronMask.switching_off(neurons, fingerprint.intermediate_sizes)
        info = MaskInfo(language=language, method="by-hand", fingerprint=fingerprint)
        write_mask(directory / "masks", f"by-hand-{language}", mask, info)
    return directory


def _run(place: Path, chat: str, *options: object, fails: bool = False) -> str:
    arguments = (
        "masks",
        "compare",
        place / "base",
        place / chat,
        "--masks",
        place / "masks",
        "--corpus",
        place,
        *options,
    )
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--dtype", "float32")])
    assert (result.exit_code != 0) == fails, result.output
    return " ".join(result.output.split())


def test_effects_on_both_models(place: Path, tmp_path: Path) -> None:
    _run(place, "chat", "--out", tmp_path)
    effects = TransferEffects.model_validate_json((tmp_path / "pair.json").read_bytes())
    assert effects.base.fingerprint == Fingerprint.of(place / "base")
    assert effects.chat.fingerprint == Fingerprint.of(place / "chat") != effects.base.fingerprint
    assert [(effect.mask, effect.neurons) for effect in effects.effects] == [("by-hand-en", 3), ("by-hand-vi", 4)]
    texts = load_corpus(place, "test", ["en", "vi"])
    scales = torch.ones(3, 160)
    scales[0, 1:3] = scales[1, 3] = 0
    for side in ("base", "chat"):
        decoder = take_apart(load_model(place / side, torch.float32, torch.device("cpu")))
        tokenizer = load_tokenizer(place / side)
        for language in ("en", "vi"):
            ids = encode(tokenizer, language, texts.documents[language], 256, decoder.vocabulary).token_ids
            whole = losses(decoder, ids, 512).per_token
            assert getattr(effects, side).nats_per_token[language] == pytest.approx(whole, rel=1e-5)
            with masked(decoder, NeuronMask(scales, (160,) * 3)):
                change = losses(decoder, ids, 512).per_token - whole
            assert getattr(effects.effects[0], side)[language].mean == pytest.approx(change, rel=1e-3, abs=1e-5)
    assert effects.effects[0].base["en"].mean != pytest.approx(effects.effects[0].chat["en"].mean, rel=1e-3)
    report = (tmp_path / "pair.md").read_text()
    assert effects.chat.fingerprint.weights_digest[:12] in report
    rows = (tmp_path / "pair.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 2
    journals = [(tmp_path / f"ablations-{side}.jsonl").read_text() for side in ("base", "chat")]
    _run(place, "chat", "--out", tmp_path)
    assert journals == [(tmp_path / f"ablations-{side}.jsonl").read_text() for side in ("base", "chat")]


def test_the_old_name_says_the_new_one(place: Path, tmp_path: Path) -> None:
    old = ("transfer", place / "base", place / "chat", "--masks", place / "masks", "--corpus", place, "--out", tmp_path)
    result = CliRunner().invoke(app, [str(argument) for argument in (*old, "--names", "by-hand-en")])
    assert result.exit_code == 0
    assert "`crane masks compare`" in result.stderr.splitlines()[0]
    assert len(result.stdout.splitlines()) == 3
    assert "transfer" not in CliRunner().invoke(app, ["--help"]).output


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    said = _run(place, "longer", "--out", tmp_path, fails=True)
    assert "mask 'by-hand-en' cannot be transferred: the layers of its model is 3, that of the new checkpoint 4" in said
    assert "nope" in _run(place, "chat", "--names", "nope", "--out", tmp_path, fails=True)
    swapped = ("masks", "compare", place / "chat", place / "base", "--masks", place / "masks", "--corpus", place)
    result = CliRunner().invoke(app, [str(argument) for argument in swapped])
    assert result.exit_code == 1
    assert "was made for another model" in " ".join(result.output.split())
