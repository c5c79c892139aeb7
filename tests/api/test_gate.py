"""What the gate lets in: limits, order, and that nothing counted is ever lost."""

import asyncio

import pytest

from crane_serve.service.api.context import RequestContext
from crane_serve.service.api.errors import ApiError, TooBusy, describe
from crane_serve.service.api.gate import Gate
from crane_serve.service.api.keys import Key, Role


def request(name: str | None = None) -> RequestContext:
    return RequestContext("-", key=None if name is None else Key(name, Role.USER))


def admitted(gate: Gate, sequences: int = 0, name: str | None = None) -> RequestContext:
    context = request(name)
    gate.admit(context, sequences)
    return context


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_request_may_go_over_the_limit() -> None:
    gate = Gate(4, 10)
    first, second = admitted(gate, 3), admitted(gate, 50)
    assert gate.sequences == 53
    late = request()
    with pytest.raises(TooBusy, match="53 prompts are waiting or running; at most 4 may") as caught:
        gate.admit(late, 1)
    status, body, headers = describe(caught.value)
    assert (status, body.code, int(headers["Retry-After"]) > 0) == (429, "queue_full", True)
    assert (late.admitted, late.sequences, gate.sequences) == (False, 0, 53)
    gate.leave(second)
    gate.admit(late, 1)
    gate.leave(first)
    gate.leave(late)
    assert gate.sequences == 0


async def test_a_key_has_so_many_requests() -> None:
    gate = Gate(100, 2)
    mine = [admitted(gate, 1, "a") for _ in range(2)]
    with pytest.raises(TooBusy, match="this key has 2 requests under way") as caught:
        admitted(gate, 1, "a")
    assert caught.value.code == "too_many_requests"
    assert gate.sequences == 2
    others = [admitted(gate, 1, "b"), *(admitted(gate, 1) for _ in range(5))]
    gate.leave(mine.pop())
    mine.append(admitted(gate, 1, "a"))
    for context in (*mine, *others):
        gate.leave(context)
    assert gate.sequences == 0
    assert not gate._requests_per_key


async def test_a_refusal_by_the_queue_does_not_count_for_the_key() -> None:
    gate = Gate(1, 1)
    full = admitted(gate, 1)
    for _ in range(3):
        with pytest.raises(TooBusy, match="prompts are waiting"):
            admitted(gate, 1, "a")
    gate.leave(full)
    admitted(gate, 1, "a")


async def test_leaving_twice_or_without_admission_changes_nothing() -> None:
    gate = Gate(10, 10)
    other, context = admitted(gate, 3, "a"), admitted(gate, 2, "a")
    gate.leave(request("a"))
    gate.leave(context)
    gate.leave(context)
    assert (gate.sequences, context.admitted, context.sequences) == (3, False, 0)
    gate.leave(other)
    assert (gate.sequences, dict(gate._requests_per_key)) == (0, {})


async def test_admitting_twice_is_a_mistake() -> None:
    gate = Gate(10, 10)
    context = admitted(gate, 1)
    with pytest.raises(AssertionError):
        gate.admit(context, 1)
    assert gate.sequences == 1


async def test_a_closed_gate_lets_running_requests_go_on() -> None:
    gate = Gate(1, 10)
    batch = admitted(gate)
    await gate.wait(batch)
    waiting = asyncio.create_task(gate.wait(batch))
    await settle()
    gate.closed = True
    with pytest.raises(ApiError, match="shutting down") as caught:
        admitted(gate, 1)
    status, body, headers = describe(caught.value)
    assert (status, body.code, headers["Connection"]) == (503, "shutting_down", "close")
    assert int(headers["Retry-After"]) > 0
    gate.give_back(batch)
    await waiting
    gate.give_back(batch)
    await gate.wait(batch)
    gate.leave(batch)
    assert gate.sequences == 0


async def test_waiting_never_exceeds_the_limit() -> None:
    gate = Gate(3, 10)
    contexts = [admitted(gate) for _ in range(4)]
    running, most = 0, 0

    async def line(context: RequestContext, index: int) -> None:
        nonlocal running, most
        await gate.wait(context)
        running += 1
        most = max(most, running, gate.sequences)
        for _ in range(index % 5):
            await asyncio.sleep(0)
        running -= 1
        gate.give_back(context)

    await asyncio.gather(*(line(contexts[index % 4], index) for index in range(200)))
    assert most == 3
    assert (gate.sequences, [context.sequences for context in contexts]) == (0, [0] * 4)


async def test_waiting_is_in_order_and_nobody_gets_ahead() -> None:
    gate = Gate(1, 10)
    context = admitted(gate)
    order: list[int] = []
    await gate.wait(context)

    async def line(index: int) -> None:
        await gate.wait(context)
        order.append(index)
        await asyncio.sleep(0)
        gate.give_back(context)

    lines = [asyncio.create_task(line(index)) for index in range(5)]
    await settle()
    gate.give_back(context)
    # The place is the first one's already, although that has not run since.
    lines.append(asyncio.create_task(line(5)))
    with pytest.raises(TooBusy):
        admitted(gate, 1)
    await asyncio.gather(*lines)
    assert order == [0, 1, 2, 3, 4, 5]
    assert gate.sequences == 0


@pytest.mark.parametrize("cancelled", [0, 1, 2])
async def test_a_cancelled_waiter_loses_nothing(cancelled: int) -> None:
    gate = Gate(1, 10)
    context = admitted(gate)
    await gate.wait(context)
    waiters = [asyncio.create_task(gate.wait(context)) for _ in range(3)]
    await settle()
    waiters[cancelled].cancel()
    await settle()
    rest = [waiter for waiter in waiters if waiter is not waiters[cancelled]]
    for waiter in rest:
        assert gate.sequences == 1
        gate.give_back(context)
        await waiter
    assert (gate.sequences, context.sequences) == (1, 1)
    gate.give_back(context)
    assert (gate.sequences, context.sequences) == (0, 0)


@pytest.mark.parametrize("cancel_first", [False, True], ids=["let in first", "cancelled first"])
async def test_a_place_given_to_a_cancelled_waiter_goes_to_the_next(cancel_first: bool) -> None:
    gate = Gate(1, 10)
    context = admitted(gate)
    await gate.wait(context)
    first, second = (asyncio.create_task(gate.wait(context)) for _ in range(2))
    await settle()
    # Both before `first` can run.
    if cancel_first:
        first.cancel()
        gate.give_back(context)
    else:
        gate.give_back(context)
        first.cancel()
    await second
    assert first.cancelled()
    assert (gate.sequences, context.sequences) == (1, 1)
    gate.leave(context)
    assert gate.sequences == 0


async def test_a_request_that_has_left_counts_no_more() -> None:
    gate = Gate(1, 10)
    gone, other = admitted(gate), admitted(gate)
    await gate.wait(gone)
    orphan = asyncio.create_task(gate.wait(gone))
    waiting = asyncio.create_task(gate.wait(other))
    await settle()
    gate.leave(gone)
    await waiting
    assert orphan.done() or await asyncio.wait({orphan}, timeout=5)
    assert orphan.cancelled()
    gate.give_back(gone)
    assert (gate.sequences, gone.sequences, other.sequences) == (1, 0, 1)
    with pytest.raises(AssertionError):
        await gate.wait(gone)
    gate.leave(other)
    assert gate.sequences == 0
