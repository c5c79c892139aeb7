"""What the gate lets in: limits, and that nothing counted is ever lost."""

import pytest

from crane_serve.service.api.context import RequestContext
from crane_serve.service.api.errors import ApiError, TooBusy, describe
from crane_serve.service.api.gate import MAX_LOGPROBS, Gate
from crane_serve.service.api.keys import Key, Role


def request(name: str | None = None) -> RequestContext:
    return RequestContext("-", key=None if name is None else Key(name, Role.USER))


def admitted(gate: Gate, sequences: int = 0, name: str | None = None, logprobs: int = 0) -> RequestContext:
    context = request(name)
    gate.admit(context, sequences, logprobs)
    return context


async def test_what_runs_and_what_is_asked_for_count_together() -> None:
    gate = Gate(4, 10)
    first, second = admitted(gate, 1), admitted(gate, 2)
    late = request()
    with pytest.raises(TooBusy, match=r"^3 prompts .* 2 more .* 4$") as caught:
        gate.admit(late, 2)
    status, body, headers = describe(caught.value)
    assert (status, body.code, int(headers["Retry-After"]) > 0) == (429, "queue_full", True)
    assert (late.admitted, late.sequences, gate.sequences) == (False, 0, 3)
    third = admitted(gate, 1)
    with pytest.raises(TooBusy):
        admitted(gate, 0)  # what runs no model waits, too, while the queue is full
    gate.leave(first)
    gate.leave(third)
    gate.admit(late, 2)
    gate.leave(second)
    gate.leave(late)
    assert gate.sequences == 0


@pytest.mark.parametrize("sequences", [5, 1024 * 16384])
async def test_what_never_fits_is_no_matter_of_time(sequences: int) -> None:
    gate = Gate(4, 10)
    with pytest.raises(ApiError, match=f"{sequences} sequences, .* at most 4 ") as caught:
        admitted(gate, sequences)
    status, body, headers = describe(caught.value)
    assert (status, body.code, "Retry-After" in headers) == (400, "too_many_sequences", False)
    assert gate.sequences == 0


async def test_log_probabilities_are_bounded_over_all_sequences() -> None:
    gate = Gate(10_000, 10)
    gate.leave(admitted(gate, 1024, logprobs=20))
    for sequences, logprobs in ((1025, 20), (1, MAX_LOGPROBS + 1)):
        with pytest.raises(ApiError, match=str(MAX_LOGPROBS)) as caught:
            admitted(gate, sequences, logprobs=logprobs)
        assert (caught.value.status, caught.value.code, caught.value.param) == (400, "too_many_logprobs", "logprobs")
    assert gate.sequences == 0


async def test_a_key_has_a_share_of_the_sequences() -> None:
    gate = Gate(9, 10)  # a share of 5
    mine = admitted(gate, 4, "a")
    with pytest.raises(TooBusy, match=r"^of this key, 4 prompts .* 2 more .* 5$") as caught:
        admitted(gate, 2, "a")
    assert caught.value.code == "key_queue_full"
    with pytest.raises(ApiError, match="at most 5 ") as never:
        admitted(gate, 6, "a")
    assert never.value.code == "too_many_sequences"
    others = [admitted(gate, 3, "b"), admitted(gate, 2)]
    gate.leave(mine)
    others.append(admitted(gate, 4, "a"))
    for context in others:
        gate.leave(context)
    assert (gate.sequences, dict(gate._sequences_per_key)) == (0, {})
    for share, most in ((7, 7), (100, 9)):
        admitted(Gate(9, 10, share), most, "a")
        with pytest.raises(ApiError, match=f"at most {most} "):
            admitted(Gate(9, 10, share), most + 1, "a")
    admitted(Gate(9, 10, 1), 9)  # without keys there is nobody to share with


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
    assert (gate.sequences, dict(gate._requests_per_key), dict(gate._sequences_per_key)) == (0, {}, {})


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
