import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from crane_serve.masks import Fingerprint, read_mask
from relevance.contrast import share_margin
from relevance.method import MethodError, Shape
from relevance.methods.random import draw
from relevance.scores import Scores, ScoresError, ScoresInfo
from relevance.selection import SelectionError, neurons_of_budget, select, top

SIZES = (50, 30)


def scores_of(languages: tuple[str, ...] = ("en", "vi", "zh"), sizes: tuple[int, ...] = SIZES) -> Scores:
    shape = Shape(languages, sizes)
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(shape.tensor, generator=generator).where(shape.exists, 0)
    count = len(languages)
    fingerprint = Fingerprint(
        architecture="LlamaForCausalLM",
        layers=len(sizes),
        hidden_size=8,
        intermediate_sizes=sizes,
        config_digest="c",
        weights_digest="w",
    )
    info = ScoresInfo(
        languages=languages,
        fingerprint=fingerprint,
        corpus_digest="d",
        split="relevance",
        documents=(3,) * count,
        tokens=(30,) * count,
        truncated=(0,) * count,
        skipped=(0,) * count,
        max_tokens=2048,
        dtype="float32",
    )
    return Scores({"attnlrp": normal, "lape": normal.flip(0), "random": draw(shape, 0).float()}, info)


def off(scores: Scores, method: str, language: str, budget: float, **options: object) -> Tensor:
    return select(scores, method, budget, **options).masks[language].intermediate == 0  # type: ignore[arg-type]


def test_share_margin_by_hand() -> None:
    scores = torch.tensor([[[6.0, -2.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]], [[0.0, 10.0], [0.0, 0.0]]])
    expected = [[[0.6 - 0.25, -0.2 - 1.0], [0.1 - 0.25, 0.1 - 0.25]], [[0.25 - 0.6, 0.25 - 1.0], [0.15, 0.15]]]
    torch.testing.assert_close(share_margin(scores)[:2], torch.tensor(expected))


def test_top_breaks_ties_towards_the_first_and_skips_padding() -> None:
    ranking = torch.tensor([[1.0, 1.0, 9.0], [1.0, 2.0, 1.0]])
    eligible = torch.tensor([[True, True, False], [True, True, True]])
    assert top(ranking, eligible, 3).tolist() == [[True, True, False], [False, True, False]]


def test_the_budget_is_a_fraction_of_all_neurons() -> None:
    scores = scores_of()
    for budget, neurons in [(0.1, 8), (1.0, 80), (0.001, 1)]:
        assert {mask.neurons for mask in select(scores, "lape", budget).masks.values()} == {neurons}


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_an_impossible_budget(budget: float) -> None:
    with pytest.raises(SelectionError, match=f"budget is {budget}; expected a fraction"):
        neurons_of_budget(budget, 100)


def test_the_highest_contrast_is_selected() -> None:
    scores = scores_of()
    margins = share_margin(scores.of("attnlrp").double())
    margins[:, 1, 30:] = -math.inf
    chosen = off(scores, "attnlrp", "vi", 0.1)
    assert int(chosen.sum()) == 8
    assert margins[1][chosen].min() > margins[1][~chosen].max()


@pytest.mark.parametrize("language", ["en", "vi", "zh"])
def test_random_is_matched_to_attnlrp_layer_by_layer_and_disjoint(language: str) -> None:
    scores = scores_of()
    control, model = off(scores, "random", language, 0.2), off(scores, "attnlrp", language, 0.2)
    assert control.sum(dim=1).tolist() == model.sum(dim=1).tolist()
    assert not bool((control & model).any())


def test_random_is_seeded() -> None:
    scores = scores_of()
    first = off(scores, "random", "en", 0.2, seed=3)
    assert torch.equal(first, off(scores, "random", "en", 0.2, seed=3))
    assert not torch.equal(first, off(scores, "random", "en", 0.2, seed=4))


def test_random_of_seed_0_is_the_draw_in_the_file() -> None:
    scores = scores_of()
    stored = scores.of("random")
    chosen = off(scores, "random", "zh", 0.1, match="none")
    assert stored[2][chosen].min() > stored[2][~chosen].max()


def test_a_match_can_be_chosen() -> None:
    scores = scores_of()
    lape = off(scores, "lape", "en", 0.1)
    assert off(scores, "random", "en", 0.1, match="lape").sum(1).tolist() == lape.sum(1).tolist()
    with pytest.raises(SelectionError, match="cannot be matched to itself"):
        select(scores, "lape", 0.1, match="lape")


def test_too_few_neurons_are_left_for_a_control() -> None:
    with pytest.raises(SelectionError, match=r"layer 0 has 50 neurons, of which the matched method takes \d+"):
        select(scores_of(), "random", 0.8)


def test_scores_that_are_not_finite() -> None:
    scores = scores_of()
    scores.of("lape")[1, 0, 2] = math.nan
    with pytest.raises(SelectionError, match="scores of lape for vi are not all finite"):
        select(scores, "lape", 0.1)


def test_a_contrast_needs_a_second_language() -> None:
    with pytest.raises(MethodError, match="method attnlrp compares languages and needs at least 2, found 1: en"):
        select(scores_of(("en",)), "attnlrp", 0.1)


def test_unknown_and_missing_methods() -> None:
    scores = scores_of()
    with pytest.raises(MethodError, match="unknown method 'magic'; methods are attnlrp, lape, random"):
        select(scores, "magic", 0.1)
    partial = Scores({"random": scores.of("random")}, scores.info)
    with pytest.raises(ScoresError, match="no scores of method 'attnlrp'; there are scores of random"):
        select(partial, "random", 0.1)
    assert select(partial, "random", 0.1, match="none").masks["en"].neurons == 8


def test_masks_are_written_with_their_provenance(tmp_path: Path) -> None:
    scores = scores_of()
    selection = select(scores, "random", 0.1, seed=5)
    paths = selection.write(tmp_path / "masks", scores)
    assert [path.name for path in paths] == ["random-en.safetensors", "random-vi.safetensors", "random-zh.safetensors"]
    stored = read_mask(paths[1])
    assert stored.mask.digest == selection.masks["vi"].digest
    assert (stored.info.language, stored.info.method, stored.info.budget) == ("vi", "random", 0.1)
    assert (stored.info.fingerprint, stored.info.corpus_digest) == (scores.info.fingerprint, "d")
    assert stored.info.parameters == {
        "contrast": "none",
        "matched_to": "attnlrp",
        "seed": 5,
        "split": "relevance",
        "languages": ["en", "vi", "zh"],
    }


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    scores = scores_of()
    path = tmp_path / "new" / "scores.safetensors"
    scores.save(path)
    loaded = Scores.load(path)
    assert loaded.info == scores.info
    assert list(loaded.by_method) == ["attnlrp", "lape", "random"]
    assert all(torch.equal(loaded.of(method), scores.of(method)) for method in loaded.by_method)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "missing", "directory"])
def test_a_corrupt_scores_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "scores.safetensors"
    scores_of().save(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("not a scores file")
    else:
        path.unlink()
        if damage == "directory":
            path.mkdir()
    with pytest.raises(ScoresError, match=r"scores\.safetensors"):
        Scores.load(path)


def test_a_safetensors_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"attnlrp": torch.zeros(1, 2, 3)}, path)
    with pytest.raises(ScoresError, match="no 'crane-scores' metadata"):
        Scores.load(path)
    save_file({"attnlrp": torch.zeros(1, 2, 3)}, path, metadata={"crane-scores": '{"languages": ["en"]}'})
    with pytest.raises(ScoresError, match="metadata field 'fingerprint'"):
        Scores.load(path)


def test_scores_of_a_wrong_shape() -> None:
    with pytest.raises(ScoresError, match=r"scores of lape are torch.float32 \[3, 2\]"):
        Scores({"lape": torch.zeros(3, 2)}, scores_of().info)
