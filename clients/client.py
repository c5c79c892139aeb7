"""CraneClient and AsyncCraneClient: typed access to a crane server."""

import asyncio
import ipaddress
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Unpack

import httpx

from clients import calls
from clients.answers import Generation, Health, MaskListing, MaskSummary, Readiness, Scores
from clients.calls import AnswerType, Call, Sampling
from clients.errors import CraneError
from clients.retries import Patience, RetryPolicy
from clients.stream import AsyncGenerationStream, GenerationStream

DEFAULT_SERVER = "http://127.0.0.1:8000"
_PROBE_TIMEOUT_S = 10.0


class _Client:
    """What both clients share: the address, the time-outs, the retry policy."""

    def __init__(self, server: str, read_timeout_s: float, connect_timeout_s: float, retries: RetryPolicy) -> None:
        url = _checked_url(server)
        self.server = f"{url.scheme}://{url.netloc.decode()}{url.path.rstrip('/')}"  # netloc leaves credentials out
        self._retries = retries
        self._settings: dict[str, Any] = {
            "base_url": url,
            "timeout": httpx.Timeout(read_timeout_s, connect=connect_timeout_s, pool=None),
            "trust_env": not _is_loopback(url.host),  # a proxy cannot reach this machine's loopback
        }


class CraneClient(_Client):
    """Blocking client.

    Every method raises CraneError: at once for refusals (400, 404, 422, ...), and once `retries` is exhausted for
    429, 503 and failed connections. mask: a name, names joined with commas (their union), or None for unmasked.
    Raises ValueError if `server` is not an http address.
    """

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        read_timeout_s: float = 300.0,
        connect_timeout_s: float = 5.0,
        retries: RetryPolicy | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(server, read_timeout_s, connect_timeout_s, retries or RetryPolicy())
        self._http = httpx.Client(**self._settings, transport=transport)

    def generate(
        self, prompt: str | Sequence[str], *, mask: str | None = None, **sampling: Unpack[Sampling]
    ) -> Generation:
        """Complete one prompt or several; outputs are in the order of the prompts."""
        return self._send(calls.generate(prompt, mask, sampling))

    def generate_stream(
        self, prompt: str | Sequence[str], *, mask: str | None = None, **sampling: Unpack[Sampling]
    ) -> GenerationStream:
        """Complete prompts and hand out the text as it is made. Retries end when the server starts to answer."""
        call = calls.generate(prompt, mask, sampling, stream=True)
        return self._retries.blocking()(self._open, call)

    def score_text(self, texts: str | Sequence[str], *, mask: str | None = None) -> Scores:
        """Log-probabilities of whole texts."""
        return self._send(calls.score_text(texts, mask))

    def score_continuations(self, context: str, continuations: Sequence[str], *, mask: str | None = None) -> Scores:
        """Log-probabilities of continuations given `context`."""
        return self._send(calls.score_continuations(context, continuations, mask))

    def masks(self) -> MaskListing:
        """The masks the server holds."""
        return self._send(calls.masks())

    def mask(self, name: str) -> MaskSummary:
        """One mask; a bare language name means the server's default method."""
        return self._send(calls.mask(name))

    def ready(self) -> Readiness:
        """What the server serves, once it does."""
        return self._send(calls.ready())

    def wait_until_ready(self, timeout_s: float) -> Readiness:
        """`ready`, asked again and again for `timeout_s` seconds; raises the last CraneError after that."""
        answer: Readiness = Patience(total_s=timeout_s).blocking()(self._once, calls.ready(), _PROBE_TIMEOUT_S)
        return answer

    def health(self) -> Health:
        """Whether the process is up."""
        return self._send(calls.health())

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> "CraneClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: Call[AnswerType]) -> AnswerType:
        answer: AnswerType = self._retries.blocking()(self._once, call)
        return answer

    def _once(self, call: Call[AnswerType], timeout_s: float | None = None) -> AnswerType:
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else timeout_s
        try:
            response = self._http.request(call.method, call.path, params=call.query, json=call.body, timeout=timeout)
        except httpx.TransportError as error:
            raise CraneError.of_transport(error, self.server) from error
        return call.parse(response)

    def _open(self, call: Call[Generation]) -> GenerationStream:
        request = self._http.build_request(call.method, call.path, params=call.query, json=call.body)
        try:
            response = self._http.send(request, stream=True)
            if response.status_code >= 400:
                response.read()
                raise CraneError.of_response(response)
        except httpx.TransportError as error:
            raise CraneError.of_transport(error, self.server) from error
        return GenerationStream(response, self.server)


class AsyncCraneClient(_Client):
    """CraneClient for asyncio, with at most `concurrency` requests under way; further ones wait their turn.

    A request keeps its slot while it backs off, so that an overloaded server is asked less.
    """

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        concurrency: int = 16,
        read_timeout_s: float = 300.0,
        connect_timeout_s: float = 5.0,
        retries: RetryPolicy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}, expected at least 1")
        super().__init__(server, read_timeout_s, connect_timeout_s, retries or RetryPolicy())
        self.concurrency = concurrency
        self._slots = asyncio.Semaphore(concurrency)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
        self._http = httpx.AsyncClient(**self._settings, limits=limits, transport=transport)

    async def generate(
        self, prompt: str | Sequence[str], *, mask: str | None = None, **sampling: Unpack[Sampling]
    ) -> Generation:
        """Complete one prompt or several; outputs are in the order of the prompts."""
        return await self._send(calls.generate(prompt, mask, sampling))

    async def generate_stream(
        self, prompt: str | Sequence[str], *, mask: str | None = None, **sampling: Unpack[Sampling]
    ) -> AsyncGenerationStream:
        """Complete prompts and hand out the text as it is made. Retries end when the server starts to answer."""
        call = calls.generate(prompt, mask, sampling, stream=True)
        await self._slots.acquire()
        try:
            return await self._retries.awaiting()(self._open, call)
        except BaseException:
            self._slots.release()
            raise

    async def score_text(self, texts: str | Sequence[str], *, mask: str | None = None) -> Scores:
        """Log-probabilities of whole texts."""
        return await self._send(calls.score_text(texts, mask))

    async def score_continuations(
        self, context: str, continuations: Sequence[str], *, mask: str | None = None
    ) -> Scores:
        """Log-probabilities of continuations given `context`."""
        return await self._send(calls.score_continuations(context, continuations, mask))

    async def masks(self) -> MaskListing:
        """The masks the server holds."""
        return await self._send(calls.masks())

    async def mask(self, name: str) -> MaskSummary:
        """One mask; a bare language name means the server's default method."""
        return await self._send(calls.mask(name))

    async def ready(self) -> Readiness:
        """What the server serves, once it does."""
        return await self._send(calls.ready())

    async def wait_until_ready(self, timeout_s: float) -> Readiness:
        """`ready`, asked again and again for `timeout_s` seconds; raises the last CraneError after that.

        Takes no slot, so it may be called while requests are under way.
        """
        return await Patience(total_s=timeout_s).awaiting()(self._once, calls.ready(), _PROBE_TIMEOUT_S)

    async def health(self) -> Health:
        """Whether the process is up."""
        return await self._send(calls.health())

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncCraneClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: Call[AnswerType]) -> AnswerType:
        async with self._slots:
            return await self._retries.awaiting()(self._once, call)

    async def _once(self, call: Call[AnswerType], timeout_s: float | None = None) -> AnswerType:
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else timeout_s
        try:
            response = await self._http.request(
                call.method, call.path, params=call.query, json=call.body, timeout=timeout
            )
        except httpx.TransportError as error:
            raise CraneError.of_transport(error, self.server) from error
        return call.parse(response)

    async def _open(self, call: Call[Generation]) -> AsyncGenerationStream:
        request = self._http.build_request(call.method, call.path, params=call.query, json=call.body)
        try:
            response = await self._http.send(request, stream=True)
            if response.status_code >= 400:
                await response.aread()
                raise CraneError.of_response(response)
        except httpx.TransportError as error:
            raise CraneError.of_transport(error, self.server) from error
        return AsyncGenerationStream(response, self.server, self._slots.release)


def _checked_url(server: str) -> httpx.URL:
    try:
        url = httpx.URL(server)
    except httpx.InvalidURL as error:
        raise ValueError(f"server address cannot be read ({error}); expected one like {DEFAULT_SERVER}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError(f"server address {url!r} is not one; expected one like {DEFAULT_SERVER}")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
