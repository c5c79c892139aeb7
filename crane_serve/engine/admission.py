"""Admission: the one rule that says which mask a request gets, applied in the front end and in the engine core."""

from collections.abc import Collection
from typing import Any, NamedTuple

from crane_serve.common.masks import MaskError, MaskTableFull, Positions, ResolvedMask, inline_text
from crane_serve.engine.config import DISABLE_VARIABLE, MASKS_VARIABLE, mask_config, masks_disabled
from crane_serve.engine.vocabulary import vocabulary_size

MASK_ARGUMENT = "crane_mask"
POSITIONS_ARGUMENT = "crane_positions"
SCORE_ARGUMENT = "crane_score"
"""Asks for scores of its prompt: see `scoring`."""
ACTIVATIONS_ARGUMENT = "crane_activations"
"""Asks for values of neurons: see `activations`."""
_ARGUMENTS = (MASK_ARGUMENT, POSITIONS_ARGUMENT)
_SHOWN = 80  # characters of an expression that errors show
OUR_WORDS = ("crane", "mask", "maks", "msak", "amsk")
"""Parts of a parameter's name that show that it asks for a mask; also misspellings with two letters exchanged."""


class MaskRequest(NamedTuple):
    """What a request's `extra_args` say: a mask expression, or the text form of a mask, and which tokens it is for."""

    expression: str
    positions: Positions


def looks_like_ours(argument: str) -> bool:
    """Whether an argument asks for a mask, even if its name is misspelt."""
    lower = argument.lower()
    return any(word in lower for word in OUR_WORDS) or lower.startswith("position")


def requested_mask(sampling_params: Any) -> MaskRequest | None:
    """The mask that a request asks for, or None.

    Raises MaskError for malformed arguments, and for unknown arguments with a similar name: a request with a misspelt
    argument must not run unmasked.
    """
    extra_args = getattr(sampling_params, "extra_args", None)
    if not extra_args:
        return None
    for argument in extra_args:
        if looks_like_ours(argument) and argument not in (*_ARGUMENTS, SCORE_ARGUMENT, ACTIVATIONS_ARGUMENT):
            raise MaskError(f"unknown argument {argument!r}; expected {' or '.join(map(repr, _ARGUMENTS))}")
    expression, positions = (extra_args.get(argument) for argument in _ARGUMENTS)
    if expression is None:
        if positions is not None:
            raise MaskError(f"{POSITIONS_ARGUMENT}={positions!r} without {MASK_ARGUMENT}")
        return None
    if isinstance(expression, dict):
        try:
            expression = inline_text(expression)
        except ValueError as error:
            raise MaskError(f"{MASK_ARGUMENT}: {error}") from None
    if not isinstance(expression, str):
        raise MaskError(f"{MASK_ARGUMENT} is {type(expression).__name__}, expected a mask name, or an object")
    try:
        return MaskRequest(expression, Positions.ALL if positions is None else Positions.parse(positions))
    except ValueError as error:
        raise MaskError(f"{POSITIONS_ARGUMENT}: {error}") from None


def mask_arguments(mask: ResolvedMask) -> dict[str, str]:
    """The `extra_args` that make a request run with `mask`."""
    return {MASK_ARGUMENT: mask.wire, POSITIONS_ARGUMENT: str(mask.positions)}


def admit(vllm_config: Any, sampling_params: Any, *, resumable: bool, embeds: bool = False) -> ResolvedMask | None:
    """The mask of a request; None only if the request asks for no mask. Raises MaskError.

    resumable: whether it is a session with streamed input; embeds: whether its prompt holds embeddings without ids.
    Rewrites the request's `extra_args`, so that later stages get the mask by its content digest.
    """
    request = requested_mask(sampling_params)
    if request is None:
        return None
    what = f"{MASK_ARGUMENT}={request.expression[:_SHOWN]!r}"
    config = mask_config(vllm_config)
    if config is None:
        reason = f"{DISABLE_VARIABLE} is set" if masks_disabled() else f"start it with {MASKS_VARIABLE}=DIRECTORY"
        raise MaskError(f"{what}: this engine serves no masks ({reason})")
    # A mask that was just replaced is still admitted by its digest: the request may have been sent before.
    resolved = config.library().resolve_wire(request.expression, request.positions)
    others = {key: value for key, value in sampling_params.extra_args.items() if key not in _ARGUMENTS}
    if resolved is None:
        sampling_params.extra_args = others
        return None
    if resumable:
        raise MaskError(f"{what}: streaming-input sessions cannot be masked")
    _check_until(resolved.positions, vllm_config, embeds)
    if resolved.mask.scales_outputs and not config.outputs:
        raise MaskError(f"{what}: scales MLP output dimensions, which this engine was started without")
    if resolved.mask.offsets and not config.offsets:
        raise MaskError(f"{what}: adds to neurons, which this engine was started without")
    sampling_params.extra_args = {**others, **mask_arguments(resolved)}
    return resolved


def _check_until(positions: Positions, vllm_config: Any, embeds: bool) -> None:
    if not positions.until:
        return
    if embeds:
        raise MaskError(f"{POSITIONS_ARGUMENT}={positions}: the prompt has embeddings, of which no token id is known")
    vocabulary = vocabulary_size(vllm_config.model_config)
    if positions.until[-1] >= vocabulary:
        raise MaskError(
            f"{POSITIONS_ARGUMENT}={positions}: token {positions.until[-1]} is not in the model's vocabulary of "
            f"{vocabulary} tokens (0 to {vocabulary - 1})"
        )


def require_row(vllm_config: Any, mask: ResolvedMask, in_use: Collection[str]) -> None:
    """Raise MaskTableFull if the engine has no free row for `mask`. in_use: digests of the masks of other requests.

    Never raised if there is a row for every request that can run at once.
    """
    config = mask_config(vllm_config)
    if config is None or config.rows >= vllm_config.scheduler_config.max_num_seqs or mask.mask.digest in in_use:
        return
    if len(in_use) >= config.rows:
        raise MaskTableFull(f"mask {mask.name}: {config.rows} other masks are in use, and the engine has no more rows")
