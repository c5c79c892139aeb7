"""Mask files: one safetensors file per mask, with JSON metadata that is checked against the tensors."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import crane_serve
from crane_serve.atomic import write_atomically
from crane_serve.masks.fingerprint import Fingerprint
from crane_serve.masks.mask import NeuronMask

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
_METADATA_KEY = "crane"
_NAME = re.compile(r"[a-z0-9_-]+")
_RESERVED = "none"


class MaskFileError(ValueError):
    """A mask file cannot be read or written; the message names the file and what was expected."""


class MaskInfo(BaseModel):
    """Where a mask comes from. None of it is part of the mask's identity."""

    model_config = ConfigDict(frozen=True)

    language: str
    method: str
    fingerprint: Fingerprint
    budget: float | None = None  # fraction of all neurons
    corpus_digest: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)  # of the method: seed, contrast, ...
    created_by: str = f"crane-serve {crane_serve.__version__}"


class _Metadata(MaskInfo):
    """What stands in the file: the provenance plus what lets a reader check the tensors."""

    format_version: int
    digest: str
    neurons: list[list[int]]  # per layer, indices whose scale is not 1


@dataclass(frozen=True)
class StoredMask:
    """A mask with its name (the file's stem) and its provenance."""

    name: str
    mask: NeuronMask
    info: MaskInfo


def check_name(name: str) -> str:
    """Return `name` if it can name a mask; raise MaskFileError otherwise."""
    if not _NAME.fullmatch(name) or len(name) > 128:
        raise MaskFileError(f"mask name {name!r} is not allowed; expected 1 to 128 characters of a-z, 0-9, _ and -")
    if name == _RESERVED:
        raise MaskFileError(f"mask name {name!r} is reserved for unmasked requests")
    return name


def write_mask(directory: Path, name: str, mask: NeuronMask, info: MaskInfo) -> Path:
    """Write `{name}.safetensors` atomically into `directory` (made if missing) and return its path.

    Raises MaskFileError, before anything is written, for a bad name or a mask of other sizes than its fingerprint's.
    """
    path = directory / f"{check_name(name)}{SUFFIX}"
    if mask.intermediate_sizes != info.fingerprint.intermediate_sizes:
        raise MaskFileError(f"{path}: the mask's intermediate sizes differ from those of the model it was made for")
    _check_output(path, mask, info.fingerprint)
    metadata = _Metadata(**dict(info), format_version=FORMAT_VERSION, digest=mask.digest, neurons=mask.neuron_sets())
    tensors = {"intermediate": mask.intermediate}
    if mask.output is not None:
        tensors["output"] = mask.output
    content = save(tensors, metadata={_METADATA_KEY: metadata.model_dump_json()})
    write_atomically(path, content)
    return path


def read_mask(path: Path) -> StoredMask:
    """Read and verify a mask file. Raises MaskFileError for anything that is not a whole, consistent mask."""
    name = check_name(path.stem)
    try:
        with safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get(_METADATA_KEY)
            if raw is None:
                raise MaskFileError(f"{path}: no {_METADATA_KEY!r} metadata; this is not a mask file")
            metadata = _Metadata.model_validate_json(raw)
            if metadata.format_version != FORMAT_VERSION:
                raise MaskFileError(
                    f"{path}: format version {metadata.format_version}, this program reads {FORMAT_VERSION}"
                )
            names = set(file.keys())
            if "intermediate" not in names or names - {"intermediate", "output"}:
                raise MaskFileError(f"{path}: tensors {sorted(names)}, expected 'intermediate' and maybe 'output'")
            mask = NeuronMask(
                intermediate=file.get_tensor("intermediate"),
                intermediate_sizes=metadata.fingerprint.intermediate_sizes,
                output=file.get_tensor("output") if "output" in names else None,
            )
    except MaskFileError:
        raise
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise MaskFileError(f"{path}: metadata field {where!r}: {problem['msg']}") from error
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:  # RuntimeError: formats without arithmetic
        raise MaskFileError(f"{path}: not a readable mask file: {error}") from error
    _check_output(path, mask, metadata.fingerprint)
    if mask.digest != metadata.digest:
        raise MaskFileError(f"{path}: content digest is {mask.digest[:16]}..., metadata says {metadata.digest[:16]}...")
    if mask.neuron_sets() != metadata.neurons:
        raise MaskFileError(f"{path}: the neuron sets in the metadata differ from those in the tensor")
    info = MaskInfo(**{field: getattr(metadata, field) for field in MaskInfo.model_fields})
    return StoredMask(name, mask, info)


def _check_output(path: Path, mask: NeuronMask, fingerprint: Fingerprint) -> None:
    if mask.output is not None and mask.output.shape[1] != fingerprint.hidden_size:
        raise MaskFileError(f"{path}: 'output' has {mask.output.shape[1]} columns, expected {fingerprint.hidden_size}")
