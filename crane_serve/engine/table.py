"""MaskTable: the masks in use, as rows of a tensor per layer."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crane_serve.common.masks import Composition, InlineMask

UNMASKED_ROW = 0
NO_OFFSET = -0.0
"""What changes no bit of any number when it is added; 0.0 would make -0.0 another zero."""


@dataclass(frozen=True)
class Part:
    """The neurons of a layer that one patched module of this rank reads.

    table: [rows, *shape], changed in place only; start, stop: what they are among; of: [*shape], their indices from
    `start` on, None for all of them in order; offsets: [rows, *shape], None in an engine without.
    """

    table: Tensor
    start: int
    stop: int
    of: Tensor | None = None
    offsets: Tensor | None = None

    def fill(self, row: int, mask: Composition | InlineMask, layer: int) -> None:
        """Write the mask's scales and offsets."""
        scales = mask.intermediate(layer, self.start, self.stop)  # [stop - start]
        self.table[row].copy_(self._own(scales).to(self.table.device, self.table.dtype))
        if self.offsets is None:
            return
        offsets = mask.offset(layer, self.start, self.stop)  # [stop - start]
        if offsets is None:
            self.offsets[row].fill_(NO_OFFSET)
        else:
            own = self._own(offsets).to(self.offsets.device, self.offsets.dtype)
            self.offsets[row].copy_(torch.where(own != 0, own, NO_OFFSET))

    def _own(self, values: Tensor) -> Tensor:
        return values if self.of is None else values[self.of]


class MaskTable:
    """Rows of scales that the patched MLPs read. Row 0 is all ones and belongs to unmasked requests.

    parts: per owned layer (global index) what its modules on this rank read.
    outputs: per owned layer a tensor [rows, hidden] for the MLP's output, if that can be scaled.
    routers: per owned layer with experts a tensor [rows, experts], 0 for those that its router may not choose.
    """

    def __init__(
        self,
        parts: Mapping[int, Sequence[Part]],
        outputs: Mapping[int, Tensor] | None = None,
        routers: Mapping[int, Tensor] | None = None,
    ) -> None:
        if not parts:
            raise ValueError("a mask table needs at least one layer")
        self._parts = {layer: tuple(of_layer) for layer, of_layer in parts.items()}
        self._has_offsets = all(part.offsets is not None for of_layer in parts.values() for part in of_layer)
        self._outputs = dict(outputs or {})
        self._routers = dict(routers or {})
        tables = [part.table for of_layer in self._parts.values() for part in of_layer]
        self._capacity = tables[0].shape[0]
        self._rows: OrderedDict[str, int] = OrderedDict()  # digest -> row, least recently used first
        for table in (*tables, *self._outputs.values(), *self._routers.values()):
            table.fill_(1.0)

    def assign(self, masks: Sequence[Composition | InlineMask]) -> list[int]:
        """The row of each mask. A mask that is not resident gets a row that no mask of this call needs.

        Raises RuntimeError for more distinct masks than the table has rows.
        """
        distinct = {mask.digest: mask for mask in masks}
        if len(distinct) > self._capacity - 1:
            raise RuntimeError(f"{len(distinct)} distinct masks in one batch, the table holds {self._capacity - 1}")
        for digest in distinct:
            if digest in self._rows:
                self._rows.move_to_end(digest)
        for digest, mask in distinct.items():
            if digest not in self._rows:
                self._rows[digest] = self._fill(self._free_row(distinct), mask)
        return [self._rows[mask.digest] for mask in masks]

    def _free_row(self, needed: Mapping[str, Composition | InlineMask]) -> int:
        if len(self._rows) < self._capacity - 1:
            return len(self._rows) + 1
        digest = next(digest for digest in self._rows if digest not in needed)
        return self._rows.pop(digest)

    def _fill(self, row: int, mask: Composition | InlineMask) -> int:
        if mask.offsets and not self._has_offsets:
            raise RuntimeError("a mask has offsets, the model was patched without them")
        for layer, parts in self._parts.items():
            for part in parts:
                part.fill(row, mask, layer)
        if mask.scales_outputs and not self._outputs:
            raise RuntimeError("a mask scales MLP output dimensions, the model was patched without them")
        for tables, of_mask in ((self._outputs, mask.output), (self._routers, mask.router)):
            for layer, table in tables.items():
                scales = of_mask(layer)  # [hidden] or [experts]
                if scales is None:
                    table[row].fill_(1.0)
                else:
                    table[row].copy_(scales.to(table.device, table.dtype))
        return row


def new_table(rows: int, *shape: int, like: Tensor, value: float = 1.0) -> Tensor:
    """Ones, or another `value`, of shape [rows, *shape] with the dtype and device of `like`."""
    return torch.full((rows, *shape), value, dtype=like.dtype, device=like.device)
