"""How fast questions are scored: POST /score, the harness's way over HTTP, and the harness's own backends.

    python benchmarks/scoring_speed.py MODEL MASKS --out DIR [--shape choice=90 ...] [--way score ...] [--mask NAME ...]

Shapes, of the project's parallel corpus, each in en, zh and vi, with the number of items, or 90:
- choice: five-shot questions with four choices, answered by one letter;
- sentences: the same with two choices, whose words are scored;
- cloze: one text with 100 words that could come next;
- texts: whole texts.
Ways:
- score: one /score request for each item, 64 at a time;
- echo: one /v1/completions request with `echo` for each continuation, as lm-evaluation-harness asks a server; what is
  computed is every token of every sequence, with its logits, as /score did before version 0.5;
- before: as score, of the server of another checkout, --before DIR (its dependencies are those installed here);
- hf, vllm: lm-evaluation-harness's backends, in a process of their own, without masks; asked the first shape only.
Every item is asked under none and each mask. All repetitions have other items, so that nothing is cached from the one
before. Ways take turns. Further options are vLLM's flags, for the server. Writes DIR/scoring-SHAPE.json and prints a
table: seconds, items per second, the largest difference from `before` or `echo` in nats, for a server's ways the peak
memory of its largest process, which is the engine's worker, and for score what was computed.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from http_service import Server
from summary import machine, spread, table

from clients import AsyncCraneClient
from crane_serve.common.atomic import write_atomically

CORPUS = Path(__file__).resolve().parent.parent / "crane_serve" / "common" / "text" / "parallel_corpus"
LANGUAGES = ("en", "zh", "vi")
SHAPES = ("choice", "sentences", "cloze", "texts")
WAYS = ("score", "before", "echo", "hf", "vllm")
AT_A_TIME = 64
SHOTS = 5


class Item(NamedTuple):
    """A context with its continuations; a text is the continuation of nothing."""

    context: str
    continuations: tuple[str, ...]


def texts_of(language: str) -> list[str]:
    return [json.loads(line)["text"] for line in (CORPUS / f"{language}.jsonl").read_text("utf-8").splitlines()]


def items(shape: str, count: int, repetition: int) -> list[Item]:
    """`count` items, as many of each language."""
    found = []
    for language in LANGUAGES:
        draw = random.Random(f"{shape} {language} {repetition}")
        texts = texts_of(language)
        parts = [(text[: len(text) // 3], text[len(text) // 3 : len(text) // 2]) for text in texts]
        shots = "".join(question(draw, parts, shape, shown=True) for _ in range(SHOTS))
        for _ in range(count // len(LANGUAGES)):
            if shape == "texts":
                found.append(Item("", (f"{draw.random()} {draw.choice(texts)}",)))
            elif shape == "cloze":
                # A character right behind another may be one token with it.
                split = [list(text) if language == "zh" else text.split() for text in texts]
                words = [f" {word}" for of_text in split for word in of_text if word.strip()]
                distinct = sorted(set(words))
                found.append(Item(f"{draw.random()} {draw.choice(texts)}", tuple(draw.sample(distinct, 100))))
            else:
                asked = question(draw, parts, shape, shown=False)
                choices = tuple(f" {letter}" for letter in "ABCD")
                if shape == "sentences":
                    choices = tuple(f" {part[1]}" for part in draw.sample(parts, 2))
                found.append(Item(shots + asked, choices))
    return found


def question(draw: random.Random, parts: Sequence[tuple[str, str]], shape: str, *, shown: bool) -> str:
    """What comes next? With its answer if it is `shown`."""
    chosen = draw.sample(parts, 4)
    right = draw.randrange(4)
    if shape == "sentences":
        return f"{chosen[right][0]}:" + (f" {chosen[right][1]}\n\n" if shown else "")
    choices = "\n".join(f"{letter}. {part[1][:30]}" for letter, part in zip("ABCD", chosen, strict=True))
    return f"{chosen[right][0][:60]}\n{choices}\nAnswer:" + (f" {'ABCD'[right]}\n\n" if shown else "")


Scores = dict[tuple[str, int], list[float]]
"""Nats of each continuation, by mask and item."""


def score(url: str, model: str, asked: Sequence[Item], masks: Sequence[str]) -> tuple[Scores, dict[str, int]]:
    """By /score, and what it computed."""

    async def run() -> tuple[Scores, dict[str, int]]:
        found: Scores = {}
        usage = {"computed_tokens": 0, "cached_tokens": 0, "prompt_tokens": 0}
        async with AsyncCraneClient(url, concurrency=AT_A_TIME) as client:

            async def one(mask: str, index: int, item: Item) -> None:
                if item.context:
                    answer = await client.score_continuations(
                        item.context, item.continuations, mask=mask, join="length"
                    )
                else:
                    answer = await client.score_text(item.continuations, mask=mask)
                found[mask, index] = [each.logprob for each in answer.scores]
                for name in usage:
                    usage[name] += getattr(answer.usage, name, 0) or 0

            await asyncio.gather(*(one(mask, index, item) for index, item in enumerate(asked) for mask in masks))
        return found, usage

    return asyncio.run(run())


def echo(url: str, model: str, asked: Sequence[Item], masks: Sequence[str]) -> tuple[Scores, dict[str, int]]:
    """By /v1/completions, one request for each continuation."""

    async def run() -> tuple[Scores, dict[str, int]]:
        found: Scores = {}
        limits = httpx.Limits(max_connections=AT_A_TIME)
        async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:

            async def text(prompt: str, name: str) -> dict[str, Any]:
                body = {"model": name, "prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
                answer = await client.post("/v1/completions", json=body)
                answer.raise_for_status()
                logprobs: dict[str, Any] = answer.json()["choices"][0]["logprobs"]
                return logprobs

            async def one(mask: str, index: int, item: Item) -> None:
                name = model if mask == "none" else f"{model}:{mask}"
                prompts = [item.context + end for end in item.continuations]
                answers = await asyncio.gather(*(text(prompt, name) for prompt in prompts))
                found[mask, index] = []
                for answer in answers:
                    start = len(item.context)
                    pairs = zip(answer["text_offset"][:-1], answer["token_logprobs"][:-1], strict=True)
                    scored = [value for offset, value in pairs if value is not None and offset >= start]
                    found[mask, index].append(sum(scored))

            await asyncio.gather(*(one(mask, index, item) for index, item in enumerate(asked) for mask in masks))
        return found, {}

    return asyncio.run(run())


class Harness:
    """A backend of lm-evaluation-harness in a process of its own, which answers lists of items."""

    def __init__(self, way: str, options: argparse.Namespace) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("CRANE_")}
        environment = {**kept, "VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
        command = [sys.executable, __file__, "harness", way, str(options.model), options.dtype, str(options.batch)]
        self._log = options.out / f"{way}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,
            )
        self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("harness: "):
                return json.loads(line.removeprefix("harness: "))
        raise RuntimeError(f"the harness has died ({self._process.wait()}); see {self._log}")

    def __call__(self, url: str, model: str, asked: Sequence[Item], masks: Sequence[str]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return {("none", index): values for index, values in enumerate(self._read())}, {}

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # with the engine that it has started
        self._process.wait()


def serve_harness(way: str, model: str, dtype: str, batch: str) -> None:
    """In the process of a Harness: answer lists of items, one a line."""
    from lm_eval.api.instance import Instance

    if way == "hf":
        from lm_eval.models.huggingface import HFLM

        backend: Any = HFLM(pretrained=model, dtype=dtype, device="cpu", batch_size=int(batch))
    else:
        plain = importlib.metadata.version
        # The CPU build is a distribution of another name.
        importlib.metadata.version = lambda name: f"{plain('vllm-cpu')}+cpu" if name == "vllm" else plain(name)  # type: ignore[assignment]
        from lm_eval.models.vllm_causallms import VLLM

        backend = VLLM(pretrained=model, dtype=dtype, batch_size="auto", max_model_len=2048, gpu_memory_utilization=0.9)
    print("harness: 0", flush=True)
    for line in sys.stdin:
        asked = [Item(context, tuple(ends)) for context, ends in json.loads(line)]
        requests = [
            Instance("loglikelihood", {}, (item.context, end), number)
            for number, item in enumerate(asked)
            for end in item.continuations
        ]
        values = iter(backend.loglikelihood(requests, disable_tqdm=True))
        found = [[float(next(values)[0]) for _ in item.continuations] for item in asked]
        print(f"harness: {json.dumps(found)}", flush=True)


def largest_difference(found: Scores, reference: Scores) -> float | None:
    """In nats, of a continuation."""
    common = found.keys() & reference.keys()
    pairs = [zip(found[key], reference[key], strict=True) for key in common]
    return max((abs(one - other) for pair in pairs for one, other in pair), default=None)


def measure(
    options: argparse.Namespace, servers: dict[str, Server], harness: dict[str, Harness], shape: str, count: int
) -> dict[str, Any]:
    """Seconds and differences by way. servers: that a way asks, `score`'s unless it has its own."""
    masks = ["none", *options.mask]
    ways: dict[str, Callable[..., Any]] = {"score": score, "before": score, "echo": echo, **harness}
    asked_ways = [way for way in options.way if way in ways]
    times: dict[str, list[float]] = {way: [] for way in asked_ways}
    differences: dict[str, list[float]] = {way: [] for way in asked_ways}
    usages = []
    for server in servers.values():
        server.forget_peak_memory()
    for repetition in range(options.repetitions):
        asked = items(shape, count, repetition)
        found = {}
        order = list(asked_ways)
        random.Random(repetition).shuffle(order)
        for way in order:
            began = time.perf_counter()
            found[way], usage = ways[way](servers.get(way, servers["score"]).address, options.model.name, asked, masks)
            times[way].append(time.perf_counter() - began)
            if way == "score":
                usages.append(usage)
            print(f"{shape} {repetition}: {way} {times[way][-1]:.1f} s {usage or ''}", file=sys.stderr, flush=True)
        reference = found.get("before", found.get("echo", {}))
        for way in order:
            difference = largest_difference(found[way], reference)
            if difference is not None:
                differences[way].append(difference)
    asked_under = {way: count * (1 if way in harness else len(masks)) for way in asked_ways}
    return {
        "machine": machine(),
        "shape": shape,
        "masks": masks,
        "items": count,
        "dtype": options.dtype,
        "usage": usages,
        "peak_memory_mib": {way: server.peak_memory_mib() for way, server in servers.items() if way in asked_ways},
        "ways": {
            way: {
                "seconds": spread(times[way]),
                "items_per_second": spread([asked_under[way] / seconds for seconds in times[way]]),
                "largest_difference_nats": max(differences[way], default=None),
            }
            for way in asked_ways
        },
    }


def main() -> None:
    if sys.argv[1:2] == ["harness"]:
        serve_harness(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", action="append", help=f"{', '.join(SHAPES)}, perhaps with =ITEMS; default: choice")
    parser.add_argument("--way", choices=WAYS, action="append")
    parser.add_argument("--before", type=Path, help="another checkout, for the way `before`")
    parser.add_argument("--mask", action="append", default=[])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time of the harness's backend hf")
    options, engine_flags = parser.parse_known_args()
    options.way = options.way or ["score", "echo"]
    shapes = [
        (name, int(count or 90)) for name, _, count in (one.partition("=") for one in options.shape or ["choice"])
    ]
    if not {name for name, _ in shapes} <= set(SHAPES):
        parser.error(f"unknown shape; expected {', '.join(SHAPES)}")
    if ("before" in options.way) != (options.before is not None):
        parser.error("--way before and --before DIR go together")
    options.out.mkdir(parents=True, exist_ok=True)
    crane = str(Path(sys.executable).with_name("crane"))
    flags = ["--dtype", options.dtype, "--max-model-len", "2048", "--max-num-seqs", str(AT_A_TIME), *engine_flags]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CRANE_")}
    environment = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **kept, "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [crane, "serve", str(options.model), "--masks", str(options.masks), *flags]
    with contextlib.ExitStack() as running:
        servers = {}
        for way, checkout in (("score", None), ("before", options.before))[: 2 if options.before else 1]:
            of_checkout = {**environment, "PYTHONPATH": str(checkout.resolve())} if checkout else environment
            server = Server(f"crane ({way})", command, of_checkout, options.out / f"server-{way}.log", "/ready")
            running.callback(server.stop)
            servers[way] = server.wait()
        harness = {}
        for way in options.way:
            if way in ("hf", "vllm"):
                harness[way] = Harness(way, options)
                running.callback(harness[way].stop)
        for number, (shape, count) in enumerate(shapes):
            result = measure(options, servers, {} if number else harness, shape, count)
            write_atomically(options.out / f"scoring-{shape}.json", json.dumps(result, indent=1).encode())
            print(f"{shape}\n{report(result)}\n", flush=True)


def report(result: dict[str, Any]) -> str:
    """A table."""
    rows = []
    for way, of_way in result["ways"].items():
        seconds, speed = of_way["seconds"], of_way["items_per_second"]
        difference = of_way["largest_difference_nats"]
        times = f"{seconds['median']:.1f} ({seconds['min']:.1f}, {seconds['max']:.1f})"
        peak = result["peak_memory_mib"].get(way)
        shown = ["" if difference is None else f"{difference:.2g}", "" if peak is None else f"{peak:,.0f}"]
        rows.append([way, times, f"{speed['median']:.2f}", *shown])
    return table(["way", "s", "items/s", "from before or echo, nats", "peak MiB"], rows)


if __name__ == "__main__":
    main()
