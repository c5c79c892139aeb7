"""Turns: one piece of work each time that the loop goes round, and a rest after a long one."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from crane_serve.service.api import turns
from crane_serve.service.api.concurrency import paced, run_all
from crane_serve.service.api.turns import Turns


async def rounds_of(count: int) -> list[int]:
    """The round of the loop in which each of `count` callers has its turn."""
    one_by_one, rounds, now = Turns(), [], 0

    async def caller() -> None:
        await one_by_one.take()
        rounds.append(now)

    callers = [asyncio.create_task(caller()) for _ in range(count)]
    while not all(task.done() for task in callers):
        await asyncio.sleep(0)
        now += 1
    return rounds


async def test_each_round_of_the_loop_has_one_turn() -> None:
    rounds = await rounds_of(20)
    assert (len(rounds), len(set(rounds))) == (20, 20)
    assert rounds == sorted(rounds)


async def test_after_a_long_turn_the_loop_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    rests: list[float] = []
    time = loop.time()
    monkeypatch.setattr(loop, "time", lambda: time)
    monkeypatch.setattr(loop, "call_later", lambda after_s, call: rests.append(after_s) or loop.call_soon(call))

    async def turn(took_s: float) -> list[float]:
        """The rests after a turn that takes so long."""
        nonlocal time
        one_by_one = Turns()
        await one_by_one.take()
        time += took_s
        rests.clear()
        await one_by_one.take()
        taken = list(rests)
        await asyncio.sleep(0)  # the second turn ends
        return taken

    assert await turn(turns._SHORT_S / 2) == []
    assert await turn(0.02) == [pytest.approx(0.02)]
    assert await turn(5.0) == [turns._LONGEST_REST_S]


async def test_who_gives_up_waiting_keeps_nobody_waiting() -> None:
    one_by_one = Turns()
    await one_by_one.take()
    gone, next_one = (asyncio.create_task(one_by_one.take()) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    async with asyncio.timeout(10):
        await next_one


async def test_many_parts_are_started_a_few_at_a_time() -> None:
    started, most = 0, 0

    async def part(number: int) -> int:
        nonlocal started
        started += 1
        await asyncio.sleep(0.001)
        return number

    async def watch() -> None:
        nonlocal most
        before = 0
        while before < 200:
            most = max(most, started - before)
            before = started
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    assert await run_all(part(number) for number in range(200)) == list(range(200))
    await watching
    assert most <= 16


async def test_the_first_error_ends_parts_that_have_not_begun(recwarn: pytest.WarningsRecorder) -> None:
    async def part(number: int) -> None:
        raise ValueError(f"part {number}")

    with pytest.raises(ValueError, match="part 0"):
        await run_all(part(number) for number in range(100))
    assert not recwarn.list


async def test_others_have_their_turn_while_long_work_goes_on() -> None:
    done, turns = False, 0

    def items() -> Iterator[int]:
        for number in range(20):
            time.sleep(0.003)
            yield number

    async def others() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await asyncio.sleep(0)

    waiting = asyncio.create_task(others())
    assert [number async for number in paced(items())] == list(range(20))
    done = True
    await waiting
    assert turns >= 5
