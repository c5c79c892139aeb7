"""Mask files: one safetensors file per mask, with JSON metadata that is checked against the tensors."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

import crane_serve
from crane_serve.common.atomic import write_atomically
from crane_serve.common.masks.fingerprint import Fingerprint
from crane_serve.common.masks.mask import NeuronMask

SUFFIX = ".safetensors"
METADATA_KEY, SCORES_KEY = "crane", "crane-scores"  # of mask files and of scores files
NAME = r"[a-z0-9_-]+"
MAX_NAME = 128
_RESERVED = "none"
_SHOWN = 80  # characters of names from a file that errors show


class MaskFileError(ValueError):
    """A mask file cannot be read or written; the message names the file and what was expected."""


class MaskInfo(BaseModel):
    """The provenance of a mask. It is not part of the mask's identity.

    fingerprint: the model that it may be used on; transferred_from: the model that its neurons were found in, if that
    is another one (see `crane_serve.common.masks.transfer`).
    """

    model_config = ConfigDict(frozen=True)

    language: str
    method: str
    fingerprint: Fingerprint
    transferred_from: Fingerprint | None = None
    budget: float | None = None  # fraction of all neurons
    corpus_digest: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)  # of the method: seed, contrast, ...
    created_by: str = f"crane-serve {crane_serve.__version__}"


class _Metadata(MaskInfo):
    """The metadata in the file: the provenance, and what is needed to check the tensors."""

    format_version: int
    digest: str
    # Per layer, indices whose scale is not 1; left out of version 2, whose models have millions of neurons.
    neurons: list[list[int]] | None = None


@dataclass(frozen=True)
class StoredMask:
    """A mask with its name (the file's stem) and its provenance."""

    name: str
    mask: NeuronMask
    info: MaskInfo


def check_name(name: str) -> str:
    """Return `name` if it can name a mask; raise MaskFileError otherwise."""
    if not re.fullmatch(NAME, name) or len(name) > MAX_NAME:
        raise MaskFileError(
            f"mask name {name!r} is not allowed; expected 1 to {MAX_NAME} characters of a-z, 0-9, _ and -"
        )
    if name == _RESERVED:
        raise MaskFileError(f"mask name {name!r} is reserved for unmasked requests")
    return name


def mask_path(directory: Path, name: str) -> Path:
    """The path of the mask of this name. Raises MaskFileError unless `name` is a valid mask name; no path is."""
    return directory / f"{check_name(name)}{SUFFIX}"


def encode_mask(name: str, mask: NeuronMask, info: MaskInfo) -> bytes:
    """The content of a mask file. Raises MaskFileError for an invalid name, or if the sizes differ from the
    fingerprint's."""
    check_name(name)
    if mask.intermediate_sizes != info.fingerprint.intermediate_sizes:
        raise MaskFileError(f"mask {name!r}: its intermediate sizes differ from those of the model it was made for")
    _check_others(f"mask {name!r}", mask, info.fingerprint)
    version = _version(info.fingerprint)
    neurons = mask.neuron_sets() if version == 1 else None
    metadata = _Metadata(**dict(info), format_version=version, digest=mask.digest, neurons=neurons)
    tensors = _taken_apart(mask.intermediate, info.fingerprint, _SCALES)
    if mask.offset is not None:
        tensors |= _taken_apart(mask.offset, info.fingerprint, _OFFSETS)
    if mask.output is not None:
        tensors["output"] = mask.output
    if mask.router is not None:
        tensors["router"] = mask.router
    return save(tensors, metadata={METADATA_KEY: metadata.model_dump_json()})


def write_mask(directory: Path, name: str, mask: NeuronMask, info: MaskInfo) -> Path:
    """Write `{name}.safetensors` atomically into `directory` (made if missing) and return its path.

    Raises MaskFileError as `encode_mask` does, before anything is written.
    """
    path = mask_path(directory, name)
    write_atomically(path, encode_mask(name, mask, info))
    return path


def read_mask(path: Path) -> StoredMask:
    """Read and verify a mask file. Raises MaskFileError for anything that is not a whole, consistent mask."""
    name = check_name(path.stem)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MaskFileError(f"{path}: not a readable mask file: {error}") from error
    return decode_mask(name, content, source=str(path))


def decode_mask(name: str, content: bytes, *, source: str) -> StoredMask:
    """Verify the content of a mask file. `source` names it in errors.

    Raises MaskFileError for anything that is not a whole, consistent mask.
    """
    check_name(name)
    try:
        tensors = load(content)  # checks the header, too
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        keys = header.get("__metadata__") or {}
        raw = keys.get(METADATA_KEY)
        if raw is None:
            what = " but scores, of which `crane select` makes masks" if SCORES_KEY in keys else ""
            raise MaskFileError(f"{source}: no {METADATA_KEY!r} metadata; this is not a mask file{what}")
        metadata = _Metadata.model_validate_json(raw)
        of = metadata.fingerprint
        if of.experts is not None and len(of.intermediate_sizes) != of.layers:
            raise MaskFileError(f"{source}: the fingerprint has not one intermediate size for each layer")
        version = _version(metadata.fingerprint)
        if metadata.format_version != version:
            raise MaskFileError(
                f"{source}: format version {metadata.format_version}, this program reads {version} for such a model"
            )
        wanted, offsets = (names[: 1 if of.experts is None else 2] for names in (_SCALES, _OFFSETS))
        maybe = "output" if version == 1 else "router"
        has_offsets = not set(_OFFSETS).isdisjoint(tensors)
        needed = {*wanted, *(offsets if has_offsets else ())}
        if not needed <= set(tensors) <= {*needed, maybe}:
            excerpts = [name[:_SHOWN] for name in sorted(tensors)[:3]]
            listed, others = " and ".join(map(repr, wanted)), ", ".join(map(repr, (maybe, *offsets)))
            raise MaskFileError(f"{source}: tensors {excerpts}, expected {listed} and maybe {others}")
        mask = NeuronMask(
            intermediate=_joined(tensors, of, _SCALES),
            intermediate_sizes=metadata.fingerprint.intermediate_sizes,
            output=tensors.get("output"),
            router=tensors.get("router"),
            offset=_joined(tensors, of, _OFFSETS) if has_offsets else None,
        )
    except MaskFileError:
        raise
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))[:_SHOWN]
        field = f"metadata field {where!r}" if where else f"metadata {METADATA_KEY!r}"
        raise MaskFileError(f"{source}: {field}: {problem['msg']}") from error
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # RuntimeError, KeyError: unknown formats
        raise MaskFileError(f"{source}: not a readable mask file: {str(error)[: 2 * _SHOWN]}") from error
    _check_others(source, mask, metadata.fingerprint)
    if mask.digest != metadata.digest:
        raise MaskFileError(
            f"{source}: content digest is {mask.digest[:16]}..., metadata says {metadata.digest[:16]}..."
        )
    if metadata.format_version == 1 and mask.neuron_sets() != metadata.neurons:
        raise MaskFileError(f"{source}: the neuron sets in the metadata differ from those in the tensor")
    info = MaskInfo(**{field: getattr(metadata, field) for field in MaskInfo.model_fields})
    return StoredMask(name, mask, info)


def _version(fingerprint: Fingerprint) -> int:
    """1, as from the beginning, or 2 for models with experts, of which earlier programs know nothing."""
    return 1 if fingerprint.experts is None else 2


# The tensors of a file by what they say of neurons: of dense MLPs, and of experts.
_SCALES, _OFFSETS = ("intermediate", "experts"), ("offset", "expert_offsets")


def _taken_apart(values: Tensor, fingerprint: Fingerprint, names: tuple[str, str]) -> dict[str, Tensor]:
    """The tensors of a file. values: [layers, widest]."""
    experts = fingerprint.experts
    if experts is None:
        return {names[0]: values}
    dense, neutral = fingerprint.dense_sizes, _neutral(names)
    of_dense = torch.full((len(dense), max(dense)), neutral)  # [layers, widest without experts]
    of_experts = torch.full((len(dense), experts.count, experts.size), neutral)  # [layers, experts, neurons]
    for layer, size in enumerate(dense):
        of_dense[layer, :size] = values[layer, :size]
        columns = experts.columns(layer, fingerprint.intermediate_sizes)
        if columns.start < columns.stop:
            of_experts[layer] = values[layer, columns].view(experts.count, experts.size)
    return dict(zip(names, (of_dense, of_experts), strict=True))


def _neutral(names: tuple[str, str]) -> float:
    """What leaves a neuron untouched."""
    return 1.0 if names == _SCALES else 0.0


def _joined(tensors: Mapping[str, Tensor], fingerprint: Fingerprint, names: tuple[str, str]) -> Tensor:
    """The values [layers, widest] of a file's tensors. Raises ValueError for other shapes, and for values of what no
    layer has."""
    experts = fingerprint.experts
    if experts is None:
        return tensors[names[0]]
    dense, neutral = fingerprint.dense_sizes, _neutral(names)
    of_dense, of_experts = (tensors[name] for name in names)
    shapes = [len(dense), max(dense)], [len(dense), experts.count, experts.size]
    for name, shape in zip(names, shapes, strict=True):
        if list(tensors[name].shape) != shape or not tensors[name].is_floating_point():
            has = f"shape {list(tensors[name].shape)} and dtype {tensors[name].dtype}"
            raise ValueError(f"{name!r} has {has}, expected {shape} and floating point")
    if min(dense) < 0 or any(layer >= len(dense) for layer in experts.layers):
        raise ValueError("the model's experts do not fit its layers")
    values = torch.full((len(dense), max(fingerprint.intermediate_sizes)), neutral)
    for layer, size in enumerate(dense):
        values[layer, :size] = of_dense[layer, :size]
        beyond, columns = [of_dense[layer, size:]], experts.columns(layer, fingerprint.intermediate_sizes)
        if columns.start < columns.stop:
            values[layer, columns] = of_experts[layer].flatten()
        else:
            beyond.append(of_experts[layer])
        if any(bool((rest != neutral).any()) for rest in beyond):
            raise ValueError(f"layer {layer} has scales of neurons that the model does not have")
    return values


def _check_others(source: str, mask: NeuronMask, fingerprint: Fingerprint) -> None:
    """Raise MaskFileError for scales of something that the model does not have."""
    experts = fingerprint.experts
    if mask.output is not None and experts is not None:
        raise MaskFileError(f"{source}: 'output' is not known for models with experts")
    if mask.output is not None and mask.output.shape[1] != fingerprint.hidden_size:
        raise MaskFileError(
            f"{source}: 'output' has {mask.output.shape[1]} columns, expected {fingerprint.hidden_size}"
        )
    if mask.router is None:
        return
    if experts is None:
        raise MaskFileError(f"{source}: 'router' is not known for models without experts")
    if mask.router.shape[1] != experts.count:
        raise MaskFileError(f"{source}: 'router' has {mask.router.shape[1]} columns, expected {experts.count}")
    for layer in set(range(mask.layers)) - set(experts.layers):
        if bool((mask.router[layer] != 1).any()):
            raise MaskFileError(f"{source}: 'router' switches off experts of layer {layer}, which has none")
