"""Neuron masks: their content, their files, and the model that they belong to. Does not import vLLM."""

from crane_serve.common.masks.applied import applied
from crane_serve.common.masks.composition import Composition, Member
from crane_serve.common.masks.files import (
    MaskFileError,
    MaskInfo,
    StoredMask,
    decode_mask,
    encode_mask,
    mask_path,
    read_mask,
    write_mask,
)
from crane_serve.common.masks.fingerprint import Fingerprint, FingerprintError
from crane_serve.common.masks.hub import HubMasksError, mask_directory
from crane_serve.common.masks.inline import INLINE_PREFIX, InlineMask, inline_content, inline_text
from crane_serve.common.masks.library import (
    InlineMasksOff,
    InvalidMask,
    MaskError,
    MaskLibrary,
    MaskTableFull,
    ResolvedMask,
    UnknownMask,
)
from crane_serve.common.masks.mask import NeuronMask
from crane_serve.common.masks.positions import Positions

__all__ = [
    "INLINE_PREFIX",
    "Composition",
    "Fingerprint",
    "FingerprintError",
    "HubMasksError",
    "InlineMask",
    "InlineMasksOff",
    "InvalidMask",
    "MaskError",
    "MaskFileError",
    "MaskInfo",
    "MaskLibrary",
    "MaskTableFull",
    "Member",
    "NeuronMask",
    "Positions",
    "ResolvedMask",
    "StoredMask",
    "UnknownMask",
    "applied",
    "decode_mask",
    "encode_mask",
    "inline_content",
    "inline_text",
    "mask_directory",
    "mask_path",
    "read_mask",
    "write_mask",
]
