"""Admission: the one rule that says which mask a request gets, applied in the front end and in the engine core."""

from typing import Any

from crane_serve.engine.config import DISABLE_VARIABLE, MASKS_VARIABLE, mask_library, masks_disabled
from crane_serve.masks import MaskError, ResolvedMask

MASK_ARGUMENT = "crane_mask"


def requested_mask(sampling_params: Any) -> str | None:
    """The mask expression in a request's `extra_args`, or None.

    Raises MaskError if it is not a string, or for another argument of that look: a misspelt one must not run unmasked.
    """
    extra_args = getattr(sampling_params, "extra_args", None) or {}
    for argument in extra_args:
        if argument.startswith("crane") and argument != MASK_ARGUMENT:
            raise MaskError(f"unknown argument {argument!r}; expected {MASK_ARGUMENT!r}")
    expression = extra_args.get(MASK_ARGUMENT)
    if expression is not None and not isinstance(expression, str):
        raise MaskError(f"{MASK_ARGUMENT} is {type(expression).__name__}, expected a mask name")
    return expression


def admit(vllm_config: Any, sampling_params: Any, *, resumable: bool) -> ResolvedMask | None:
    """Resolve the mask of a request, or raise MaskError; None only if the request asks for no mask.

    Rewrites the request's `extra_args` so that the mask travels on by content digest.
    """
    expression = requested_mask(sampling_params)
    if expression is None:
        return None
    library = mask_library(vllm_config)
    if library is None:
        reason = f"{DISABLE_VARIABLE} is set" if masks_disabled() else f"start it with {MASKS_VARIABLE}=DIRECTORY"
        raise MaskError(f"{MASK_ARGUMENT}={expression!r}: this engine serves no masks ({reason})")
    resolved = library.resolve(expression)
    if resolved is None:
        sampling_params.extra_args = {k: v for k, v in sampling_params.extra_args.items() if k != MASK_ARGUMENT}
        return None
    if resumable:
        raise MaskError(f"{MASK_ARGUMENT}={expression!r}: streaming-input sessions cannot be masked")
    sampling_params.extra_args = {**sampling_params.extra_args, MASK_ARGUMENT: resolved.wire}
    return resolved
