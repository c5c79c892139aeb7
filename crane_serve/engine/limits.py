"""The error for a prompt that leaves no room for a generated token. vLLM's own message names max_tokens, or a flag of
the operator."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

from crane_serve.engine.wrapping import wrap

_LIMIT = "get_max_tokens"


def explain_limits() -> None:
    """Have vLLM's front end say how long a prompt is if it is too long. For this process; calling it again has no
    effect.

    Call it after vLLM's routes have been imported: each of their modules has imported the replaced function by name.
    """
    from vllm.entrypoints.serve.utils import api_utils
    from vllm.v1.engine.input_processor import InputProcessor

    original = getattr(api_utils, _LIMIT)
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and getattr(module, _LIMIT, None) is original:
            wrap(module, _LIMIT, _max_tokens)
    wrap(InputProcessor, "_validate_prompt_len", _check_length)


def no_room(prompt_tokens: int, context_tokens: int) -> str:
    """Why nothing can follow a prompt of so many tokens, and what to do."""
    return (
        f"the prompt has {prompt_tokens} tokens, and the model's context is {context_tokens} for prompt and completion "
        f"together; shorten the prompt to at most {context_tokens - 1} tokens"
    )


def _max_tokens(original: Callable[..., int], *args: Any, **kwargs: Any) -> int:
    from vllm.exceptions import VLLMValidationError

    arguments = inspect.signature(original).bind(*args, **kwargs).arguments
    length, limit = arguments["input_length"], arguments["max_model_len"]
    if arguments.get("truncate_prompt_tokens") is None and length >= limit and arguments["max_tokens"] != 0:
        raise VLLMValidationError(no_room(length, limit))
    return original(*args, **kwargs)


def _check_length(original: Callable[..., None], self: Any, prompt_len: int, prompt_type: str) -> None:
    from vllm.exceptions import VLLMValidationError

    limit = self.model_config.max_model_len
    is_longer = prompt_len >= limit if self.model_config.runner_type == "generate" else prompt_len > limit
    if prompt_type == "decoder" and is_longer:
        raise VLLMValidationError(no_room(prompt_len, limit))
    original(self, prompt_len, prompt_type)
