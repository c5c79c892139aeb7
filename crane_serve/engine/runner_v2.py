"""The interface to vLLM's V2 model runner (`v1/worker/gpu/model_runner.py`, vLLM 0.32): its ModelState, and its
PromptLogprobsWorker, which scores prompts.

V2 asks `resolve_model_state_cls` which class holds a model's per-request state, makes one when the weights are loaded,
and calls it for every request and every batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from crane_serve.engine.activations import ActivationRequest, asked_for
from crane_serve.engine.admission import requested_mask
from crane_serve.engine.batch_masks import BatchMasks
from crane_serve.engine.routing import MaskedTokens
from crane_serve.engine.scoring import Chunk, ScoreRequest, Scoring


class _Request(NamedTuple):
    """masked: None for a request without a mask; prefill: the ids with which it began, if a token may end its mask;
    shown: the activations that it asks for; prompt: its length in tokens."""

    masked: MaskedTokens | None = None
    prefill: Sequence[int] = ()
    shown: tuple[str, ActivationRequest] | None = None
    prompt: int = 0

    @classmethod
    def of(cls, new_req_data: Any) -> "_Request":
        """Of a request that begins, or begins again after a preemption: then its prefill has generated tokens, too."""
        asked, shown = requested_mask(new_req_data.sampling_params), asked_for(new_req_data.sampling_params)
        if asked is None and shown is None:
            return _NONE
        ids = new_req_data.prompt_token_ids
        prompt = len(new_req_data.prompt_embeds if ids is None else ids)
        masked = None if asked is None else MaskedTokens(asked, prompt)
        ends = masked is not None and masked.have_end
        return cls(masked, new_req_data.prefill_token_ids if ends else (), shown, prompt)


_NONE = _Request()


class MaskedModelState:
    """Mixed in before a ModelState class: the masks of V2's requests by id."""

    def __init__(self, vllm_config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, model, *args, **kwargs)  # type: ignore[call-arg]
        self._crane_masks = BatchMasks.install(model, vllm_config)
        self._crane_requests: dict[str, _Request] = {}

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Also called for a preempted request when it resumes, as for a new one."""
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        self._crane_requests[new_req_data.req_id] = _Request.of(new_req_data)

    def remove_request(self, req_id: str) -> None:
        """Forget what the request asked for."""
        super().remove_request(req_id)  # type: ignore[misc]
        self._crane_requests.pop(req_id, None)

    def prepare_inputs(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Called for dummy batches too; their ids belong to no request, so they are unmasked."""
        ids, starts = input_batch.req_ids, input_batch.query_start_loc_np
        tokens, computed = np.diff(starts[: len(ids) + 1]), input_batch.num_computed_tokens_np[: len(ids)]
        requests = [self._crane_requests.get(req_id, _NONE) for req_id in ids]
        self._crane_masks.fill(
            [request.masked for request in requests],
            tokens,
            computed,
            # Sampled ids are on the device: with async scheduling the host has not seen those of the last step.
            ids=lambda: input_batch.input_ids[: int(tokens.sum())].cpu().numpy(),
            before=lambda index: requests[index].prefill[: computed[index]],
        )
        if self._crane_masks.activations is not None:
            shown = [request.shown for request in requests]
            prompts = [request.prompt for request in requests]
            self._crane_masks.activations.fill(shown, tokens, computed, prompts)
        return super().prepare_inputs(input_batch, *args, **kwargs)  # type: ignore[misc]

    def prepare_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Batches that belong to no request are unmasked."""
        self._crane_masks.clear()
        return super().prepare_dummy_inputs(*args, **kwargs)  # type: ignore[misc]


def masked(state: type) -> type:
    """The ModelState class `state` with masks."""
    return type(f"Masked{state.__name__}", (MaskedModelState, state), {})


def _scoring_of(worker: Any) -> Scoring:
    """Of a PromptLogprobsWorker, which may be of an engine that was started before there were masks."""
    found: Scoring = worker.__dict__.setdefault("_crane_scoring", Scoring())
    return found


def add_scored(original: Callable[..., None], self: Any, req_id: str, req_idx: int, sampling_params: Any) -> None:
    """Begin a request, also one that was preempted."""
    original(self, req_id, req_idx, sampling_params)
    asked = ScoreRequest.of(sampling_params)
    if asked is not None:
        _scoring_of(self).add(req_id, asked)
        self.uses_prompt_logprobs[req_idx] = False


def remove_scored(original: Callable[..., None], self: Any, req_id: str) -> None:
    """Forget a request."""
    original(self, req_id)
    _scoring_of(self).remove(req_id)


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

    scoring = _scoring_of(self)
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
        # One that was preempted behind its prompt begins again with what it generated; its scores have been given.
        if request_id in scoring and input_batch.prefill_len_np[index] <= prompt_lens[input_batch.idx_mapping_np[index]]
    )
    scores = scoring.step(logits_fn, hidden_states, chunks)
    return {**answers, **{request_id: LogprobsTensors(*tensors) for request_id, tensors in scores.items()}}
