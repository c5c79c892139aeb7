"""Slow clients and hostile bodies against a real engine for minutes: `python -m tests.hostile.siege [--minutes 10]`.

Serves a tiny random model. 200 connections stall, each at a stage: in the head, in the body, in reading the answer.
Bodies of random shapes (tests.fuzz.bodies) are sent, twelve at a time. Meanwhile /health is asked 20 times a second,
memory is read, and an honest client asks under a mask. Prints what came of it. Exits with 1 if /health took longer than
100 ms, memory grew by more than a tenth after the first fifth of the time, a body broke a rule, or an honest answer was
wrong.
"""

import argparse
import asyncio
import http.client
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Queue
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.conftest import TEMPLATE, TINY_FLAGS
from tests.engines import Server, random_masks
from tests.fuzz import bodies
from tests.tiny import tiny_model

CONNECTIONS, BODIES = 200, 10_000
HEALTH_MS, GROWTH = 100, 1.1
_STALL_S = 20
_SCORE = {"text": ["The harbour froze."], "mask": "zh"}
_BATCH = 50
_SENDERS = 12


def probe(url: str, until: float) -> dict[str, Any]:
    """Milliseconds that /health took, 20 times a second on one connection."""
    host, took = url.removeprefix("http://"), []
    connection = http.client.HTTPConnection(host, timeout=30)
    while time.time() < until:
        began = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        took.append(1000 * (time.perf_counter() - began))
        time.sleep(0.05)
    return {"health": took}


def ask_honestly(url: str, until: float) -> dict[str, Any]:
    """Answers of a client that asks for a score under a mask every second; the first is taken for right."""
    right, outcomes = math.nan, Counter[str]()
    while time.time() < until:
        answer = httpx.post(f"{url}/score", json=_SCORE, timeout=60)
        if answer.is_success:
            score = answer.json()["scores"][0]["logprob"]
            right = score if math.isnan(right) else right
            outcomes["right" if abs(score - right) < 1e-2 else "WRONG"] += 1
        else:
            outcomes[f"refused with {answer.status_code}"] += 1
        time.sleep(1)
    return {"honest": outcomes}


def send_bodies(url: str, until: float) -> dict[str, Any]:
    """Statuses of random bodies, and what broke a rule."""
    os.nice(10)
    statuses, broken = Counter[int](), []

    def run(seed: int) -> tuple[Counter[int], list[str]]:
        return bodies.run(url, _BATCH, seed, counting=False) if time.time() < until else (Counter(), [])

    with ThreadPoolExecutor(_SENDERS) as senders, httpx.Client(base_url=url, timeout=60) as client:
        before = bodies.unmasked_tokens(client)  # everybody asks for a mask
        for some, wrong in senders.map(run, range(BODIES // _BATCH)):
            statuses += some
            broken += wrong
        if bodies.unmasked_tokens(client) != before:
            broken.append("tokens were computed unmasked")
    return {"bodies": statuses, "broken": broken}


def stall(url: str, until: float) -> dict[str, Any]:
    """How often a connection stalled at each stage."""
    os.nice(10)
    return {"stalled": asyncio.run(_stall(url, until))}


async def _stall(url: str, until: float) -> Counter[str]:
    host, _, port = url.removeprefix("http://").partition(":")
    stalled: Counter[str] = Counter()
    body = b'{"prompt": "The harbour froze.", "max_tokens": 400, "stream": true, "mask": "zh"}'
    head = b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    whole = head % len(body) + body
    stages = {"head": len(head) // 2, "body": len(whole) - 5, "answer": len(whole)}

    async def one(draw: random.Random) -> None:
        while time.time() < until:
            stage = draw.choice(list(stages))
            with suppress(OSError):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(whole[: stages[stage]])
                stalled[stage] += 1
                await asyncio.sleep(draw.uniform(1, _STALL_S))
                writer.close()

    await asyncio.gather(*(one(random.Random(number)) for number in range(CONNECTIONS)))
    return stalled


def memory(server: Server) -> float:
    """MiB of the server's processes."""
    process = psutil.Process(server.process.pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) / 2**20


def besieged(server: Server, seconds: float) -> dict[str, Any]:
    """What all clients found, and the memory at a fifth of the time and at its end."""
    until = time.time() + seconds
    found: dict[str, Any] = {}
    results: Queue[dict[str, Any]] = multiprocessing.get_context("spawn").Queue()
    clients = [
        multiprocessing.get_context("spawn").Process(target=_report, args=(act, server.url, until, results))
        for act in (probe, ask_honestly, send_bodies, stall)
    ]
    for client in clients:
        client.start()
    time.sleep(seconds / 5)
    found["before"] = memory(server)
    while time.time() < until:
        time.sleep(1)
    found["after"] = memory(server)
    for _ in clients:
        found |= results.get(timeout=300)
    for client in clients:
        client.join()
    return found


def _report(act: Callable[[str, float], dict[str, Any]], url: str, until: float, results: "Queue[Any]") -> None:
    results.put(act(url, until))


def judged(found: dict[str, Any]) -> bool:
    """Print it; whether all is within its bound."""
    took = sorted(found["health"])
    p50, p99 = statistics.median(took), took[int(0.99 * len(took))]
    print(f"/health: {len(took)} times, p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {took[-1]:.1f} ms")
    print(f"memory: {found['before']:.0f} MiB after a fifth of the time, {found['after']:.0f} MiB at the end")
    print(f"honest client: {dict(found['honest'])}")
    print(f"random bodies: {found['bodies'].total()}, by status {dict(sorted(found['bodies'].items()))}")
    print(f"stalled: {dict(found['stalled'])}")
    print(*found["broken"], sep="\n", end="")
    is_flat = found["after"] <= GROWTH * found["before"]
    is_right = found["honest"]["right"] > 0 and not found["honest"]["WRONG"]
    return took[-1] <= HEALTH_MS and is_flat and is_right and not found["broken"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.siege", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = tiny_model("llama", directory / "tiny")
        random_masks(model, directory / "masks", share=0.4)
        flags = (*TINY_FLAGS, "--enforce-eager", "--enable-scale-out", "--chat-template", TEMPLATE)
        server = Server.of(model, directory / "masks", directory / "log", *flags, "--body-timeout-s", "10", core=1)
        try:
            return not judged(besieged(server.wait(), 60 * arguments.minutes))
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
