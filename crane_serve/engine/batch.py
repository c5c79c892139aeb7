"""BatchMasks: a patched model and the masks of the batch it is about to run; what both model runners share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from crane_serve.engine.config import mask_config, mask_library
from crane_serve.engine.masked_mlp import install_masks
from crane_serve.engine.routing import fill_slots, row_per_token
from crane_serve.engine.table import UNMASKED_ROW, MaskTable
from crane_serve.masks import MaskLibrary


class BatchMasks:
    """The masks of one worker. Made by `install` when the model is loaded, then `fill` before every batch."""

    def __init__(self, library: MaskLibrary, table: MaskTable, slots: Tensor) -> None:
        self._library = library
        self._table = table
        self.slots = slots  # [maximum tokens], the table row of each token

    @classmethod
    def install(cls, model: nn.Module, vllm_config: Any) -> "BatchMasks":
        """Patch a loaded model. Raises UnsupportedModel naming what cannot be masked."""
        config, library = mask_config(vllm_config), mask_library(vllm_config)
        if config is None or library is None:
            raise ValueError("the engine was configured without masks")
        # Batches are padded up to the largest captured graph, which may exceed the scheduler's limit.
        captured = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
        max_tokens = max(vllm_config.scheduler_config.max_num_batched_tokens, *captured, 3)
        sizes = library.fingerprint.intermediate_sizes
        table, slots = install_masks(model, sizes, config.rows, max_tokens, outputs=config.outputs)
        return cls(library, table, slots)

    def fill(self, expressions: Sequence[str | None], tokens: Sequence[int] | NDArray[np.integer]) -> None:
        """Give each token of the batch the row of its request's mask; padding behind the batch becomes unmasked.

        expressions: [requests], the mask of each request in the order of the batch; tokens: [requests].
        Raises MaskError for an expression that does not resolve. That stops the engine, rightly: admission has resolved
        it already, so it cannot happen, and if it did the request must not run unmasked.
        """
        masks = [None if resolved is None else resolved.mask for resolved in map(self._library.resolve, expressions)]
        masked_rows = iter(self._table.assign([mask for mask in masks if mask is not None]))
        rows = [UNMASKED_ROW if mask is None else next(masked_rows) for mask in masks]
        fill_slots(self.slots, row_per_token(rows, tokens))

    def clear(self) -> None:
        """Make every token unmasked, for profiling and graph capture."""
        self.slots.fill_(UNMASKED_ROW)
