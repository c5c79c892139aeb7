"""MaskChanges: masks put and removed while an engine serves."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from typing import Any

from crane_serve.common.atomic import remove_file, written_aside
from crane_serve.common.masks import MaskFileError, MaskLibrary, StoredMask, UnknownMask, encode_mask, mask_path
from crane_serve.common.masks.hub import is_pinned
from crane_serve.engine.answers import EngineDead, PinnedMasks
from crane_serve.engine.config import OFFSETS_VARIABLE, MaskConfig
from crane_serve.engine.cores import Cores
from crane_serve.engine.live_masks import CHANGE_METHOD, FORGET_METHOD


class MaskChanges:
    """Changes, one after the other, of the masks of `library`, of the engine cores and on the disk: all or none."""

    def __init__(self, config: MaskConfig, library: MaskLibrary, cores: Cores) -> None:
        self._config = config
        self.library = library
        self._cores = cores
        self._changing = asyncio.Lock()
        self._forgetting: asyncio.Task[None] | None = None

    async def put(self, stored: StoredMask, *, save: bool = False) -> None:
        """Add a mask while serving, or replace the one of its name; requests that use the old one finish with it.

        save: write it to the directory of masks, too, before any process has it. Returns when every process has it.
        Raises PinnedMasks if that is a commit of the Hub, FingerprintError for another model's mask, MaskFileError for
        a mask that this engine cannot run, OSError if it cannot be written, EngineDead. After an error nothing has
        changed.
        """
        self._require_own_files(save)
        self.library.fingerprint.require(stored.info.fingerprint, f"mask {stored.name!r}")
        if stored.mask.output is not None and not self._config.outputs:
            raise MaskFileError(
                f"mask {stored.name!r} scales MLP output dimensions, which this engine was started without"
            )
        if stored.mask.offset is not None and not self._config.offsets:
            raise MaskFileError(
                f"mask {stored.name!r} adds to neurons, which this engine was started without; "
                f"{OFFSETS_VARIABLE}=1 at its start, or a mask that does so, makes room for it"
            )
        content = encode_mask(stored.name, stored.mask, stored.info)
        await self._whole(self._put(stored, content, save))

    def _require_own_files(self, save: bool) -> None:
        if save and is_pinned(self._config.masks):
            raise PinnedMasks(
                "the masks of this server are a commit of a repository on the Hub, which does not change; serve a "
                "directory (`crane masks pull`) to change masks"
            )

    async def _put(self, stored: StoredMask, content: bytes, save: bool) -> None:
        async with self._changing:
            with ExitStack() as files:
                put_in_place: Callable[[], None] | None = None
                if save:
                    aside = written_aside(mask_path(self._config.masks, stored.name), content)
                    put_in_place = await asyncio.to_thread(files.enter_context, aside)
                try:
                    await self._cores.tell(CHANGE_METHOD, stored.name, content)
                    if put_in_place is not None:
                        await asyncio.to_thread(put_in_place)
                except Exception:
                    with suppress(Exception):  # what has failed may fail again; the first error says why
                        await self._take_back(stored)
                    raise
            self.library.put(stored)
        await self._forget_unused()

    async def _take_back(self, stored: StoredMask) -> None:
        """Have the engine cores be as the front end, which never had `stored`."""
        before = self.library.masks.get(stored.name)
        content = None if before is None else encode_mask(before.name, before.mask, before.info)
        await self._cores.tell(CHANGE_METHOD, stored.name, content)
        if stored.mask.digest not in self.library:  # requests of the front end may have it otherwise
            await self._cores.tell(FORGET_METHOD, [stored.mask.digest])

    async def remove(self, name: str, *, save: bool = False) -> None:
        """Remove the mask of exactly this name while serving; requests that use it finish with it.

        save: remove its file, too; the only way to remove a file without a usable mask. Raises PinnedMasks if it is in
        a commit of the Hub, UnknownMask, OSError if the file cannot be removed (then nothing has changed), EngineDead.
        """
        self._require_own_files(save)
        await self._whole(self._remove(name, save))

    async def _remove(self, name: str, save: bool) -> None:
        async with self._changing:
            if name not in self.library.masks and not (save and name in self.library.invalid):
                known = ", ".join(self.library.masks) or "no masks"
                raise UnknownMask(f"unknown mask {name!r}; this server has {known}")
            if save:
                await asyncio.to_thread(remove_file, mask_path(self._config.masks, name))
            self.library.discard(name)
            await self._cores.tell(CHANGE_METHOD, name, None)
        await self._forget_unused()

    @staticmethod
    async def _whole(change: Coroutine[Any, Any, None]) -> None:
        """Run a change to its end, even if the caller is cancelled: half a change would leave the processes with
        different masks."""
        await asyncio.shield(asyncio.ensure_future(change))

    def forget_soon(self) -> None:
        """Forget, in this process and in the engine cores, masks that no request uses any more; in the event loop."""
        if self._forgetting is None or self._forgetting.done():
            self._forgetting = asyncio.get_running_loop().create_task(self._forget_unused())

    async def _forget_unused(self) -> None:
        async with self._changing:
            with suppress(EngineDead):  # then there is nobody left to forget
                while digests := self.library.forget(self.library.retired):
                    await self._cores.tell(FORGET_METHOD, digests)
