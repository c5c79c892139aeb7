"""The Hugging Face model that is measured."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from crane_serve.common.models.decoder import KnownDecoder
from crane_serve.common.models.families import attention_for, decoder_of
from crane_serve.common.models.load import (
    architecture_of,
    empty_causal_lm,
    load_causal_lm,
    load_config,
    require_plain,
    require_weights,
)
from crane_serve.common.models.processor import cpu_multiplies_bfloat16
from relevance.proof import prove_conservation, prove_logits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelOptionError(ValueError):
    """A device or dtype that does not exist here."""


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or CUDA where there is one, else the CPU. Raises ModelOptionError."""
    available = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if available else "cpu"))
    except RuntimeError as error:
        raise ModelOptionError(f"unknown device {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not available or (device.index or 0) >= torch.cuda.device_count()):
        raise ModelOptionError(f"device {name!r} is not there; {torch.cuda.device_count()} CUDA devices are visible")
    if device.type not in ("cpu", "cuda"):
        raise ModelOptionError(f"device {name!r} is not supported; expected cpu or cuda")
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype called `name`; without one bfloat16, float32 on a CPU that is slow at it. Raises ModelOptionError."""
    if name is None:
        return torch.bfloat16 if device.type != "cpu" or cpu_multiplies_bfloat16() else torch.float32
    if name not in DTYPES:
        raise ModelOptionError(f"unknown dtype {name!r}; expected {' or '.join(DTYPES)}")
    return DTYPES[name]


def load_model(checkpoint: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model of a local checkpoint, in evaluation mode and without gradients of its parameters.

    Raises CheckpointError for a quantised checkpoint, before any weight is read, or when it cannot be loaded or lacks
    weights, and UnsupportedModelError for a model whose logits are not what its parts make of them, or in which the
    rules of relevance lose something.
    """
    _, options = _config(checkpoint)
    model = load_causal_lm(checkpoint, dtype, options=options).to(device).requires_grad_(False)
    decoder = decoder_of(model)
    prove_logits(model, decoder)
    if isinstance(decoder, KnownDecoder):
        prove_conservation(model, decoder)
    return model


def load_skeleton(checkpoint: Path) -> nn.Module:
    """The model of a local checkpoint without its weights, on the device "meta". Raises as `load_model` does."""
    config, options = _config(checkpoint)
    model = empty_causal_lm(checkpoint, config, options)
    require_weights(checkpoint, model)
    return model.requires_grad_(False)


def _config(checkpoint: Path) -> tuple[Any, dict[str, str]]:
    """The config, and options that choose an attention which computes the model's function."""
    config = load_config(checkpoint)
    require_plain(checkpoint, config)
    attention = attention_for(config, architecture_of(config))
    return config, {} if attention is None else {"attn_implementation": attention}
