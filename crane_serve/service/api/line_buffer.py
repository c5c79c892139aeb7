"""LineBuffer: lines of an input that have been read and not been started, bounded in bytes."""

import asyncio
from collections import deque
from dataclasses import dataclass

_LINE_OVERHEAD = 128  # bytes that a line costs beside its content
_MOST_LINES, _MOST_BYTES = 64, 2**20  # taken at once


@dataclass(frozen=True, slots=True)
class Line:
    """index: number of the line, from 0; content: without its end, None if it is longer than allowed."""

    index: int
    content: bytes | None

    @property
    def cost(self) -> int:
        """Bytes that it takes up in the buffer."""
        return _LINE_OVERHEAD + len(self.content or b"")


class LineBuffer:
    """Bytes in, lines out; blank lines are left out and not counted.

    max_line_bytes: longest line; what is longer is thrown away as it comes. max_bytes: from which on `feed` waits until
    lines have been released. One task feeds, one takes.
    """

    def __init__(self, max_line_bytes: int, max_bytes: int) -> None:
        self.max_line_bytes = max_line_bytes
        self._max_bytes = max_bytes
        self._partial = bytearray()
        self._too_long = False
        self._lines: deque[Line] = deque()
        self._count = 0
        self._bytes = 0
        self._closed = False
        self._readable = asyncio.Event()
        self._room = asyncio.Event()

    async def feed(self, chunk: bytes) -> None:
        """Add a piece of the input, wherever it was cut; waits while the buffer is full."""
        *ends, rest = chunk.split(b"\n")
        for piece in ends:
            self._extend(piece)
            await self._end_line()
        self._extend(rest)

    async def end(self) -> None:
        """The input has ended; its last line needs no line end."""
        await self._end_line()
        self.close()

    def close(self) -> None:
        """Nothing more will be taken in; what is there can still be taken out."""
        self._closed = True
        self._readable.set()
        self._room.set()

    async def take(self) -> list[Line]:
        """The next lines, at least one; none at the end. Each must be released once it needs no more room here."""
        while not self._lines and not self._closed:
            self._readable.clear()
            await self._readable.wait()
        taken: list[Line] = []
        size = 0
        while self._lines and len(taken) < _MOST_LINES and size < _MOST_BYTES:
            taken.append(self._lines.popleft())
            size += taken[-1].cost
        return taken

    def release(self, line: Line) -> None:
        """Give back the room of a line that was taken."""
        self._bytes -= line.cost
        self._room.set()

    def _extend(self, piece: bytes) -> None:
        if self._too_long or self._closed:
            return
        if len(self._partial) + len(piece) > self.max_line_bytes:
            self._too_long = True
            self._partial.clear()
        else:
            self._partial += piece

    async def _end_line(self) -> None:
        content = None if self._too_long else bytes(self._partial.strip())
        self._too_long = False
        self._partial.clear()
        if content == b"":
            return
        while self._bytes >= self._max_bytes and not self._closed:
            self._room.clear()
            await self._room.wait()
        if self._closed:
            return
        line = Line(self._count, content)
        self._lines.append(line)
        self._count += 1
        self._bytes += line.cost
        self._readable.set()
