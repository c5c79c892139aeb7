"""Configs, models and tokenizers, loaded by transformers; every problem with a checkpoint is a CheckpointError."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crane_serve.common.models.errors import CheckpointError
from crane_serve.common.models.weights import stored_tensors, weight_files

_NAMED = 4  # tensors that a message names
_REASON_CHARACTERS = 400
_ZIP = b"PK\x03\x04"  # how a file begins that torch has saved since 1.6
_OLD_CONSTANT = (
    ".masked_bias"  # in early GPT-2 files; transformers itself ignores the other constants that it once saved
)
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")

Options = Mapping[str, Any]


def load_config(checkpoint: Path, *, trust_remote_code: bool = False) -> Any:
    """The config of a local checkpoint. Raises CheckpointError."""
    from transformers import AutoConfig

    with _transformers(f"{checkpoint} has no config that can be loaded"):
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


def architecture_of(config: Any) -> str:
    """The class of the model: the first in the config, else transformers' causal language model of its type.

    Raises CheckpointError if `architectures` is not a list of names.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = config.architectures
    if not names:
        return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type))
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise CheckpointError(f"the config's architectures are {names!r}; expected a list of class names")
    return names[0]


def _loader(config: Any) -> Any:
    """The class of transformers that makes the model: a causal language model, or one that reads images beside text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    wrapped = architecture_of(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    return AutoModelForImageTextToText if wrapped else AutoModelForCausalLM


def load_tokenizer(checkpoint: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local checkpoint. Raises CheckpointError when there is none."""
    from transformers import AutoTokenizer

    with _transformers(f"{checkpoint} has no tokenizer that can be loaded"):
        return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


def load_causal_lm(
    checkpoint: Path, dtype: torch.dtype | str, *, trust_remote_code: bool = False, options: Options | None = None
) -> nn.Module:
    """The causal language model of a local checkpoint, in evaluation mode, with all its weights.

    dtype: "auto" is the checkpoint's own. Tensors that the model does not have cause a warning. Raises CheckpointError,
    also naming weights that are missing or of another shape, for which transformers would use random numbers.
    """
    _shapes_of(checkpoint)  # unlike transformers, it names a damaged file
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    method = quantisation(config)
    with _transformers(f"{checkpoint} cannot be loaded" + (f" (it is quantised: {method})" if method else "")):
        model, loading_info = _loader(config).from_pretrained(
            checkpoint,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name the tensors, in `_require_all`
            **(options or {}),
        )
    _require_all(checkpoint, loading_info)
    loaded: nn.Module = model.eval()
    return loaded


def empty_causal_lm(checkpoint: Path, config: Any, options: Options | None = None) -> nn.Module:
    """The model of a config without its weights, on the device "meta". Raises CheckpointError."""
    with _transformers(f"{checkpoint} cannot be loaded"), torch.device("meta"):
        model: nn.Module = _loader(config).from_config(config, trust_remote_code=False, **(options or {}))
    return model.eval()


def require_weights(checkpoint: Path, model: nn.Module) -> None:
    """Compare the checkpoint's tensors with those of an empty `model`, by names and shapes only.

    Tensors that the model does not have cause a warning. Raises CheckpointError as `load_causal_lm` does, before any
    weight is read.
    """
    _require_all(checkpoint, _compared(checkpoint, model))


def _compared(checkpoint: Path, model: nn.Module) -> Mapping[str, Any]:
    from transformers.initialization import no_init_weights

    one = torch.zeros(())
    shapes = _shapes_of(checkpoint)
    config: Any = model.config
    kind: Any = type(model)
    with _transformers(f"{checkpoint} cannot be loaded"), no_init_weights():
        _, loading_info = kind.from_pretrained(
            None,
            config=config,
            state_dict={
                name: one.expand(shape) for name, shape in shapes.items()
            },  # views of one number, which take no memory
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    of_transformers: Mapping[str, Any] = loading_info
    return of_transformers


def require_weights_of(checkpoint: Path) -> None:
    """`require_weights` for a checkpoint that will be served, if transformers can tell what is missing.

    It cannot tell for an unknown model, a model without a causal language model class in transformers, or a quantised
    one.
    """
    try:
        config = load_config(checkpoint)
        if quantisation(config) is not None:
            return
        model = empty_causal_lm(checkpoint, config)
        if type(model).__name__ != architecture_of(config):
            return
        loading_info = _compared(checkpoint, model)
    except CheckpointError:
        return
    _require_all(checkpoint, loading_info)


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of a file that torch.save wrote. content: of any shape."""

    name: str
    content: torch.Tensor

    @property
    def dtype(self) -> str:
        """The kind of its numbers as safetensors names it, such as BF16."""
        return _safetensors_name(self.content.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes, one per dimension."""
        return tuple(self.content.shape)

    def middle(self, count: int) -> bytes:
        """So many bytes from the middle of its values in order, or all if it has fewer."""
        values = self.content.detach().contiguous().flatten().view(torch.uint8)
        start = max(0, (len(values) - count) // 2)
        return values[start : start + count].numpy().tobytes()


def pickled_tensors(file: Path) -> list[PickledTensor]:
    """The tensors of a file that torch.save wrote; nothing but tensors is unpickled.

    Their values stay on the disk until they are used, but for files older than torch 1.6, which are read whole. Raises
    CheckpointError for a file without tensors by name.
    """
    with _transformers(f"{file} is not a file of weights"):
        with file.open("rb") as content:
            zipped = content.read(len(_ZIP)) == _ZIP
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
        tensors = [PickledTensor(name, value) for name, value in held.items() if isinstance(value, torch.Tensor)]
    if not tensors:
        raise CheckpointError(f"{file} is not a file of weights: it holds no tensors by name")
    return tensors


@cache
def _safetensors_name(dtype: torch.dtype) -> str:
    from safetensors.torch import save

    header = save({"tensor": torch.empty(0, dtype=dtype)})[8:]  # behind its own length; no values follow
    return str(json.loads(header)["tensor"]["dtype"])


def quantisation(config: Any) -> str | None:
    """The format in which a config's checkpoint is quantised, such as gptq; None for plain weights."""
    for of in (config, config.get_text_config()):
        for key in _QUANTIZATION_KEYS:
            entry = getattr(of, key, None)
            if entry is not None:
                method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
                return str(getattr(method, "value", method) or "an unnamed format")
    return None


def require_plain(checkpoint: Path, config: Any) -> None:
    """Raise CheckpointError for a quantised checkpoint, naming its format and the way out."""
    method = quantisation(config)
    if method is not None:
        raise CheckpointError(
            f"{checkpoint} is quantised ({method}); expected the checkpoint that it was made from, with plain weights. "
            "`crane masks transfer MASKS --to QUANTISED` makes its masks usable on the quantised one"
        )


def reason(error: BaseException) -> str:
    """An error's message as one line, with its class in front if the message alone is not clear."""
    text = " ".join(str(error).split())
    if len(text) > _REASON_CHARACTERS:
        text = f"{text[:_REASON_CHARACTERS]}..."
    if isinstance(error, OSError | ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _transformers(problem: str) -> Iterator[None]:
    """Silences transformers, and turns its errors, which have no common base class, into CheckpointError."""
    from transformers.utils import logging as verbosity

    verbosity.disable_progress_bar()
    before = verbosity.get_verbosity()
    verbosity.set_verbosity_error()  # silences its table of missing and unexpected weights, which we report ourselves
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{problem}: {reason(error)}") from error
    finally:
        verbosity.set_verbosity(before)


def _shapes_of(checkpoint: Path) -> dict[str, Sequence[int]]:
    return {name: shape for file in weight_files(checkpoint) for name, shape in _shapes(file)}


def _shapes(file: Path) -> Iterable[tuple[str, Sequence[int]]]:
    tensors = stored_tensors(file) if file.suffix == ".safetensors" else pickled_tensors(file)
    return [(tensor.name, tensor.shape) for tensor in tensors]


def _require_all(checkpoint: Path, loading_info: Mapping[str, Any]) -> None:
    """loading_info: of transformers: missing_keys, unexpected_keys, mismatched_keys (name, stored, expected)."""
    missing, other = sorted(loading_info["missing_keys"]), sorted(loading_info["mismatched_keys"])
    unexpected = sorted(name for name in loading_info["unexpected_keys"] if not name.endswith(_OLD_CONSTANT))
    beside = f"; it has {_listed(unexpected)}, which the model has not" if unexpected else ""
    if missing:
        raise CheckpointError(f"{checkpoint} lacks {_count(missing)} that the model needs: {_listed(missing)}{beside}")
    if other:
        shapes = [f"{name} is {list(stored)}, not {list(expected)}" for name, stored, expected in other]
        raise CheckpointError(f"{checkpoint} has {_count(other)} of another shape than the model: {_listed(shapes)}")
    if unexpected:
        _warn(f"{checkpoint} has {_count(unexpected)} that the model does not use: {_listed(unexpected)}")


def _count(tensors: Sequence[object]) -> str:
    return f"{len(tensors)} tensor{'' if len(tensors) == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


@cache
def _warn(message: str) -> None:
    """Show each message only once, since a model is loaded several times in a run."""
    logging.getLogger(__name__).warning("warning: %s", message)
