import math

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis
from torch import Tensor

from relevance.accumulators import (
    DocumentSample,
    FiniteCheck,
    Moments,
    NonFiniteError,
    RunningMean,
    StatisticError,
)
from relevance.methods.crane import z_scores

CPU = torch.device("cpu")


def test_running_mean_by_hand() -> None:
    mean = RunningMean(2, 3, CPU)
    mean.add(1, torch.tensor([3.0, 9.0]), observations=2)
    mean.add(1, torch.tensor([3.0, 0.0]), observations=1)
    assert mean.mean().tolist() == [[0.0, 0.0, 0.0], [2.0, 3.0, 0.0]]


def test_running_means_merge_and_load() -> None:
    whole, first, second = (RunningMean(2, 3, CPU) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    for part in (first, second):
        sums = torch.randn(3, generator=generator)
        part.add(0, sums, 4)
        whole.add(0, sums, 4)
    loaded = RunningMean(2, 3, CPU)
    loaded.load(first.tensors())
    loaded.merge(second)
    assert torch.equal(loaded.mean(), whole.mean())
    with pytest.raises(StatisticError, match=r"total is torch.float64 \[2, 4\]; expected torch.float64 \[2, 3\]"):
        first.merge(RunningMean(2, 4, CPU))
    with pytest.raises(StatisticError, match="total is nothing"):
        first.load({})


def values(documents: int, units: int = 7) -> Tensor:
    """Skewed, heavy-tailed, and far from zero, so that sums of raw powers would lose everything."""
    generator = torch.Generator().manual_seed(1)
    return 1e4 + torch.randn(documents, units, generator=generator, dtype=torch.float64).exp()


@pytest.mark.parametrize("batches", [[23], [1] * 23, [1, 2, 20], [20, 2, 1], [11, 12]])
def test_kurtosis_is_that_of_scipy_in_any_batches(batches: list[int]) -> None:
    data = values(23)
    moments = Moments(1, 9, CPU)
    for batch in data.split(batches):  # type: ignore[no-untyped-call]
        moments.add(0, batch)
    found = moments.kurtosis()[0]
    np.testing.assert_allclose(found[:7].numpy(), kurtosis(data.numpy(), axis=0, bias=False), rtol=1e-9)
    assert bool(found[7:].isnan().all())


def test_moments_merge_to_those_of_the_union() -> None:
    data = values(40)
    parts = [Moments(1, 7, CPU) for _ in range(4)]
    for index, part in enumerate(parts[:3]):
        part.add(0, data[index * 8 : index * 8 + 8])
        part.add(0, data[24 + index * 5 : 29 + index * 5])
    parts[3].add(0, data[39:])
    whole = Moments(1, 7, CPU)
    whole.load(parts[3].tensors())
    for part in (*parts[:3], Moments(1, 7, CPU)):
        whole.merge(part)
    np.testing.assert_allclose(whole.kurtosis()[0].numpy(), kurtosis(data.numpy(), axis=0, bias=False), rtol=1e-9)
    assert whole.count.tolist() == [40]


def test_kurtosis_needs_four_documents_and_a_variance() -> None:
    few, constant = Moments(1, 2, CPU), Moments(1, 2, CPU)
    few.add(0, values(3, 2))
    constant.add(0, torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 3.0], [0.1, 5.0], [0.1, 9.0]]))
    assert bool(few.kurtosis().isnan().all())
    assert constant.kurtosis().isnan().tolist() == [[True, False]]


def test_z_scores_leave_out_what_is_missing() -> None:
    found = z_scores(torch.tensor([1.0, math.nan, 3.0, 5.0]))
    assert found.tolist() == pytest.approx([-math.sqrt(1.5), 0.0, 0.0, math.sqrt(1.5)])
    assert z_scores(torch.tensor([math.nan, 2.0])).tolist() == [0.0, 0.0]


def sampled(keys: Tensor, rows: Tensor, batch: int, size: int = 6) -> DocumentSample:
    """A sample of documents with two layers of 3 and 2 neurons."""
    sample = DocumentSample(2, 3, size)
    for start in range(0, len(keys), batch):
        stop = start + batch
        sample.add(1, keys[start:stop], rows[start:stop, 1, :2])
        sample.add(0, keys[start:stop], rows[start:stop, 0])
    return sample


def documents(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(count, 2, 3, generator=generator)
    rows[:, 1, 2] = 0
    return torch.randperm(count, generator=generator) - count // 2, rows


@pytest.mark.parametrize("count", [4, 25])
def test_a_sample_is_the_documents_with_the_smallest_keys(count: int) -> None:
    keys, rows = documents(count)
    expected = keys.argsort()[:6]
    for batch in (1, 3, 25):
        sample = sampled(keys, rows, batch)
        assert torch.equal(sample.keys, keys[expected])
        assert torch.equal(sample.rows, rows[expected])


def test_samples_merge_exactly_and_grow_in_pieces() -> None:
    keys, rows = documents(30)
    whole = sampled(keys, rows, 30)
    merged = sampled(keys[:11], rows[:11], 4)
    merged.merge(sampled(keys[11:], rows[11:], 5))
    assert torch.equal(merged.rows, whole.rows)
    growing, pieces = DocumentSample(2, 3, 6), []
    for start in range(0, 30, 5):
        growing.merge(sampled(keys[start : start + 5], rows[start : start + 5], 5))
        pieces.append(growing.news())
    assert all(len(piece["keys"]) < 6 for piece in pieces)
    assert len(growing.news()["keys"]) == 0
    again = whole.empty()
    for piece in pieces:
        part = whole.empty()
        part.load(piece)
        again.merge(part)
    assert torch.equal(again.keys, whole.keys)
    assert torch.equal(again.rows, whole.rows)
    assert len(again.news()["keys"]) == 0
    with pytest.raises(StatisticError, match="expected rows"):
        whole.load({"keys": keys})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite_check_names_the_first_layer_in_the_order_of_computation(value: float) -> None:
    check = FiniteCheck(4, CPU)
    for layer in range(4):
        check.see(layer, torch.tensor([[1.0, value if layer in (1, 2) else 2.0]]))
    with pytest.raises(NonFiniteError, match=r"layer 1: activations are not finite in torch\.float32"):
        check.require("activations")
    with pytest.raises(NonFiniteError, match="layer 2: gradients"):
        check.require("gradients", last_first=True)
