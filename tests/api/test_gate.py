"""What the gate lets in: limits, and that nothing counted is ever lost."""

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


async def test_one_request_may_go_over_the_limit() -> None:
    gate = Gate(4, 10)
    first, second = admitted(gate, 3), admitted(gate, 50)
    assert gate.sequences == 53
    late = request()
    with pytest.raises(TooBusy, match=r"53 prompts .* 4") as caught:
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


async def test_a_closed_gate_admits_nothing() -> None:
    gate = Gate(10, 10)
    running = admitted(gate, 2)
    gate.closed = True
    with pytest.raises(ApiError) as caught:
        admitted(gate, 1)
    status, body, headers = describe(caught.value)
    assert (status, body.code, headers["Connection"]) == (503, "shutting_down", "close")
    assert int(headers["Retry-After"]) > 0
    assert gate.sequences == 2
    gate.leave(running)
    assert gate.sequences == 0
