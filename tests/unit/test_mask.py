"""NeuronMask: what it refuses, what its digest depends on, how masks join."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crane_serve.common.masks import NeuronMask

SIZES = (6, 4)


def scales(*changes: tuple[int, int, float]) -> Tensor:
    tensor = torch.ones(2, 6)
    for layer, neuron, scale in changes:
        tensor[layer, neuron] = scale
    return tensor


def test_switching_off_zeroes_exactly_the_given_neurons() -> None:
    mask = NeuronMask.switching_off([[1, 5], [3]], SIZES)
    assert torch.equal(mask.intermediate, scales((0, 1, 0.0), (0, 5, 0.0), (1, 3, 0.0)))
    assert mask.neurons == 3
    assert mask.neuron_sets() == [[1, 5], [3]]
    assert mask.neurons_per_layer() == [2, 1]
    assert mask.layers == 2


def test_counts_every_scale_that_is_not_one() -> None:
    mask = NeuronMask(scales((0, 2, 0.5), (0, 0, 2.0), (1, 1, 0.0)), SIZES)
    assert mask.neuron_sets() == [[0, 2], [1]]


@pytest.mark.parametrize(
    "same",
    [
        pytest.param(lambda: NeuronMask.switching_off([[5, 1, 1], [3]], SIZES), id="order and repetition"),
        pytest.param(lambda: NeuronMask(scales((0, 1, -0.0), (0, 5, 0.0), (1, 3, -0.0)), SIZES), id="negative zero"),
        pytest.param(lambda: NeuronMask(scales((0, 1, 0), (0, 5, 0), (1, 3, 0)).double(), SIZES), id="float64"),
        pytest.param(lambda: NeuronMask(scales((0, 1, 0), (0, 5, 0), (1, 3, 0)).bfloat16(), SIZES), id="bfloat16"),
        pytest.param(
            lambda: NeuronMask(scales((0, 1, 0), (0, 5, 0), (1, 3, 0)).T.contiguous().T, SIZES), id="memory layout"
        ),
    ],
)
def test_equal_content_has_one_digest(same: Callable[[], NeuronMask]) -> None:
    assert same().digest == NeuronMask.switching_off([[1, 5], [3]], SIZES).digest


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(NeuronMask(scales((0, 1, 1e-7)), SIZES), id="one scale slightly"),
        pytest.param(NeuronMask(scales((0, 2, 0.0)), SIZES), id="another neuron"),
        pytest.param(NeuronMask(scales((1, 1, 0.0)), SIZES), id="another layer"),
        pytest.param(NeuronMask(scales((0, 1, 0.0)), (6, 5)), id="layer sizes"),
        pytest.param(NeuronMask(scales((0, 1, 0.0)), SIZES, torch.ones(2, 3)), id="output of ones"),
        pytest.param(NeuronMask(scales((0, 1, 0.0)), SIZES, torch.zeros(2, 3)), id="output of zeros"),
        pytest.param(NeuronMask(scales((0, 1, 0.0)), SIZES, torch.zeros(2, 4)), id="wider output"),
    ],
)
def test_other_content_has_another_digest(other: NeuronMask) -> None:
    assert other.digest != NeuronMask(scales((0, 1, 0.0)), SIZES).digest


def test_digest_of_a_known_mask_never_changes() -> None:
    known = "e8f3a4f174fbb669e133fd4119b36a3c041f91428f49ec36db1f9ac983eaa4e7"
    assert NeuronMask.switching_off([[1, 5], [3]], SIZES).digest == known


def test_later_changes_to_the_callers_tensor_do_not_reach_the_mask() -> None:
    tensor, output = scales(), torch.ones(2, 3)
    mask = NeuronMask(tensor, SIZES, output)
    tensor.zero_()
    output.zero_()
    assert mask.neurons == 0
    assert mask.output is not None
    assert bool((mask.output == 1).all())


@pytest.mark.parametrize(
    ("intermediate", "output", "message"),
    [
        (scales((0, 0, float("nan"))), None, "'intermediate' holds values that are not finite"),
        (scales((0, 0, float("inf"))), None, "'intermediate' holds values that are not finite"),
        (scales(), torch.full((2, 3), float("-inf")), "'output' holds values that are not finite"),
        (scales().double() * 1e300, None, "not finite"),
        (torch.ones(3, 6), None, r"shape \[3, 6\], expected \[2, 6\]"),
        (torch.ones(2, 7), None, r"shape \[2, 7\], expected \[2, 6\]"),
        (torch.ones(12), None, r"shape \[12\], expected \[2, 6\]"),
        (scales((1, 4, 0.0)), None, "padding of layer 1 beyond its 4 neurons"),
        (scales((1, 5, float("nan"))), None, "not finite"),
        (scales().long(), None, "dtype torch.int64, expected floating point"),
        (scales().bool(), None, "dtype torch.bool, expected floating point"),
        (scales(), torch.ones(3, 4), r"'output' has shape \[3, 4\]"),
        (scales(), torch.ones(8), r"'output' has shape \[8\]"),
    ],
)
def test_refuses_what_is_no_mask(intermediate: Tensor, output: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuronMask(intermediate, SIZES, output)


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ([[], [4]], "layer 1: neuron 4 is out of range, expected 0 to 3"),
        ([[6], []], "layer 0: neuron 6 is out of range, expected 0 to 5"),
        ([[-1], []], "layer 0: neuron -1 is out of range, expected 0 to 5"),
        ([[0]], "neuron sets for 1 layers, expected 2"),
        ([[0], [0], [0]], "neuron sets for 3 layers, expected 2"),
    ],
)
def test_switching_off_names_what_is_out_of_range(neurons: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuronMask.switching_off(neurons, SIZES)


FIRST = NeuronMask(scales((0, 0, 0.3), (0, 1, 0.0)), SIZES)
SECOND = NeuronMask(scales((0, 0, 0.7), (1, 2, 0.0)), SIZES, torch.full((2, 3), 0.5))
THIRD = NeuronMask(scales((0, 0, 1.1), (1, 3, 2.0)), SIZES, torch.full((2, 3), 0.25))


def test_union_multiplies_scales() -> None:
    union = NeuronMask.union([FIRST, SECOND, THIRD])
    assert torch.allclose(union.intermediate, FIRST.intermediate * SECOND.intermediate * THIRD.intermediate)
    assert union.neuron_sets() == [[0, 1], [2, 3]]
    assert union.output is not None
    assert torch.equal(union.output, torch.full((2, 3), 0.125))


def test_union_does_not_depend_on_the_order() -> None:
    orders = [(FIRST, SECOND, THIRD), (THIRD, SECOND, FIRST), (SECOND, FIRST, THIRD), (SECOND, THIRD, FIRST)]
    assert len({NeuronMask.union(order).digest for order in orders}) == 1


def test_union_counts_a_mask_once() -> None:
    again = NeuronMask(FIRST.intermediate.clone(), SIZES)
    assert NeuronMask.union([FIRST, again]).digest == FIRST.digest
    assert NeuronMask.union([FIRST, SECOND, again]).digest == NeuronMask.union([FIRST, SECOND]).digest


def test_union_leaves_its_members_as_they_were() -> None:
    before = FIRST.intermediate.clone()
    NeuronMask.union([FIRST, SECOND])
    assert torch.equal(FIRST.intermediate, before)


@pytest.mark.parametrize(
    ("masks", "message"),
    [([], "at least one mask"), ([FIRST, NeuronMask(scales(), (6, 5))], "different intermediate sizes")],
)
def test_union_refuses(masks: list[NeuronMask], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuronMask.union(masks)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 2.0])
def test_scaling_moves_what_is_masked_and_leaves_the_rest_at_exactly_one(factor: float) -> None:
    mask = NeuronMask(scales((0, 1, 0.0), (1, 2, 0.5)), SIZES, torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    scaled = mask.scaled(factor)
    expected = scales((0, 1, factor), (1, 2, factor + (1 - factor) * 0.5))
    assert torch.equal(scaled.intermediate, expected)
    assert scaled.output is not None
    assert torch.equal(scaled.output, torch.tensor([[factor, 1.0], [1.0, 1.0]]))


def test_scaling_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        NeuronMask.switching_off([[1], []], SIZES).scaled(float("inf"))
