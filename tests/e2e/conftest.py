"""A server for the clients of others: with a chat template, tokens by id, and rows for only two masks."""

import os
from collections.abc import Iterator

import pytest

from tests.conftest import TINY_FLAGS, Engines
from tests.engines import Server

_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# Token ids in place of texts, for which random models need not have any.
_FLAGS = ("--chat-template", _TEMPLATE, "--return-tokens-as-token-ids", "--mask-rows", "2", "--enable-scale-out")
_TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")


@pytest.fixture(scope="session")
def openai_server(engines: Engines) -> Iterator[Server]:
    """`crane serve`, with vLLM's own key variable set: keys are crane serve's own."""
    os.environ["VLLM_API_KEY"] = "not asked for"
    try:
        log = engines.directory / "openai.log"
        flags = (*TINY_FLAGS, "--enforce-eager", *_FLAGS, *_TOOLS)
        core = 1 % (os.cpu_count() or 1)
        server = Server.start(engines.tiny.checkpoint, engines.tiny.masks, log, *flags, core=core)
    finally:
        del os.environ["VLLM_API_KEY"]
    try:
        yield server.wait()
    finally:
        server.stop()
