"""Composition: masks joined and damped, as a request asks for them. It holds its parts; its scales are never kept."""

import hashlib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import torch
from torch import Tensor

from crane_serve.common.masks.mask import MAX_SCALE, NeuronMask, require_expert_left

_DIGEST_DOMAIN = b"crane-composition-v1"


@dataclass(frozen=True)
class Member:
    """A mask and the factor f that moves each of its scales s to s + f (1 - s), and each offset o to (1 - f) o.

    So a scale of 0 becomes f and 1 stays 1: a factor of 0 is the mask as it is, 1 has no effect, 2 doubles what the
    mask switches off. Where the mask replaces a value by another, f is the share of what was there.
    """

    mask: NeuronMask
    factor: float = 0.0

    @property
    def wire(self) -> str:
        """The mask's digest, with `@factor` if that is not 0."""
        return f"{self.mask.digest}@{self.factor!r}" if self.factor else self.mask.digest

    @property
    def largest(self) -> float:
        """The largest absolute value of its scales, but at least 1."""
        return max(1.0, *(abs(scale + self.factor * (1 - scale)) for scale in self.mask.extremes))

    @property
    def router(self) -> Tensor | None:
        """float32 [layers, experts]: 0 for those that routers may not choose; None if they may choose all."""
        return None if self.factor == 1 else self.mask.router

    @property
    def largest_offset(self) -> float:
        """The largest absolute value of its offsets."""
        return abs(1 - self.factor) * self.mask.largest_offset

    def offset(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor | None:
        """float32 [stop - start]: the moved offsets of these neurons of a layer, None if all are 0."""
        if self.mask.offset is None or self.factor == 1:
            return None
        return self.mask.offset[layer, start:stop] * (1 - self.factor)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The moved offsets and scales of some neurons of a mask with offsets: [places] each.

        places: [places], over all layers and their padding.
        """
        assert self.mask.offset is not None
        offsets = self.mask.offset.flatten()[places] * (1 - self.factor)
        return offsets, self.moved(self.mask.intermediate.flatten()[places])

    def moved(self, scales: Tensor) -> Tensor:
        """`scales` of its mask, moved; of any shape."""
        # Exactly f for 0 and 1 for 1. Not one operation, which would round otherwise at the end of a shard.
        return (1 - scales).mul_(self.factor).add_(scales) if self.factor else scales


@dataclass(frozen=True)
class Composition:
    """The joint effect of masks: scales multiply, and what is given twice counts once.

    At most one member gives a neuron an offset, or several the same with the same scale of 0 or 1, which counts once.
    It acts first; the scales of the others multiply the outcome. So the order of the members does not matter.

    members: sorted by their wire form, at least one. The identity is made of theirs, so nothing has to be multiplied to
    know it; one mask as it is keeps its own.

    Raises ValueError for no members, for masks of different sizes, if the members' largest scales multiply to more than
    MAX_SCALE, with their offsets or without, for members that replace a neuron by different values, for a factor other
    than 0 and 1 of a mask that routers obey, and if the members leave some router no expert. No scale can be larger
    than that product; it may be smaller, if the largest are of other neurons.
    """

    members: tuple[Member, ...]

    def __init__(self, members: Iterable[Member]) -> None:
        distinct = {member.wire: member for member in members}
        object.__setattr__(self, "members", tuple(distinct[wire] for wire in sorted(distinct)))
        if not distinct:
            raise ValueError("a composition needs at least one mask")
        if len({member.mask.intermediate_sizes for member in self.members}) > 1:
            raise ValueError("masks of models with different intermediate sizes cannot be joined")
        bound = math.prod(member.largest for member in self.members)
        if bound > MAX_SCALE:
            raise ValueError(f"scales that may multiply to {bound:.3g}, expected at most {MAX_SCALE:g}")
        if any(one.mask.router is not None and one.factor not in (0, 1) for one in self.members):
            raise ValueError("a router may choose an expert or not; expected 0 or 1 behind '@' of a mask of experts")
        self._check_offsets()
        routers = [router for one in self.members if (router := one.router) is not None]
        if len(routers) > 1:
            require_expert_left(reduce(torch.mul, routers))

    def _check_offsets(self) -> None:
        giving = [one for one in self.members if one.largest_offset]
        for one in giving:
            bound = one.largest_offset * math.prod(other.largest for other in self.members if other is not one)
            if bound > MAX_SCALE:
                raise ValueError(f"offsets that may become {bound:.3g}, expected at most {MAX_SCALE:g}")
        for one, other in itertools.combinations(giving, 2):
            both = np.flatnonzero(np.unpackbits(one.mask.offsetting & other.mask.offsetting))
            if not both.size:
                continue
            (mine, scales), (theirs, others) = (of.at(torch.from_numpy(both)) for of in (one, other))
            same = (mine == theirs) & (scales == others) & ((scales == 0) | (scales == 1))
            if not bool(same.all()):
                layer, neuron = divmod(int(both[int((~same).nonzero()[0])]), one.mask.intermediate.shape[1])
                raise ValueError(f"masks that give neuron {neuron} of layer {layer} different values")

    @cached_property
    def wire(self) -> str:
        """The members' wire forms, joined with commas."""
        return ",".join(member.wire for member in self.members)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) that no other content has: of one mask as it is its own, else of the wire form."""
        first = self.members[0]
        if len(self.members) == 1 and not first.factor:
            return first.mask.digest
        return hashlib.sha256(_DIGEST_DOMAIN + self.wire.encode()).hexdigest()

    @cached_property
    def neurons(self) -> int:
        """Number of neurons that some member scales."""
        bits = [member.mask.changed for member in self.members if member.factor != 1]
        return int(np.bitwise_count(reduce(np.bitwise_or, bits)).sum()) if bits else 0

    @property
    def scales_outputs(self) -> bool:
        """Whether some member scales dimensions of the MLP's output."""
        return any(member.mask.output is not None for member in self.members)

    def intermediate(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        """float32 [stop - start]: the scales of these neurons of a layer, made anew at each call."""
        # In the order of the members, so that every process gets the same bits.
        return reduce(torch.mul, (one.moved(one.mask.intermediate[layer, start:stop]) for one in self.members))

    @property
    def offsets(self) -> bool:
        """Whether some member adds to neurons."""
        return any(member.largest_offset for member in self.members)

    def offset(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor | None:
        """float32 [stop - start]: what is added to these neurons of a layer after they are scaled, None for nothing."""
        given = [one.offset(layer, start, stop) for one in self.members]
        found = [offset for offset in given if offset is not None]
        if not found:
            return None
        total = reduce(lambda one, other: torch.where(one != 0, one, other), found)
        for one, own in zip(self.members, given, strict=True):
            scales = one.moved(one.mask.intermediate[layer, start:stop])
            total = total * (scales if own is None else scales.where(own == 0, 1.0))
        return total

    def output(self, layer: int) -> Tensor | None:
        """float32 [hidden]: the scales of the dimensions of a layer's MLP output, None for all ones."""
        scales = [one.moved(one.mask.output[layer]) for one in self.members if one.mask.output is not None]
        return reduce(torch.mul, scales) if scales else None

    @property
    def reroutes(self) -> bool:
        """Whether some member has experts that routers may not choose."""
        return any(member.router is not None for member in self.members)

    @cached_property
    def experts_off(self) -> int:
        """Number of experts, over all layers, that routers may not choose."""
        routers = [router for one in self.members if (router := one.router) is not None]
        return int((reduce(torch.mul, routers) == 0).sum()) if routers else 0

    def router(self, layer: int) -> Tensor | None:
        """float32 [experts]: 0 for those that the layer's router may not choose, else 1; None for all ones."""
        routers = [router[layer] for one in self.members if (router := one.router) is not None]
        return reduce(torch.mul, routers) if routers else None

    def whole(self) -> NeuronMask:
        """The composition as a mask of its own, which can be written to a file."""
        sizes = self.members[0].mask.intermediate_sizes
        layers = range(len(sizes))
        outputs = [scales for layer in layers if (scales := self.output(layer)) is not None]
        routers = [router for layer in layers if (router := self.router(layer)) is not None]
        intermediate = torch.stack([self.intermediate(layer) for layer in layers])  # [layers, widest]
        offsets = [self.offset(layer) for layer in layers] if self.offsets else []  # [widest] each
        given = [offset for offset in offsets if offset is not None]
        of_others = (torch.stack(rows) if rows else None for rows in (outputs, routers, given))
        return NeuronMask(intermediate, sizes, *of_others)
