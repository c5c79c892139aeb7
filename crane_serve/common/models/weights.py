"""The files with a checkpoint's weights, and their content."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crane_serve.common.models.errors import CheckpointError

# In transformers' order of preference; an index names the files.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX = ".index.json"
_OTHER_FORMS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file. start, end: its bytes, counted from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_files(checkpoint: Path) -> tuple[Path, ...]:
    """The files that transformers loads the weights from; other files beside them are ignored.

    Raises CheckpointError if there are none, or if a file that an index names is missing.
    """
    for name in WEIGHT_FILES:
        file = checkpoint / name
        if file.is_file():
            return _of_index(file) if name.endswith(_INDEX) else (file,)
    others = sorted(file.name for file in checkpoint.iterdir() if file.suffix in _OTHER_FORMS)
    beside = f"; it has {', '.join(others)}, which is not read" if others else ""
    raise CheckpointError(f"{checkpoint} holds no weights; expected one of {', '.join(WEIGHT_FILES)}{beside}")


def shard_names(index: Path) -> tuple[str, ...]:
    """The files that an index names, in order. Raises CheckpointError if the file is not an index."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights; expected a `weight_map`: {error}") from error
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise CheckpointError(f"{index} is not an index of weights; expected file names in its `weight_map`")
    return tuple(names)


def _of_index(index: Path) -> tuple[Path, ...]:
    files = tuple(index.parent / name for name in shard_names(index))
    absent = ", ".join(file.name for file in files if not file.is_file())
    if absent:
        raise CheckpointError(f"{index} names {absent}; expected all its files beside it")
    return files


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, by its header alone. Raises CheckpointError for a damaged file."""
    try:
        return _tensors(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from error


def _tensors(file: Path) -> list[StoredTensor]:
    with file.open("rb") as content:
        (header_bytes,) = struct.unpack("<Q", content.read(8))
        size, start = file.stat().st_size, 8 + header_bytes
        if start > size:
            raise ValueError("its header is longer than the file")
        header: dict[str, Any] = json.loads(content.read(header_bytes))
    header.pop("__metadata__", None)
    tensors = [_tensor(name, entry, start) for name, entry in header.items()]
    end = max((tensor.end for tensor in tensors), default=start)
    if size != end:
        raise ValueError(f"it has {size} bytes, but its header needs {end}")
    return tensors


def _tensor(name: str, entry: Any, offset: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    if not 0 <= start <= end:
        raise ValueError(f"tensor {name!r} lies at {start} to {end}")
    shape = tuple(int(size) for size in entry["shape"])
    return StoredTensor(name, str(entry["dtype"]), shape, offset + start, offset + end)
