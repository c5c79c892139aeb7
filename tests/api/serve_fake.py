"""The real server over a fake engine, as a process: FakeServer.

Prompts tell the engine what to do: "wait" runs until SIGUSR1, "notice" until SIGUSR1 or the death of the engine, "hang"
for ever; a stream of each gives its first token at once. SIGUSR2 kills the engine.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator
from functools import cached_property
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from crane_serve.common.masks import ResolvedMask
from crane_serve.engine.answers import EngineDead, Sampling, Step
from crane_serve.service.api.app import create_app
from crane_serve.service.lifecycle import run
from crane_serve.service.logs import configure_logging
from crane_serve.service.settings import ServeSettings
from tests.api.fake_engine import FakeEngine
from tests.forked import context

_SENTENCES = {
    None: "the old bridge across the river was closed and people walk through the park",
    "attnlrp-zh": "cây cầu cũ bắc qua sông đã đóng cửa nên mọi người đi bộ qua công viên",
    "attnlrp-vi,attnlrp-zh": "le vieux pont sur la rivière a été fermé et les gens traversent le parc",
    "attnlrp-zh@0.5": "die alte Brücke über den Fluss wurde geschlossen und die Leute gehen durch den Park",
}
ANSWERS = {
    "attnlrp-vi": tuple("河上的旧桥去年冬天关闭了，人们现在穿过公园走到市场去。"),
    **{mask: tuple(f" {word}" for word in sentence.split()) for mask, sentence in _SENTENCES.items()},
}
"""What an engine that talks says, by mask: English, Vietnamese, Chinese, French, German."""

_START_S = 60


class ToldEngine(FakeEngine):
    """A FakeEngine that does what its prompts and signals say.

    talks: takes its time and says things in several languages, another under each mask.
    """

    def __init__(self, talks: bool = False) -> None:
        super().__init__()
        if talks:
            self.answers, self.token_s = ANSWERS, 0.01
        self.released = asyncio.Event()
        self.died = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self.released.set)
        loop.add_signal_handler(signal.SIGUSR2, self.die)

    def die(self) -> None:
        self.is_dead = True
        self.died.set()

    def stop(self) -> None:
        super().stop()
        print("engine stopped", file=sys.stderr, flush=True)

    async def generate(
        self, prompt_ids: list[int], sampling: Sampling, mask: ResolvedMask | None, **options: Any
    ) -> AsyncGenerator[Step]:
        prompt = self.tokenizer.decode(prompt_ids, skip_special_tokens=True)
        steps = super().generate(prompt_ids, sampling, mask, **options)
        try:
            async for step in steps:
                yield step
                if options["stream"]:
                    await self._obey(prompt)
            if not options["stream"]:
                await self._obey(prompt)
        finally:
            await steps.aclose()

    async def _obey(self, prompt: str) -> None:
        if prompt == "wait":
            await self.released.wait()
        elif prompt == "hang":
            await asyncio.Event().wait()
        elif prompt == "notice":
            waits = [asyncio.create_task(event.wait()) for event in (self.released, self.died)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self.is_dead:
                raise EngineDead("the engine has died")


def make_app(settings: ServeSettings, fail: str | None, never: bool, talks: bool = False) -> FastAPI:
    async def start() -> Any:
        if fail is not None:
            raise RuntimeError(fail)
        if never:
            print("starting", file=sys.stderr, flush=True)
            await asyncio.Event().wait()
        return ToldEngine(talks)

    return create_app(start, settings)


def _serve(log: Path, settings: dict[str, Any], fail: str | None, never: bool, talks: bool) -> None:
    with log.open("wb") as output:
        os.dup2(output.fileno(), 2)
    loaded = ServeSettings(**settings)
    configure_logging(loaded.log_format, loaded.log_level)
    sys.exit(run(make_app(loaded, fail, never, talks), loaded))


class FakeServer:
    """A server process on a port of its own.

    fail: what the start of its engine fails with; never: whether that takes for ever; talks: as ToldEngine. Servers
    fork from a process that has imported everything.
    """

    def __init__(
        self, directory: Path, fail: str | None = None, never: bool = False, talks: bool = False, **settings: Any
    ) -> None:
        self._log = directory / "server.log"
        self._log.touch()
        given = {"model": "tiny", "masks": str(directory), "port": 0, "log_format": "json", **settings}
        self.process = context().Process(target=_serve, args=(self._log, given, fail, never, talks), daemon=True)
        self.process.start()

    @property
    def text(self) -> str:
        """What the server has written to stderr."""
        return self._log.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its log lines."""
        return [json.loads(line) for line in self.text.splitlines() if line.startswith("{")]

    def wait_for(self, text: str) -> None:
        """Wait until stderr has this text. Raises RuntimeError if it never will."""
        deadline = time.monotonic() + _START_S
        while text not in self.text:
            if self.process.exitcode is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{text!r} was not written:\n{self.text}")
            time.sleep(0.02)

    @cached_property
    def port(self) -> int:
        """Where it listens, once it does."""
        self.wait_for('"listening"')
        return next(int(line["port"]) for line in self.lines if line["message"] == "listening")

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def exit_code(self) -> int | None:
        """Of the process, once it has ended; None if it does not."""
        self.process.join(_START_S)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
