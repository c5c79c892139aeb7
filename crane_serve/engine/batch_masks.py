"""BatchMasks: a patched model and the masks of its next batch. Both model runners use it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from crane_serve.common.masks import MaskLibrary, Positions
from crane_serve.engine.activations import ActivationRequest, BatchActivations, CaptureBuffers
from crane_serve.engine.admission import MaskRequest
from crane_serve.engine.config import mask_config
from crane_serve.engine.masked_mlp import install_masks
from crane_serve.engine.routing import Ints, fill_slots, row_per_token
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
        self._before: tuple[list[MaskRequest | None], list[int]] | None = None

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
        buffers = CaptureBuffers() if config.activations else None
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
        requests: Sequence[MaskRequest | None],
        tokens: Ints,
        computed: Ints,
        prompts: Ints,
        shown: Sequence[tuple[str, ActivationRequest] | None] = (),
    ) -> None:
        """Give each token of the batch the row of its request's mask; padding behind the batch becomes unmasked.

        All arguments are [requests] in the order of the batch: the mask each asks for, the tokens scheduled, the tokens
        computed before, and the length of the prompt; shown: the activations that each asks for, empty if none does,
        see `BatchActivations.fill`. Raises MaskError for a mask that does not resolve. Admission has
        resolved it before, so this should never happen; if it does, the engine stops, because the request must not run
        unmasked.
        """
        if self.activations is not None:
            self.activations.fill(shown, tokens, computed, prompts)
        if not any(requests):
            if self._used:
                self._unmask()
            return
        scheduled = np.asarray(tokens).tolist()
        if self._before == (requests, scheduled):  # the same requests decode on
            return
        masks = [None if request is None else self._library.mask_of(request.expression) for request in requests]
        masked_rows = iter(self._table.assign([mask for mask in masks if mask is not None]))
        rows = [UNMASKED_ROW if mask is None else next(masked_rows) for mask in masks]
        positions = [Positions.ALL if request is None else request.positions for request in requests]
        self._used = fill_slots(self.slots, row_per_token(rows, positions, scheduled, computed, prompts), self._used)
        settled = all(where is Positions.ALL for where in positions)
        self._before = (list(requests), scheduled) if settled else None

    def clear(self) -> None:
        """Make every token unmasked, for profiling and graph capture."""
        if self.activations is not None:
            self.activations.clear()
        self._unmask()

    def _unmask(self) -> None:
        self.slots.fill_(UNMASKED_ROW)
        self._used = 0
        self._before = None
