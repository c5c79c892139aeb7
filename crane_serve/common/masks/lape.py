"""Import of LAPE's published neuron files (ACL 2024, github.com/RUCAIBox/Language-Specific-Neurons)."""

from collections.abc import Mapping, Sequence
from itertools import filterfalse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crane_serve.common.masks.files import MaskFileError, MaskInfo, check_name, write_mask
from crane_serve.common.masks.fingerprint import Fingerprint
from crane_serve.common.masks.mask import NeuronMask

_EXPECTED = "expected list[language][layer] of tensors of indices, or pairs [layer, neuron] for each language"


def import_lape(file: Path, labels: Sequence[str], fingerprint: Fingerprint, out: Path) -> list[Path]:
    """Write one mask `lape-{label}` per language of a LAPE file and return their paths.

    The file was saved with torch.save and is read with `weights_only=True`, so it cannot run code. A published file has
    `list[language][layer] -> LongTensor` of neuron indices, and `labels` name its languages in order. Other projects
    that follow LAPE use other forms, which are accepted too: a dict by language (the labels must then be its keys); for
    a language a dict by layer, or pairs [layer, neuron] as a list or a tensor [pairs, 2]; lists of numbers instead of
    tensors. A file of pairs alone is one language. Everything is checked before anything is written.

    Raises MaskFileError for an unreadable file, one of another form, a wrong number of languages or layers, or an index
    out of range.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for damaged files has no common base
        reason = str(error).splitlines() or [type(error).__name__]
        raise MaskFileError(f"{file}: not a LAPE neuron file: {reason[0]}") from error
    by_label = _by_label(content, labels, file)

    masks = []
    for label, value in by_label.items():
        check_name(label)
        check_name(_mask_name(label))
        layers = _by_layer(value, fingerprint.layers, f"{file}: {label}")
        try:
            mask = NeuronMask.switching_off(layers, fingerprint.intermediate_sizes)
        except ValueError as error:
            raise MaskFileError(f"{file}: {label}: {error}") from error
        masks.append(mask)

    total = sum(fingerprint.intermediate_sizes)
    return [
        write_mask(
            out,
            _mask_name(label),
            mask,
            MaskInfo(
                language=label,
                method="lape",
                budget=mask.neurons / total,
                fingerprint=fingerprint,
                parameters={"imported_from": file.name},
            ),
        )
        for label, mask in zip(labels, masks, strict=True)
    ]


def _mask_name(label: str) -> str:
    return f"lape-{label}"


def _by_label(content: Any, labels: Sequence[str], file: Path) -> dict[str, Any]:
    """Label -> the file's content for it."""
    if len(set(labels)) != len(labels):
        raise MaskFileError(f"labels {', '.join(labels)} are not all different")
    if isinstance(content, Mapping):
        if {str(key) for key in content} != set(labels):
            keys = ", ".join(map(str, content))
            raise MaskFileError(f"{file}: holds the languages {keys}; expected the labels {', '.join(labels)}")
        by_name = {str(key): value for key, value in content.items()}
        return {label: by_name[label] for label in labels}
    if len(labels) == 1 and _pairs(content) is not None:
        return {labels[0]: content}
    if not isinstance(content, list | tuple) or not all(map(_may_be_language, content)):
        strange = content if not isinstance(content, list | tuple) else next(filterfalse(_may_be_language, content))
        place = "" if strange is content else " in a list"
        raise MaskFileError(f"{file}: {_EXPECTED}; found {_kind(strange)}{place}")
    if len(content) != len(labels):
        hint = " (pairs [layer, neuron] are one language, and take one label)" if _pairs(content) is not None else ""
        raise MaskFileError(f"{file}: holds {len(content)} languages, but {len(labels)} labels were given{hint}")
    return dict(zip(labels, content, strict=True))


def _by_layer(value: Any, layers: int, where: str) -> list[list[int]]:
    """The indices of each layer, of one language. Raises MaskFileError, which begins with `where`."""
    pairs = _pairs(value)
    if pairs is not None and not isinstance(value, Tensor) and len(pairs) == layers:
        raise MaskFileError(
            f"{where}: {layers} lists of two numbers may be pairs [layer, neuron] or the indices of {layers} layers; "
            "expected a tensor [pairs, 2], or a tensor for each layer"
        )
    if pairs is not None:
        neurons: list[list[int]] = [[] for _ in range(layers)]
        for layer, neuron in pairs:
            if not 0 <= layer < layers:
                raise MaskFileError(f"{where}: pair [{layer}, {neuron}]: there is no layer {layer} of {layers}")
            neurons[layer].append(neuron)
        return neurons
    if isinstance(value, Mapping):
        by_layer = {str(layer): indices for layer, indices in value.items()}
        if strange := [layer for layer in by_layer if not layer.isdecimal() or int(layer) >= layers]:
            raise MaskFileError(f"{where}: there is no layer {strange[0]!r} of {layers}")
        value = [by_layer.get(str(layer), []) for layer in range(layers)]
    if not isinstance(value, list | tuple):
        raise MaskFileError(f"{where}: {_EXPECTED}; found {_kind(value)}")
    of_layers = []
    for layer, entry in enumerate(value):
        indices = _numbers(entry)
        if indices is None:
            raise MaskFileError(
                f"{where}, layer {layer}: expected a one-dimensional tensor or list of whole numbers; "
                f"found {_kind(entry)}"
            )
        of_layers.append(indices)
    return of_layers


def _may_be_language(value: Any) -> bool:
    return isinstance(value, list | tuple | Mapping) or _pairs(value) is not None


def _pairs(value: Any) -> list[list[int]] | None:
    """Pairs [layer, neuron], from a tensor [pairs, 2] or a list of lists of two numbers; None for anything else."""
    if isinstance(value, Tensor):
        return value.tolist() if _is_whole(value) and value.ndim == 2 and value.shape[1] == 2 else None
    if not isinstance(value, list | tuple) or not value or any(isinstance(pair, Tensor) for pair in value):
        return None
    pairs = [_numbers(pair) for pair in value]
    return [pair for pair in pairs if pair is not None] if all(pair and len(pair) == 2 for pair in pairs) else None


def _numbers(value: Any) -> list[int] | None:
    if isinstance(value, Tensor):
        return value.tolist() if _is_whole(value) and value.ndim == 1 else None
    if isinstance(value, list | tuple) and all(isinstance(of, int) and not isinstance(of, bool) for of in value):
        return list(value)
    return None


def _is_whole(value: Tensor) -> bool:
    whole = not value.dtype.is_floating_point and not value.dtype.is_complex and value.dtype != torch.bool
    return whole and value.layout == torch.strided and value.device.type == "cpu"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    size = f" of {len(value)}" if isinstance(value, list | tuple | Mapping) else ""
    return f"{type(value).__name__}{size}"
