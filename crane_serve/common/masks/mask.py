"""NeuronMask: what becomes of every MLP neuron, identified by its content."""

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
    """What becomes of the MLP neurons of one model: a value a becomes scale * a + offset.

    A scale of 0 switches a neuron off, 1 leaves it untouched; an offset adds to it, or, with a scale of 0, replaces it.

    intermediate: float32 [layers, widest intermediate size], the scale of each input of `down_proj`;
        columns beyond a layer's own intermediate size are padding and must be 1.
    intermediate_sizes: the number of neurons of each layer.
    output: float32 [layers, hidden], the scale of each dimension of the MLP's output, or None for all ones.
    router: float32 [layers, experts], 0 for experts that routers may not choose (their logits become minus infinity),
        1 for the others and in layers without experts; None for all ones.
    offset: float32, of the shape of `intermediate`, 0 in padding; None if all are 0.

    Raises ValueError for scales and offsets that are not finite or larger than MAX_SCALE, wrong shapes, padding other
    than 1 (of offsets, 0), and a layer without an expert left.
    """

    intermediate: Tensor  # [layers, widest]
    intermediate_sizes: tuple[int, ...]
    output: Tensor | None = field(default=None)  # [layers, hidden]
    router: Tensor | None = field(default=None)  # [layers, experts]
    offset: Tensor | None = field(default=None)  # [layers, widest]

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
        if self.offset is not None:
            self._set_offset(self.offset, expected)
        if self.router is not None:
            if not bool(((self.router == 0) | (self.router == 1)).all()):
                raise ValueError("'router' holds something else than 0 and 1")
            require_expert_left(self.router)

    def _set_offset(self, offset: Tensor, expected: tuple[int, int]) -> None:
        if tuple(offset.shape) != expected:
            raise ValueError(f"'offset' has shape {list(offset.shape)}, expected {list(expected)}")
        offset = self._checked("offset", offset)
        for layer, size in enumerate(self.intermediate_sizes):
            if bool(offset[layer, size:].any()):
                raise ValueError(f"'offset' adds to padding of layer {layer} beyond its {size} neurons")
        object.__setattr__(self, "offset", offset if bool(offset.any()) else None)

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
        if self.offset is not None:
            content.update(b"offset")
            content.update(self.offset.numpy().astype("<f4").tobytes())
        return content.hexdigest()

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest scale."""
        ranges = [scales.aminmax() for scales in (self.intermediate, self.output) if scales is not None]
        return float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))

    @cached_property
    def largest_offset(self) -> float:
        """The largest absolute value of an offset."""
        return 0.0 if self.offset is None else float(self.offset.abs().max())

    @cached_property
    def offsetting(self) -> NDArray[np.uint8]:
        """Which neurons it adds to, as in `changed`."""
        added = torch.zeros_like(self.intermediate) if self.offset is None else self.offset
        return np.packbits((added != 0).numpy())

    @cached_property
    def changed(self) -> NDArray[np.uint8]:
        """Which neurons it changes, a bit for each: [layers * widest / 8, rounded up]."""
        return np.packbits(self._touched.numpy())

    @property
    def _touched(self) -> Tensor:
        """bool [layers, widest]: which neurons it changes."""
        scaled = self.intermediate != 1
        return scaled if self.offset is None else scaled | (self.offset != 0)

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
        """Number of neurons that it changes."""
        return int(self._touched.sum())

    def neuron_sets(self) -> list[list[int]]:
        """Per layer, the ascending indices of the neurons that it changes."""
        return [torch.nonzero(row).flatten().tolist() for row in self._touched]

    def neuron_values(self) -> dict[str, list[list[float]]]:
        """The scales and the offsets of `neuron_sets`, under these names; without those that are all 0."""
        held = {"scales": self.intermediate, "offsets": self.offset}
        of_each = {
            name: [row[touched].tolist() for row, touched in zip(values, self._touched, strict=True)]
            for name, values in held.items()
            if values is not None
        }
        return {name: values for name, values in of_each.items() if any(map(any, values))}

    def neurons_per_layer(self) -> list[int]:
        """Per layer, how many neurons it changes."""
        return [int(count) for count in self._touched.sum(dim=1)]


def require_expert_left(router: Tensor) -> None:
    """Raise ValueError if a layer's router may choose none. router: [layers, experts]."""
    without = (router == 0).all(dim=1).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"no expert of layer {without[0]} is left to its router, expected at least one")
