"""The Hugging Face model that is measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crane_serve.checkpoints.resolve import CheckpointError
from relevance.families import require_family

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
    """The dtype called `name`, or float32 on the CPU and bfloat16 elsewhere. Raises ModelOptionError."""
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ModelOptionError(f"unknown dtype {name!r}; expected {' or '.join(DTYPES)}")
    return DTYPES[name]


def load_model(checkpoint: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model of a local checkpoint, in evaluation mode and without gradients of its parameters.

    Raises UnsupportedModelError for an unknown architecture, before any weight is read, and CheckpointError when the
    checkpoint cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    with _loading(checkpoint):
        _, attention = _config(checkpoint)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **attention)
    return model.to(device).eval().requires_grad_(False)


def load_skeleton(checkpoint: Path) -> nn.Module:
    """The model of a local checkpoint without its weights, on the device "meta". Raises as `load_model` does."""
    from transformers import AutoModelForCausalLM

    with _loading(checkpoint), torch.device("meta"):
        config, attention = _config(checkpoint)
        model: nn.Module = AutoModelForCausalLM.from_config(config, **attention)
    return model.eval().requires_grad_(False)


def _config(checkpoint: Path) -> tuple[Any, dict[str, str]]:
    """The config, and options that choose an attention which computes the family's function."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    family = require_family((config.architectures or [type(config).__name__])[0])
    return config, {} if family.attention is None else {"attn_implementation": family.attention}


@contextmanager
def _loading(checkpoint: Path) -> Iterator[None]:
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer of a local checkpoint. Raises CheckpointError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{checkpoint} has no tokenizer that can be loaded: {reason}") from error
