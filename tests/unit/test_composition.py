"""Composition: masks joined and damped; what identifies it, what it refuses, and its rows."""

import random
from itertools import permutations

import pytest
import torch
from torch import Tensor

from crane_serve.common.masks import Composition, Member, NeuronMask
from crane_serve.common.masks.mask import MAX_SCALE

SIZES = (6, 4)


def scales(*changes: tuple[int, int, float]) -> Tensor:
    tensor = torch.ones(2, 6)
    for layer, neuron, scale in changes:
        tensor[layer, neuron] = scale
    return tensor


FIRST = NeuronMask(scales((0, 0, 0.3), (0, 1, 0.0)), SIZES)
SECOND = NeuronMask(scales((0, 0, 0.7), (1, 2, 0.0)), SIZES, torch.full((2, 3), 0.5))
THIRD = NeuronMask(scales((0, 0, 1.1), (1, 3, 2.0)), SIZES, torch.full((2, 3), 0.25))


def joined(*masks: NeuronMask) -> Composition:
    return Composition(map(Member, masks))


def test_joined_scales_multiply() -> None:
    whole = joined(FIRST, SECOND, THIRD).whole()
    assert torch.allclose(whole.intermediate, FIRST.intermediate * SECOND.intermediate * THIRD.intermediate)
    assert whole.neuron_sets() == [[0, 1], [2, 3]]
    assert whole.output is not None
    assert torch.equal(whole.output, torch.full((2, 3), 0.125))


def test_the_order_does_not_matter_to_a_bit() -> None:
    orders = [joined(*order) for order in permutations([FIRST, SECOND, THIRD])]
    assert len({one.digest for one in orders}) == 1
    assert len({one.whole().digest for one in orders}) == 1


def test_what_is_given_twice_counts_once() -> None:
    again = NeuronMask(FIRST.intermediate.clone(), SIZES)
    assert joined(FIRST, again).digest == FIRST.digest
    assert joined(FIRST, SECOND, again).digest == joined(FIRST, SECOND).digest
    halves = [Member(FIRST, 0.5), Member(again, 0.5)]
    assert torch.equal(Composition(halves).whole().intermediate, Composition(halves[:1]).whole().intermediate)


def test_one_mask_as_it_is_is_that_mask() -> None:
    alone = joined(SECOND)
    assert (alone.digest, alone.wire) == (SECOND.digest, SECOND.digest)
    assert alone.whole().digest == SECOND.digest
    assert alone.intermediate(0).data_ptr() == SECOND.intermediate.data_ptr()  # no copy is made


def test_every_other_composition_has_a_digest_of_its_own() -> None:
    members = [(FIRST, 0.0), (FIRST, 0.5), (FIRST, 1.0), (SECOND, 0.0), (SECOND, 0.5)]
    pairs = [[Member(*one), Member(*other)] for one in members for other in members]
    digests = {
        frozenset((member.mask.digest, member.factor) for member in pair): Composition(pair).digest for pair in pairs
    }
    assert len(set(digests.values())) == len(digests) == 15
    # Not even a mask with the same scales: what is multiplied at each use is not what was written down.
    assert Composition([Member(FIRST, 0.5)]).whole().digest not in digests.values()


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 2.0])
def test_a_factor_moves_what_is_masked_and_leaves_the_rest_at_exactly_one(factor: float) -> None:
    mask = NeuronMask(scales((0, 1, 0.0), (1, 2, 0.5)), SIZES, torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    whole = Composition([Member(mask, factor)]).whole()
    assert torch.equal(whole.intermediate, scales((0, 1, factor), (1, 2, 0.5 + factor * 0.5)))
    assert whole.output is not None
    assert torch.equal(whole.output, torch.tensor([[factor, 1.0], [1.0, 1.0]]))


def test_a_shard_is_a_part_of_the_row() -> None:
    mask = Composition([Member(FIRST, 0.5), Member(SECOND)])
    assert torch.equal(mask.intermediate(0, 1, 4), mask.intermediate(0)[1:4])


def test_neurons_that_any_member_scales_are_counted_once() -> None:
    assert joined(FIRST, SECOND, THIRD).neurons == 4
    assert Composition([Member(FIRST, 1.0)]).neurons == 0
    assert Composition([Member(FIRST, 1.0), Member(SECOND)]).neurons == SECOND.neurons == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "at least one mask"),
        ([Member(FIRST), Member(NeuronMask(torch.ones(2, 6), (6, 5)))], "different intermediate sizes"),
        ([Member(FIRST, factor) for factor in (100, 99, 98)], r"multiply to 9\.7e\+05, expected at most 10000"),
        ([Member(NeuronMask(scales((0, 0, 9000.0)), SIZES), 3.0)], r"multiply to 1\.8e\+04, expected"),
        ([Member(NeuronMask(torch.ones(2, 6), SIZES, torch.full((2, 3), -200.0)), 100.0)], r"multiply to 1\.99e\+04"),
    ],
)
def test_refuses(members: list[Member], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Composition(members)


def test_what_is_admitted_never_leaves_its_bound() -> None:
    draw = random.Random(0)
    admitted = 0
    for _ in range(2000):
        members = []
        for _ in range(draw.randrange(1, 5)):
            size = 10 ** draw.uniform(-2, 4)
            changes = [(0, draw.randrange(6), draw.uniform(-size, size)) for _ in range(3)]
            output = torch.full((2, 3), draw.uniform(-size, size)) if draw.random() < 0.3 else None
            mask = NeuronMask(scales(*changes), SIZES, output)
            members.append(Member(mask, draw.choice([0.0, 0.0, draw.uniform(0, 2), draw.uniform(0, 100)])))
        try:
            whole = Composition(members).whole()
        except ValueError:
            continue
        admitted += 1
        low, high = whole.extremes
        assert max(-low, high) <= MAX_SCALE
    assert admitted > 300
