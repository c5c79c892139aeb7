"""NeuronMask: a scale for every MLP neuron, identified by its content."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

_DIGEST_DOMAIN = b"crane-mask-v1"


@dataclass(frozen=True, eq=False)
class NeuronMask:
    """Multiplicative scales for the MLP neurons of one model: 0 switches a neuron off, 1 leaves it untouched.

    intermediate: float32 [layers, widest intermediate size], the scale of each input of `down_proj`;
        columns beyond a layer's own intermediate size are padding and must be 1.
    intermediate_sizes: the number of neurons of each layer.
    output: float32 [layers, hidden], the scale of each dimension of the MLP's output, or None for all ones.

    Raises ValueError for scales that are not finite, wrong shapes, or padding other than 1.
    """

    intermediate: Tensor  # [layers, widest]
    intermediate_sizes: tuple[int, ...]
    output: Tensor | None = field(default=None)  # [layers, hidden]

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
        if self.output is not None:
            if self.output.ndim != 2 or self.output.shape[0] != len(sizes):
                raise ValueError(f"'output' has shape {list(self.output.shape)}, expected [{len(sizes)}, hidden size]")
            object.__setattr__(self, "output", self._checked("output", self.output))

    @staticmethod
    def _checked(name: str, scales: Tensor) -> Tensor:
        if not scales.is_floating_point():
            raise ValueError(f"{name!r} has dtype {scales.dtype}, expected floating point")
        scales = scales.detach().to("cpu", torch.float32).contiguous() + 0.0
        if not bool(torch.isfinite(scales).all()):
            raise ValueError(f"{name!r} holds values that are not finite")
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

    @classmethod
    def union(cls, masks: Sequence["NeuronMask"]) -> "NeuronMask":
        """The joint effect of `masks`: scales multiply, and a mask given twice counts once.

        Raises ValueError for no masks or masks of different shapes.
        """
        distinct = list({mask.digest: mask for mask in masks}.values())
        if not distinct:
            raise ValueError("a union needs at least one mask")
        # A fixed order makes the float product, and with it the digest, independent of the caller's order.
        distinct.sort(key=lambda mask: mask.digest)
        first = distinct[0]
        if any(mask.intermediate_sizes != first.intermediate_sizes for mask in distinct):
            raise ValueError("masks of models with different intermediate sizes have no union")
        intermediate, output = first.intermediate, first.output
        for mask in distinct[1:]:
            intermediate = intermediate * mask.intermediate
            if mask.output is not None:
                output = mask.output if output is None else output * mask.output
        return cls(intermediate, first.intermediate_sizes, output)

    def scaled(self, factor: float) -> "NeuronMask":
        """The same neurons at another strength: scale 0 becomes `factor` f, 1 stays 1, s becomes f + (1 - f) s.

        0 gives this mask, 1 has no effect, 2 doubles what this mask switches off. Raises ValueError for a factor that
        is not finite.
        """

        def moved(scales: Tensor) -> Tensor:
            return torch.where(scales == 1, scales, factor + (1 - factor) * scales)

        output = None if self.output is None else moved(self.output)
        return NeuronMask(moved(self.intermediate), self.intermediate_sizes, output)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the scales and their shapes. Names, languages and dates are not part of the identity."""
        content = hashlib.sha256(_DIGEST_DOMAIN)
        content.update(repr(self.intermediate_sizes).encode())
        content.update(self.intermediate.numpy().astype("<f4").tobytes())
        if self.output is not None:
            content.update(f"output{tuple(self.output.shape)}".encode())
            content.update(self.output.numpy().astype("<f4").tobytes())
        return content.hexdigest()

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
