"""From requests to tokens: which table row each token of a batch reads. Pure, so it is tested without an engine."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from crane_serve.common.masks import Positions
from crane_serve.common.masks.positions import NEVER
from crane_serve.engine.admission import MaskRequest
from crane_serve.engine.table import UNMASKED_ROW

Ints = Sequence[int] | NDArray[np.integer]
_NOTHING = (0, 0, 0, 0)
_IS_MASKED = (False, True, False, True, False)  # of the runs between bounds


class MaskedTokens:
    """Which tokens of one request its mask is for. Made when the request begins in a worker.

    If they `have_end`, a token that ends them, it is known only when that token is: before a step, `restart` if the
    request `begins_elsewhere`, then `read` the tokens of the step if it `wants` them, or `skip` them. Then `bounds` are
    right for that step.
    """

    def __init__(self, request: MaskRequest, prompt_tokens: int) -> None:
        self.expression = request.expression
        self.are_all = request.positions == Positions.ALL
        self.have_end = bool(request.positions.until)
        self._windows = request.positions.windows(prompt_tokens)
        self._until = np.asarray(request.positions.until, dtype=np.int64)
        self._read = 0  # so many of the request's tokens have been read or skipped
        self._end = NEVER  # behind the last masked token, as far as tokens were read

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """Ascending indices of tokens: the mask is for those from the first to the second and from the third to the
        fourth, stops excluded."""
        prompt, generated = self._windows
        end = self._end
        return min(prompt.start, end), min(prompt.stop, end), min(generated.start, end), min(generated.stop, end)

    @property
    def settled(self) -> int:
        """From this token on all tokens read the same row, whatever they are; `NEVER` if that is not known yet."""
        start, stop, first, last = self.bounds
        if last < NEVER:
            return last if first < last else stop if start < stop else 0
        if self.have_end:
            return NEVER
        return start if start < stop == first else first

    def begins_elsewhere(self, computed: int) -> bool:
        """Whether a step behind so many tokens is not the next one, and the tokens before it matter: they came from the
        prefix cache, or the request was preempted and begins again."""
        return computed < self._read or (computed > self._read and self._can_end(self._read, NEVER))

    def restart(self, ids: Ints, computed: int) -> None:
        """Begin behind so many tokens, whose ids are [computed]. Raises RuntimeError if some are not known."""
        if len(ids) != computed:
            raise RuntimeError(f"{len(ids)} token ids are known of {computed} before a step")
        self._read, self._end = 0, NEVER
        self.read(ids)

    def wants(self, tokens: int) -> bool:
        """Whether one of the next tokens may end the mask."""
        return self._can_end(self._read, self._read + tokens)

    def read(self, ids: Ints) -> None:
        """Look at the next tokens: [tokens]. Raises RuntimeError for what is no token id, in which an end could be
        missed."""
        ids = np.asarray(ids)
        if len(ids) and ids.min() < 0:
            raise RuntimeError("a token that may end a mask is not known yet")
        for window in self._windows:
            start, stop = (max(0, edge - self._read) for edge in (window.start, window.stop))
            ends = np.flatnonzero(np.isin(ids[start:stop], self._until))
            if self._end == NEVER and len(ends):
                self._end = self._read + start + int(ends[0]) + 1
        self._read += len(ids)

    def skip(self, tokens: int) -> None:
        """Pass over the next tokens, which cannot end the mask."""
        self._read += tokens

    def _can_end(self, start: int, stop: int) -> bool:
        return self._end == NEVER and any(max(start, each.start) < min(stop, each.stop) for each in self._windows)


def row_per_token(
    rows: Sequence[int], masked: Sequence[MaskedTokens | None], tokens: Ints, computed: Ints
) -> NDArray[np.int64]:
    """The row of each token of a batch: [sum of tokens].

    All arguments are [requests]: the row of the request's mask, which of its tokens that is for (None for a request
    without a mask), the tokens scheduled, and the tokens computed before. Raises ValueError when the lengths differ.
    """
    if not len(rows) == len(masked) == len(tokens) == len(computed):
        raise ValueError(f"{len(rows)} rows for {len(masked)}, {len(tokens)} and {len(computed)} requests")
    all_rows = np.asarray(rows, dtype=np.int64)
    if all(each is None or each.are_all for each in masked):
        return np.repeat(all_rows, tokens)
    bounds = np.asarray([_NOTHING if each is None else each.bounds for each in masked])  # [requests, 4]
    scheduled, before = np.asarray(tokens)[:, None], np.asarray(computed, dtype=np.int64)[:, None]
    inner = np.clip(bounds - before, 0, scheduled)
    # Five runs of tokens per request, each of which may be empty: [requests, 5] -> [5 * requests].
    runs = np.diff(np.concatenate([np.zeros_like(scheduled), inner, scheduled], axis=1), axis=1)
    return np.repeat(np.where(_IS_MASKED, all_rows[:, None], UNMASKED_ROW).ravel(), runs.ravel())


def fill_slots(slots: Tensor, rows: NDArray[np.int64], used: int) -> int:
    """Write `rows` [tokens] to the front of `slots` [maximum tokens]; return how many slots are in use now.

    used: how many slots were in use before; slots that are no longer in use become unmasked. Raises ValueError if the
    batch is longer than `slots`.
    """
    if len(rows) > len(slots):
        raise ValueError(f"{len(rows)} tokens in a batch, slots for {len(slots)}")
    source, pinned = from_numpy(rows), slots.device.type == "cuda"
    if pinned:
        # Pinned memory comes from PyTorch's caching allocator, which does not reuse it before the copy is done.
        source = source.pin_memory()
    slots[: len(rows)].copy_(source, non_blocking=pinned)
    if used > len(rows):
        slots[len(rows) : used].fill_(UNMASKED_ROW)
    return len(rows)
