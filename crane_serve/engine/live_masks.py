"""Masks that come and go while an engine serves: how a change reaches every process of it.

The front end owns the names. A new mask is sent to the engine cores and workers, by content, before the front end knows
its name. So no request can ask for a mask that a process lacks. A mask that was replaced or removed is retired at once
in the front end; its content is forgotten in the front end when no request refers to it, then in each engine core when
no request of that core does, and only then in that core's workers. Requests take the same way in the same order, so a
request never arrives before its mask.
"""

from collections.abc import Sequence
from typing import Any

from crane_serve.common.masks import MaskLibrary, decode_mask
from crane_serve.engine.config import mask_config

CHANGE_METHOD = "crane_change_mask"
FORGET_METHOD = "crane_forget_masks"
_PENDING = "_crane_pending"


def _library(vllm_config: Any) -> MaskLibrary:
    config = mask_config(vllm_config)
    if config is None:
        raise ValueError("the engine was started without masks")
    return config.library()


def _apply(library: MaskLibrary, name: str, content: bytes | None) -> None:
    if content is None:
        library.discard(name)
    else:
        library.put(decode_mask(name, content, source=f"mask {name!r}"))


def change_in_core(self: Any, name: str, content: bytes | None) -> int:
    """Method of EngineCore: put the mask with the content of a mask file, or remove it (None), here and in the workers.

    Returns the number of workers that have made the change.
    """
    _apply(_library(self.vllm_config), name, content)
    return len(self.collective_rpc(CHANGE_METHOD, args=(name, content)))


def change_in_worker(self: Any, name: str, content: bytes | None) -> None:
    """Method of WorkerWrapperBase."""
    _apply(_library(self.worker.model_runner.vllm_config), name, content)


def forget_in_core(self: Any, digests: list[str]) -> None:
    """Method of EngineCore: forget retired content, now or when the requests that refer to it have ended."""
    setattr(self, _PENDING, {*getattr(self, _PENDING, ()), *digests})
    forget_pending(self)


def forget_pending(core: Any) -> None:
    """Forget pending content that no request needs any more."""
    pending: set[str] = getattr(core, _PENDING, set())
    if not pending:
        return
    library = _library(core.vllm_config)
    library.forget(pending)
    dropped = [digest for digest in pending if digest not in library]
    if dropped:
        core.collective_rpc(FORGET_METHOD, args=(dropped,))
    # Content that has a name again must be kept.
    setattr(core, _PENDING, pending & library.retired)


def forget_in_worker(self: Any, digests: Sequence[str]) -> None:
    """Method of WorkerWrapperBase."""
    _library(self.worker.model_runner.vllm_config).forget(digests)
