"""From requests to tokens: which table row each token of a batch reads. Pure, so it is tested without an engine."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from crane_serve.common.masks import Positions
from crane_serve.engine.table import UNMASKED_ROW

Ints = Sequence[int] | NDArray[np.integer]


def row_per_token(
    rows: Sequence[int], positions: Sequence[Positions], tokens: Ints, computed: Ints, prompts: Ints
) -> NDArray[np.int64]:
    """The row of each token of a batch: [sum of tokens].

    All arguments are [requests]: the row of the request's mask, the positions that it is for, the tokens scheduled, the
    tokens computed before, and the length of the prompt. Raises ValueError when the lengths differ.
    """
    if not len(rows) == len(positions) == len(tokens) == len(computed) == len(prompts):
        raise ValueError(
            f"{len(rows)} rows and {len(positions)} positions for {len(tokens)}, {len(computed)} and {len(prompts)} "
            "requests"
        )
    all_rows = np.asarray(rows, dtype=np.int64)
    if all(where is Positions.ALL for where in positions):
        return np.repeat(all_rows, tokens)
    scheduled = np.asarray(tokens)
    in_prompt = np.clip(np.asarray(prompts) - np.asarray(computed), 0, scheduled)
    prompt_rows = np.where([where is Positions.GENERATED for where in positions], UNMASKED_ROW, all_rows)
    generated_rows = np.where([where is Positions.PROMPT for where in positions], UNMASKED_ROW, all_rows)
    # Two runs of tokens per request, one of which may be empty: [requests, 2] -> [2 * requests].
    runs = np.stack([in_prompt, scheduled - in_prompt], axis=1).ravel()
    return np.repeat(np.stack([prompt_rows, generated_rows], axis=1).ravel(), runs)


def fill_slots(slots: Tensor, rows: NDArray[np.int64], used: int) -> int:
    """Write `rows` [tokens] to the front of `slots` [maximum tokens]; return how many slots are in use now.

    used: how many slots were in use before; slots that are no longer in use become unmasked. Raises ValueError if the
    batch is longer than `slots`.
    """
    if len(rows) > len(slots):
        raise ValueError(f"{len(rows)} tokens in a batch, slots for {len(slots)}")
    source = from_numpy(rows)
    if slots.device.type == "cuda":
        # Pinned memory comes from PyTorch's caching allocator, which does not reuse it before the copy is done.
        source = source.pin_memory()
    slots[: len(rows)].copy_(source, non_blocking=True)
    if used > len(rows):
        slots[len(rows) : used].fill_(UNMASKED_ROW)
    return len(rows)
