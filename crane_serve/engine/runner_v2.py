"""The interface to vLLM's V2 model runner (`v1/worker/gpu/model_runner.py`, vLLM 0.32): its ModelState, and its
PromptLogprobsWorker, which scores prompts.

V2 asks `resolve_model_state_cls` which class holds a model's per-request state, makes one when the weights are loaded,
and calls it for every request and every batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from crane_serve.engine.activations import ActivationRequest, asked_for
from crane_serve.engine.admission import MaskRequest, requested_mask
from crane_serve.engine.batch_masks import BatchMasks
from crane_serve.engine.scoring import Chunk, ScoreRequest, Scoring


class MaskedModelState:
    """Mixed in before a ModelState class: the masks of V2's requests by id."""

    def __init__(self, vllm_config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, model, *args, **kwargs)  # type: ignore[call-arg]
        self._crane_masks = BatchMasks.install(model, vllm_config)
        self._crane_requests: dict[str, MaskRequest | None] = {}
        self._crane_shown: dict[str, tuple[str, ActivationRequest]] = {}
        self._crane_prompts: dict[str, int] = {}  # length in tokens

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Also called for a preempted request when it resumes, as for a new one."""
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        request = requested_mask(new_req_data.sampling_params)
        self._crane_requests[new_req_data.req_id] = request
        shown = asked_for(new_req_data.sampling_params)
        if shown is not None:
            self._crane_shown[new_req_data.req_id] = shown
        # After a preemption what is to be prefilled includes generated tokens; the prompt does not.
        has_prompt = request is not None or shown is not None
        self._crane_prompts[new_req_data.req_id] = len(new_req_data.prompt_token_ids or ()) if has_prompt else 0

    def remove_request(self, req_id: str) -> None:
        """Forget what the request asked for."""
        super().remove_request(req_id)  # type: ignore[misc]
        self._crane_requests.pop(req_id, None)
        self._crane_shown.pop(req_id, None)
        self._crane_prompts.pop(req_id, None)

    def prepare_inputs(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Called for dummy batches too; their ids belong to no request, so they are unmasked."""
        ids = input_batch.req_ids
        tokens = np.diff(input_batch.query_start_loc_np[: len(ids) + 1])
        requests = [self._crane_requests.get(req_id) for req_id in ids]
        prompts = [self._crane_prompts.get(req_id, 0) for req_id in ids]
        shown = [self._crane_shown.get(req_id) for req_id in ids] if self._crane_shown else []
        self._crane_masks.fill(requests, tokens, input_batch.num_computed_tokens_np[: len(ids)], prompts, shown)
        return super().prepare_inputs(input_batch, *args, **kwargs)  # type: ignore[misc]

    def prepare_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Batches that belong to no request are unmasked."""
        self._crane_masks.clear()
        return super().prepare_dummy_inputs(*args, **kwargs)  # type: ignore[misc]


def masked(state: type) -> type:
    """The ModelState class `state` with masks."""
    return type(f"Masked{state.__name__}", (MaskedModelState, state), {})


def init_scoring(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Make a PromptLogprobsWorker that scores prompts, too."""
    original(self, *args, **kwargs)
    self._crane_scoring = Scoring()


def add_scored(original: Callable[..., None], self: Any, req_id: str, req_idx: int, sampling_params: Any) -> None:
    """Begin a request, also one that was preempted."""
    original(self, req_id, req_idx, sampling_params)
    asked = ScoreRequest.of(sampling_params)
    if asked is not None:
        self._crane_scoring.add(req_id, asked)
        self.uses_prompt_logprobs[req_idx] = False


def remove_scored(original: Callable[..., None], self: Any, req_id: str) -> None:
    """Forget a request."""
    original(self, req_id)
    self._crane_scoring.remove(req_id)


def compute_prompt_logprobs(
    original: Callable[..., Any],
    self: Any,
    logits_fn: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    input_batch: Any,
    all_token_ids: Tensor,
    num_computed_tokens: Tensor,
    prompt_lens: Any,
) -> Any:
    """vLLM's prompt log-probabilities of a step, in nats, with those of the scored requests.

    logits_fn: [rows, hidden size] -> [rows, vocabulary]; hidden_states: [tokens, hidden size]; all_token_ids:
    [requests, tokens], num_computed_tokens and prompt_lens: [requests], all three by a request's place.
    """
    from vllm.v1.outputs import LogprobsTensors

    answers = original(self, logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens)

    def tokens_of(place: int, start: int, end: int) -> Tensor:
        return all_token_ids[place, start:end].long()

    chunks = (
        Chunk(
            request_id=request_id,
            row=int(input_batch.query_start_loc_np[index]),
            start=int(input_batch.num_computed_prefill_tokens_np[index]),
            tokens=int(input_batch.num_scheduled_tokens[index]),
            prompt=int(prompt_lens[input_batch.idx_mapping_np[index]]),
            targets=partial(tokens_of, int(input_batch.idx_mapping_np[index])),
        )
        for index, request_id in enumerate(input_batch.req_ids)
        if request_id in self._crane_scoring
    )
    scores = self._crane_scoring.step(logits_fn, hidden_states, chunks)
    return {**answers, **{request_id: LogprobsTensors(*tensors) for request_id, tensors in scores.items()}}
