"""Entry point of the vLLM general plugin: what is wrapped, and where. vLLM calls `register` in every process.

What is wrapped, each once per process:
- EngineArgs.create_engine_config: decides whether this engine serves masks, and refuses what cannot be exact;
- InputProcessor.process_inputs (front end): admission, so that a bad mask is the caller's error;
- to_beam_search_params of vLLM's own HTTP requests (front end): beam search would drop the mask, so it is refused;
- EngineCore.preprocess_add_request (engine core): admission again, and the prefix-cache salt;
- WorkerWrapperBase.init_device (worker): gives the model runner its masks, through MaskedRunner (V1)
  or MaskedModelState (V2).
"""

import functools
import os
from collections.abc import Callable
from typing import Any

from crane_serve.engine.admission import MASK_ARGUMENT, admit
from crane_serve.engine.config import MASKS_VARIABLE, add_mask_config, mask_config, masks_disabled
from crane_serve.engine.prefix_cache import salted
from crane_serve.engine.support import UnsupportedEngine, check_engine, check_version
from crane_serve.masks import MaskError

_MARK = "_crane_wrapped"


def register() -> None:
    """Install the plugin. Raises UnsupportedEngine on an untested vLLM version if masks are asked for."""
    import vllm
    from vllm.logger import init_logger

    try:
        check_version(vllm.__version__)
    except UnsupportedEngine as error:
        if os.environ.get(MASKS_VARIABLE) and not masks_disabled():
            raise
        init_logger("vllm.crane").warning("crane plugin not installed: %s", error)
        return

    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    _wrap(InputProcessor, "__init__", _init_front_end)
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(EngineCore, "preprocess_add_request", _preprocess_add_request)
    _wrap(WorkerWrapperBase, "init_device", _init_device)


def _wrap(owner: type, method: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, method)
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, method, wrapped)


def _create_engine_config(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    vllm_config = original(self, *args, **kwargs)
    add_mask_config(vllm_config)
    if mask_config(vllm_config) is not None:
        check_engine(vllm_config)
    return vllm_config


def _init_front_end(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for request in (ChatCompletionRequest, CompletionRequest):
        _wrap(request, "to_beam_search_params", _to_beam_search_params)


def _to_beam_search_params(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    if MASK_ARGUMENT in (self.vllm_xargs or {}):
        raise VLLMValidationError(f"{MASK_ARGUMENT}: beam search cannot be masked", parameter=MASK_ARGUMENT)
    return original(self, *args, **kwargs)


def _process_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(self, *args, **kwargs)  # an EngineCoreRequest with its own copy of the sampling parameters
    from vllm.exceptions import VLLMValidationError

    try:
        admit(self.vllm_config, request.sampling_params, resumable=request.resumable)
        salted(None, request.cache_salt)
    except MaskError as error:
        raise VLLMValidationError(str(error), parameter=MASK_ARGUMENT) from error
    return request


def _preprocess_add_request(original: Callable[..., Any], self: Any, request: Any) -> Any:
    # An error here is sent to the client as a failed request (EngineCoreProc) or raised to the caller (in-process).
    resolved = admit(self.vllm_config, request.sampling_params, resumable=request.resumable)
    request.cache_salt = salted(None if resolved is None else resolved.mask.digest, request.cache_salt)
    return original(self, request)


def _init_device(original: Callable[..., Any], self: Any) -> Any:
    result = original(self)
    if mask_config(self.vllm_config) is not None:
        if self.vllm_config.use_v2_model_runner:
            _mask_model_states()
        else:
            from crane_serve.engine.runner_v1 import MaskedRunner

            MaskedRunner(self.worker.model_runner)
    return result


def _mask_model_states() -> None:
    """Have V2 make masked states for engines with masks; its model is loaded after this."""
    from vllm.v1.worker.gpu import model_states

    from crane_serve.engine.runner_v2 import masked

    original = model_states.resolve_model_state_cls
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def resolve(vllm_config: Any, model: Any) -> type:
        state: type = original(vllm_config, model)
        return state if mask_config(vllm_config) is None else masked(state)

    setattr(resolve, _MARK, True)
    model_states.resolve_model_state_cls = resolve
