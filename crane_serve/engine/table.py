"""MaskTable: the masks in use, as rows of a tensor per layer."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from crane_serve.common.masks import Composition

UNMASKED_ROW = 0


class MaskTable:
    """Rows of scales that the patched MLPs read. Row 0 is all ones and belongs to unmasked requests.

    tables: per owned layer (global index) a tensor [rows, neurons on this rank], changed in place only.
    offsets: per owned layer the first neuron of this rank's tensor-parallel shard.
    outputs: per owned layer a tensor [rows, hidden] for the MLP's output, if that can be scaled.
    """

    def __init__(
        self, tables: Mapping[int, Tensor], offsets: Mapping[int, int], outputs: Mapping[int, Tensor] | None = None
    ) -> None:
        if not tables:
            raise ValueError("a mask table needs at least one layer")
        self._tables = dict(tables)
        self._offsets = dict(offsets)
        self._outputs = dict(outputs or {})
        self._capacity = next(iter(self._tables.values())).shape[0]
        self._rows: OrderedDict[str, int] = OrderedDict()  # digest -> row, least recently used first
        for table in (*self._tables.values(), *self._outputs.values()):
            table.fill_(1.0)

    def assign(self, masks: list[Composition]) -> list[int]:
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

    def _free_row(self, needed: Mapping[str, Composition]) -> int:
        if len(self._rows) < self._capacity - 1:
            return len(self._rows) + 1
        digest = next(digest for digest in self._rows if digest not in needed)
        return self._rows.pop(digest)

    def _fill(self, row: int, mask: Composition) -> int:
        for layer, table in self._tables.items():
            start, width = self._offsets[layer], table.shape[1]
            scales = mask.intermediate(layer, start, start + width)  # [neurons on this rank]
            table[row].copy_(scales.to(table.device, table.dtype))
        if mask.scales_outputs and not self._outputs:
            raise RuntimeError("a mask scales MLP output dimensions, the model was patched without them")
        for layer, table in self._outputs.items():
            output = mask.output(layer)  # [hidden]
            if output is None:
                table[row].fill_(1.0)
            else:
                table[row].copy_(output.to(table.device, table.dtype))
        return row


def new_table(rows: int, neurons: int, like: Tensor) -> Tensor:
    """Ones of shape [rows, neurons] with the dtype and device of `like`."""
    return torch.ones(rows, neurons, dtype=like.dtype, device=like.device)
