"""Fingerprint: identifies the model that a mask was made for."""

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, SerializerFunctionWrapHandler, model_serializer

from crane_serve.common.masks.canonical_config import config_digest, file_digest
from crane_serve.common.models.errors import CheckpointError, UnsupportedModelError
from crane_serve.common.models.experts import Experts, neurons_of
from crane_serve.common.models.load import architecture_of, load_config, pickled_tensors, reason
from crane_serve.common.models.weights import stored_tensors, weight_files

_SAMPLE_BYTES = 4096


class FingerprintError(ValueError):
    """A fingerprint cannot be made of a directory, or two fingerprints differ."""


class Fingerprint(BaseModel):
    """Identity of a checkpoint: architecture, sizes, and digests of its config and weights.

    The config digest covers the config as transformers reads it, without defaults. The weights digest covers every
    tensor's name, dtype and shape and a 4 KiB sample from its middle, so that a fine-tuned checkpoint of the same shape
    has another digest, and not all weights need to be read. Whether they are in safetensors or .bin files does not
    matter. Files that transformers does not load do not count.

    intermediate_sizes: the number of neurons of each layer, those of experts included; experts: which of them those
    are, None for a model without.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    layers: int
    hidden_size: int
    intermediate_sizes: tuple[int, ...]
    config_digest: str
    weights_digest: str
    experts: Experts | None = None

    # field -> its value in version 0.1.0 for the same checkpoint, so that masks of 0.1.0 stay valid.
    _earlier: dict[str, str] = PrivateAttr(default_factory=dict)
    # Weights digests of 0.1.0 for any .bin files of the same names and sizes. They identify nothing.
    _by_sizes: frozenset[str] = PrivateAttr(default=frozenset())

    @classmethod
    def of(cls, checkpoint: Path) -> "Fingerprint":
        """Fingerprint of a local Hugging Face checkpoint. Raises FingerprintError if it is not one."""
        try:
            raw = _raw_config(checkpoint)
            whole = load_config(checkpoint)
            config = whole.get_text_config()
            layers, hidden_size = _positive(config, "num_hidden_layers"), _positive(config, "hidden_size")
            (sizes, experts), architecture = neurons_of(checkpoint, whole), architecture_of(whole)
        except UnsupportedModelError as error:
            raise FingerprintError(f"{checkpoint}: {error}") from error
        except Exception as error:  # what a config class raises for a bad value has no common base
            raise FingerprintError(f"{checkpoint} is not a Hugging Face checkpoint: {reason(error)}") from error
        try:
            files = weight_files(checkpoint)
            weights = _weights_digest(files)
        except CheckpointError as error:
            raise FingerprintError(str(error)) from error
        fingerprint = cls(
            architecture=architecture,
            layers=layers,
            hidden_size=hidden_size,
            intermediate_sizes=sizes,
            config_digest=config_digest(whole),
            weights_digest=weights,
            experts=experts,
        )
        earlier = {
            "architecture": str((raw.get("architectures") or [raw.get("model_type", "unknown")])[0]),
            "config_digest": file_digest(raw),
            "weights_digest": _earlier_weights_digest(checkpoint, files) or weights,
        }
        fingerprint._earlier.update(earlier)
        fingerprint._by_sizes = _digests_by_sizes(checkpoint, files)
        return fingerprint

    @model_serializer(mode="wrap")
    def _without_none(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As earlier versions wrote it, for a model without experts."""
        content: dict[str, Any] = plain(self)
        return {key: value for key, value in content.items() if value is not None}

    @property
    def dense_sizes(self) -> tuple[int, ...]:
        """The number of neurons of each layer outside of experts."""
        return self.intermediate_sizes if self.experts is None else self.experts.dense(self.intermediate_sizes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self.model_dump() == other.model_dump()

    def is_of(self, other: "Fingerprint") -> bool:
        """Whether `other`, such as the fingerprint of a mask, is of this checkpoint, perhaps made by an earlier
        version."""
        return self._difference(other) is None

    def require(self, other: "Fingerprint", what: str) -> None:
        """Raise FingerprintError naming the first difference, unless `other` (of `what`) is the same model."""
        name = self._difference(other)
        if name == "weights_digest" and other.weights_digest in self._by_sizes:
            raise FingerprintError(
                f"{what} was made by an earlier version, which told .bin files apart by their names and sizes alone; "
                "make it again. If you are sure that it was this model, masks can be kept: "
                "`crane masks transfer MASKS --to MODEL --out DIRECTORY` makes them usable on it"
            )
        if name is not None:
            mine, theirs = getattr(self, name), getattr(other, name)
            raise FingerprintError(
                f"{what} was made for another model: its {name} is {_short(theirs)}, this model has {_short(mine)}"
            )

    def _difference(self, other: "Fingerprint") -> str | None:
        for name in type(self).model_fields:
            mine = getattr(self, name)
            if getattr(other, name) not in (mine, self._earlier.get(name, mine)):
                return name
        return None


def _short(value: object) -> str:
    text = f"{value[:3]}... ({len(value)} layers)" if isinstance(value, tuple) and len(value) > 4 else str(value)
    return text[:16] + "..." if len(text) == 64 else text


def _raw_config(checkpoint: Path) -> dict[str, Any]:
    raw = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError(f"config.json holds a {type(raw).__name__}; expected an object")
    return raw


def _positive(config: Any, key: str) -> int:
    value = int(getattr(config, key))
    if value < 1:
        raise ValueError(f"{key} is {value}; expected 1 at least")
    return value


def _weights_digest(files: Iterable[Path]) -> str:
    entries = [entry for file in files for entry in _entries(file)]
    digest = hashlib.sha256()
    for entry in sorted(entries):  # by tensor name, so that the division into shards does not matter
        digest.update(entry)
    return digest.hexdigest()


def _entries(file: Path) -> list[bytes]:
    if file.suffix != ".safetensors":
        pickled = pickled_tensors(file)
        try:
            return [_entry(tensor.name, tensor.dtype, tensor.shape, tensor.middle(_SAMPLE_BYTES)) for tensor in pickled]
        except (RuntimeError, TypeError, ValueError, OSError) as error:  # of an uncommon kind of tensor
            raise CheckpointError(f"{file} holds a tensor that cannot be read: {reason(error)}") from error
    entries = []
    tensors = stored_tensors(file)
    with file.open("rb") as content:
        for tensor in tensors:
            middle = max(tensor.start, (tensor.start + tensor.end - _SAMPLE_BYTES) // 2)
            content.seek(middle)
            sample = content.read(min(_SAMPLE_BYTES, tensor.end - middle))
            entries.append(_entry(tensor.name, tensor.dtype, tensor.shape, sample))
    return entries


def _entry(name: str, dtype: str, shape: tuple[int, ...], sample: bytes) -> bytes:
    return f"{name}|{dtype}|{list(shape)}|".encode() + sample


def _earlier_weights_digest(checkpoint: Path, files: Collection[Path]) -> str | None:
    """The digest over all safetensors files, as version 0.1.0 made it; None if these are just the model's files."""
    beside = set(checkpoint.glob("*.safetensors"))
    if not beside or beside == set(files):
        return None
    try:
        return _weights_digest(beside)
    except CheckpointError:  # something else, which 0.1.0 could not read either
        return None


def _digests_by_sizes(checkpoint: Path, files: Collection[Path]) -> frozenset[str]:
    """The digests of version 0.1.0 for .bin files: of the model's, and of all in the directory."""
    if all(file.suffix == ".safetensors" for file in files):
        return frozenset()
    sizes = [sorted(f"{file.name}:{file.stat().st_size}" for file in of) for of in (files, checkpoint.glob("*.bin"))]
    return frozenset(hashlib.sha256("".join(of).encode()).hexdigest() for of in sizes)
