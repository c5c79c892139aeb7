"""NeuronMask: a scale for every MLP neuron, identified by its content."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_SCALE = 10_000.0
"""The largest absolute value of a scale, in a mask and in masks joined: within float16, which ends at 65,504."""

_DIGEST_DOMAIN = b"crane-mask-v1"


@dataclass(frozen=True, eq=False)
class NeuronMask:
    """Multiplicative scales for the MLP neurons of one model: 0 switches a neuron off, 1 leaves it untouched.

    intermediate: float32 [layers, widest intermediate size], the scale of each input of `down_proj`;
        columns beyond a layer's own intermediate size are padding and must be 1.
    intermediate_sizes: the number of neurons of each layer.
    output: float32 [layers, hidden], the scale of each dimension of the MLP's output, or None for all ones.
    router: float32 [layers, experts], 0 for experts that routers may not choose (their logits become minus infinity),
        1 for the others and in layers without experts; None for all ones.

    Raises ValueError for scales that are not finite or larger than MAX_SCALE, wrong shapes, padding other than 1, and
    a layer without an expert left.
    """

    intermediate: Tensor  # [layers, widest]
    intermediate_sizes: tuple[int, ...]
    output: Tensor | None = field(default=None)  # [layers, hidden]
    router: Tensor | None = field(default=None)  # [layers, experts]

    def __post_init__(self) -> None:
        sizes = self.intermediate_sizes
        expected = (len(sizes), max(sizes, default=0))
        if tuple(self.intermediate.shape) != expected:
            raise ValueError(f"'intermediate' has shape {list(self.intermediate.shape)}, expected {list(expected)}")
        # Adding 0.0 turns -0.0 into 0.0, so that equal scales have equal bytes and one digest.
        object.__setattr__(self, "intermediate", self._checked("intermediate", self.intermediate))
        for layer, size in enumerate(sizes):
            if not bool((self.intermediate[layer, size:] == 1).all()):
                raise ValueError(f"'intermediate' scales padding of layer {layer} beyond its {size} neurons")
        for name, columns in (("output", "hidden size"), ("router", "experts")):
            scales = getattr(self, name)
            if scales is not None:
                if scales.ndim != 2 or scales.shape[0] != len(sizes):
                    raise ValueError(f"{name!r} has shape {list(scales.shape)}, expected [{len(sizes)}, {columns}]")
                object.__setattr__(self, name, self._checked(name, scales))
        if self.router is not None:
            if not bool(((self.router == 0) | (self.router == 1)).all()):
                raise ValueError("'router' holds something else than 0 and 1")
            require_expert_left(self.router)

    @staticmethod
    def _checked(name: str, scales: Tensor) -> Tensor:
        if not scales.is_floating_point():
            raise ValueError(f"{name!r} has dtype {scales.dtype}, expected floating point")
        scales = scales.detach().to("cpu", torch.float32).contiguous() + 0.0
        if not bool((scales.abs() <= MAX_SCALE).all()):  # nor is NaN
            largest = float(scales.abs().max())
            what = f"a scale of size {largest:.3g}" if math.isfinite(largest) else "values that are not finite"
            raise ValueError(f"{name!r} holds {what}, expected at most {MAX_SCALE:g} in absolute value")
        return scales

    @classmethod
    def switching_off(cls, neurons: Sequence[Iterable[int]], intermediate_sizes: Sequence[int]) -> "NeuronMask":
        """Mask that zeroes `neurons[layer]`, the neuron indices of each layer.

        Raises ValueError when a layer is missing or an index lies outside its layer.
        """
        sizes = tuple(intermediate_sizes)
        if len(neurons) != len(sizes):
            raise ValueError(f"neuron sets for {len(neurons)} layers, expected {len(sizes)}")
        scales = torch.ones(len(sizes), max(sizes, default=0))  # [layers, widest]
        for layer, (indices, size) in enumerate(zip(neurons, sizes, strict=True)):
            for index in indices:
                if not 0 <= index < size:
                    raise ValueError(f"layer {layer}: neuron {index} is out of range, expected 0 to {size - 1}")
                scales[layer, index] = 0.0
        return cls(scales, sizes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the scales and their shapes. Names, languages and dates are not part of the identity."""
        content = hashlib.sha256(_DIGEST_DOMAIN)
        content.update(repr(self.intermediate_sizes).encode())
        content.update(self.intermediate.numpy().astype("<f4").tobytes())
        if self.output is not None:
            content.update(f"output{tuple(self.output.shape)}".encode())
            content.update(self.output.numpy().astype("<f4").tobytes())
        if self.router is not None:
            content.update(f"router{tuple(self.router.shape)}".encode())
            content.update(self.router.numpy().astype("<f4").tobytes())
        return content.hexdigest()

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest scale."""
        ranges = [scales.aminmax() for scales in (self.intermediate, self.output) if scales is not None]
        return float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))

    @cached_property
    def changed(self) -> NDArray[np.uint8]:
        """Which scales of `intermediate` are not 1, a bit for each: [layers * widest / 8, rounded up]."""
        return np.packbits((self.intermediate != 1).numpy())

    @cached_property
    def experts_off(self) -> int:
        """Number of experts, over all layers, that routers may not choose."""
        return 0 if self.router is None else int((self.router == 0).sum())

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.intermediate_sizes)

    @cached_property
    def neurons(self) -> int:
        """Number of neurons whose scale is not 1."""
        return int((self.intermediate != 1).sum())

    def neuron_sets(self) -> list[list[int]]:
        """Per layer, the ascending indices of the neurons whose scale is not 1."""
        return [torch.nonzero(row != 1).flatten().tolist() for row in self.intermediate]

    def neurons_per_layer(self) -> list[int]:
        """Per layer, how many neurons have a scale that is not 1."""
        return [int(count) for count in (self.intermediate != 1).sum(dim=1)]


def require_expert_left(router: Tensor) -> None:
    """Raise ValueError if a layer's router may choose none. router: [layers, experts]."""
    without = (router == 0).all(dim=1).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"no expert of layer {without[0]} is left to its router, expected at least one")
