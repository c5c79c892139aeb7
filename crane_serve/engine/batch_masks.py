"""BatchMasks: a patched model and the masks of its next batch. Both model runners use it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from crane_serve.common.masks import MaskLibrary
from crane_serve.engine.activations import BatchActivations, CaptureBuffers
from crane_serve.engine.config import mask_config
from crane_serve.engine.masked_mlp import install_masks
from crane_serve.engine.routing import Ints, MaskedTokens, fill_slots, row_per_token
from crane_serve.engine.table import UNMASKED_ROW, MaskTable


class BatchMasks:
    """The masks of one worker. Made by `install` when the model is loaded, then `fill` before every batch.

    activations: what requests ask to see of their neurons; None in an engine without.
    """

    def __init__(
        self, library: MaskLibrary, table: MaskTable, slots: Tensor, activations: BatchActivations | None = None
    ) -> None:
        self.activations = activations
        self._library = library
        self._table = table
        self.slots = slots  # [maximum tokens], the table row of each token
        self._used = 0  # slots from here on are unmasked
        # Of the last batch, if its rows last: requests, their tokens, and from which token on they last: [requests].
        self._before: tuple[list[MaskedTokens | None], list[int], NDArray[np.int64]] | None = None

    @classmethod
    def install(cls, model: nn.Module, vllm_config: Any) -> "BatchMasks":
        """Patch a loaded model.

        Raises UnsupportedModelError naming what cannot be masked, ValueError for an engine without masks.
        """
        config = mask_config(vllm_config)
        if config is None:
            raise ValueError("the engine was configured without masks")
        library = config.library()
        # Batches are padded up to the largest captured graph, which may exceed the scheduler's limit.
        captured = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
        max_tokens = max(vllm_config.scheduler_config.max_num_batched_tokens, *captured, 3)
        of = library.fingerprint
        buffers = CaptureBuffers(config.gates) if config.activations else None
        table, slots = install_masks(
            model,
            of.intermediate_sizes,
            config.rows + 1,
            max_tokens,
            outputs=config.outputs,
            offsets=config.offsets,
            experts=of.experts,
            buffers=buffers,
        )
        return cls(library, table, slots, None if buffers is None else BatchActivations(buffers))

    def fill(
        self,
        requests: Sequence[MaskedTokens | None],
        tokens: Ints,
        computed: Ints,
        ids: Callable[[], Ints],
        before: Callable[[int], Ints],
    ) -> None:
        """Give each token of the batch the row of its request's mask; padding behind the batch becomes unmasked.

        requests, tokens, computed: [requests] in the order of the batch: the masked tokens of each, always by the same
        object while it runs, None for no mask; the tokens scheduled, and the tokens computed before. ids: gives the ids
        of all tokens of the batch, and waits for the device; before: gives the ids of the request at an index that come
        before the batch. Both are called only for masks that end with a token.

        Raises MaskError for a mask that does not resolve. Admission has resolved it before, so this should never
        happen; if it does, the engine stops, because the request must not run unmasked. So it does for a RuntimeError
        of `MaskedTokens.read`.
        """
        if not any(requests):
            if self._used:
                self._unmask()
            return
        scheduled, first = np.asarray(tokens).tolist(), np.asarray(computed)
        if self._before is not None:
            *batch, settled = self._before
            if batch == [requests, scheduled] and (first >= settled).all():  # the same requests decode on
                return
        _read(requests, scheduled, computed, ids, before)
        masks = [None if request is None else self._library.mask_of(request.expression) for request in requests]
        masked_rows = iter(self._table.assign([mask for mask in masks if mask is not None]))
        rows = [UNMASKED_ROW if mask is None else next(masked_rows) for mask in masks]
        self._used = fill_slots(self.slots, row_per_token(rows, requests, scheduled, computed), self._used)
        settled = np.asarray([0 if request is None else request.settled for request in requests])
        self._before = (list(requests), scheduled, settled) if (first >= settled).all() else None

    def clear(self) -> None:
        """Make every token unmasked, for profiling and graph capture."""
        if self.activations is not None:
            self.activations.clear()
        self._unmask()

    def _unmask(self) -> None:
        self.slots.fill_(UNMASKED_ROW)
        self._used = 0
        self._before = None


def _read(
    requests: Sequence[MaskedTokens | None],
    tokens: Sequence[int],
    computed: Ints,
    ids: Callable[[], Ints],
    before: Callable[[int], Ints],
) -> None:
    """Have all masks that end with a token see those of a batch: see `BatchMasks.fill`."""
    batch: Ints | None = None
    start = 0
    for index, (request, count) in enumerate(zip(requests, tokens, strict=True)):
        if request is not None and request.have_end:
            if request.begins_elsewhere(int(computed[index])):
                request.restart(before(index), int(computed[index]))
            if request.wants(count):
                batch = ids() if batch is None else batch
                request.read(batch[start : start + count])
            else:
                request.skip(count)
        start += count
