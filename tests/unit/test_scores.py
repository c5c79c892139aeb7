"""Scores files: what goes in comes out, and anything else is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from relevance.scores import Scores, ScoresError, Texts
from tests.scores import random_scores, scores_info


def stored(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), json.loads(file.metadata()["crane-scores"])


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    scores = random_scores()
    path = tmp_path / "new" / "scores.safetensors"
    scores.save(path)
    loaded = Scores.load(path)
    assert loaded.info == scores.info
    assert list(loaded.by_method) == ["attnlrp", "crane", "lape", "random"]
    assert all(torch.equal(loaded.of(method), scores.of(method)) for method in loaded.by_method)
    assert list(loaded.outputs) == ["crane"]
    assert torch.equal(loaded.outputs_of("crane"), scores.outputs_of("crane"))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "empty", "missing", "directory"])
def test_a_corrupt_scores_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "scores.safetensors"
    random_scores().save(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content)
    elif damage in ("text", "empty"):
        path.write_text("not a scores file" if damage == "text" else "")
    else:
        path.unlink()
        if damage == "directory":
            path.mkdir()
    with pytest.raises(ScoresError, match=r"scores\.safetensors"):
        Scores.load(path)


def test_outputs_are_part_of_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    random_scores().save(path)
    tensors, metadata = stored(path)
    tensors["outputs/crane"][0, 0, 0] += 1
    save_file(tensors, path, metadata={"crane-scores": json.dumps(metadata)})
    with pytest.raises(ScoresError, match="do not have the digest"):
        Scores.load(path)


def test_a_safetensors_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"attnlrp": torch.zeros(1, 2, 3)}, path)
    with pytest.raises(ScoresError, match="no 'crane-scores' metadata"):
        Scores.load(path)
    save_file({"attnlrp": torch.zeros(1, 2, 3)}, path, metadata={"crane-scores": '{"languages": ["en"]}'})
    with pytest.raises(ScoresError, match="metadata field 'fingerprint'"):
        Scores.load(path)


def test_a_later_format(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    random_scores().save(path)
    tensors, metadata = stored(path)
    save_file(tensors, path, metadata={"crane-scores": json.dumps({**metadata, "format_version": 2})})
    with pytest.raises(ScoresError, match=r"scores\.safetensors: format version 2, this program reads 1"):
        Scores.load(path)


def test_a_file_from_before_there_were_outputs(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scores = random_scores()
    Scores(scores.by_method, scores.info).save(path)
    tensors, metadata = stored(path)
    del metadata["other_texts"]
    save_file(tensors, path, metadata={"crane-scores": json.dumps(metadata)})
    assert not Scores.load(path).outputs


def test_scores_of_a_wrong_shape_or_dtype() -> None:
    info = scores_info()
    with pytest.raises(ScoresError, match=r"scores of lape are torch.float32 \[3, 2\], expected .* \[3, 2, 50\]"):
        Scores({"lape": torch.zeros(3, 2)}, info)
    with pytest.raises(ScoresError, match=r"scores of lape are torch.float64"):
        Scores({"lape": torch.zeros(3, 2, 50, dtype=torch.float64)}, info)
    with pytest.raises(ScoresError, match=r"output scores of lape are .* \[3, 2, 50\], expected .* \[3, 2, 8\]"):
        Scores({"lape": torch.zeros(3, 2, 50)}, info, {"lape": torch.zeros(3, 2, 50)})


def test_scores_of_nothing_and_outputs_of_nothing() -> None:
    with pytest.raises(ScoresError, match="scores of no method"):
        Scores({}, scores_info())
    with pytest.raises(ScoresError, match="output scores of crane, but none of its neurons"):
        Scores({"lape": torch.zeros(3, 2, 50)}, scores_info(), {"crane": torch.zeros(3, 2, 8)})


def test_missing_methods_name_those_that_exist() -> None:
    scores = random_scores()
    with pytest.raises(ScoresError, match="no scores of method 'relp'; there are scores of attnlrp, crane, lape"):
        scores.of("relp")
    with pytest.raises(ScoresError, match="of output dimensions of method 'lape'; there are of crane"):
        scores.outputs_of("lape")
    with pytest.raises(ScoresError, match="there are of no method"):
        Scores(scores.by_method, scores.info).outputs_of("lape")


def test_merged_scores_hold_the_methods_of_both(tmp_path: Path) -> None:
    scores = random_scores()
    first = Scores({"lape": scores.of("lape")}, scores.info)
    other_texts = scores.info.model_copy(update={"corpus_digest": "e", "split": "train"})
    second = Scores({"crane": scores.of("crane")}, other_texts, scores.outputs)
    path = tmp_path / "scores.safetensors"
    first.merged(second).save(path)
    merged = Scores.load(path)
    assert sorted(merged.by_method) == ["crane", "lape"]
    assert torch.equal(merged.of("crane"), scores.of("crane"))
    assert list(merged.outputs) == ["crane"]
    assert merged.info.texts("lape") == Texts(corpus_digest="d", split="relevance")
    assert merged.info.texts("crane") == Texts(corpus_digest="e", split="train")
    assert (merged.info.corpus_digest, merged.info.documents) == ("d", (3, 3, 3))
    again = Scores({"random": scores.of("random")}, other_texts).merged(merged)
    assert again.info.texts("lape") == Texts(corpus_digest="d", split="relevance")
    assert again.info.texts("crane") == again.info.texts("random") == Texts(corpus_digest="e", split="train")


def test_scores_that_cannot_be_merged() -> None:
    scores = random_scores()
    with pytest.raises(
        ScoresError, match="both hold scores of attnlrp, crane, lape, random; expected each method once"
    ):
        scores.merged(random_scores())
    with pytest.raises(ScoresError, match="languages vi, en, zh cannot join those of en, vi, zh"):
        scores.merged(random_scores(("vi", "en", "zh")))
    fingerprint = scores.info.fingerprint.model_copy(update={"weights_digest": "x"})
    another = Scores(scores.by_method, scores.info.model_copy(update={"fingerprint": fingerprint}))
    with pytest.raises(ScoresError, match="made for another model: its weights_digest is x"):
        scores.merged(another)
