"""The interface to vLLM's V2 model runner (`v1/worker/gpu/model_runner.py`, vLLM 0.32): its ModelState.

V2 asks `resolve_model_state_cls` which class holds a model's per-request state, makes one when the weights are loaded,
and calls it for every request and every batch.
"""

from typing import Any

import numpy as np

from crane_serve.engine.admission import MaskRequest, requested_mask
from crane_serve.engine.batch_masks import BatchMasks


class MaskedModelState:
    """Mixed in before a ModelState class: the masks of V2's requests by id."""

    def __init__(self, vllm_config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, model, *args, **kwargs)  # type: ignore[call-arg]
        self._crane_masks = BatchMasks.install(model, vllm_config)
        self._crane_requests: dict[str, MaskRequest | None] = {}
        self._crane_prompts: dict[str, int] = {}  # length in tokens

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Also called for a preempted request when it resumes, as for a new one."""
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        request = requested_mask(new_req_data.sampling_params)
        self._crane_requests[new_req_data.req_id] = request
        # After a preemption what is to be prefilled includes generated tokens; the prompt does not.
        self._crane_prompts[new_req_data.req_id] = len(new_req_data.prompt_token_ids or ()) if request else 0

    def remove_request(self, req_id: str) -> None:
        """Forget what the request asked for."""
        super().remove_request(req_id)  # type: ignore[misc]
        self._crane_requests.pop(req_id, None)
        self._crane_prompts.pop(req_id, None)

    def prepare_inputs(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Called for dummy batches too; their ids belong to no request, so they are unmasked."""
        ids = input_batch.req_ids
        tokens = np.diff(input_batch.query_start_loc_np[: len(ids) + 1])
        requests = [self._crane_requests.get(req_id) for req_id in ids]
        prompts = [self._crane_prompts.get(req_id, 0) for req_id in ids]
        self._crane_masks.fill(requests, tokens, input_batch.num_computed_tokens_np[: len(ids)], prompts)
        return super().prepare_inputs(input_batch, *args, **kwargs)  # type: ignore[misc]

    def prepare_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Batches that belong to no request are unmasked."""
        self._crane_masks.clear()
        return super().prepare_dummy_inputs(*args, **kwargs)  # type: ignore[misc]


def masked(state: type) -> type:
    """The ModelState class `state` with masks."""
    return type(f"Masked{state.__name__}", (MaskedModelState, state), {})
