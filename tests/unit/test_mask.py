"""NeuronMask: what it refuses, what its digest depends on, how masks join."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crane_serve.common.masks import NeuronMask
from crane_serve.common.masks.mask import MAX_SCALE

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


def test_the_largest_scales_are_allowed() -> None:
    mask = NeuronMask(scales((0, 1, -MAX_SCALE), (1, 1, MAX_SCALE)), SIZES, torch.full((2, 3), 0.5))
    assert mask.extremes == (-MAX_SCALE, MAX_SCALE)
    assert torch.isfinite(mask.intermediate.half()).all()


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
        (scales().double() * 1e300, None, "not finite, expected at most 10000 in absolute value"),
        (
            scales((0, 0, 1e38)),
            None,
            r"'intermediate' holds a scale of size 1e\+38, expected at most 10000 in absolute",
        ),
        (scales((0, 0, -10001)), None, r"holds a scale of size 1e\+04, expected at most 10000"),
        (scales(), torch.full((2, 3), 65504.0), r"'output' holds a scale of size 6.55e\+04, expected at most 10000"),
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
