"""Entry point of the vLLM general plugin: what is wrapped, and where. vLLM calls `register` in every process.

What is wrapped, each once per process:
- EngineArgs.create_engine_config: decides whether this engine serves masks, and refuses what cannot be exact;
- InputProcessor.process_inputs (front end): admission, so that a bad mask is the caller's error, and so is a token
  beyond the model's vocabulary;
- BaseRenderer.validate_token_ids (front end): says which token is beyond which vocabulary;
- to_beam_search_params of vLLM's own HTTP requests (front end): beam search would drop the mask, so it is refused;
- places where vLLM's own server and offline classes would drop a mask: see `vllm_routes`;
- EngineCore.preprocess_add_request (engine core): admission again, and the prefix-cache salt;
- generate_block_hash_extra_keys (engine core): the salts of blocks, if only some tokens are masked, in hashes and in KV
  events;
- get_kv_cache_configs (engine core): has KV blocks zeroed before a request gets them: see `fresh_blocks`;
- KVCacheManager.get_computed_blocks (engine core): how far a scored request may read from the prefix cache;
- EngineCore.add_request (engine core): refuses a mask without a free row, and forgets content that no request needs;
- WorkerWrapperBase.init_device (worker): gives the model runner its masks, through MaskedRunner (V1)
  or MaskedModelState (V2), and has it score prompts: see `scoring`;
- CPUUnquantizedExperts.process_weights_after_loading (worker, on a CPU): keeps the weights of experts: see
  `masked_experts`.
Added to EngineCore and WorkerWrapperBase: the methods of `live_masks` and `activations`.
"""

import copyreg
from collections.abc import Callable
from typing import Any

from crane_serve.common.masks import MaskError, MaskTableFull, ResolvedMask
from crane_serve.engine import activations, live_masks, vllm_routes
from crane_serve.engine.activations import ActivationsError, admit_activations
from crane_serve.engine.admission import (
    ACTIVATIONS_ARGUMENT,
    MASK_ARGUMENT,
    admit,
    looks_like_ours,
    requested_mask,
    require_row,
)
from crane_serve.engine.config import (
    MaskConfig,
    add_mask_config,
    mask_config,
    masks_wanted,
)
from crane_serve.engine.masked_experts import keep_weights
from crane_serve.engine.prefix_cache import WindowSalts, check_salt, generated_salt, salted, with_second_salt
from crane_serve.engine.scoring import check_score, get_computed_blocks
from crane_serve.engine.support import UnsupportedEngine, caution, check_engine, check_version
from crane_serve.engine.versions import fail_request
from crane_serve.engine.vocabulary import drop_impossible, require_embeddings, validate_token_ids
from crane_serve.engine.wrapping import wrap

_LEASE = "_crane_mask"


def _arrive(*fields: Any) -> MaskConfig:
    """A MaskConfig in the process that receives it, which must have the plugin. Raises as `install` does."""
    install()
    return MaskConfig(*fields)


copyreg.pickle(MaskConfig, lambda config: (_arrive, config.fields))


def register() -> None:
    """Install the plugin. Raises UnsupportedEngine on an untested vLLM version if masks are asked for."""
    import vllm
    from vllm.logger import init_logger

    try:
        check_version(vllm.__version__)
    except UnsupportedEngine as error:
        if masks_wanted():
            raise
        init_logger("vllm.crane").warning("crane plugin not installed: %s", error)
        _refuse_masks()
        return
    install()


def install() -> None:
    """Wrap what masks need in this process. Calling it again has no effect.

    Raises UnsupportedEngine on an untested vLLM version.
    """
    import vllm

    check_version(vllm.__version__)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.engine import core
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from crane_serve.engine.fresh_blocks import get_kv_cache_configs

    wrap(EngineArgs, "create_engine_config", _create_engine_config)
    wrap(InputProcessor, "__init__", _init_front_end)
    wrap(InputProcessor, "process_inputs", _process_inputs)
    wrap(BaseRenderer, "validate_token_ids", validate_token_ids)
    wrap(EngineCore, "preprocess_add_request", _preprocess_add_request)
    wrap(EngineCore, "add_request", _add_request)
    for module in (kv_cache_utils, block_pool):  # the second imports it by name, for KV events
        wrap(module, "generate_block_hash_extra_keys", _block_keys)
    wrap(core, "get_kv_cache_configs", get_kv_cache_configs)
    wrap(KVCacheManager, "get_computed_blocks", get_computed_blocks)
    wrap(WorkerWrapperBase, "init_device", _init_device)
    setattr(EngineCore, live_masks.CHANGE_METHOD, live_masks.change_in_core)
    setattr(EngineCore, live_masks.FORGET_METHOD, live_masks.forget_in_core)
    setattr(WorkerWrapperBase, live_masks.CHANGE_METHOD, live_masks.change_in_worker)
    setattr(WorkerWrapperBase, live_masks.FORGET_METHOD, live_masks.forget_in_worker)
    setattr(EngineCore, activations.TAKE_METHOD, activations.take_in_core)
    setattr(WorkerWrapperBase, activations.TAKE_METHOD, activations.take_in_worker)
    vllm_routes.install()


def _refuse_masks() -> None:
    """For a vLLM in which the plugin is not installed: refuse requests for masks, if the functions that requests pass
    through still exist."""
    try:
        from vllm.v1.engine.input_processor import InputProcessor

        wrap(InputProcessor, "process_inputs", _refuse_masked_inputs)
    except (ImportError, AttributeError):
        return


def _refuse_masked_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(self, *args, **kwargs)
    if requested_mask(getattr(request, "sampling_params", None)) is not None:
        raise ValueError(f"{MASK_ARGUMENT}: the crane plugin is not installed in this untested vLLM version")
    return request


def _create_engine_config(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if masks_wanted():
        # Masks are of the language model alone: what reads images is not loaded, and a request with one is refused.
        self.language_model_only = True
    vllm_config = original(self, *args, **kwargs)
    add_mask_config(vllm_config)
    if mask_config(vllm_config) is not None:
        check_engine(vllm_config)
        _warn_of_version()
    return vllm_config


def _warn_of_version() -> None:
    import vllm
    from vllm.logger import init_logger

    warning = caution(vllm.__version__)
    if warning is not None:
        init_logger("vllm.crane").warning("%s", warning)


def _init_front_end(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    vllm_routes.install()  # again, for modules that were imported since the plugin was loaded
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for request in (ChatCompletionRequest, CompletionRequest):
        wrap(request, "to_beam_search_params", _to_beam_search_params)


def _to_beam_search_params(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    if any(map(looks_like_ours, self.vllm_xargs or ())):
        raise VLLMValidationError(f"{MASK_ARGUMENT}: beam search cannot be masked", parameter=MASK_ARGUMENT)
    return original(self, *args, **kwargs)


def _process_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(self, *args, **kwargs)  # an EngineCoreRequest with its own copy of the sampling parameters
    from vllm.exceptions import VLLMValidationError

    require_embeddings(self.vllm_config, request, self.tokenizer)
    check_score(self.vllm_config, request, self.tokenizer)
    drop_impossible(self.vllm_config, request.sampling_params)
    try:
        _admit(self.vllm_config, request)
        check_salt(request.cache_salt)
        if any(map(looks_like_ours, getattr(request.pooling_params, "extra_kwargs", None) or ())):
            raise MaskError(f"{MASK_ARGUMENT}: pooling requests cannot be masked")
        admit_activations(self.vllm_config, request)
    except MaskError as error:
        raise VLLMValidationError(str(error), parameter=MASK_ARGUMENT) from error
    except ActivationsError as error:
        raise VLLMValidationError(str(error), parameter=ACTIVATIONS_ARGUMENT) from error
    return request


def _admit(vllm_config: Any, request: Any) -> ResolvedMask | None:
    embeds = request.prompt_embeds is not None
    return admit(vllm_config, request.sampling_params, resumable=request.resumable, embeds=embeds)


def _preprocess_add_request(original: Callable[..., Any], self: Any, request: Any) -> Any:
    # An error here is sent to the client as a failed request (EngineCoreProc) or raised to the caller (in-process).
    from vllm.exceptions import VLLMValidationError

    require_embeddings(self.vllm_config, request)
    check_score(self.vllm_config, request)
    try:
        resolved = _admit(self.vllm_config, request)
        request.cache_salt = salted(resolved, request.cache_salt)
        admit_activations(self.vllm_config, request)
    except MaskError as error:  # from 0.33 on the client is told the text of this kind of error
        raise VLLMValidationError(str(error), parameter=MASK_ARGUMENT) from error
    except ActivationsError as error:
        raise VLLMValidationError(str(error), parameter=ACTIVATIONS_ARGUMENT) from error
    admitted = original(self, request)
    # As long as vLLM keeps the request, its mask is in use.
    setattr(admitted[0], _LEASE, resolved)
    return admitted


def _add_request(original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    live_masks.forget_pending(self)
    mask: ResolvedMask | None = getattr(request, _LEASE, None)
    if mask is not None:
        leases = (getattr(other, _LEASE, None) for other in self.scheduler.requests.values())
        try:
            require_row(self.vllm_config, mask, {lease.mask.digest for lease in leases if lease is not None})
        except MaskTableFull as error:
            # The engine core may raise here only if it runs in the caller's process.
            if not hasattr(self, "_send_finish_outputs_to_client"):
                raise
            fail_request(self, request, "mask_table_full", str(error))
            return None
    return original(self, request, *args, **kwargs)


def _block_keys(
    original: Callable[..., Any], request: Any, start_token_idx: int, end_token_idx: int, *args: Any, **kwargs: Any
) -> Any:
    keys, *rest = original(request, start_token_idx, end_token_idx, *args, **kwargs)
    # The prompt's blocks are hashed while the request is being made, before it has its lease.
    windows = _window_salts(request)
    if windows is None:
        salt = generated_salt(getattr(request, _LEASE, None), request.num_prompt_tokens, end_token_idx)
    else:
        salt = windows.salt(start_token_idx, end_token_idx)
    return with_second_salt(keys, salt), *rest


def _window_salts(request: Any) -> WindowSalts | None:
    """Of vLLM's request, from arguments that `admit` has written; kept there, since every block needs them."""
    try:
        return request.crane_window_salts  # type: ignore[no-any-return]
    except AttributeError:
        request.crane_window_salts = WindowSalts.of(requested_mask(request.sampling_params), request.num_prompt_tokens)
        return request.crane_window_salts  # type: ignore[no-any-return]


def _init_device(original: Callable[..., Any], self: Any) -> Any:
    result = original(self)
    if mask_config(self.vllm_config) is not None:
        _keep_experts()
        self.worker.reload_weights = _refuse_weights
        if self.vllm_config.use_v2_model_runner:
            _prepare_v2()
        else:
            from crane_serve.engine.runner_v1 import MaskedRunner

            MaskedRunner(self.worker.model_runner)
    return result


def _refuse_weights(*args: Any, **kwargs: Any) -> None:
    raise UnsupportedEngine("the weights of an engine with masks cannot be loaded again; start another engine")


def _keep_experts() -> None:
    """Have experts on a CPU keep the weights that masks need; they are loaded after this."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

        wrap(CPUUnquantizedExperts, "process_weights_after_loading", keep_weights)


def _prepare_v2() -> None:
    """Have V2 make masked states for engines with masks, and score their prompts; its model is loaded after this."""
    from vllm.v1.worker.gpu import model_states
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    from crane_serve.engine.runner_v2 import (
        add_scored,
        compute_prompt_logprobs,
        masked,
        remove_scored,
    )

    def resolve(original: Callable[..., type], vllm_config: Any, model: Any) -> type:
        state = original(vllm_config, model)
        return state if mask_config(vllm_config) is None else masked(state)

    wrap(model_states, "resolve_model_state_cls", resolve)
    wrap(PromptLogprobsWorker, "add_request", add_scored)
    wrap(PromptLogprobsWorker, "remove_request", remove_scored)
    wrap(PromptLogprobsWorker, "compute_prompt_logprobs", compute_prompt_logprobs)
