"""The interface to vLLM's V1 model runner (`v1/worker/gpu_model_runner.py` and its CPU subclass, vLLM 0.32)."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crane_serve.engine.activations import ActivationRequest, asked_for
from crane_serve.engine.admission import requested_mask
from crane_serve.engine.batch_masks import BatchMasks
from crane_serve.engine.fresh_blocks import zero_blocks
from crane_serve.engine.routing import MaskedTokens
from crane_serve.engine.scoring import Chunk, ScoreRequest, Scoring


class MaskedRunner:
    """Gives one V1 model runner its masks: patches the model after loading and fills the slots of every batch.

    Only this runner instance is changed. Its methods are called by vLLM in the order `load_model`, `_dummy_run`
    (profiling), and then per step `_prepare_inputs` and `_get_prompt_logprobs_dict`.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._masks: BatchMasks | None = None
        self._scoring = Scoring()
        self._load_model, runner.load_model = runner.load_model, self.load_model
        self._prepare_inputs, runner._prepare_inputs = runner._prepare_inputs, self.prepare_inputs
        self._dummy_run, runner._dummy_run = runner._dummy_run, self.dummy_run
        self._prompt_logprobs = runner._get_prompt_logprobs_dict
        runner._get_prompt_logprobs_dict = self.prompt_logprobs
        if runner.device.type == "cpu":
            runner._zero_block_ids = partial(zero_blocks, runner)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, and patch it."""
        self._load_model(*args, **kwargs)
        self._masks = BatchMasks.install(self._runner.get_model(), self._runner.vllm_config)
        self._runner._crane_masks = self._masks

    def prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray[Any, Any], *args: Any) -> Any:
        """Prepare a step, and fill the slots. num_scheduled_tokens: [requests], in the order before the step."""
        prepared = self._prepare_inputs(scheduler_output, num_scheduled_tokens, *args)
        # Only now is the order of the batch final: _update_states and _prepare_inputs may change it.
        assert self._masks is not None
        runner, batch = self._runner, self._runner.input_batch
        prompts, computed = batch.num_prompt_tokens, batch.num_computed_tokens_cpu
        masked = [
            _masked_tokens(runner.requests[request_id], int(prompts[index]))
            for index, request_id in enumerate(batch.req_ids)
        ]
        self._masks.fill(
            masked,
            num_scheduled_tokens,
            computed[: len(masked)],
            # Sampled ids are on the device: with async scheduling the host has not seen those of the last step.
            ids=lambda: runner.input_ids.gpu[: int(num_scheduled_tokens.sum())].cpu().numpy(),
            before=lambda index: batch.token_ids_cpu[index, : computed[index]],
        )
        if self._masks.activations is not None:
            shown = [_activation_request(runner.requests[request_id]) for request_id in batch.req_ids]
            count = len(shown)
            self._masks.activations.fill(shown, num_scheduled_tokens, computed[:count], prompts[:count])
        if self._masks.slots.device.type == "cpu":
            _spare_seeds(self._runner)
        return prepared

    def dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        """Run a batch that belongs to no request, unmasked."""
        if self._masks is not None:
            self._masks.clear()
        return self._dummy_run(*args, **kwargs)

    def prompt_logprobs(self, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        """vLLM's prompt log-probabilities of a step, in nats, with those of the scored requests.

        hidden_states: [tokens, hidden size].
        """
        from vllm.v1.outputs import LogprobsTensors

        runner, scoring = self._runner, self._scoring
        for request_id in list(runner.num_prompt_logprobs):
            asked = ScoreRequest.of(runner.requests[request_id].sampling_params)
            if asked is not None:
                scoring.add(request_id, asked)
                del runner.num_prompt_logprobs[request_id]
        answers = self._prompt_logprobs(hidden_states, num_scheduled_tokens)
        scoring.keep(runner.requests.keys())
        chunks = (
            self._chunk(request_id, tokens)
            for request_id, tokens in num_scheduled_tokens.items()
            if request_id in scoring
        )
        scores = scoring.step(runner.model.compute_logits, hidden_states, chunks)
        on_host = {key: LogprobsTensors(*(each.cpu() for each in tensors)) for key, tensors in scores.items()}
        return {**answers, **on_host}

    def _chunk(self, request_id: str, tokens: int) -> Chunk:
        runner, request = self._runner, self._runner.requests[request_id]
        prompt: list[int] = request.prompt_token_ids
        row = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])

        def targets(start: int, end: int) -> Tensor:
            return torch.tensor(prompt[start:end], device=runner.device)

        return Chunk(request_id, row, request.num_computed_tokens, tokens, len(prompt), targets)


def _masked_tokens(state: Any, prompt_tokens: int) -> MaskedTokens | None:
    """Which tokens of a request are masked, kept in vLLM's state of the request, since every step needs it."""
    try:
        return state.crane_masked_tokens  # type: ignore[no-any-return]
    except AttributeError:
        request = requested_mask(state.sampling_params)
        state.crane_masked_tokens = None if request is None else MaskedTokens(request, prompt_tokens)
        return state.crane_masked_tokens  # type: ignore[no-any-return]


def _activation_request(state: Any) -> tuple[str, ActivationRequest] | None:
    """As `_masked_tokens`, for the activations that a request asks for."""
    try:
        return state.crane_activation_request  # type: ignore[no-any-return]
    except AttributeError:
        state.crane_activation_request = asked_for(state.sampling_params)
        return state.crane_activation_request  # type: ignore[no-any-return]


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
