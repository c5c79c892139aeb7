"""Turns for rows of the mask table."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from crane_serve.engine.rows import Rows
from crane_serve.engine.service import EngineService


class Scene:
    """Requests that take a row, hold it until they are told to end, and are written down."""

    def __init__(self, count: int | None) -> None:
        self.rows = Rows(count)
        self.has: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str) -> None:
        """name: the mask, and a number."""
        self._ends[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._run(name))
        await settle()

    async def _run(self, name: str) -> None:
        async with self.rows.taken(name[0]):
            self.has.append(name)
            await self._ends[name].wait()
            self.has.remove(name)

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await settle()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await settle()
        if name in self.has:
            self.has.remove(name)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def scene(count: int | None) -> AsyncIterator[Scene]:
    made = Scene(count)
    yield made
    for task in made._tasks.values():
        task.cancel()
    await settle()
    assert not made.rows.running
    assert made.rows.waiting == 0


async def test_masks_share_rows_and_wait_in_their_order() -> None:
    async with scene(2) as of:
        for name in ("a1", "b1", "a2", "c1", "d1", "a3", "c2"):
            await of.ask(name)
        assert of.has == ["a1", "b1", "a2"], "a3 waits behind c1, though its mask has a row"
        assert of.rows.waiting == 4
        await of.end("a1")
        assert of.has == ["b1", "a2"]
        await of.end("b1")
        assert of.has == ["a2", "c1"], "d1 finds no row; nobody overtakes it"
        await of.end("a2")
        assert of.has == ["c1", "d1"]
        await of.end("c1")
        assert of.has == ["d1", "a3"]
        await of.end("d1")
        assert of.has == ["a3", "c2"]


async def test_who_goes_makes_room_for_the_next() -> None:
    async with scene(1) as of:
        for name in ("a1", "b1", "a2"):
            await of.ask(name)
        assert of.has == ["a1"]
        await of.cancel("b1")
        assert of.has == ["a1", "a2"]


async def test_a_turn_that_comes_with_the_cancellation_is_passed_on() -> None:
    async with scene(1) as of:
        for name in ("a1", "b1", "c1"):
            await of.ask(name)
        of._ends["a1"].set()
        await asyncio.sleep(0)  # a1 gives its row to b1, which has not run yet
        of._tasks["b1"].cancel()
        await settle()
        assert of.has == ["c1"]


async def test_a_row_that_comes_after_the_cancellation_goes_to_the_next() -> None:
    async with scene(1) as of:
        for name in ("a1", "b1", "c1"):
            await of.ask(name)
        of._ends["a1"].set()
        of._tasks["b1"].cancel()  # b1 is cancelled, but has not run yet, when a1 gives its row back
        await settle()
        assert of.has == ["c1"]


async def test_enough_rows_are_never_waited_for() -> None:
    async with scene(None) as of:
        for mask in "abcdefgh":
            await of.ask(f"{mask}1")
        assert len(of.has) == 8


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_everybody_gets_a_turn(count: int) -> None:
    rows, most, done = Rows(count), 0, 0

    async def run(mask: str) -> None:
        nonlocal most, done
        async with rows.taken(mask):
            most = max(most, len(rows.running))
            await asyncio.sleep(0.001)
            done += 1

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for number in range(60):
            group.create_task(run("abcde"[number % 5]))
    assert (most, done) == (count, 60)


async def test_who_waits_for_a_row_takes_no_place_of_those_who_ask_for_activations() -> None:
    begun: list[str] = []

    @asynccontextmanager
    async def kept(*_: object) -> AsyncIterator[None]:
        begun.append("activations")
        raise RuntimeError("its turn has come")
        yield

    service: Any = object.__new__(EngineService)
    service._rows = Rows(1)
    service._activations = SimpleNamespace(require=lambda *_: begun.append("required"), kept=kept)
    parallel = SimpleNamespace(data_parallel_size=1)
    service._engine = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=99), vllm_config=SimpleNamespace(parallel_config=parallel)
    )
    mask: Any = SimpleNamespace(mask=SimpleNamespace(digest="zh"))
    async with service._rows.taken("vi"):
        waiting = asyncio.create_task(service.score([1, 2], (), mask))
        await settle()
        assert begun == ["required"]
    with pytest.raises(RuntimeError, match="its turn has come"):
        await waiting
    assert begun == ["required", "activations"]
