import math

import pytest
import torch
from torch import Tensor

from relevance.method import Capture, Method, MethodError, Needs, Shape
from relevance.methods import available, find_all
from relevance.methods.attnlrp import AttnLRP
from relevance.methods.lape import Lape, entropy, percentile, published_selection, ranked_selection
from relevance.methods.random import Random, draw
from relevance.statistics import NonFiniteError, RunningMean

SHAPE = Shape(("en", "zh"), (3, 2))
CPU = torch.device("cpu")


def capture(language: int, layer: int, counted: Tensor, activation: Tensor, gradient: Tensor | None = None) -> Capture:
    return Capture(language, layer, counted, activation, activation, gradient)


def test_methods_are_found_by_name() -> None:
    assert list(available()) == ["attnlrp", "lape", "random"]
    assert [method.needs for method in available().values()] == [Needs.BACKWARD, Needs.FORWARD, Needs.NOTHING]
    assert find_all(["random", "lape", "random"]) == [Random, Lape]
    assert find_all(None) == list(available().values())
    with pytest.raises(MethodError, match="unknown method 'crane'; methods are attnlrp, lape, random"):
        find_all(["lape", "crane"])
    with pytest.raises(MethodError, match="no method was named"):
        find_all([])


def test_running_mean_by_hand() -> None:
    mean = RunningMean(SHAPE, CPU)
    mean.add(1, 1, torch.tensor([3.0, 9.0]), observations=2)
    mean.add(1, 1, torch.tensor([3.0, 0.0]), observations=1)
    assert mean.mean()[1, 1].tolist() == [2.0, 3.0, 0.0]
    assert mean.mean()[0].abs().sum() == 0


def test_running_means_merge() -> None:
    torch.manual_seed(0)
    whole, first, second = (RunningMean(SHAPE, CPU) for _ in range(3))
    for part in (first, second):
        for layer, size in enumerate(SHAPE.sizes):
            sums = torch.randn(size)
            part.add(0, layer, sums, 4)
            whole.add(0, layer, sums, 4)
    first.merge(second)
    assert torch.equal(first.mean(), whole.mean())
    with pytest.raises(ValueError, match="cannot merge"):
        first.merge(RunningMean(Shape(("en",), (3, 2)), CPU))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_running_mean_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(NonFiniteError, match="layer 1 gives values that are not finite for zh"):
        RunningMean(SHAPE, CPU).add(1, 1, torch.tensor([1.0, value]), 1)


def test_attnlrp_sums_over_counted_tokens_and_averages_over_documents() -> None:
    method = AttnLRP(SHAPE)
    counted = torch.tensor([[False, True, True], [False, True, False]])
    activation = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 4.0]], [[9.0, 9.0], [5.0, 6.0], [9.0, 9.0]]])
    gradient = torch.tensor([[[9.0, 9.0], [1.0, -1.0], [2.0, 1.0]], [[9.0, 9.0], [-3.0, 1.0], [9.0, 9.0]]])
    method.accumulate(capture(1, 1, counted, activation, gradient))
    # neuron 0: 1*1 + 3*2 = 7 and 5*-3 = -15; neuron 1: 2*-1 + 4*1 = 2 and 6*1 = 6
    assert method.scores()[1, 1].tolist() == [-4.0, 4.0, 0.0]


def test_lape_counts_tokens_with_a_positive_gate() -> None:
    method = Lape(SHAPE)
    counted = torch.tensor([[False, True, True], [False, True, True]])
    gate = torch.tensor([[[9.0, 9.0], [1.0, -0.1], [2.0, 0.0]], [[9.0, 9.0], [0.5, 0.1], [-0.2, -1.0]]])
    method.accumulate(capture(0, 1, counted, gate))
    assert method.active.mean()[0, 1].tolist() == [0.75, 0.25, 0.0]


def test_percentile_and_entropy_by_hand() -> None:
    assert percentile(torch.arange(1.0, 101.0), 0.95).item() == 95.0
    p = torch.tensor([[0.2, 0.9, 0.0], [0.2, 0.3, 0.0]], dtype=torch.float64)
    expected = [math.log(2), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), 0.0]
    assert entropy(p).tolist() == pytest.approx(expected)


def lape_case() -> tuple[Tensor, Tensor]:
    """Two languages, one layer of 10 neurons. Of the 20 p, 0.5 is the 75th percentile; five lie above."""
    p = torch.full((2, 1, 10), 0.1, dtype=torch.float64)
    p[0, 0, :3] = torch.tensor([0.9, 0.8, 0.6])
    p[1, 0, :3] = torch.tensor([0.1, 0.8, 0.2])
    p[1, 0, 3:5] = torch.tensor([0.7, 0.5])
    return p, torch.ones(1, 10, dtype=torch.bool)


def test_lape_published_selection_by_hand() -> None:
    p, exists = lape_case()
    # eligible by rising entropy: 0 (.9 and .1), 3 (.1 and .7), 2 (.6 and .2), 1 (.8 and .8)
    selected = published_selection(p, exists, selected=0.2, share=0.75)
    assert [row.nonzero().flatten().tolist() for row in selected[:, 0]] == [[0], [3]]
    selected = published_selection(p, exists, selected=0.5, share=0.75)  # more than there are eligible
    assert [row.nonzero().flatten().tolist() for row in selected[:, 0]] == [[0, 1, 2], [1, 3]]


def test_lape_ranking_by_hand() -> None:
    p, exists = lape_case()
    scores = ranked_selection(p, exists, share=0.75)
    assert scores[0, 0].argsort(descending=True, stable=True).tolist()[:4] == [0, 2, 1, 3]
    assert scores[1, 0].argsort(descending=True, stable=True).tolist()[:4] == [3, 1, 4, 2]
    assert scores[0, 0, 0].item() == pytest.approx(math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    above = p > 0.5
    assert float(scores[above].min()) >= 0 > float(scores[~above].max())


def test_lape_ignores_padding() -> None:
    p, _ = lape_case()
    exists = torch.arange(14).expand(1, 14) < 10
    padded = torch.cat((p, torch.zeros(2, 1, 4)), dim=2)
    assert torch.equal(ranked_selection(padded, exists, 0.75)[..., :10], ranked_selection(p, exists[:, :10], 0.75))
    assert ranked_selection(padded, exists, 0.75)[..., 10:].abs().sum() == 0
    assert int(published_selection(padded, exists, 0.5, 0.75).sum()) == 5


def test_random_scores_are_seeded_and_leave_padding_alone() -> None:
    assert torch.equal(Random(SHAPE).scores(), draw(SHAPE, 0))
    assert not torch.equal(draw(SHAPE, 1), draw(SHAPE, 0))
    assert draw(SHAPE, 1)[:, 1, 2].tolist() == [0.0, 0.0]
    assert not torch.equal(draw(SHAPE, 1)[0], draw(SHAPE, 1)[1])


def test_every_method_gives_scores_of_the_shape() -> None:
    for method in available().values():
        instance: Method = method(SHAPE)
        assert instance.scores().shape == SHAPE.tensor
        assert instance.scores().dtype == torch.float64
