"""Contrasts, against values worked out by hand."""

import pytest
import torch
from torch import Tensor

from relevance.contrast import CONTRASTS, ContrastError, find_contrast

# [languages, layers, neurons]
SCORES = torch.tensor([[[6.0, -2.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]], [[0.0, 10.0], [0.0, 0.0]]])


def test_none_leaves_the_scores() -> None:
    assert torch.equal(CONTRASTS["none"](SCORES), SCORES)


def test_minus_mean_by_hand() -> None:
    expected = [[[5.5, -7.5], [0.5, 0.5]], [[-2.0, -3.0], [0.5, 0.5]], [[-3.5, 10.5], [-1.0, -1.0]]]
    torch.testing.assert_close(CONTRASTS["minus-mean"](SCORES), torch.tensor(expected))


def test_minus_max_by_hand() -> None:
    expected = [[[5.0, -12.0], [0.0, 0.0]], [[-5.0, -9.0], [0.0, 0.0]], [[-6.0, 9.0], [-1.0, -1.0]]]
    torch.testing.assert_close(CONTRASTS["minus-max"](SCORES), torch.tensor(expected))


def test_share_by_hand() -> None:
    expected = [[[6 / 7, -2 / 13], [0.5, 0.5]], [[1 / 7, 1 / 13], [0.5, 0.5]], [[0.0, 10 / 13], [0.0, 0.0]]]
    torch.testing.assert_close(CONTRASTS["share"](SCORES), torch.tensor(expected))


def test_share_of_a_dead_neuron_is_0() -> None:
    assert CONTRASTS["share"](torch.zeros(2, 1, 3)).tolist() == [[[0.0] * 3], [[0.0] * 3]]


def test_share_prefers_tiny_neurons_and_margin_does_not() -> None:
    tiny, large = 0, 1
    scores = torch.tensor([[[1e-9, 5.0]], [[0.0, 1.0]]])
    assert CONTRASTS["share"](scores)[0, 0].argmax() == tiny
    assert CONTRASTS["minus-max"](scores)[0, 0].argmax() == large
    wide = torch.tensor([[[1e-9, 5.0, 1.0]], [[0.0, 1.0, 5.0]]])
    assert CONTRASTS["margin"](wide)[0, 0].argmax() == large


def test_margin_by_hand() -> None:
    expected = [[[0.6 - 0.25, -0.2 - 1.0], [0.1 - 0.25, 0.1 - 0.25]], [[0.25 - 0.6, 0.25 - 1.0], [0.15, 0.15]]]
    torch.testing.assert_close(CONTRASTS["margin"](SCORES)[:2], torch.tensor(expected))


def test_margin_of_a_language_without_relevance_is_finite() -> None:
    scores = torch.tensor([[[0.0, 0.0]], [[3.0, 1.0]]])
    assert CONTRASTS["margin"](scores).tolist() == [[[-0.75, -0.25]], [[0.75, 0.25]]]


@pytest.mark.parametrize("name", ["minus-mean", "minus-max", "share", "margin"])
def test_padding_stays_0_and_the_input_is_left_alone(name: str) -> None:
    scores = SCORES.clone()
    scores[:, 1, 1] = 0
    before = scores.clone()
    assert CONTRASTS[name](scores)[:, 1, 1].tolist() == [0, 0, 0]
    assert torch.equal(scores, before)


@pytest.mark.parametrize("name", ["minus-mean", "minus-max", "share", "margin"])
def test_a_contrast_needs_a_second_language(name: str) -> None:
    with pytest.raises(ContrastError, match=f"contrast {name} compares languages and needs at least 2, found 1"):
        CONTRASTS[name](SCORES[:1])


@pytest.mark.parametrize(("name", "unchanged"), [("margin", True), ("share", False), ("minus-max", False)])
def test_what_a_language_scaled_as_a_whole_changes(name: str, unchanged: bool) -> None:
    def contrasted(factor: float) -> Tensor:
        return CONTRASTS[name](SCORES * torch.tensor([factor, 1.0, 1.0])[:, None, None])

    assert torch.allclose(contrasted(8.0), contrasted(1.0)) == unchanged


def test_an_unknown_contrast_names_those_that_exist() -> None:
    with pytest.raises(
        ContrastError, match="unknown contrast 'best'; contrasts are none, minus-mean, minus-max, share"
    ):
        find_contrast("best")
