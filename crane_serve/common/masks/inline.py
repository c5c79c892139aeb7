"""InlineMask: a mask that a request brings with it, as a list of neurons, instead of the name of one."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crane_serve.common.masks.mask import MAX_SCALE
from crane_serve.common.unique_names import unique_names

INLINE = "inline"
"""What stands for the name of such a mask: in answers, in the log, and in metrics."""

INLINE_PREFIX = "neurons:"
"""How its text form begins, in which it travels; no name of a mask has a colon."""

MAX_NEURONS = 16_384
"""Most neurons of one mask."""

_MAX_TEXT = 2**18  # characters; all texts of MAX_NEURONS neurons are shorter
_FIELDS = ("neurons", "scale", "offset")
_LAYER = re.compile("0|[1-9][0-9]{0,5}")
_SHOWN = 40  # characters of a value that errors show
_DIGEST_DOMAIN = b"crane-inline-v1"


@dataclass(frozen=True, eq=False)
class InlineMask:
    """The values a of some neurons become scale * a + offset; all others stay as they are. Made by `read` or `parse`.

    A row of the table is filled from it as from a Composition, whose attributes it has. It keeps only the neurons, in
    4 bytes each, and its text form.

    neurons_of: by layer, the ascending indices of the neurons that it lists, at least one; scale, added: of each,
    float32 numbers.
    """

    neurons_of: Mapping[int, NDArray[np.int32]]
    intermediate_sizes: tuple[int, ...]
    scale: float = 0.0
    added: float = 0.0

    @classmethod
    def read(cls, content: Any, intermediate_sizes: Sequence[int]) -> "InlineMask":
        """The mask in parsed JSON: {"neurons": {"12": [3, 17]}, "scale": 0, "offset": 0}, of which neurons is required.

        intermediate_sizes: the number of neurons of each layer of the model. Raises ValueError for anything else, for
        no neuron or more than MAX_NEURONS, for one that is listed twice or that the model does not have, and for
        numbers that are not finite or larger than MAX_SCALE.
        """
        _require_object(content)
        unknown = [name for name in content if name not in _FIELDS]
        if unknown:
            raise ValueError(f"unknown field {_shown(unknown[0])}, expected {', '.join(map(repr, _FIELDS))}")
        sizes = tuple(intermediate_sizes)
        scale, added = (_number(content, field) for field in ("scale", "offset"))
        return cls(_neurons(content.get("neurons"), sizes), sizes, scale, added)

    @classmethod
    def parse(cls, text: str, intermediate_sizes: Sequence[int]) -> "InlineMask":
        """The mask in its text form, INLINE_PREFIX and JSON. Raises ValueError as `read` does."""
        return cls.read(inline_content(text), intermediate_sizes)

    @cached_property
    def wire(self) -> str:
        """The text form, the same for all ways to write the same content."""
        content: dict[str, Any] = {
            "neurons": {str(layer): self.neurons_of[layer].tolist() for layer in sorted(self.neurons_of)},
            "scale": self.scale,
        }
        if self.added:
            content["offset"] = self.added
        return inline_text(content)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the text form and the layers' sizes, which no other content has, nor any other mask."""
        content = hashlib.sha256(_DIGEST_DOMAIN)
        content.update(repr(self.intermediate_sizes).encode())
        content.update(self.wire.encode())
        return content.hexdigest()

    @property
    def neurons(self) -> int:
        """Number of neurons that it changes."""
        changes = self.scale != 1 or self.added != 0
        return sum(map(len, self.neurons_of.values())) if changes else 0

    @property
    def offsets(self) -> bool:
        """Whether it adds to neurons."""
        return self.added != 0

    @property
    def scales_outputs(self) -> bool:
        """Whether it scales dimensions of the MLP's output: never."""
        return False

    @property
    def experts_off(self) -> int:
        """Number of experts that routers may not choose: none."""
        return 0

    def intermediate(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        """float32 [stop - start]: the scales of these neurons of a layer."""
        return self._filled(1.0, self.scale, layer, start, stop)

    def offset(self, layer: int, start: int = 0, stop: int | None = None) -> Tensor | None:
        """float32 [stop - start]: what is added to these neurons of a layer after they are scaled, None for nothing."""
        if not self.added or layer not in self.neurons_of:
            return None
        return self._filled(0.0, self.added, layer, start, stop)

    def output(self, layer: int) -> Tensor | None:
        """float32 [hidden]: the scales of the dimensions of a layer's MLP output; always None, for all ones."""
        return None

    def router(self, layer: int) -> Tensor | None:
        """float32 [experts]: which of them the layer's router may choose; always None, for all."""
        return None

    def _filled(self, value: float, own: float, layer: int, start: int, stop: int | None) -> Tensor:
        """float32 [stop - start]: `own` at the neurons that are listed, `value` elsewhere."""
        end = max(self.intermediate_sizes) if stop is None else stop
        values = torch.full((end - start,), value)
        listed = self.neurons_of.get(layer)
        if listed is not None:
            inside = listed[(listed >= start) & (listed < end)] - start
            values[torch.from_numpy(inside).long()] = own
        return values


def inline_text(content: Mapping[Any, Any]) -> str:
    """The text form of a mask that is given as an object; unchecked. Raises ValueError for what JSON cannot hold."""
    try:
        return INLINE_PREFIX + json.dumps(content, separators=(",", ":"))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the mask cannot be written as JSON: {error}") from None


def inline_content(text: str) -> dict[str, Any]:
    """The object in a text form, else unchecked. Raises ValueError for a text that is too long or holds no object."""
    if len(text) > _MAX_TEXT:
        raise ValueError(f"{len(text)} characters; at most {_MAX_TEXT} are read")
    try:
        content: Any = json.loads(text.removeprefix(INLINE_PREFIX), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be read as JSON: {error}") from None
    _require_object(content)
    return cast(dict[str, Any], content)


def _require_object(content: Any) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"found {_shown(content)}, expected an object with 'neurons'")


def _number(content: Mapping[str, Any], field: str) -> float:
    value = content.get(field, 0.0)
    if type(value) not in (int, float) or not abs(value) <= MAX_SCALE:  # nor is NaN
        raise ValueError(f"{field!r} is {_shown(value)}, expected a number of at most {MAX_SCALE:g} in absolute value")
    return float(np.float32(value)) + 0.0  # + 0.0: there is one zero


def _neurons(listed: Any, sizes: Sequence[int]) -> dict[int, NDArray[np.int32]]:
    if not isinstance(listed, dict) or not all(isinstance(indices, list) for indices in listed.values()):
        raise ValueError("'neurons' holds something else than layers, each with a list of neurons: {\"12\": [3, 17]}")
    count = sum(map(len, listed.values()))
    if not 0 < count <= MAX_NEURONS:
        raise ValueError(f"'neurons' lists {count}, expected 1 to {MAX_NEURONS} (without any, leave out the mask)")
    return {
        layer: _indices(layer, indices, sizes[layer])
        for layer, indices in ((_layer(key, len(sizes)), indices) for key, indices in listed.items())
        if indices
    }


def _layer(key: Any, layers: int) -> int:
    if not isinstance(key, str) or not _LAYER.fullmatch(key) or int(key) >= layers:
        raise ValueError(f'layer {_shown(key)} is none of the model\'s, expected "0" to "{layers - 1}"')
    return int(key)


def _indices(layer: int, indices: Sequence[Any], size: int) -> NDArray[np.int32]:
    """Ascending."""
    wrong = [index for index in indices if type(index) is not int or not 0 <= index < size]
    if wrong:
        raise ValueError(f"layer {layer}: {_shown(wrong[0])} is no neuron, expected whole numbers from 0 to {size - 1}")
    ordered = np.sort(np.array(indices, np.int32))
    twice = ordered[:-1][ordered[:-1] == ordered[1:]]
    if twice.size:
        raise ValueError(f"layer {layer}: neuron {twice[0]} is listed twice")
    return ordered


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
