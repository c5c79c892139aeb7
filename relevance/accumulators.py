"""Streaming statistics of neurons, which can be saved, loaded and merged with others of their kind."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """Activations, gradients or log-probabilities are not finite; the message names the layer if it is known."""


class StatisticError(ValueError):
    """Statistics that do not fit together, or tensors that are not those of a statistic."""


class Statistic(ABC):
    """A statistic of every neuron over some documents."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The whole state, on the CPU."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a state from `tensors`. Raises StatisticError for any other."""

    @abstractmethod
    def merge(self, other: "Statistic") -> None:
        """Add the observations of `other`, which must have the same kind and sizes. Raises StatisticError otherwise."""


class GrowingStatistic(Statistic):
    """A statistic with many rows, which is saved in pieces: each call of `news` gives the next piece.

    A piece is a state of its own: loading the pieces one by one and merging them gives the whole.
    """

    @abstractmethod
    def news(self) -> dict[str, Tensor]:
        """The rows that are new since the last call, on the CPU."""

    @abstractmethod
    def empty(self) -> "GrowingStatistic":
        """A statistic of the same kind and sizes without observations."""


class RunningMean(Statistic):
    """Mean over observations (tokens, documents) of every neuron.

    total: float64 [layers, widest] sums; count: int64 [layers] observations.
    """

    def __init__(self, layers: int, widest: int, device: torch.device) -> None:
        self.total = torch.zeros(layers, widest, dtype=torch.float64, device=device)
        self.count = torch.zeros(layers, dtype=torch.int64)

    def add(self, layer: int, sums: Tensor, observations: int) -> None:
        """Add the `sums` [neurons] over so many `observations` of one layer."""
        self.total[layer, : sums.numel()] += sums
        self.count[layer] += observations

    def tensors(self) -> dict[str, Tensor]:
        return {"total": self.total.cpu(), "count": self.count}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.total = _fitting(tensors, "total", self.total)
        self.count = _fitting(tensors, "count", self.count)

    def merge(self, other: Statistic) -> None:
        assert isinstance(other, RunningMean)
        self.total += _fitting(other.tensors(), "total", self.total)
        self.count += other.count

    def mean(self) -> Tensor:
        """float64 [layers, widest] on the CPU; 0 where nothing was observed."""
        return self.total.cpu() / self.count.clamp_min(1).unsqueeze(-1)


class Moments(Statistic):
    """Central moments up to the fourth of one number per document and unit, in float64.

    Pébay 2008, "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order statistical
    moments" (SAND2008-6212), equations 2.1 to 2.3 for two sets.
    count: int64 [layers] documents; mean, second, third, fourth: [layers, widest], the last three sums of powers of
    the deviations from the mean.
    """

    NAMES = ("mean", "second", "third", "fourth")

    def __init__(self, layers: int, widest: int, device: torch.device) -> None:
        self.mean, self.second, self.third, self.fourth = (
            torch.zeros(layers, widest, dtype=torch.float64, device=device) for _ in self.NAMES
        )
        self.count = torch.zeros(layers, dtype=torch.int64)

    def add(self, layer: int, values: Tensor) -> None:
        """Add `values` [documents, units] of one layer."""
        values = values.double()
        mean = values.mean(dim=0)
        deviation = values - mean
        square = deviation.square()
        sums = (square.sum(dim=0), (square * deviation).sum(dim=0), square.square().sum(dim=0))
        self._take_in(layer, values.shape[1], len(values), mean, *sums)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).cpu() for name in self.NAMES} | {"count": self.count}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name in (*self.NAMES, "count"):
            setattr(self, name, _fitting(tensors, name, getattr(self, name)))

    def merge(self, other: Statistic) -> None:
        assert isinstance(other, Moments)
        theirs = {name: _fitting(other.tensors(), name, getattr(self, name)) for name in self.NAMES}
        for layer, count in enumerate(other.count.tolist()):
            self._take_in(layer, self.mean.shape[1], count, *(theirs[name][layer] for name in self.NAMES))

    def _take_in(
        self, layer: int, units: int, count: int, mean: Tensor, second: Tensor, third: Tensor, fourth: Tensor
    ) -> None:
        """Merge in a set of `count` documents with the given moments, [units] each."""
        before = int(self.count[layer])
        if count == 0:
            return
        here = [getattr(self, name)[layer, :units] for name in self.NAMES]
        delta = mean - here[0]
        total = before + count
        share, other_share = before / total, count / total
        scaled = delta * other_share  # how far the mean moves
        spread = delta.square() * share * count
        here[3] += (
            fourth
            + spread * delta.square() * (share * share - share * other_share + other_share * other_share)
            + 6 * delta.square() * (share * share * second + other_share * other_share * here[1])
            + 4 * delta * (share * third - other_share * here[2])
        )
        here[2] += third + spread * delta * (share - other_share) + 3 * delta * (share * second - other_share * here[1])
        here[1] += second + spread
        here[0] += scaled
        self.count[layer] = total

    def kurtosis(self) -> Tensor:
        """Unbiased excess kurtosis, float64 [layers, widest] on the CPU; NaN where the variance is zero.

        G2 = (n - 1) / ((n - 2) (n - 3)) * ((n + 1) g2 + 6), g2 = n * fourth / second^2 - 3. As in scipy, a variance
        counts as zero when it is below the rounding error of the mean. NaN too with fewer than 4 documents.
        """
        n = self.count.double().unsqueeze(-1)  # [layers, 1]
        second, fourth = self.second.cpu(), self.fourth.cpu()
        epsilon = torch.finfo(torch.float64).eps
        constant = second <= n * (epsilon * self.mean.cpu()).square()
        excess = n * fourth / second.square() - 3
        unbiased = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * excess + 6)
        return unbiased.masked_fill(constant | (n < 4), torch.nan)


class DocumentSample(GrowingStatistic):
    """One row per document of at most `size` documents: those with the smallest keys.

    The keys are hashes, so this is a uniform sample without replacement, and the union of two samples cut to `size` is
    the sample of the union (bottom-k sketch). While there are no more than `size` documents it holds all of them.
    keys: int64 [documents], rising; rows: float32 [documents, layers, widest]; both on the CPU.
    """

    def __init__(self, layers: int, widest: int, size: int) -> None:
        self.size = size
        self.keys = torch.zeros(0, dtype=torch.int64)
        self.rows = torch.zeros(0, layers, widest)
        self._saved = torch.zeros(0, dtype=torch.bool)  # [documents], whether `news` has returned the row
        self._arriving: dict[int, Tensor] = {}

    def add(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Add one layer of a batch of documents, keys [documents] and values [documents, neurons].

        The documents count once all layers of the batch have been added, in any order.
        """
        self._arriving[layer] = values
        if len(self._arriving) < self.rows.shape[1]:
            return
        rows = self.rows.new_zeros(len(keys), *self.rows.shape[1:])
        for index, of_layer in self._arriving.items():
            rows[:, index, : of_layer.shape[1]] = of_layer.float().cpu()
        self._arriving.clear()
        self._take_in(keys, rows, torch.zeros(len(keys), dtype=torch.bool))

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "rows": self.rows}

    def news(self) -> dict[str, Tensor]:
        new = ~self._saved
        self._saved = torch.ones_like(self._saved)
        return {"keys": self.keys[new], "rows": self.rows[new]}

    def empty(self) -> "DocumentSample":
        _, layers, widest = self.rows.shape
        return DocumentSample(layers, widest, self.size)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        rows = tensors.get("rows")
        if rows is None or rows.dtype != torch.float32 or rows.shape[1:] != self.rows.shape[1:]:
            raise StatisticError(f"expected rows, float32 [documents, {', '.join(map(str, self.rows.shape[1:]))}]")
        self.keys = _fitting(tensors, "keys", torch.zeros(len(rows), dtype=torch.int64))
        self.rows = rows
        self._saved = torch.ones(len(rows), dtype=torch.bool)

    def merge(self, other: Statistic) -> None:
        assert isinstance(other, DocumentSample)
        self._take_in(other.keys, other.rows, other._saved)

    def _take_in(self, keys: Tensor, rows: Tensor, saved: Tensor) -> None:
        if len(self.keys) == self.size:
            wanted = keys < self.keys[-1]
            keys, rows, saved = keys[wanted], rows[wanted], saved[wanted]
        if not len(keys):
            return
        every_key = torch.cat((self.keys, keys))
        order = every_key.argsort(stable=True)[: self.size]
        self.keys = every_key[order]
        self.rows = torch.cat((self.rows, rows))[order]
        self._saved = torch.cat((self._saved, saved))[order]


class Histogram(Statistic):
    """Counts of observations (tokens) of every neuron by sign and size: two steps for each doubling from 1 / 4096 to
    4096. What is smaller has one bin around 0, what is larger counts as of the last step.

    counts: int32 [layers, widest, bins].
    """

    STEPS = 48  # of each sign
    BINS = 2 * STEPS + 1

    def __init__(self, layers: int, widest: int, device: torch.device) -> None:
        self.counts = torch.zeros(layers, widest, self.BINS, dtype=torch.int32, device=device)

    def add(self, layer: int, values: Tensor, counted: Tensor | None = None) -> None:
        """Add `values` [observations, neurons] of one layer; counted: bool of that shape, None for all."""
        values = values.float()
        steps = (2 * values.abs().log2()).floor().add_(self.STEPS // 2 + 1).clamp_(0, self.STEPS)
        bins = self.STEPS + (steps * values.sign()).long()  # [observations, neurons]
        neurons = values.shape[1]
        places = bins + self.BINS * torch.arange(neurons, device=values.device)
        places = places.flatten() if counted is None else places[counted]
        found = torch.bincount(places, minlength=neurons * self.BINS).view(neurons, self.BINS)
        self.counts[layer, :neurons] += found.to(torch.int32)

    def tensors(self) -> dict[str, Tensor]:
        return {"counts": self.counts.cpu()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.counts = _fitting(tensors, "counts", self.counts)

    def merge(self, other: Statistic) -> None:
        assert isinstance(other, Histogram)
        self.counts += _fitting(other.tensors(), "counts", self.counts)

    def median(self) -> Tensor:
        """float64 [layers, widest] on the CPU, linear within the bin that holds it; 0 where nothing was observed."""
        sizes = 2.0 ** ((torch.arange(self.STEPS + 1, dtype=torch.float64) - self.STEPS // 2) / 2)
        edges = torch.cat((-sizes.flip(0), sizes))  # [bins + 1]
        medians = []
        for counts in self.counts.cpu():  # [widest, bins]
            up_to = counts.cumsum(dim=1).double()
            half = up_to[:, -1:] / 2
            at = (up_to < half).sum(dim=1, keepdim=True)  # the first bin that reaches half of them
            inside = counts.gather(1, at).double()
            share = (half - up_to.gather(1, at) + inside) / inside.clamp_min(1)
            low, high = edges[at], edges[at + 1]
            medians.append(torch.where(half > 0, low + share * (high - low), 0).squeeze(1))
        return torch.stack(medians)


class FiniteCheck:
    """Checks that the values of every layer are finite, with one read from the device for all layers."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self.sums = torch.zeros(layers, device=device)
        self.dtype = torch.float32

    def see(self, layer: int, values: Tensor) -> None:
        """Accumulate a sum that is finite only if `values`, of any shape, are finite."""
        self.sums[layer] += values.detach().sum(dtype=torch.float32)
        self.dtype = values.dtype

    def require(self, what: str, last_first: bool = False) -> None:
        """Raise NonFiniteError naming the first layer, in the order of computation, whose values are not finite."""
        broken = (~torch.isfinite(self.sums)).nonzero().flatten().tolist()
        if broken:
            layer = broken[-1] if last_first else broken[0]
            raise NonFiniteError(f"layer {layer}: {what} are not finite in {self.dtype}; try a wider dtype")


def _fitting(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The tensor `name`, on the device of `like`. Raises StatisticError unless it has the shape and dtype of `like`."""
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
        what = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise StatisticError(f"{name} is {what}; expected {like.dtype} {list(like.shape)}")
    return tensor.to(like.device)
