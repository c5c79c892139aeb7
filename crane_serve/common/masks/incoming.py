"""IncomingMask: a mask file that arrives in pieces and is refused at the first one that shows it cannot be used."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from crane_serve.common.masks.files import METADATA_KEY, MaskFileError, StoredMask, check_name, decode_mask
from crane_serve.common.masks.fingerprint import Fingerprint

_LENGTH_BYTES = 8  # of the number before the header, which says how long it is
_PROVENANCE_BYTES = 2**20
_VALUE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class MaskTooLarge(MaskFileError):
    """A mask file is larger than any mask of this model."""


class _Tensor(BaseModel):
    """Entry of a safetensors header."""

    model_config = ConfigDict(extra="forbid")

    dtype: Literal["F64", "F32", "F16", "BF16"]
    shape: tuple[StrictInt, ...]
    data_offsets: tuple[StrictInt, StrictInt]


class _Header(BaseModel):
    """The safetensors header of a mask file."""

    model_config = ConfigDict(extra="forbid")

    metadata: dict[str, str] = Field(alias="__metadata__")
    intermediate: _Tensor
    output: _Tensor | None = None


class _Origin(BaseModel):
    """Of a mask's metadata, what says whether this model can have the rest."""

    fingerprint: Fingerprint


class IncomingMask:
    """The file of a mask called `name` for the model with `fingerprint`: `feed` it, then `finish`.

    Never holds more than `largest` bytes of it. Raises MaskFileError for a bad name.
    """

    def __init__(self, name: str, fingerprint: Fingerprint) -> None:
        self.name = check_name(name)
        self._fingerprint = fingerprint
        sizes = fingerprint.intermediate_sizes
        self._shapes = {
            "intermediate": (len(sizes), max(sizes, default=0)),
            "output": (len(sizes), fingerprint.hidden_size),
        }
        values = sum(rows * columns for rows, columns in self._shapes.values())
        indices = sum(size * (len(str(size)) + len(", ")) for size in sizes)
        self._largest_header = _PROVENANCE_BYTES + indices
        self.largest = _LENGTH_BYTES + self._largest_header + max(_VALUE_BYTES.values()) * values
        """Bytes that a mask of this model has at most."""
        self._content = bytearray()
        self._header_end: int | None = None
        self._end: int | None = None  # as the header says

    def expect(self, size: int) -> None:
        """Raise MaskTooLarge if no mask of this model has `size` bytes."""
        if size > self.largest:
            raise MaskTooLarge(f"mask {self.name!r} has {size} bytes; a mask of this model has at most {self.largest}")

    def feed(self, piece: bytes) -> None:
        """Take the next bytes. Raises MaskTooLarge, MaskFileError, or FingerprintError for another model's mask."""
        received = len(self._content) + len(piece)
        if self._end is None:
            self.expect(received)
        if self._end is None or received <= self._end:
            self._content += piece
        if self._header_end is None and received >= _LENGTH_BYTES:
            self._header_end = _LENGTH_BYTES + self._header_length()
        if self._end is None and self._header_end is not None and received >= self._header_end:
            self._end = self._header_end + self._tensor_bytes(self._header(self._header_end))
        if self._end is not None and received > self._end:
            raise self._error(f"goes on after the {self._end} bytes that its header speaks of")

    def finish(self) -> StoredMask:
        """The mask, once everything is there. Slow for large models.

        Raises MaskFileError for anything that is not a whole, consistent mask, FingerprintError for another model's.
        """
        if self._end is None or len(self._content) < self._end:
            expected = "its header does" if self._end is None else f"the {self._end} that its header speaks of"
            raise self._error(f"ends after {len(self._content)} bytes, before {expected}")
        content = bytes(self._content)
        self._content.clear()
        stored = decode_mask(self.name, content, source=f"mask {self.name!r}")
        self._require(stored.info.fingerprint)
        return stored

    def _header_length(self) -> int:
        length = int.from_bytes(self._content[:_LENGTH_BYTES], "little")
        if length > self._largest_header:
            raise MaskTooLarge(
                f"mask {self.name!r} begins with a header of {length} bytes; "
                f"that of a mask of this model has at most {self._largest_header}"
            )
        return length

    def _header(self, end: int) -> _Header:
        try:
            text = self._content[_LENGTH_BYTES:end].decode()
            header = _Header.model_validate(json.loads(text, object_pairs_hook=_without_repetition))
        except ValidationError as error:
            raise self._invalid("header", error) from error
        except (ValueError, RecursionError) as error:
            raise self._error(f"the header is not readable as JSON: {error}") from error
        return header

    def _tensor_bytes(self, header: _Header) -> int:
        """How many bytes come behind the header, which is checked against the model."""
        raw = header.metadata.get(METADATA_KEY)
        if raw is None:
            raise self._error(f"no {METADATA_KEY!r} metadata; this is not a mask file")
        try:
            origin = _Origin.model_validate_json(raw)
        except ValidationError as error:
            raise self._invalid("metadata", error) from error
        except ValueError as error:  # half a surrogate pair
            raise self._error(f"the metadata is not readable as JSON: {error}") from error
        self._require(origin.fingerprint)
        tensors = {"intermediate": header.intermediate}
        if header.output is not None:
            tensors["output"] = header.output
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
            rows, columns = self._shapes[name]
            if tensor.shape != (rows, columns):
                raise self._error(f"{name!r} does not have the shape {[rows, columns]} of this model")
            begin, end = end, end + rows * columns * _VALUE_BYTES[tensor.dtype]
            if tensor.data_offsets != (begin, end):
                raise self._error(f"{name!r} does not have the offsets {[begin, end]} that its format and shape need")
        return end

    def _require(self, other: Fingerprint) -> None:
        self._fingerprint.require(other, f"mask {self.name!r}")

    def _invalid(self, part: str, error: ValidationError) -> MaskFileError:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        return self._error(f"{part} field {where[:80]!r}: {problem['msg']}")

    def _error(self, problem: str) -> MaskFileError:
        return MaskFileError(f"mask {self.name!r}: {problem}")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if it has a key twice: readers differ in which of the two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found
