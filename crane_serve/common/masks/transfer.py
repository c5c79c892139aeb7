"""Transfer: makes masks of one checkpoint valid for another of the same shape, if the user decides so."""

from collections.abc import Sequence
from pathlib import Path

from crane_serve.common.masks.files import (
    SUFFIX,
    MaskFileError,
    MaskInfo,
    StoredMask,
    check_name,
    read_mask,
    write_mask,
)
from crane_serve.common.masks.fingerprint import Fingerprint

_SHAPE = ("architecture", "layers", "hidden_size", "intermediate_sizes", "experts")


class TransferError(ValueError):
    """A mask cannot be transferred to this checkpoint; the message says why."""


def transfer_masks(masks: Path, fingerprint: Fingerprint, out: Path, names: Sequence[str] = ()) -> list[Path]:
    """Write the masks of the directory `masks` for the checkpoint with `fingerprint` into `out`; return their paths.

    names: of the masks, all by default. Scales and digests stay the same. For the provenance see `transferred`.
    Everything is checked before anything is written. Raises MaskFileError for a directory without masks, or a file that
    is not a mask; TransferError when `out` is the same directory, or the checkpoint has another shape than a mask's.
    """
    if out.resolve() == masks.resolve():
        raise TransferError(f"{out} holds the masks to transfer; expected another directory, so that these stay")
    ready = [transferred(stored, fingerprint) for stored in read_masks(masks, names)]
    return [write_mask(out, stored.name, stored.mask, stored.info) for stored in ready]


def read_masks(masks: Path, names: Sequence[str] = ()) -> list[StoredMask]:
    """The masks `names` of the directory `masks`, each once, or all of them. Raises MaskFileError."""
    if not masks.is_dir():
        raise MaskFileError(f"{masks} is not a directory of mask files")
    files = [masks / f"{check_name(name)}{SUFFIX}" for name in names] or sorted(masks.glob(f"[!.]*{SUFFIX}"))
    if not files:
        raise MaskFileError(f"{masks} holds no mask files")
    return [read_mask(file) for file in dict.fromkeys(files)]


def transferred(stored: StoredMask, fingerprint: Fingerprint) -> StoredMask:
    """`stored` with its scales unchanged, for the model with `fingerprint`.

    `transferred_from` is the model that the neurons were found in, also after several transfers. After a transfer back
    to that model it is None. Raises TransferError for a model of another architecture or shape.
    """
    _require_same_shape(stored, fingerprint)
    origin = stored.info.transferred_from or stored.info.fingerprint
    info: MaskInfo = stored.info.model_copy(
        update={"fingerprint": fingerprint, "transferred_from": None if fingerprint.is_of(origin) else origin}
    )
    return StoredMask(stored.name, stored.mask, info)


def _require_same_shape(stored: StoredMask, fingerprint: Fingerprint) -> None:
    of_mask = stored.info.fingerprint
    for field in _SHAPE:
        mine, theirs = getattr(of_mask, field), getattr(fingerprint, field)
        if mine == theirs:
            continue
        what = field.replace("_", " ")
        if isinstance(mine, tuple):  # as long as the other, since the number of layers is equal
            layer = next(index for index, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
            what, mine, theirs = f"intermediate size in layer {layer}", mine[layer], theirs[layer]
        raise TransferError(
            f"mask {stored.name!r} cannot be transferred: the {what} of its model is {mine}, that of the new "
            f"checkpoint {theirs}"
        )
