"""What HTTP costs: the service, started as a user does, against vLLM's offline engine; latency, overload, memory.

    python benchmarks/http_service.py MODEL MASKS --out DIR [throughput] [latency] [overload] [memory] [options]

- throughput: N prompts under all masks of MASKS in turn and under none, by three ways: `LLM.generate` on the whole
  batch (offline); one /generate request with many prompts for each mask (requests); and one /generate request for
  each prompt, 64 at a time (singles). The offline engine and the server are both alive, and the one that is not
  measured is stopped (SIGSTOP). Ways take turns in an order that is shuffled for each repetition.
- latency: single /generate requests by 1, 8, 32 and 128 clients, each of which asks again as soon as it is answered.
- overload: ten times as many clients as sequences that the server admits (--max-sequences), for a minute: what is
  answered, with what, and whether refusals say when to come back.
- bench: vLLM's own `vllm bench serve` on /v1/completions, against vLLM's own server without the plugin (vllm), this one
  (crane), and this one with a random mask for each request, by model name (masks); the two servers take turns as above.
- memory: the resident memory of the server's processes over many small requests, and its slope; beside it that of
  vLLM's own server without the plugin, on /v1/completions.

Both engines run with the same flags. Generation is greedy; the time of the clients, on the same machine, counts as the
service's. Writes DIR/http.json and prints tables. Without a name of one, all are measured.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import psutil
from fleet import Engine, EngineFailed
from summary import machine, speed_ratio, spread, table
from worker import MAX_BATCHED_TOKENS, MAX_MODEL_LEN

from clients import AsyncCraneClient, RetryPolicy
from crane_serve.common.atomic import write_atomically

MEASUREMENTS = ("throughput", "latency", "overload", "bench", "memory")
BENCHES = ("vllm", "crane", "masks")
WAYS = ("offline", "requests", "singles")
OFFLINE = WAYS[0]
SINGLES_AT_A_TIME = 64
LATENCY_CLIENTS = (1, 8, 32, 128)
OVERLOAD_FACTOR = 10
PAUSE_S = 0.1  # of a client that was refused, in the overload
PIECE_CHARACTERS = 120
KV_CACHE_BYTES = 64 * 2**20  # in the measurement of memory
START_TIMEOUT_S = 600
ONCE = RetryPolicy(attempts=1)

Prompt = tuple[str, str | None]  # text and mask


def text_pieces(count: int) -> list[str]:
    """Distinct pieces of the project's parallel corpus, all languages in turn."""
    corpus = Path(__file__).resolve().parent.parent / "crane_serve" / "common" / "text" / "parallel_corpus"
    by_language = []
    for path in sorted(corpus.glob("*.jsonl")):
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        starts = range(0, max(map(len, texts)), PIECE_CHARACTERS)
        pieces = (text[start : start + PIECE_CHARACTERS].strip() for start in starts for text in texts)
        by_language.append([piece for piece in dict.fromkeys(pieces) if len(piece) > PIECE_CHARACTERS // 2])
    turns = [piece for row in zip(*by_language, strict=False) for piece in row]
    if count > len(turns):
        raise ValueError(f"{count} prompts asked for, the corpus has {len(turns)}")
    return turns[:count]


def mixed(texts: Sequence[str], masks: Sequence[str], turn: int) -> list[Prompt]:
    """Each text under a mask, all of them and none in rotation; `turn` (of the measurement) says which comes first."""
    names = [None, *masks]
    return [(text, names[(index + turn) % len(names)]) for index, text in enumerate(texts)]


def by_mask(prompts: Sequence[Prompt]) -> dict[str | None, list[str]]:
    """The texts of each mask."""
    groups: dict[str | None, list[str]] = {}
    for text, mask in prompts:
        groups.setdefault(mask, []).append(text)
    return groups


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    return {f"p{share}": float(np.quantile(seconds, share / 100)) for share in (50, 95, 99)}


def slope(samples: Sequence[tuple[int, int]]) -> float:
    """Bytes per request: least squares over (requests, bytes), without the first quarter, in which caches fill."""
    kept = np.array(samples[len(samples) // 4 :], dtype=float)
    return float(np.polyfit(kept[:, 0], kept[:, 1], 1)[0]) if len(kept) > 1 else 0.0


def environment(masks: Path) -> dict[str, str]:
    """That of both engines."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CRANE_")}
    plugin = {"CRANE_MASKS": str(masks), "CRANE_MASK_ROWS": "256"}
    return {**kept, **plugin, "VLLM_CPU_KVCACHE_SPACE": "1", "TOKENIZERS_PARALLELISM": "false"}


def engine_settings(options: argparse.Namespace) -> dict[str, Any]:
    """vLLM's settings, by the names of its Python arguments."""
    return {
        "dtype": options.dtype,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": options.concurrency,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "enable_prefix_caching": False,
    }


def as_flags(settings: dict[str, Any]) -> list[str]:
    """The same settings as flags: true ones as --name, false ones as --no-name."""
    flags: list[str] = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        flags += (
            [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
        )
    return flags


class Server(Engine):
    """A server in a session of its own. ready: the path that answers 200 once it serves."""

    def __init__(self, name: str, command: Sequence[str], settings: Mapping[str, str], log: Path, ready: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self._ready = ready
        super().__init__(name, [*command, "--port", str(port)], settings, log, answers=False)

    def wait(self) -> "Server":
        """Return once it serves. Raises EngineFailed, with the end of its log, if it does not."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise EngineFailed(f"{self.name} does not start; {self._log}:\n{self._tail()}")
            time.sleep(0.5)
        self.start_s = time.perf_counter() - self._began
        print(f"{self.name} started in {self.start_s:.1f} s", file=sys.stderr, flush=True)
        return self

    def _is_ready(self) -> bool:
        try:
            return httpx.get(self.address + self._ready, timeout=10, trust_env=False).is_success
        except httpx.TransportError:
            return False

    def memory(self) -> dict[str, int]:
        """Resident bytes of the process that serves, and of all that it has started together."""
        process = psutil.Process(self._process.pid)
        started = sum(child.memory_info().rss for child in process.children(recursive=True))
        return {"server": process.memory_info().rss, "engine": started}

    def forget_peak_memory(self) -> None:
        for process in self._files():
            (process / "clear_refs").write_text("5")

    def peak_memory_mib(self) -> float:
        """Of its largest process, which is the engine's worker, since the last `forget_peak_memory`."""
        peaks = (re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text()) for process in self._files())
        return max(int(peak[1]) for peak in peaks if peak) / 1024

    def _files(self) -> list[Path]:
        parent = psutil.Process(self._process.pid)
        return [Path("/proc") / str(process.pid) for process in (parent, *parent.children(recursive=True))]

    def __enter__(self) -> "Server":
        return self


class Service(Server):
    """`crane serve`."""

    def __init__(self, options: argparse.Namespace, log: Path, *flags: str) -> None:
        crane = str(Path(sys.executable).with_name("crane"))
        command = [crane, "serve", str(options.model), "--masks", str(options.masks), *flags]
        command += as_flags(engine_settings(options))
        super().__init__("crane", command, environment(options.masks), log, "/ready")


class PlainServer(Server):
    """vLLM's own OpenAI server, without the plugin, under the name that the model has in `crane serve`."""

    def __init__(self, options: argparse.Namespace, log: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.model)]
        command += ["--served-model-name", options.model.name, "--host", "127.0.0.1", *flags]
        command += as_flags(engine_settings(options))
        settings = {name: value for name, value in environment(options.masks).items() if not name.startswith("CRANE_")}
        super().__init__("vllm", command, {**settings, "VLLM_PLUGINS": ""}, log, "/health")


def offline_worker(settings: dict[str, Any]) -> None:
    """The offline engine: a line of JSON per job on stdin, `{"prompts": [[text, mask], ...], "max_tokens"}`."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    llm = LLM(settings["model"], **settings["engine"])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            began = time.perf_counter()
            parameters = [
                SamplingParams(
                    temperature=0,
                    max_tokens=job["max_tokens"],
                    extra_args=None if mask is None else {"crane_mask": mask},
                )
                for _, mask in job["prompts"]
            ]
            results = llm.generate([text for text, _ in job["prompts"]], parameters, use_tqdm=False)
            seconds = time.perf_counter() - began
            tokens = sum(len(result.outputs[0].token_ids) for result in results)
            answer: dict[str, Any] = {"seconds": seconds, "tokens": tokens}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


async def ask_by_requests(client: AsyncCraneClient, prompts: Sequence[Prompt], max_tokens: int) -> int:
    """One request with many prompts for each mask, all at once; the number of tokens."""
    answers = await asyncio.gather(
        *(
            client.generate(texts, mask=mask, max_tokens=max_tokens, temperature=0.0)
            for mask, texts in by_mask(prompts).items()
        )
    )
    return sum(answer.usage.completion_tokens for answer in answers)


async def ask_by_singles(client: AsyncCraneClient, prompts: Sequence[Prompt], max_tokens: int) -> int:
    """A request for each prompt, 64 at once."""
    tally = await crowd(client.server, SINGLES_AT_A_TIME, prompts, max_tokens, requests=len(prompts), until=None)
    if tally.statuses != {200: len(prompts)} or tally.broken:
        raise RuntimeError(f"not every request was answered: {tally.report()}")
    return tally.tokens


Ask = Callable[[AsyncCraneClient, Sequence[Prompt], int], Awaitable[int]]
BY_HTTP: dict[str, Ask] = {"requests": ask_by_requests, "singles": ask_by_singles}


def over_http(address: str, way: str, prompts: Sequence[Prompt], max_tokens: int) -> dict[str, Any]:
    """Seconds and generated tokens. Raises CraneError or RuntimeError unless every prompt is answered."""

    async def run() -> dict[str, Any]:
        async with AsyncCraneClient(address, concurrency=SINGLES_AT_A_TIME, retries=ONCE) as client:
            began = time.perf_counter()
            tokens = await BY_HTTP[way](client, prompts, max_tokens)
            return {"seconds": time.perf_counter() - began, "tokens": tokens}

    return asyncio.run(run())


def measure_throughput(options: argparse.Namespace, masks: Sequence[str]) -> dict[str, Any]:
    texts = text_pieces(options.prompts)
    settings = {"model": str(options.model), "engine": engine_settings(options)}
    command = [sys.executable, __file__, "--offline-worker", json.dumps(settings)]
    measurements: list[dict[str, Any]] = []
    with (
        Engine(OFFLINE, command, environment(options.masks), options.out / "offline.log") as offline,
        Service(options, options.out / "throughput.log") as service,
    ):
        engines = {OFFLINE: offline.wait(), **dict.fromkeys(BY_HTTP, service.wait())}
        offline.pause()
        service.pause()
        draw = random.Random(0)

        def ask(way: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
            engines[way].wake()
            try:
                if way == OFFLINE:
                    return offline.ask({"prompts": prompts, "max_tokens": options.max_tokens})
                return over_http(service.address, way, prompts, options.max_tokens)
            finally:
                engines[way].pause()

        for repetition in range(options.repetitions):
            prompts = mixed(texts, masks, repetition)
            for way in draw.sample(WAYS, len(WAYS)):
                ask(way, prompts[: len(masks) + 1])  # it has just been woken
                measured = ask(way, prompts)
                measurements.append({"way": way, "repetition": repetition, **measured})
                print(f"repetition {repetition} {way}: {measured['seconds']:.2f} s", file=sys.stderr, flush=True)
    return {"measurements": measurements, "summary": summarise_throughput(measurements)}


def summarise_throughput(measurements: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Way -> figures. Time is per token: greedy generations of different batches can part, and end sooner or later."""
    cost = {
        way: {(0, one["repetition"]): one["seconds"] / one["tokens"] for one in measurements if one["way"] == way}
        for way in WAYS
    }
    return {
        way: {
            "seconds": spread([one["seconds"] for one in measurements if one["way"] == way]),
            "tokens": statistics.median(one["tokens"] for one in measurements if one["way"] == way),
            "tokens_per_s": 1 / statistics.median(cost[way].values()),
            "speed": speed_ratio(cost[OFFLINE], cost[way]),
        }
        for way in WAYS
    }


def throughput_table(summary: dict[str, dict[str, Any]]) -> str:
    rows = []
    for way, figures in summary.items():
        seconds, speed = figures["seconds"], figures["speed"]
        rows.append(
            [
                way,
                f"{seconds['median']:.2f}",
                f"{seconds['min']:.2f}..{seconds['max']:.2f}",
                f"{figures['tokens']:.0f}",
                f"{figures['tokens_per_s']:.0f}",
                f"{speed['ratio']:.3f}",
                "-" if speed["interval"] is None else "{:.3f}..{:.3f}".format(*speed["interval"]),
            ]
        )
    return table(["way", "s", "range", "tokens", "tokens/s", "of offline", "95 %"], rows)


@dataclass
class Tally:
    """What a crowd of clients has met. seconds: of the answered requests; others: failures without an HTTP status."""

    statuses: Counter[int] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    without_retry_after: int = 0
    broken: int = 0  # 200s whose body is no answer

    def add(self, status: int, headers: Mapping[str, str], body: bytes, seconds: float) -> None:
        """One answer. headers: by any case, as HTTP libraries have them."""
        self.statuses[status] += 1
        if status == 200:
            self.seconds.append(seconds)
            try:
                self.tokens += json.loads(body)["usage"]["completion_tokens"]
            except (ValueError, LookupError, TypeError):
                self.broken += 1
        elif status in (429, 503) and "Retry-After" not in headers:
            self.without_retry_after += 1

    def report(self) -> dict[str, Any]:
        return {
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "others": dict(self.others),
            "broken": self.broken,
            "without_retry_after": self.without_retry_after,
            "tokens": self.tokens,
            "seconds": percentiles(self.seconds) if self.seconds else None,
        }


Request = Callable[[Prompt, int], tuple[str, dict[str, Any]]]


def our_request(prompt: Prompt, max_tokens: int) -> tuple[str, dict[str, Any]]:
    """Path and body of a generation."""
    text, mask = prompt
    return "/generate", {"prompt": text, "max_tokens": max_tokens, "temperature": 0.0, "mask": mask}


def plain_request(model: str) -> Request:
    """The same on vLLM's own server, without the mask."""

    def request(prompt: Prompt, max_tokens: int) -> tuple[str, dict[str, Any]]:
        body = {"model": model, "prompt": prompt[0], "max_tokens": max_tokens, "temperature": 0.0}
        return "/v1/completions", body

    return request


async def crowd(
    address: str,
    clients: int,
    prompts: Sequence[Prompt],
    max_tokens: int,
    *,
    requests: int | None,
    until: float | None,
    request: Request = our_request,
) -> Tally:
    """Clients that ask again and again: `requests` in all, or until a time of the monotonic clock.

    Through aiohttp, which costs little: with many connections httpx takes longer for a request than the server.
    """
    tally, asked = Tally(), 0

    async def one(session: aiohttp.ClientSession) -> None:
        nonlocal asked
        while (requests is None or asked < requests) and (until is None or time.monotonic() < until):
            path, body = request(prompts[asked % len(prompts)], max_tokens)
            asked += 1
            began = time.perf_counter()
            try:
                async with session.post(path, json=body) as response:
                    content = await response.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                tally.others[type(error).__name__] += 1
                await asyncio.sleep(PAUSE_S)
                continue
            tally.add(response.status, response.headers, content, time.perf_counter() - began)
            if response.status != 200:
                await asyncio.sleep(PAUSE_S)

    async with (
        aiohttp.ClientSession(address, connector=aiohttp.TCPConnector(limit=0)) as session,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(clients):
            group.create_task(one(session))
    return tally


def measure_latency(options: argparse.Namespace, masks: Sequence[str]) -> dict[str, Any]:
    prompts = mixed(text_pieces(options.prompts), masks, 0)
    levels = {}
    with Service(options, options.out / "latency.log") as service:
        service.wait()
        asyncio.run(crowd(service.address, 8, prompts, options.max_tokens, requests=16, until=None))
        for clients in LATENCY_CLIENTS:
            requests = max(options.latency_requests, 3 * clients)
            began = time.perf_counter()
            tally = asyncio.run(
                crowd(service.address, clients, prompts, options.max_tokens, requests=requests, until=None)
            )
            levels[str(clients)] = {**tally.report(), "requests_per_s": requests / (time.perf_counter() - began)}
            print(f"latency with {clients} clients: {levels[str(clients)]}", file=sys.stderr, flush=True)
    return levels


def latency_table(levels: dict[str, Any]) -> str:
    rows = []
    for clients, level in levels.items():
        seconds = level["seconds"] or {}
        cells = [f"{seconds[name]:.3f}" if seconds else "-" for name in ("p50", "p95", "p99")]
        rows.append([clients, *cells, f"{level['requests_per_s']:.1f}", json.dumps(level["statuses"])])
    return table(["clients", "p50 s", "p95 s", "p99 s", "requests/s", "answers"], rows)


def measure_overload(options: argparse.Namespace, masks: Sequence[str]) -> dict[str, Any]:
    prompts = mixed(text_pieces(options.prompts), masks, 0)
    limit = ("--max-sequences", str(options.max_sequences))
    clients = OVERLOAD_FACTOR * options.max_sequences
    with Service(options, options.out / "overload.log", *limit) as service:
        service.wait()
        asyncio.run(crowd(service.address, 4, prompts, options.max_tokens, requests=8, until=None))
        end = time.monotonic() + options.overload_s
        tally = asyncio.run(crowd(service.address, clients, prompts, options.max_tokens, requests=None, until=end))
        after = asyncio.run(crowd(service.address, 1, prompts, options.max_tokens, requests=8, until=None))
    return {"clients": clients, "max_sequences": options.max_sequences, **tally.report(), "after": after.report()}


def overload_table(found: dict[str, Any]) -> str:
    names = ("clients", "max_sequences", "statuses", "others", "broken", "without_retry_after", "seconds")
    rows = [[name, json.dumps(found[name])] for name in names]
    return table(["overload", "figure"], [*rows, ["answers after it", json.dumps(found["after"]["statuses"])]])


def bench(address: str, options: argparse.Namespace, models: Sequence[str]) -> dict[str, float]:
    """One run of vLLM's benchmark. models: names that requests draw from; none for the base model."""
    program = (
        "import sys; from vllm.benchmarks.serve import add_cli_args, main; "
        "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser; "
        "parser = Parser(); add_cli_args(parser); main(parser.parse_args(sys.argv[1:]))"
    )  # the `vllm` command does not start with the CPU distribution
    result = options.out / "bench.json"
    arguments = ["--backend", "openai", "--base-url", address, "--endpoint", "/v1/completions"]
    arguments += ["--model", str(options.model), "--served-model-name", options.model.name]
    arguments += [
        "--dataset-name",
        "random",
        "--random-input-len",
        "64",
        "--seed",
        "0",
        "--ignore-eos",
        "--disable-tqdm",
    ]
    arguments += ["--random-output-len", str(options.max_tokens), "--num-prompts", str(options.bench_requests)]
    arguments += ["--max-concurrency", str(options.concurrency), "--temperature", "0", "--save-result"]
    arguments += ["--result-dir", str(result.parent), "--result-filename", result.name]
    arguments += ["--lora-modules", *models] if models else []
    log = options.out / "bench.log"
    with log.open("wb") as output:
        subprocess.run([sys.executable, "-c", program, *arguments], stdout=output, stderr=output, check=True)
    found = json.loads(result.read_text())
    if found["completed"] != options.bench_requests:
        raise RuntimeError(f"{found['completed']} of {options.bench_requests} requests were answered; see {log}")
    kept = ("output_throughput", "request_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")
    return {name: float(found[name]) for name in kept}


def measure_bench(options: argparse.Namespace, masks: Sequence[str]) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    with (
        PlainServer(options, options.out / "vllm.log") as plain,
        Service(options, options.out / "crane.log") as service,
    ):
        models = [f"{options.model.name}:{mask}" for mask in masks]
        ways = {"vllm": (plain.wait(), ()), "crane": (service.wait(), ()), "masks": (service, models)}
        plain.pause()
        service.pause()
        draw = random.Random(0)
        for repetition in range(options.repetitions):
            for way in draw.sample(BENCHES, len(BENCHES)):
                server, names = ways[way]
                server.wake()
                try:
                    runs.append({"way": way, "repetition": repetition, **bench(server.address, options, names)})
                finally:
                    server.pause()
                print(f"bench: {runs[-1]}", file=sys.stderr, flush=True)
    return {"runs": runs}


def bench_table(found: dict[str, Any]) -> str:
    cost = {
        way: {(0, run["repetition"]): 1 / run["output_throughput"] for run in found["runs"] if run["way"] == way}
        for way in BENCHES
    }
    rows = []
    for way in BENCHES:
        speed = speed_ratio(cost["vllm"], cost[way])
        median = {
            name: statistics.median(run[name] for run in found["runs"] if run["way"] == way)
            for name in ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")
        }
        interval = "-" if speed["interval"] is None else "{:.3f}..{:.3f}".format(*speed["interval"])
        rows.append([way, *(f"{value:.1f}" for value in median.values()), f"{speed['ratio']:.3f}", interval])
    return table(["bench", "tokens/s", "TTFT ms", "p99 TTFT ms", "TPOT ms", "of vllm", "95 %"], rows)


def measure_memory(options: argparse.Namespace, masks: Sequence[str]) -> dict[str, Any]:
    prompts = mixed(text_pieces(options.prompts), masks, 0)
    # A KV cache that is soon used whole: the system counts its pages only as they are first written.
    cache = ("--kv-cache-memory-bytes", str(KV_CACHE_BYTES))
    return {
        "crane": _memory(Service(options, options.out / "memory.log", *cache), our_request, prompts, options),
        "vllm": _memory(
            PlainServer(options, options.out / "memory-vllm.log", *cache),
            plain_request(options.model.name),
            prompts,
            options,
        ),
    }


def _memory(server: Server, request: Request, prompts: Sequence[Prompt], options: argparse.Namespace) -> dict[str, Any]:
    samples: list[dict[str, int]] = []
    statuses: Counter[str] = Counter()
    with server:
        server.wait()
        step = options.memory_step
        for requests in range(0, options.memory_requests + 1, step):
            if requests:
                tally = asyncio.run(crowd(server.address, 32, prompts, 1, requests=step, until=None, request=request))
                statuses.update(tally.report()["statuses"])
                statuses.update(tally.others)
            samples.append({"requests": requests, **server.memory()})
            print(f"memory of {server.name}: {samples[-1]}", file=sys.stderr, flush=True)
    slopes = {part: slope([(one["requests"], one[part]) for one in samples]) for part in ("server", "engine")}
    return {"samples": samples, "answers": dict(statuses), "bytes_per_request": slopes}


def memory_table(found: dict[str, Any]) -> str:
    rows = []
    for name, of in found.items():
        first, last = of["samples"][0], of["samples"][-1]
        for part, slope_bytes in of["bytes_per_request"].items():
            figures = (f"{one[part] / 2**20:.1f}" for one in (first, last))
            rows.append([name, part, *figures, str(last["requests"]), f"{slope_bytes:.1f}", json.dumps(of["answers"])])
    return table(["of", "process", "MiB at first", "at last", "requests", "bytes/request", "answers"], rows)


Measure = Callable[[argparse.Namespace, Sequence[str]], dict[str, Any]]
MEASURE: dict[str, tuple[Measure, Callable[[dict[str, Any]], str]]] = {
    "throughput": (measure_throughput, lambda found: throughput_table(found["summary"])),
    "latency": (measure_latency, latency_table),
    "overload": (measure_overload, overload_table),
    "bench": (measure_bench, bench_table),
    "memory": (measure_memory, memory_table),
}


def run(options: argparse.Namespace) -> None:
    masks = sorted(path.stem for path in options.masks.glob("[!.]*.safetensors"))
    if not masks:
        sys.exit(f"{options.masks} holds no mask files")
    options.out.mkdir(parents=True, exist_ok=True)
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    content: dict[str, Any] = {
        "settings": {**shown, "masks": masks, "engine": engine_settings(options)},
        "machine": machine(),
        "took_s": {},
    }
    for name in options.measurements:
        measure, show = MEASURE[name]
        began = time.time()
        content[name] = measure(options, masks)
        content["took_s"][name] = time.time() - began
        # After every measurement, so that a failure in a later one loses nothing.
        write_atomically(options.out / "http.json", json.dumps(content, indent=2).encode() + b"\n")
        print(f"{name}\n{show(content[name])}\n", flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("masks", type=Path, help="directory of mask files for the model")
    parser.add_argument("measurements", nargs="*", metavar="MEASUREMENT", help=f"of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--concurrency", type=int, default=64, help="max_num_seqs of the engines")
    parser.add_argument("--dtype", default="bfloat16", help="of the engines; float32 where bfloat16 is slow")
    parser.add_argument("--prompts", type=int, default=500, help="of one measurement")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=6, help="of every way of throughput and bench")
    parser.add_argument("--latency-requests", type=int, default=200, help="with each number of clients, at least")
    parser.add_argument("--max-sequences", type=int, default=16, help="of the server in the overload")
    parser.add_argument("--overload-s", type=float, default=60.0)
    parser.add_argument("--bench-requests", type=int, default=128, help="of one run of vLLM's benchmark")
    parser.add_argument("--memory-requests", type=int, default=20_000)
    parser.add_argument("--memory-step", type=int, default=1000, help="requests between samples")
    options = parser.parse_intermixed_args(arguments)
    options.measurements = options.measurements or list(MEASUREMENTS)
    for name in options.measurements:
        if name not in MEASUREMENTS:
            parser.error(f"unknown measurement {name!r}, expected some of {', '.join(MEASUREMENTS)}")
    return options


def main() -> None:
    if sys.argv[1:2] == ["--offline-worker"]:
        offline_worker(json.loads(sys.argv[2]))
        return
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the engines are stopped
    run(options)


if __name__ == "__main__":
    main()
