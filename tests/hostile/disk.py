"""A disk that fails while masks are changed."""

import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.hostile.case import Case, Outcome


class _Core:
    """An engine core's masks, by digest, as `live_masks` changes them."""

    def __init__(self, library: Any) -> None:
        self.library = library

    async def call_utility_async(self, method: str, *arguments: Any) -> None:
        from crane_serve.common.masks import decode_mask
        from crane_serve.engine.live_masks import FORGET_METHOD

        if method == FORGET_METHOD:
            self.library.forget(arguments[0])
        elif arguments[1] is None:
            self.library.discard(arguments[0])
        else:
            self.library.put(decode_mask(*arguments, source="a mask"))


def _over_a_directory(measure: Callable[[Any, Any, Any, Path], Any]) -> Any:
    """The result of `measure(changes, core, mask to put, directory)`; the directory holds one mask, `old`."""
    import torch

    from crane_serve.common.masks import Fingerprint, MaskInfo, MaskLibrary, NeuronMask, StoredMask, write_mask
    from crane_serve.engine.cores import Cores
    from crane_serve.engine.mask_changes import MaskChanges

    fingerprint = Fingerprint(
        architecture="LlamaForCausalLM",
        layers=1,
        hidden_size=4,
        intermediate_sizes=(4,),
        config_digest="a" * 64,
        weights_digest="b" * 64,
    )
    info = MaskInfo(language="zh", method="made", fingerprint=fingerprint)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_mask(directory, "old", NeuronMask(torch.zeros(1, 4), (4,)), info)
        library, core = MaskLibrary.load(directory, fingerprint), _Core(MaskLibrary.load(directory, fingerprint))
        config: Any = SimpleNamespace(masks=directory, outputs=False, offsets=False)
        cores = Cores(SimpleNamespace(engine_core=core))
        new = StoredMask("new", NeuronMask(torch.full((1, 4), 0.5), (4,)), info)

        async def run() -> Any:
            return await measure(MaskChanges(config, library, cores), core, new, directory)

        return asyncio.run(run())


def _put_that_fails() -> Outcome:
    def full(*_: object) -> None:
        raise OSError("disk full")

    async def measure(changes: Any, core: Any, new: Any, directory: Path) -> Outcome:
        with mock.patch.object(Path, "replace", full):
            try:
                await changes.put(new, save=True)
                return Outcome("acknowledged", False)
            except OSError:
                left = new.mask.digest in core.library
        return Outcome("its content stays in the core" if left else "its content is forgotten again", not left)

    return _over_a_directory(measure)


def _removal_unsynced() -> Outcome:
    async def measure(changes: Any, core: Any, new: Any, directory: Path) -> Outcome:
        synced: list[str] = []
        fsync = os.fsync

        def noting(descriptor: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        with mock.patch.object(os, "fsync", noting):
            await changes.remove("old", save=True)
        held = str(directory.resolve()) in synced
        return Outcome("directory synced" if held else "directory not synced: the mask may come back", held)

    return _over_a_directory(measure)


CASES = {
    "put-fails": Case(15, "PUT, and the rename fails", "the content is in no process", _put_that_fails),
    "removal": Case(15, "DELETE, then a power cut", "the directory is synced before the answer", _removal_unsynced),
}
