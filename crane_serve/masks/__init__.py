"""Neuron masks: what they say, how they are stored, which model they belong to. Imports no vLLM."""

from crane_serve.masks.files import MaskFileError, MaskInfo, StoredMask, read_mask, write_mask
from crane_serve.masks.fingerprint import Fingerprint, FingerprintError
from crane_serve.masks.library import InvalidMask, MaskError, MaskLibrary, ResolvedMask, UnknownMask
from crane_serve.masks.mask import NeuronMask

__all__ = [
    "Fingerprint",
    "FingerprintError",
    "InvalidMask",
    "MaskError",
    "MaskFileError",
    "MaskInfo",
    "MaskLibrary",
    "NeuronMask",
    "ResolvedMask",
    "StoredMask",
    "UnknownMask",
    "read_mask",
    "write_mask",
]
