"""Composition: masks joined and damped, as a request asks for them. It holds its parts; its scales are never kept."""

import hashlib
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
    """A mask and the factor f that moves each of its scales s to s + f (1 - s).

    So 0 becomes f and 1 stays 1: a factor of 0 is the mask as it is, 1 has no effect, 2 doubles what the mask switches
    off.
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

    def moved(self, scales: Tensor) -> Tensor:
        """`scales` of its mask, moved; of any shape."""
        # Exactly f for 0 and 1 for 1. Not one operation, which would round otherwise at the end of a shard.
        return (1 - scales).mul_(self.factor).add_(scales) if self.factor else scales


@dataclass(frozen=True)
class Composition:
    """The joint effect of masks: scales multiply, and what is given twice counts once.

    members: sorted by their wire form, at least one. The identity is made of theirs, so nothing has to be multiplied to
    know it; one mask as it is keeps its own.

    Raises ValueError for no members, for masks of different sizes, if the members' largest scales multiply to more
    than MAX_SCALE, for a factor other than 0 and 1 of a mask that routers obey, and if the members leave some router no
    expert. No scale can be larger than that product; it may be smaller, if the largest are of other neurons.
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
        routers = [router for one in self.members if (router := one.router) is not None]
        if len(routers) > 1:
            require_expert_left(reduce(torch.mul, routers))

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
        of_others = (torch.stack(rows) if rows else None for rows in (outputs, routers))
        return NeuronMask(intermediate, sizes, *of_others)
