"""From requests to tokens: which table row each token of a batch reads. Pure, so it is tested without an engine."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from crane_serve.engine.table import UNMASKED_ROW


def row_per_token(rows: Sequence[int], tokens: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
    """Repeat each request's row for its scheduled tokens: rows [requests], tokens [requests] -> [sum of tokens].

    Raises ValueError when the lengths differ.
    """
    if len(rows) != len(tokens):
        raise ValueError(f"{len(rows)} rows for {len(tokens)} requests")
    return np.repeat(np.asarray(rows, dtype=np.int64), tokens)


def fill_slots(slots: Tensor, rows: NDArray[np.int64]) -> None:
    """Write `rows` [tokens] to the front of `slots` [maximum tokens]; padding behind it becomes unmasked.

    Raises ValueError if the batch is longer than `slots`.
    """
    if len(rows) > len(slots):
        raise ValueError(f"{len(rows)} tokens in a batch, slots for {len(slots)}")
    slots[: len(rows)].copy_(from_numpy(rows))
    slots[len(rows) :].fill_(UNMASKED_ROW)
