"""The masks of a verification: generated ones, and the user's own."""

import random
from dataclasses import dataclass
from pathlib import Path

from crane_serve.common.masks import Fingerprint, MaskFileError, MaskInfo, MaskLibrary, NeuronMask, write_mask

_PREFIX = "crane-verify-"
_SLICES = 8
_RANDOM = 3
_RANDOM_SHARE = 0.1  # of each layer's neurons


@dataclass(frozen=True)
class TrialMasks:
    """Names of the masks of a trial directory.

    layers: each switches all neurons of one layer off; slices: each switches one part of every layer off, so that with
    tensor parallelism every rank has some of its own; random: some of every layer; from_user: the user's; unusable:
    messages about the user's files that cannot be used.
    """

    layers: tuple[str, ...]
    slices: tuple[str, ...]
    random: tuple[str, ...]
    from_user: tuple[str, ...] = ()
    unusable: tuple[str, ...] = ()


def write_trial_masks(directory: Path, fingerprint: Fingerprint, masks: Path | None) -> TrialMasks:
    """Fill `directory` with generated masks and links to those of `masks`.

    Raises MaskFileError if `masks` is not a directory or holds a name that generated masks have.
    """
    library = None if masks is None else MaskLibrary.load(masks, fingerprint)
    directory.mkdir(exist_ok=True)
    if library is not None and masks is not None:
        for name in library.masks:
            if name.startswith(_PREFIX):
                raise MaskFileError(f"{masks}: mask {name!r} has a name that `crane verify` uses itself; rename it")
            (directory / f"{name}.safetensors").symlink_to((masks / f"{name}.safetensors").resolve())
    sizes = fingerprint.intermediate_sizes
    draw = random.Random(0)

    def write(name: str, neurons: list[list[int]]) -> str:
        info = MaskInfo(language="none", method="verify", fingerprint=fingerprint)
        write_mask(directory, f"{_PREFIX}{name}", NeuronMask.switching_off(neurons, sizes), info)
        return f"{_PREFIX}{name}"

    def layer(off: int) -> list[list[int]]:
        return [list(range(size)) if index == off else [] for index, size in enumerate(sizes)]

    def part(number: int) -> list[list[int]]:
        return [list(range(number * size // _SLICES, (number + 1) * size // _SLICES)) for size in sizes]

    def sample() -> list[list[int]]:
        return [draw.sample(range(size), max(1, round(_RANDOM_SHARE * size))) for size in sizes]

    return TrialMasks(
        layers=tuple(write(f"layer-{index}", layer(index)) for index in range(len(sizes))),
        slices=tuple(write(f"slice-{number}", part(number)) for number in range(_SLICES)),
        random=tuple(write(f"random-{number}", sample()) for number in range(_RANDOM)),
        # A mask that scales nothing has no effect to look for.
        from_user=tuple(name for name, stored in library.masks.items() if _scales(stored.mask)) if library else (),
        unusable=tuple(library.invalid.values()) if library else (),
    )


def _scales(mask: NeuronMask) -> bool:
    others = mask.output is not None and bool((mask.output != 1).any())
    return mask.neurons > 0 or mask.experts_off > 0 or others
