"""HttpProtocol: uvicorn's HTTP/1.1 over httptools, with bounds on what one client can make the event loop read.

What is read here is read before any key is known. httptools is C: with h11, in Python, 3 MB of one-byte chunks hold the
loop for seconds.
"""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 2**10
"""Longest head of a request; an unfinished head may be longer by one read of the socket."""

MAX_HEADERS = 100
"""Most headers of a request, with those behind its body."""

MAX_PIPELINED = 8
"""Most requests of a connection that wait for the answer before them."""

_PIECES_PER_READ = 1024
_BYTES_PER_PIECE = 64


class _TooMuch(Exception):
    """A bound is exceeded. httptools turns it into its own error, which uvicorn answers with a 400."""


class HttpProtocol(HttpToolsProtocol):
    """A connection. What exceeds a bound is answered with a 400, and the connection is closed."""

    _head_bytes = 0  # of the head at hand, as far as it has been parsed
    _silent_bytes = 0  # read since the last byte of a body, or the last end of a head
    _is_silent = True  # in the read at hand
    _pieces_left = 0  # of bodies, in the read at hand

    def data_received(self, data: bytes) -> None:
        """Read what has come, at most 256 KB at a time."""
        self._is_silent = True
        self._pieces_left = _PIECES_PER_READ + len(data) // _BYTES_PER_PIECE
        super().data_received(data)
        self._silent_bytes = self._silent_bytes + len(data) if self._is_silent else 0
        if self._silent_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            message = f"The head is longer than {MAX_HEAD_BYTES} bytes."
            self.logger.warning(message)
            self.send_400_response(message)

    def on_message_begin(self) -> None:
        """A head begins."""
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the address."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or one behind a body."""
        self._count(len(name) + len(value))
        if len(self.headers) >= MAX_HEADERS:
            raise _TooMuch
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The end of a head: the application is called, once the answers before are complete."""
        self._is_silent = False
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _TooMuch
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body; each chunk is one."""
        self._is_silent = False
        self._pieces_left -= 1
        if self._pieces_left < 0:
            raise _TooMuch
        super().on_body(body)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _TooMuch
