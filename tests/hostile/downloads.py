"""Readers of whole masks who take nothing of what they have asked for."""

import asyncio
import json
import resource
import time
from typing import Any

from tests.hostile.case import Case, Outcome

_LAYERS, _NEURONS = 80, 28_672  # Llama-3-70B's
_READERS = 6
_QUIET_S = 15.0
_MOST_MIB = 256
_HEAD_BYTES = 4096


def _peak_mib() -> float:
    """Of this process's memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def _held(path: str) -> tuple[float, int, float]:
    """By how many MiB memory grew for readers who take nothing, how many of them were under way, and the longest time
    in which another request was answered meanwhile."""
    import torch

    from crane_serve.common.masks import MaskInfo, MaskLibrary, NeuronMask, StoredMask
    from crane_serve.service.api.app import create_app
    from tests.api.fake_engine import FINGERPRINT, FakeEngine

    sizes = (_NEURONS,) * _LAYERS
    fingerprint = FINGERPRINT.model_copy(update={"layers": _LAYERS, "intermediate_sizes": sizes})
    torch.manual_seed(0)
    mask = NeuronMask(torch.rand(_LAYERS, _NEURONS), sizes)
    info = MaskInfo(language="zh", method="test", fingerprint=fingerprint)
    engine: Any = FakeEngine()
    engine.library = MaskLibrary(fingerprint, {"large": StoredMask("large", mask, info)})

    async def start() -> Any:
        return engine

    held: set[int] = set()
    changed = time.monotonic()

    async def read(app: Any, path: str, index: int | None) -> None:
        async def send(message: Any) -> None:
            nonlocal changed
            body = message.get("body", b"")
            if index is not None and len(body) > _HEAD_BYTES:
                held.add(index)
                changed = time.monotonic()
                await asyncio.Event().wait()

        given = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Any:
            return given.pop() if given else await asyncio.Event().wait()

        await app(
            {
                "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
                "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
                "headers": [(b"host", b"localhost")],
            },
            receive,
            send,
        )  # fmt: skip

    app = create_app(start)
    async with app.router.lifespan_context(app):
        before = _peak_mib()
        tasks = [asyncio.create_task(read(app, path, index)) for index in range(_READERS)]
        slowest = 0.0
        while len(held) < _READERS and time.monotonic() < changed + _QUIET_S:
            began = time.monotonic()
            await read(app, "/health", None)
            await asyncio.sleep(0.01)
            slowest = max(slowest, time.monotonic() - began - 0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return _peak_mib() - before, len(held), slowest


def _measure(path: str) -> Outcome:
    mib, readers, slowest = asyncio.run(_held(path))
    said = f"{mib:.0f} MiB more for {readers} under way; /health took up to {slowest * 1000:.0f} ms meanwhile"
    return Outcome(said, mib <= _MOST_MIB)


def _docs() -> Outcome:
    from crane_serve.service.api.app import create_app

    async def start() -> Any:
        raise RuntimeError("nothing is asked of an engine")

    app = create_app(start)
    paths = sorted({path for route in app.routes if (path := getattr(route, "path", "")) in ("/docs", "/redoc")})
    document = json.dumps(app.openapi()).startswith("{")
    return Outcome(f"pages with scripts from elsewhere: {', '.join(paths) or 'none'}", document and not paths)


CASES = {
    "neurons-unread": Case(
        15,
        f"{_READERS} readers of /masks/NAME/neurons at 70B's shape, who take nothing",
        f"{_MOST_MIB} MiB at most",
        lambda: _measure("/masks/large/neurons"),
    ),
    "files-unread": Case(
        15,
        f"{_READERS} readers of /masks/NAME/file at 70B's shape, who take nothing",
        f"{_MOST_MIB} MiB at most",
        lambda: _measure("/masks/large/file"),
    ),
    "docs-page": Case(15, "/docs, whose page runs scripts from elsewhere", "no such page", _docs),
}
