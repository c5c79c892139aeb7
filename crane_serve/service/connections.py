"""What a connection brings is read a piece at a time."""

import asyncio
from collections import deque
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

_LINES = 256
_BYTES = 64 * 1024


class Connection(H11Protocol):
    """uvicorn's connection over h11, which leaves the event loop to others between the pieces of a long read.

    One read of a socket holds what the client has sent by then, whole megabytes of it under uvloop, and h11 reads the
    frame of every chunk in Python: chunks of one byte would keep the loop for seconds, before any key is known. A piece
    has at most 256 lines, since each chunk has two and h11's time goes by lines. Pieces of all connections take turns,
    one in each round of the loop, and the socket is read on when a connection has none left.
    """

    _waiting: ClassVar[deque["Connection"]] = deque()
    _unread = b""

    def data_received(self, data: bytes) -> None:
        """Read `data` now if it is one piece, else piece by piece."""
        if not self._unread and _piece(data) == len(data):
            super().data_received(data)
            return
        self.transport.pause_reading()
        if not self._unread:
            self._waiting.append(self)
            if len(self._waiting) == 1:
                self.loop.call_soon(self._take_turn, self.loop)
        self._unread += data

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget what is not read yet."""
        self._unread = b""
        super().connection_lost(exc)

    @classmethod
    def _take_turn(cls, loop: asyncio.AbstractEventLoop) -> None:
        connection = cls._waiting.popleft()
        connection._read_piece()
        if connection._unread:
            cls._waiting.append(connection)
        if cls._waiting:
            loop.call_soon(cls._take_turn, loop)

    def _read_piece(self) -> None:
        size = _piece(self._unread)
        piece, self._unread = self._unread[:size], self._unread[size:]
        if piece and not self.transport.is_closing():
            super().data_received(piece)
        if self.transport.is_closing():
            self._unread = b""
        elif not self._unread and not self.flow.read_paused:
            self.transport.resume_reading()


def _piece(data: bytes) -> int:
    """How many bytes of `data` are read at once."""
    head = data[:_BYTES]
    lines = head.split(b"\n", _LINES)
    return len(head) - (len(lines[_LINES]) if len(lines) > _LINES else 0)
