"""CraneClient and AsyncCraneClient: typed access to a crane server."""

import asyncio
import ipaddress
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import httpx

from clients import calls
from clients.answers import (
    Generation,
    Health,
    MaskListing,
    MaskNeurons,
    MaskSummary,
    Readiness,
    Scores,
)
from clients.calls import AnswerType, Call, ContinuationOptions, Mask, Sampling, TextOptions
from clients.errors import CraneError
from clients.retries import Patience, RetryPolicy
from clients.stream import AsyncGenerationStream, GenerationStream
from crane_serve.common.defaults import DEFAULT_SERVER, KEY_VARIABLE

_PROBE_TIMEOUT_S = 10.0
_POOL_CONNECTIONS = 8


class _Client:
    """The common part of both clients: the address, the API key, the time-outs, the retry policy."""

    def __init__(
        self, server: str, api_key: str | None, read_timeout_s: float, connect_timeout_s: float, retries: RetryPolicy
    ) -> None:
        url = _checked_url(server)
        headers = _authorization(os.environ.get(KEY_VARIABLE) if api_key is None else api_key)
        if headers and url.userinfo:
            raise ValueError(
                "the server address holds credentials, and there is an API key; only one of them can be sent"
            )
        self.server = f"{url.scheme}://{url.netloc.decode()}{url.path.rstrip('/')}"  # netloc leaves credentials out
        self._retries = retries
        self._settings: dict[str, Any] = {
            "base_url": url,
            "headers": headers,
            "timeout": httpx.Timeout(read_timeout_s, connect=connect_timeout_s, pool=None),
            "trust_env": not _is_loopback(url.host),  # proxies cannot reach loopback addresses
        }


class CraneClient(_Client):
    """Blocking client.

    Every method raises CraneError: at once for refusals (400, 404, 422, ...), and once `retries` is exhausted for 429,
    503 and failed connections. mask: a name, names joined with commas (their union), a mask itself as an object, if the
    server allows it, or None for unmasked. add_bos: the token that is put before a text that does not begin with it:
    True the model's start token, False nothing, "auto" the one that lm-evaluation-harness puts there; join: "length"
    treats a token that spans context and continuation as the harness does. api_key: sent with every request; default:
    the environment variable CRANE_API_KEY, if it is set.
    Raises ValueError if `server` is not an http address, or the key is not a valid one.
    """

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        api_key: str | None = None,
        read_timeout_s: float = 300.0,
        connect_timeout_s: float = 5.0,
        retries: RetryPolicy | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(server, api_key, read_timeout_s, connect_timeout_s, retries or RetryPolicy())
        self._http = httpx.Client(**self._settings, transport=transport)

    def generate(
        self, prompt: str | Sequence[str], *, mask: Mask | None = None, **sampling: Unpack[Sampling]
    ) -> Generation:
        """Complete one prompt or several; outputs are in the order of the prompts."""
        return self._send(calls.generate(prompt, mask, sampling))

    def generate_stream(
        self, prompt: str | Sequence[str], *, mask: Mask | None = None, **sampling: Unpack[Sampling]
    ) -> GenerationStream:
        """Complete prompts and yield the text while it is generated. Nothing is retried once an answer has begun."""
        call = calls.generate(prompt, mask, sampling, stream=True)
        return self._retries.blocking()(self._open, call)

    def score_text(
        self,
        texts: str | Sequence[str],
        *,
        mask: Mask | None = None,
        **options: Unpack[TextOptions],
    ) -> Scores:
        """Log-probabilities of whole texts, and of each token if asked."""
        return self._send(calls.score_text(texts, mask, options))

    def score_continuations(
        self,
        context: str,
        continuations: Sequence[str],
        *,
        mask: Mask | None = None,
        **options: Unpack[ContinuationOptions],
    ) -> Scores:
        """Log-probabilities of continuations given `context`."""
        return self._send(calls.score_continuations(context, continuations, mask, options))

    def score_questions(
        self,
        questions: Sequence[tuple[str, Sequence[str]]],
        *,
        mask: Mask | None = None,
        **options: Unpack[ContinuationOptions],
    ) -> Scores:
        """Score the continuations of several contexts; a score's `question` is the index of its context."""
        return self._send(calls.score_questions(questions, mask, options))

    def masks(self) -> MaskListing:
        """The masks the server holds."""
        return self._send(calls.masks())

    def mask(self, name: str) -> MaskSummary:
        """One mask; a bare language name means the server's default method."""
        return self._send(calls.mask(name))

    def mask_neurons(self, name: str) -> MaskNeurons:
        """The neurons that a mask scales, layer by layer."""
        return self._send(calls.mask_neurons(name))

    def mask_file(self, name: str) -> bytes:
        """The content of a mask's file, as `put_mask` takes it."""
        return self._send(calls.mask_file(name))

    def put_mask(self, name: str, content: bytes | Path) -> MaskSummary:
        """Add a mask, or replace the one of this name, with a mask file's content. Wants an admin's key, if any."""
        return self._send(calls.put_mask(name, content.read_bytes() if isinstance(content, Path) else content))

    def delete_mask(self, name: str) -> None:
        """Remove the mask of exactly this name. Wants an admin's key, if any."""
        self._send(calls.delete_mask(name))

    def ready(self) -> Readiness:
        """What the server serves, once it does."""
        return self._send(calls.ready())

    def wait_until_ready(self, timeout_s: float) -> Readiness:
        """Repeat `ready` for at most `timeout_s` seconds; raises the last CraneError after that."""
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
            response = self._http.request(**call.request, timeout=timeout)
        except httpx.TransportError as error:
            raise CraneError.of_transport(error, self.server) from error
        return call.parse(response)

    def _open(self, call: Call[Generation]) -> GenerationStream:
        try:
            response = self._http.send(self._http.build_request(**call.request), stream=True)
            if not response.is_success:
                response.read()
                raise CraneError.of_response(response)
        except httpx.TransportError as error:
            raise CraneError.of_transport(error, self.server) from error
        return GenerationStream(response, self.server)


class AsyncCraneClient(_Client):
    """CraneClient for asyncio, with at most `concurrency` requests under way; further ones wait their turn.

    A request keeps its slot while it waits for a retry, so that an overloaded server gets fewer requests.
    """

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        concurrency: int = 16,
        api_key: str | None = None,
        read_timeout_s: float = 300.0,
        connect_timeout_s: float = 5.0,
        retries: RetryPolicy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}, expected at least 1")
        super().__init__(server, api_key, read_timeout_s, connect_timeout_s, retries or RetryPolicy())
        self.concurrency = concurrency
        self._slots = asyncio.Semaphore(concurrency)
        # Several small pools: the time that httpx takes for a request grows with the square of a pool's connections.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=_POOL_CONNECTIONS)
        certificates = transport is not None or httpx.create_ssl_context()  # slow; a transport needs none
        self._pools = [
            httpx.AsyncClient(**self._settings, limits=limits, verify=certificates, transport=transport)
            for _ in range(math.ceil(concurrency / _POOL_CONNECTIONS))
        ]
        self._next_pool = itertools.cycle(self._pools)

    async def generate(
        self, prompt: str | Sequence[str], *, mask: Mask | None = None, **sampling: Unpack[Sampling]
    ) -> Generation:
        """Complete one prompt or several; outputs are in the order of the prompts."""
        return await self._send(calls.generate(prompt, mask, sampling))

    async def generate_stream(
        self, prompt: str | Sequence[str], *, mask: Mask | None = None, **sampling: Unpack[Sampling]
    ) -> AsyncGenerationStream:
        """Complete prompts and yield the text while it is generated. Nothing is retried once an answer has begun."""
        call = calls.generate(prompt, mask, sampling, stream=True)
        await self._slots.acquire()
        try:
            return await self._retries.awaiting()(self._open, call)
        except BaseException:
            self._slots.release()
            raise

    async def score_text(
        self,
        texts: str | Sequence[str],
        *,
        mask: Mask | None = None,
        **options: Unpack[TextOptions],
    ) -> Scores:
        """Log-probabilities of whole texts, and of each token if asked."""
        return await self._send(calls.score_text(texts, mask, options))

    async def score_continuations(
        self,
        context: str,
        continuations: Sequence[str],
        *,
        mask: Mask | None = None,
        **options: Unpack[ContinuationOptions],
    ) -> Scores:
        """Log-probabilities of continuations given `context`."""
        return await self._send(calls.score_continuations(context, continuations, mask, options))

    async def score_questions(
        self,
        questions: Sequence[tuple[str, Sequence[str]]],
        *,
        mask: Mask | None = None,
        **options: Unpack[ContinuationOptions],
    ) -> Scores:
        """Score the continuations of several contexts; a score's `question` is the index of its context."""
        return await self._send(calls.score_questions(questions, mask, options))

    async def masks(self) -> MaskListing:
        """The masks the server holds."""
        return await self._send(calls.masks())

    async def mask(self, name: str) -> MaskSummary:
        """One mask; a bare language name means the server's default method."""
        return await self._send(calls.mask(name))

    async def mask_neurons(self, name: str) -> MaskNeurons:
        """The neurons that a mask scales, layer by layer."""
        return await self._send(calls.mask_neurons(name))

    async def mask_file(self, name: str) -> bytes:
        """The content of a mask's file, as `put_mask` takes it."""
        return await self._send(calls.mask_file(name))

    async def put_mask(self, name: str, content: bytes | Path) -> MaskSummary:
        """Add a mask, or replace the one of this name, with a mask file's content. Wants an admin's key, if any."""
        if isinstance(content, Path):
            content = await asyncio.to_thread(content.read_bytes)
        return await self._send(calls.put_mask(name, content))

    async def delete_mask(self, name: str) -> None:
        """Remove the mask of exactly this name. Wants an admin's key, if any."""
        await self._send(calls.delete_mask(name))

    async def ready(self) -> Readiness:
        """What the server serves, once it does."""
        return await self._send(calls.ready())

    async def wait_until_ready(self, timeout_s: float) -> Readiness:
        """Repeat `ready` for at most `timeout_s` seconds; raises the last CraneError after that.

        Takes no slot, so it may be called while requests are under way.
        """
        return await Patience(total_s=timeout_s).awaiting()(self._once, calls.ready(), _PROBE_TIMEOUT_S)

    async def health(self) -> Health:
        """Whether the process is up."""
        return await self._send(calls.health())

    async def close(self) -> None:
        """Close all connections."""
        for pool in self._pools:
            await pool.aclose()

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
            response = await next(self._next_pool).request(**call.request, timeout=timeout)
        except httpx.TransportError as error:
            raise CraneError.of_transport(error, self.server) from error
        return call.parse(response)

    async def _open(self, call: Call[Generation]) -> AsyncGenerationStream:
        pool = next(self._next_pool)
        try:
            response = await pool.send(pool.build_request(**call.request), stream=True)
            if not response.is_success:
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
        raise ValueError(f"{url!r} is not a server address; expected one like {DEFAULT_SERVER}")
    return url


def _authorization(api_key: str | None) -> dict[str, str]:
    if not api_key:
        return {}
    if not all("!" <= character <= "~" for character in api_key):
        raise ValueError("the API key holds blanks or characters beyond ASCII, so it is not valid")
    return {"Authorization": f"Bearer {api_key}"}


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
