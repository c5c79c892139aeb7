"""Answers with whole masks: in pieces, made by one thread beside the event loop, a few at once."""

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
import torch
from fastapi import FastAPI
from starlette.types import Message, Scope

from crane_serve.common.masks import MaskInfo, NeuronMask, StoredMask, decode_mask
from crane_serve.service.api.context import context_of
from crane_serve.service.api.downloads import AT_ONCE, AT_ONCE_PER_KEY, Downloads
from crane_serve.service.api.keys import Key, Role
from tests.api.exchange import Exchange
from tests.api.fake_engine import FINGERPRINT, FakeEngine

LAYERS, NEURONS = 6, 30_000
MANY_TURNS = 1000  # of the event loop


class Reader:
    """A client that takes nothing before it is told to."""

    def __init__(self, key: str | None = None) -> None:
        self.scope: Scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "headers": []}
        context_of(self.scope).key = None if key is None else Key(key, Role.USER)
        self.goes_on = asyncio.Event()
        self.has_begun = False
        self.body = b""

    async def receive(self) -> Message:
        raise AssertionError("nothing is asked for")

    async def send(self, message: Message) -> None:
        self.has_begun = True
        await self.goes_on.wait()
        self.body += message.get("body", b"")


async def many_turns() -> None:
    for _ in range(MANY_TURNS):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("keys", "at_once"),
    [
        ([None] * 20, AT_ONCE_PER_KEY),
        (["a"] * 20, AT_ONCE_PER_KEY),
        (["a", "b", "c", "d"] * 5, AT_ONCE),
        (["a"] * 20 + ["b"], AT_ONCE_PER_KEY + 1),
    ],
)
async def test_few_are_under_way_and_the_others_wait(keys: list[str | None], at_once: int) -> None:
    downloads, made_in = Downloads(), set()

    def pieces() -> Iterator[bytes]:
        made_in.add(threading.current_thread())
        yield from (b"a", b"b", b"c")

    readers = [Reader(key) for key in keys]
    tasks = [
        asyncio.create_task(downloads.answer(pieces(), "text/plain", {})(one.scope, one.receive, one.send))
        for one in readers
    ]
    await many_turns()
    begun = [one for one in readers if one.has_begun]
    assert len(begun) == at_once
    for task, one in zip(tasks, readers, strict=True):
        if one in begun:
            task.cancel()  # the client has gone
    for one in readers:
        one.goes_on.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [one.body for one in readers if one not in begun] == [b"abc"] * (len(keys) - at_once)
    assert len(made_in) == 1
    assert threading.current_thread() not in made_in


@pytest.fixture
def large(engine: FakeEngine) -> StoredMask:
    """A mask of many scales, served as `large`."""
    fingerprint = FINGERPRINT.model_copy(update={"layers": LAYERS, "intermediate_sizes": (NEURONS,) * LAYERS})
    scales = torch.rand(LAYERS, NEURONS)
    info = MaskInfo(language="zh", method="test", fingerprint=fingerprint)
    stored = StoredMask("large", NeuronMask(scales, fingerprint.intermediate_sizes), info)
    engine.library.masks["large"] = stored
    return stored


async def ask(app: FastAPI, path: str) -> Exchange:
    asked = Exchange("GET", path, [(b"host", b"localhost")]).give()
    await asked.call(app)
    return asked


async def test_neurons_come_a_layer_at_a_time(app: FastAPI, large: StoredMask) -> None:
    answer = await ask(app, "/masks/large/neurons")
    assert max(len(message.get("body", b"")) for message in answer.sent) < len(answer.body) / (LAYERS - 1)
    layers = json.loads(answer.body)["layers"]
    assert [layer["layer"] for layer in layers] == list(range(LAYERS))
    for layer, row in zip(layers, large.mask.intermediate, strict=True):
        assert layer["neurons"] == list(range(NEURONS))
        assert torch.equal(torch.tensor(layer["scales"]), row)


async def test_a_file_comes_in_pieces(app: FastAPI, large: StoredMask) -> None:
    answer = await ask(app, "/masks/large/file")
    assert max(len(message.get("body", b"")) for message in answer.sent) <= 2**18
    assert decode_mask("large", answer.body, source="answer").mask.digest == large.mask.digest
