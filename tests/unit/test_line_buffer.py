"""LineBuffer: whatever way the input is cut, the same lines come out; and it holds no more than it may."""

import asyncio
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from crane_serve.service.api.line_buffer import LineBuffer

BYTES = st.text(alphabet="ab \n\r", max_size=60).map(str.encode)


async def lines_of(chunks: list[bytes], longest: int) -> list[bytes | None]:
    buffer = LineBuffer(longest, 10**9)
    for chunk in chunks:
        await buffer.feed(chunk)
    await buffer.end()
    found: list[bytes | None] = []
    while taken := await buffer.take():
        assert [line.index for line in taken] == [*range(len(found), len(found) + len(taken))]
        found += [line.content for line in taken]
    return found


@given(content=BYTES, cuts=st.lists(st.integers(0, 60)), longest=st.integers(1, 8))
def test_lines_do_not_depend_on_the_cuts(content: bytes, cuts: list[int], longest: int) -> None:
    edges = [0, *sorted(cuts), len(content)]
    chunks = [content[start:end] for start, end in pairwise(edges)]
    expected = [None if len(line) > longest else line.strip() for line in content.split(b"\n")]
    assert asyncio.run(lines_of(chunks, longest)) == [line for line in expected if line != b""]


async def test_feeding_waits_until_lines_are_released() -> None:
    buffer = LineBuffer(1000, 1000)
    feeding = asyncio.create_task(buffer.feed(b"x" * 499 + b"\n" + b"y" * 499 + b"\n" + b"z\n"))
    first, second = await buffer.take()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not feeding.done()
    buffer.release(first)
    await asyncio.wait_for(feeding, timeout=5)
    (third,) = await buffer.take()
    assert (second.content, third.content, third.index) == (b"y" * 499, b"z", 2)


async def test_short_lines_fill_it_too() -> None:
    buffer = LineBuffer(1000, 10_000)
    feeding = asyncio.create_task(buffer.feed(b"x\n" * 1000))
    taken = await buffer.take()
    while not feeding.done() and (more := await asyncio.wait_for(buffer.take(), timeout=5)):
        taken += more
        if len(taken) >= 10_000 // 129:
            break
    assert len(taken) == 10_000 // 129 + 1
    assert not feeding.done()
    buffer.close()
    await asyncio.wait_for(feeding, timeout=5)
    assert await buffer.take() == []


async def test_a_closed_buffer_gives_what_it_has_and_takes_no_more() -> None:
    buffer = LineBuffer(1000, 1000)
    await buffer.feed(b"a\nb")
    buffer.close()
    await buffer.feed(b"c\nd\n")
    assert [line.content for line in await buffer.take()] == [b"a"]
    assert await buffer.take() == []
