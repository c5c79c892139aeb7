import math
from collections.abc import Sequence

import pytest
import torch
from scipy.stats import kurtosis, zscore
from torch import Tensor

from relevance.encoding import Batch
from relevance.method import Activations, Gradients, Measured, MethodError, Pass, ScoreSource, Shape, Site, Units
from relevance.methods import available, find, find_scored, scored
from relevance.methods.attnlrp import AttnLRP
from relevance.methods.average_precision import AveragePrecision, average_precisions
from relevance.methods.cp_lrp import CpLRP
from relevance.methods.crane import Crane
from relevance.methods.crane_textbook import CraneTextbook
from relevance.methods.gradient import Gradient
from relevance.methods.lape import Lape, entropy, percentile, published_selection, ranked_selection
from relevance.methods.magnitude import Magnitude
from relevance.methods.plnd import Plnd
from relevance.methods.random import Random, draw
from relevance.methods.relp import RelP
from relevance.rules import ATTNLRP

SHAPE = Shape(("en", "zh"), (3, 2))
UNITS = Units((3, 2), hidden=2)
CPU = torch.device("cpu")
TWO = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([3, 2]))  # the last token of document 2 is padding


def activations(layer: int, tensor: Tensor, batch: Batch = TWO) -> Activations:
    return Activations(layer, batch, tensor, act=tensor, up=tensor)


def gradients(site: Site, value: Tensor, gradient: Tensor, input_sum: Tensor | None = None) -> Gradients:
    return Gradients(1, site, TWO, value, gradient, input_sum)


def test_methods_are_found_by_name() -> None:
    elsewhere = ["ablation-refined", "learned"]
    mine = ["attnlrp", "average-precision", "cp-lrp", "crane", "crane-textbook", "gradient", "lape", "magnitude"]
    mine += ["plnd", "random", "relp", "routing"]
    assert list(available()) == sorted(mine + elsewhere)
    assert list(scored()) == mine
    assert find_scored(["random", "lape", "random"]) == [Random, Lape]
    assert [kind.name for kind in find_scored(["all"])] == [name for name in mine if name != "routing"]
    assert [kind.name for kind in find_scored(["all"], "LlamaForCausalLM")] == mine  # if it had experts
    with pytest.raises(MethodError, match="unknown method 'cranes'; methods are ablation-refined, attnlrp"):
        find_scored(["lape", "cranes"])
    with pytest.raises(MethodError, match="scores of learned come from another command"):
        find_scored(["learned"])
    with pytest.raises(MethodError, match="no method was named"):
        find_scored([])


def test_by_default_one_pass_serves_all() -> None:
    kinds = find_scored(None)
    assert {kind.source for kind in kinds if isinstance(kind.source, Pass)} == {AttnLRP.source}
    assert {Crane, CraneTextbook, Lape, Magnitude, Plnd, AveragePrecision, Random, AttnLRP} == set(kinds)


def test_methods_scored_elsewhere_rank_as_they_are() -> None:
    scores = torch.rand(SHAPE.tensor)
    for name in ("learned", "ablation-refined"):
        assert find(name).source is ScoreSource.ELSEWHERE
        assert torch.equal(find(name).ranking(scores, SHAPE, seed=0), scores)
        with pytest.raises(MethodError, match=f"method {name} was published without a rule"):
            find(name).published(scores, SHAPE)


@pytest.mark.parametrize("kind", [AttnLRP, CpLRP, Gradient, RelP])
def test_attribution_sums_over_counted_tokens_and_averages_over_documents(kind: type[Measured]) -> None:
    method = kind(UNITS)
    activation = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 4.0]], [[9.0, 9.0], [5.0, 6.0], [9.0, 9.0]]])
    gradient = torch.tensor([[[9.0, 9.0], [1.0, -1.0], [2.0, 1.0]], [[9.0, 9.0], [-3.0, 1.0], [9.0, 9.0]]])
    method.accumulate(gradients(Site.NEURONS, activation, gradient))  # type: ignore[attr-defined]
    # neuron 0: 1*1 + 3*2 = 7 and 5*-3 = -15; neuron 1: 2*-1 + 4*1 = 2 and 6*1 = 6
    assert method.finalise()[1].tolist() == [-4.0, 4.0, 0.0]
    with pytest.raises(MethodError, match="published without a rule"):
        kind.published(torch.zeros(SHAPE.tensor), SHAPE)


def test_attribution_ranks_by_margin_unless_told_otherwise() -> None:
    scores = torch.tensor([[[2.0, 1.0, 1.0], [0, 0, 0]], [[1.0, 3.0, 0], [0, 0, 0]]])
    assert AttnLRP.ranking(scores, SHAPE, 0)[0, 0].tolist() == [0.25, -0.5, 0.25]
    assert torch.equal(AttnLRP.ranking(scores, SHAPE, 0, "none"), scores)


def test_crane_rows_by_hand() -> None:
    value = torch.tensor([[[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]], [[2.0, 1.0], [5.0, 6.0], [9.0, 9.0]]])
    gradient = torch.tensor([[[1.0, 0.0], [2.0, -1.0], [2.0, 1.0]], [[3.0, 1.0], [-3.0, 1.0], [9.0, 9.0]]])
    seen = gradients(Site.GATE, value, gradient, torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]]))
    # All tokens but padding: 1*1 + 2*10 + 2*100, ...
    assert Crane.rows(seen).tolist() == [[221.0, 90.0], [-54.0, 22.0]]
    assert CraneTextbook.rows(seen).tolist() == [[1 + 2 + 6, 0 - 2 + 4], [6 - 15, 1 + 6]]


def crane_of(rows: dict[Site, Tensor], units: Units) -> Crane:
    """rows: site -> [layers, documents, width], of which a layer has as many units as there are."""
    method = Crane(units)
    one_token = Batch(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, dtype=torch.int64))
    for site, of_site in rows.items():
        for layer, values in enumerate(of_site):
            size = units.hidden if site is Site.OUTPUT else units.sizes[layer]
            gradient = values[:, None, :size]
            method.accumulate(Gradients(layer, site, one_token, gradient, gradient, torch.ones(6, 1)))
    return method


def test_crane_scores_by_scipy() -> None:
    units = Units((3, 2), hidden=4, outputs=True)
    generator = torch.Generator().manual_seed(0)
    rows = {
        site: torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
        for site in (Site.GATE, Site.UP, Site.OUTPUT)
    }
    rows[Site.UP][0, :, 1] = 3.0  # a row that does not vary
    method = crane_of(rows, units)
    assert method.wanted == {Site.GATE, Site.UP, Site.OUTPUT}

    def of_layers(site: Site, sizes: Sequence[int]) -> list[float]:
        return [
            kurtosis(rows[site][layer, :, unit].numpy(), bias=False)
            for layer, size in enumerate(sizes)
            for unit in range(size)
        ]

    gate, up, output = of_layers(Site.GATE, (3, 2)), of_layers(Site.UP, (3, 2)), of_layers(Site.OUTPUT, (4, 4))
    z = zscore([*gate, *up, *output], nan_policy="omit")
    z = torch.tensor(z).nan_to_num(0)
    neurons = torch.maximum(z[:5], z[5:10])
    scores = Crane.score([method.finalise()], Shape(("en",), (3, 2)))[0]
    torch.testing.assert_close(torch.cat((scores[0], scores[1, :2])), neurons)
    assert scores[1, 2] == 0
    outputs = Crane.outputs([method.finalise()], Shape(("en",), (3, 2)))
    assert outputs is not None
    torch.testing.assert_close(outputs[0].flatten(), z[10:])
    published = Crane.published(scores[None], Shape(("en",), (3, 2)))
    assert published.sum() == (neurons > 1).sum()


def test_crane_without_gate_or_outputs() -> None:
    units = Units((4, 4), gated=False)
    rows = {Site.GATE: torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    method = crane_of(rows, units)
    assert method.wanted == {Site.GATE}
    shape = Shape(("en",), (4, 4))
    expected = zscore(kurtosis(rows[Site.GATE].numpy(), axis=1, bias=False), axis=None)
    torch.testing.assert_close(Crane.score([method.finalise()], shape)[0], torch.from_numpy(expected))
    assert Crane.outputs([method.finalise()], shape) is None


def test_magnitude_is_a_mean_over_tokens() -> None:
    method = Magnitude(UNITS)
    values = torch.tensor([[[9.0, 9.0], [1.0, -2.0], [-3.0, 4.0]], [[9.0, 9.0], [5.0, 6.0], [9.0, 9.0]]])
    method.accumulate(activations(1, values))
    assert method.finalise()[1].tolist() == [3.0, 4.0, 0.0]


def test_lape_counts_tokens_with_a_positive_gate() -> None:
    method = Lape(UNITS)
    gate = torch.tensor([[[9.0, 9.0], [1.0, -0.1], [2.0, 0.0]], [[9.0, 9.0], [0.5, 0.1], [9.0, 9.0]]])
    method.accumulate(activations(1, gate))
    assert method.finalise()[1].tolist() == pytest.approx([1.0, 1 / 3, 0.0])


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


def test_lape_ranks_raw_scores_and_ignores_padding() -> None:
    p, exists = lape_case()
    shape = Shape(("en", "zh"), (10,))
    assert torch.equal(Lape.ranking(p.float(), shape, 0), ranked_selection(p.float().double(), exists))
    assert torch.equal(Lape.ranking(p, shape, 0, "minus-max"), p - p.flip(0))
    exists = torch.arange(14).expand(1, 14) < 10
    padded = torch.cat((p, torch.zeros(2, 1, 4)), dim=2)
    assert torch.equal(ranked_selection(padded, exists, 0.75)[..., :10], ranked_selection(p, exists[:, :10], 0.75))
    assert ranked_selection(padded, exists, 0.75)[..., 10:].abs().sum() == 0
    assert int(published_selection(padded, exists, 0.5, 0.75).sum()) == 5


def test_plnd_counts_documents_in_which_a_neuron_is_among_the_strongest() -> None:
    method = Plnd(Units((20,)))
    up = torch.zeros(2, 3, 20)
    up[:, 0] = 100.0  # the start token
    up[0, 2, 19] = -3.0
    up[0, 1:, 4] = torch.tensor([2.0, -2.0])
    up[1, 2] = 100.0  # padding
    up[1, 1, 4] = 1.0
    up[1, 1, 7] = 5.0
    method.accumulate(activations(0, up))
    score = method.finalise()[0]
    # top two of 20: {4, 19} and {4, 7}. Strengths: 4/7 and 1/6, 3/7, 5/6.
    assert [index for index in range(20) if score[index] >= 0.5] == [4, 7, 19]
    assert 1 <= score[4] < 1.5
    assert 0.5 < score[19] < score[7] <= 0.75
    assert score[7] - score[19] == pytest.approx(0.25 * (1 - (3 / 7) / (5 / 6)))


def test_plnd_rules_by_hand() -> None:
    shape = Shape(("en", "zh", "vi"), (4,))
    scores = torch.tensor([[[1.2, 1.1, 0.9, 1.0]], [[1.1, 1.0, 1.1, 0.3]], [[1.0, 0.4, 0.2, 0.0]]])
    assert Plnd.published(scores, shape).squeeze(1).int().tolist() == [[0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]
    ranking = Plnd.ranking(scores, shape, 0).squeeze(1)
    expected = torch.tensor([[0.2, 0.7, 0.7, 1.0], [0.1, 0.6, 0.9, 0.3], [-0.1, -0.6, -0.7, -0.3]])
    torch.testing.assert_close(ranking, expected)


def test_average_precision_by_hand_and_by_its_definition() -> None:
    languages = torch.tensor([0, 0, 1, 1, 1])
    responses = torch.tensor([[5.0], [2.0], [4.0], [3.0], [1.0]])
    # In order: 0 1 1 0 1. For language 0: 1/1 and 2/4; for 1: 1/2, 2/3, 3/5.
    found = average_precisions(responses, languages, 2)
    assert found.flatten().tolist() == pytest.approx([(1 + 0.5) / 2, (1 / 2 + 2 / 3 + 3 / 5) / 3])
    generator = torch.Generator().manual_seed(0)
    responses = torch.randint(0, 9, (40, 6), generator=generator).float()  # with many ties
    languages = torch.randint(0, 3, (40,), generator=generator)
    found = average_precisions(responses, languages, 3)
    for language in range(3):
        for neuron in range(6):
            column = responses[:, neuron].tolist()
            mine = [column[d] for d in range(40) if languages[d] == language]
            shares = [sum(x >= y for x in mine) / sum(x >= y for x in column) for y in mine]
            assert found[language, neuron].item() == pytest.approx(sum(shares) / len(shares))


def test_average_precision_from_documents() -> None:
    methods = [AveragePrecision(UNITS), AveragePrecision(UNITS)]
    for index, method in enumerate(methods):
        batch = Batch(torch.arange(6).view(2, 3) + 6 * index, torch.tensor([3, 2]))
        for layer, size in enumerate((3, 2)):
            values = torch.full((2, 3, size), 100.0)  # the start token and padding are left out
            values[0, 1:] = torch.tensor([1.0, 3.0]).unsqueeze(1) + index
            values[1, 1] = torch.tensor([2.5, -2.5, 2.5])[:size] * (1 - 2 * index)
            method.accumulate(activations(layer, values, batch))
    rows = [method.finalise() for method in methods]
    assert sorted(rows[0][:, 0, 0].tolist()) == [2.0, 2.5]
    assert rows[0][:, 1, 2].tolist() == [0.0, 0.0]
    scores = AveragePrecision.score(rows, SHAPE)
    # neuron 0: en 2, 2.5; zh 3, -2.5
    assert scores[:, 1].tolist() == [
        pytest.approx([(1 / 2 + 2 / 3) / 2, (1 / 3 + 2 / 4) / 2, 0.0]),
        pytest.approx([(1 + 2 / 4) / 2, 1.0, 0.0]),
    ]


def test_average_precision_published_takes_both_ends() -> None:
    shape = Shape(("en",), (1500, 1400))
    scores = torch.rand(1, 2, 1500, generator=torch.Generator().manual_seed(0)).where(shape.exists, 0)
    chosen = AveragePrecision.published(scores, shape)
    assert chosen.sum() == 2000
    left = scores[0][shape.exists & ~chosen[0]]
    taken = scores[chosen]
    assert (taken > left.max()).sum() == (taken < left.min()).sum() == 1000
    assert not chosen[0, 1, 1400:].any()


def test_random_scores_are_seeded_and_leave_padding_alone() -> None:
    assert torch.equal(Random.score((), SHAPE), draw(SHAPE, 0))
    assert torch.equal(Random.ranking(torch.zeros(SHAPE.tensor), SHAPE, 3), draw(SHAPE, 3))
    assert not torch.equal(draw(SHAPE, 1), draw(SHAPE, 0))
    assert draw(SHAPE, 1)[:, 1, 2].tolist() == [0.0, 0.0]
    assert not torch.equal(draw(SHAPE, 1)[0], draw(SHAPE, 1)[1])


def test_statistics_of_every_method_merge() -> None:
    """Two halves of the documents, merged, give the scores of all of them."""
    generator = torch.Generator().manual_seed(0)
    units = Units((3, 2), hidden=2, outputs=True)
    for kind in scored().values():
        if not issubclass(kind, Measured):
            continue
        whole, first, second = (kind(units) for _ in range(3))
        for number in range(6):
            batch = Batch(torch.randint(0, 99, (2, 3), generator=generator), torch.tensor([3, 2]))
            for layer, size in enumerate(units.sizes):
                values = torch.randn(2, 3, size, generator=generator)
                seen: list[Activations | Gradients] = [activations(layer, values, batch)]
                if kind.source is not ScoreSource.FORWARD:
                    seen = [
                        Gradients(layer, site, batch, values[..., :width], values[..., :width].exp(), values.sum(-1))
                        for site in whole.wanted
                        for width in [units.hidden if site is Site.OUTPUT else size]
                    ]
                for part in seen:
                    for method in (whole, second if number % 2 else first):
                        method.accumulate(part)  # type: ignore[attr-defined]
        first.merge(second)
        torch.testing.assert_close(first.finalise(), whole.finalise())
        assert whole.finalise().abs().sum() > 0


def test_every_pass_but_the_plain_one_has_rules() -> None:
    assert Crane.source == AttnLRP.source == CraneTextbook.source
    assert isinstance(AttnLRP.source, Pass)
    assert AttnLRP.source.rules is ATTNLRP
