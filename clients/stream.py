"""GenerationStream: the deltas of a streamed generation, and the data that comes at its end."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any

import httpx
from pydantic import ValidationError

from clients.answers import Delta, Generation
from clients.errors import CraneError

_DONE = b"[DONE]"


class EventReader:
    """Parses server-sent events, in arbitrary chunks of bytes, into deltas; `end` has the last event once it has
    arrived.

    Only LF and CRLF end a line: generated text may contain other characters that count as line ends elsewhere.
    """

    def __init__(self) -> None:
        self.end: Generation | None = None
        self.done = False
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[Delta]:
        """Deltas completed by `chunk`. Raises CraneError for an error event or one that cannot be read."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line.removeprefix(b"data:").removeprefix(b" "))
            elif not line and self._data:
                data, self._data = b"\n".join(self._data), []
                if data == _DONE:
                    self.done = True
                else:
                    yield from self._event(data)

    def close(self) -> None:
        """End the input. Raises CraneError if the stream was cut off."""
        if not self.done:
            raise CraneError(None, "connection_lost", "the stream ended before its last event")

    def _event(self, data: bytes) -> Iterator[Delta]:
        try:
            event: dict[str, Any] = json.loads(data)
            if "error" in event:
                raise CraneError.of_body(event["error"], status=200)
            if "outputs" in event:
                self.end = Generation.model_validate(event)
            else:
                yield Delta.model_validate(event)
        except (ValidationError, ValueError, TypeError, AttributeError) as error:
            message = f"the stream has an event that cannot be read: {data[:200].decode(errors='replace')}"
            raise CraneError(200, "invalid_answer", message) from error


class GenerationStream(Iterator[Delta]):
    """Iterator over deltas. After the last one `end` holds model, mask, usage and the outputs without text.

    Use it as a context manager to free the connection when leaving early. Raises CraneError if the server reports
    an error in mid-stream or the connection breaks; nothing is retried after the first byte.
    """

    def __init__(self, response: httpx.Response, server: str) -> None:
        self._response = response
        self._reader = EventReader()
        self._deltas = self._read(server)

    @property
    def end(self) -> Generation | None:
        """The last event, None until it has arrived."""
        return self._reader.end

    def __next__(self) -> Delta:
        return next(self._deltas)

    def close(self) -> None:
        """Free the connection; the server stops generating."""
        self._response.close()

    def __enter__(self) -> "GenerationStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, server: str) -> Iterator[Delta]:
        try:
            for chunk in self._response.iter_bytes():
                yield from self._reader.feed(chunk)
            self._reader.close()
        except httpx.TransportError as error:
            raise CraneError.of_transport(error, server) from error
        finally:
            self._response.close()


class AsyncGenerationStream(AsyncIterator[Delta]):
    """GenerationStream for `async for`; it holds one of the client's slots until it ends or is closed."""

    def __init__(self, response: httpx.Response, server: str, release: Callable[[], None]) -> None:
        self._response = response
        self._reader = EventReader()
        self._release = release
        self._closed = False
        self._deltas = self._read(server)

    @property
    def end(self) -> Generation | None:
        """The last event, None until it has arrived."""
        return self._reader.end

    async def __anext__(self) -> Delta:
        return await anext(self._deltas)

    async def aclose(self) -> None:
        """Free the connection and the slot; the server stops generating."""
        if not self._closed:
            self._closed = True
            self._release()
            await self._response.aclose()

    async def __aenter__(self) -> "AsyncGenerationStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _read(self, server: str) -> AsyncIterator[Delta]:
        try:
            async for chunk in self._response.aiter_bytes():
                for delta in self._reader.feed(chunk):
                    yield delta
            self._reader.close()
        except httpx.TransportError as error:
            raise CraneError.of_transport(error, server) from error
        finally:
            await self.aclose()
