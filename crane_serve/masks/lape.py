"""Import of LAPE's published neuron files (ACL 2024, github.com/RUCAIBox/Language-Specific-Neurons)."""

from collections.abc import Sequence
from pathlib import Path

import torch

from crane_serve.masks.files import MaskFileError, MaskInfo, check_name, write_mask
from crane_serve.masks.fingerprint import Fingerprint
from crane_serve.masks.mask import NeuronMask


def import_lape(file: Path, labels: Sequence[str], fingerprint: Fingerprint, out: Path) -> list[Path]:
    """Write one mask `lape-{label}` per language of a LAPE file and return their paths.

    The file holds `list[language][layer] -> LongTensor` of neuron indices, saved with torch.save; it is read with
    `weights_only=True`, so it cannot run code. `labels` name its languages in order. All is checked before anything
    is written. Raises MaskFileError for an unreadable file, a wrong number of languages or layers, or an index out
    of range.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for damaged files has no common base
        reason = str(error).splitlines() or [type(error).__name__]
        raise MaskFileError(f"{file}: not a LAPE neuron file: {reason[0]}") from error
    if not isinstance(content, list | tuple) or not all(isinstance(layers, list | tuple) for layers in content):
        raise MaskFileError(f"{file}: expected list[language][layer] of tensors, found {type(content).__name__}")
    if len(content) != len(labels):
        raise MaskFileError(f"{file}: holds {len(content)} languages, but {len(labels)} labels were given")
    if len(set(labels)) != len(labels):
        raise MaskFileError(f"labels {', '.join(labels)} are not all different")

    masks = []
    for label, layers in zip(labels, content, strict=True):
        check_name(label)
        check_name(_mask_name(label))
        for layer, indices in enumerate(layers):
            if not _is_index_list(indices):
                raise MaskFileError(f"{file}: {label}, layer {layer}: expected a one-dimensional LongTensor")
        try:
            mask = NeuronMask.switching_off([row.tolist() for row in layers], fingerprint.intermediate_sizes)
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


def _is_index_list(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64 or value.ndim != 1:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"
