"""The seam to vLLM's V1 model runner (`v1/worker/gpu_model_runner.py` and its CPU subclass, vLLM 0.32)."""

from typing import Any

import numpy as np
from torch import Tensor

from crane_serve.engine.admission import requested_mask
from crane_serve.engine.config import mask_config, mask_library
from crane_serve.engine.masked_mlp import install_masks
from crane_serve.engine.routing import fill_slots, row_per_token
from crane_serve.engine.table import UNMASKED_ROW, MaskTable
from crane_serve.masks import MaskLibrary


class MaskedRunner:
    """Gives one V1 model runner its masks: patches the model after loading and fills the slots of every batch.

    Only this runner instance is changed. Its methods are called by vLLM in the order `load_model`, `_dummy_run`
    (profiling), and then per step `_prepare_inputs`.
    """

    def __init__(self, runner: Any) -> None:
        config = mask_config(runner.vllm_config)
        library = mask_library(runner.vllm_config)
        if config is None or library is None:
            raise ValueError("the engine was configured without masks")
        self._runner = runner
        self._config = config
        self._library: MaskLibrary = library
        self._table: MaskTable | None = None
        self._slots: Tensor | None = None  # [maximum tokens]
        self._load_model, runner.load_model = runner.load_model, self.load_model
        self._prepare_inputs, runner._prepare_inputs = runner._prepare_inputs, self.prepare_inputs
        self._dummy_run, runner._dummy_run = runner._dummy_run, self.dummy_run

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        self._load_model(*args, **kwargs)
        sizes = self._library.fingerprint.intermediate_sizes
        compilation = self._runner.vllm_config.compilation_config
        max_tokens = max(self._runner.max_num_tokens, *(compilation.cudagraph_capture_sizes or [0]), 3)
        self._table, self._slots = install_masks(
            self._runner.model, sizes, self._config.rows, max_tokens, outputs=self._config.outputs
        )

    def prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray[Any, Any], *args: Any) -> Any:
        prepared = self._prepare_inputs(scheduler_output, num_scheduled_tokens, *args)
        # Only now is the order of the batch final: _update_states and _prepare_inputs may change it.
        assert self._table is not None
        assert self._slots is not None
        masks = []
        for request_id in self._runner.input_batch.req_ids:
            # Raising here stops the engine. Admission has resolved this digest already, so it cannot happen; if it
            # does, stopping is right, since the request must not run unmasked.
            resolved = self._library.resolve(requested_mask(self._runner.requests[request_id].sampling_params))
            masks.append(None if resolved is None else resolved.mask)
        masked_rows = iter(self._table.assign([mask for mask in masks if mask is not None]))
        rows = [UNMASKED_ROW if mask is None else next(masked_rows) for mask in masks]
        fill_slots(self._slots, row_per_token(rows, num_scheduled_tokens))
        if self._slots.device.type == "cpu":
            _spare_seeds(self._runner)
        return prepared

    def dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        if self._slots is not None:
            self._slots.fill_(UNMASKED_ROW)
        return self._dummy_run(*args, **kwargs)


def _spare_seeds(runner: Any) -> None:
    """Keep the seeds of requests in mid-prefill away from the sampler.

    vLLM 0.32 samples for them too, discards the token, and rewinds their generators; CPU generators cannot be rewound,
    and the engine dies. A seed that is not used needs no rewinding; the request keeps its generator for later steps.
    """
    batch = runner.input_batch
    discarded = runner.discard_request_mask.np
    for index, request_id in enumerate(batch.req_ids):
        generator = runner.requests[request_id].generator
        if generator is not None:
            if discarded[index]:
                batch.generators.pop(index, None)
            else:
                batch.generators[index] = generator
