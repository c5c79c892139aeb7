"""What a client can do to a server over HTTP: a real server process over a fake engine, /health asked meanwhile."""

import http.client
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.hostile.case import Case, Outcome

HEALTH_MS = 100
_KEY, _OTHER_KEY = "of-ann-0123456789", "of-bob-0123456789"
_KEYS = f"ann user {_KEY}\nbob user {_OTHER_KEY}\n"
_ANSWER_S = 60
_SILENCE_S = 2
_MIB = 2**20
# Prints how long each answer of /health took, in ms, until its stdin ends.
_PROBE = """
import http.client, select, sys, time
while not select.select([sys.stdin], [], [], 0.005)[0]:
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
    connection.request("GET", "/health")
    connection.getresponse().read()
    connection.close()
    print(1000 * (time.monotonic() - began), flush=True)
"""


@contextmanager
def _served(**settings: Any) -> Iterator[int]:
    """The port of a server; keys: whether it asks for one."""
    from tests.api.serve_fake import FakeServer

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if settings.pop("keys", False):
            file = directory / "keys"
            file.write_text(_KEYS)
            file.chmod(0o600)
            settings["api_keys_file"] = file
        server = FakeServer(directory, **settings)
        try:
            yield server.port
        finally:
            server.kill()


def _status(port: int, path: str, body: Any, key: str | None = None) -> int:
    """The status of the answer to a POST."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({} if key is None else {"x-api-key": key})
    connection.request("POST", path, content, headers)
    return connection.getresponse().status


def _raw(port: int, data: bytes) -> str:
    """The status of the first answer to what is sent, "none" if the server hangs up; all of the answer is read."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_S) as connection, suppress(OSError):
        connection.sendall(data)
        connection.settimeout(_SILENCE_S)
        while piece := connection.recv(_MIB):
            answer = answer or piece
    words = answer.split()
    return words[1].decode() if len(words) > 1 else "none"


def _health_during(action: Callable[[int], Any], **settings: Any) -> Outcome:
    """The longest answer of /health while `action(port)` runs, which returns a status."""
    with _served(**settings) as port:
        probe = subprocess.Popen(
            [sys.executable, "-c", _PROBE, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert probe.stdout is not None
        first = probe.stdout.readline()
        status = action(port)
        longest = max(map(float, (first, *probe.communicate()[0].split())))
    return Outcome(f"/health within {longest:.0f} ms, answered with {status}", longest <= HEALTH_MS)


def _posted(path: str, body: bytes) -> Callable[[], Outcome]:
    return lambda: _health_during(lambda port: _status(port, path, body))


def _sent(data: bytes) -> Callable[[], Outcome]:
    return lambda: _health_during(lambda port: _raw(port, data), keys=True)


def _names(count: int) -> bytes:
    return b",".join(b'"n%d":0' % number for number in range(count))


_ASKED = {"model": "tiny", "prompt": ["a"] * 1024, "n": 16384}


def _sixteen_million() -> Outcome:
    with _served() as port:
        status = _status(port, "/v1/completions", _ASKED)
    return Outcome(f"answered with {status}", status == 400)


@contextmanager
def _running(port: int, count: int, key: str | None = None) -> Iterator[None]:
    """A request of `count` prompts that run until the end."""
    body = json.dumps({"prompt": ["hang"] * count, "max_tokens": 1, "stream": True}).encode()
    headers = {"content-type": "application/json"} | ({} if key is None else {"x-api-key": key})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
    connection.request("POST", "/generate", body, headers)
    connection.getresponse().read(1)
    try:
        yield
    finally:
        connection.close()


def _over_the_queue() -> Outcome:
    with _served(max_sequences=4) as port, _running(port, 3):
        status = _status(port, "/generate", {"prompt": ["a"] * 4, "max_tokens": 1})
    return Outcome(f"4 more answered with {status}", status == 429)


def _one_key() -> Outcome:
    with _served(max_sequences=8, keys=True) as port, ExitStack() as held:
        admitted = 0
        for _ in range(8):
            if _status(port, "/generate", {"prompt": "a", "max_tokens": 1}, _KEY) == 200:
                held.enter_context(_running(port, 1, _KEY))
                admitted += 1
        status = _status(port, "/generate", {"prompt": "a", "max_tokens": 1}, _OTHER_KEY)
    return Outcome(f"{admitted} of 8 sequences to one key, another's request answered with {status}", status == 200)


def _unfinished(head: bytes, *, keys: bool) -> Outcome:
    """Bodies of 1 MiB without their last byte fill the room of 4 MiB; then somebody else asks."""
    with _served(max_body_bytes=_MIB, max_buffered_bytes=4 * _MIB, keys=keys) as port, ExitStack() as held:
        for _ in range(5):
            connection = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=1))
            with suppress(OSError):  # refused, or not taken
                connection.sendall(head + b"content-length: %d\r\n\r\n" % _MIB + b" " * (_MIB - 1))
        body = {"prompt": "a" * 100_000, "max_tokens": 1}
        status = _status(port, "/generate", body, _KEY if keys else None)
    return Outcome(f"answered with {status}", status in (200, 400))


def _guard() -> Outcome:
    """vLLM's own server reads each body that names a mask for the guard."""
    import time

    from crane_serve.engine.vllm_routes import refusal

    body = b'{"crane_x":0,%b,"n0":1}' % _names(16_000)
    began = time.process_time()
    refused = refusal("/v1/completions", "", body) is not None
    ms = 1000 * (time.process_time() - began)
    return Outcome(f"{ms:.0f} ms of processor time, {'refused' if refused else 'let through'}", ms <= 500 and refused)


def _junk_for_vllm() -> Outcome:
    """What vLLM's own application does with a body that its models do not know."""
    import time
    from types import SimpleNamespace

    from crane_serve.engine.openai_app import assemble

    app = assemble(SimpleNamespace(enable_tokenizer_info_endpoint=True, tokens_only=False, enable_scale_out=True))
    field = next(route.body_field for route in app.routes if route.path == "/v1/responses")
    began = time.process_time()
    field.validate({"model": "tiny", "input": [{}] * 1000}, {}, loc=("body",))
    ms = 1000 * (time.process_time() - began)
    return Outcome(f"{ms:.0f} ms of processor time", ms <= HEALTH_MS)


_POST = b"POST /generate HTTP/1.1\r\nhost: a\r\n"
_GET = b"GET /health HTTP/1.1\r\nhost: a\r\n"
_PROMISED = f"/health within {HEALTH_MS} ms"
_REPEATED = b'{%b,"n0":1}' % _names(16_000)
_UNKNOWN = b'{"prompt":"a",%b}' % _names(330_000)
_LISTS = b'{"model":"tiny","prompt":[%b[]]}' % (b"[]," * 5_000_000)
_IDS = b'{"model":"tiny","mask":"zh","prompt":[%b0]}' % (b"100," * 131_000)
_REPEATED_CONTEXT = b'{"context":"%b","continuations":["b"%b]}' % (b"a" * 8000, b',"b"' * 511)
_QUERY = b"GET /?%b HTTP/1.1\r\nhost: a\r\n\r\n" % (b"a&" * 30_000)
_HEADERS = b"GET /masks HTTP/1.1\r\nhost: a\r\n%b\r\n" % (b"a:\r\n" * 15_000)
_CHUNKS = _GET + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 500_000
CASES = {
    "repeated-names": Case(
        1, "165 KB with 16,000 names, one of them twice", _PROMISED, _posted("/v1/completions", _REPEATED)
    ),
    "names-for-the-guard": Case(1, "the same, naming a mask, on vLLM's own server", "500 ms, refused", _guard),
    "unknown-names": Case(1, "3.5 MB of unknown names on /generate", _PROMISED, _posted("/generate", _UNKNOWN)),
    "empty-lists": Case(1, "15 MB of [] on /v1/completions", _PROMISED, _posted("/v1/completions", _LISTS)),
    "token-ids": Case(1, "131,000 token ids on /v1/completions", _PROMISED, _posted("/v1/completions", _IDS)),
    "repeated-context": Case(
        1, "10 KB: one context before 512 continuations", _PROMISED, _posted("/score", _REPEATED_CONTEXT)
    ),
    "junk-for-vllm": Case(1, "3 KB of {} on /v1/responses", f"{HEALTH_MS} ms", _junk_for_vllm),
    "sixteen-million-sequences": Case(2, '{"prompt": ["a"] * 1024, "n": 16384}', "400", _sixteen_million),
    "over-the-queue": Case(2, "4 prompts where 3 of 4 sequences run", "429", _over_the_queue),
    "one-key": Case(2, "one key asks for all sequences", "another key is served", _one_key),
    "query-without-key": Case(4, "a query of 60 KB for the page, without a key", _PROMISED, _sent(_QUERY)),
    "headers-without-key": Case(4, "15,000 headers without a key", _PROMISED, _sent(_HEADERS)),
    "chunks-without-key": Case(4, "3 MB of chunks of one byte for /health, without a key", _PROMISED, _sent(_CHUNKS)),
    "pipelined-without-key": Case(
        4, "5,000 requests at once, without a key", _PROMISED, _sent((_GET + b"\r\n") * 5000)
    ),
    "unfinished-without-key": Case(
        5, "unfinished bodies of GET /health, without a key", "others are served", lambda: _unfinished(_GET, keys=True)
    ),
    "unfinished-posts": Case(
        5, "unfinished bodies, where there are no keys", "others are served", lambda: _unfinished(_POST, keys=False)
    ),
}
