"""The whole path on a small model: fetch, relevance, learn, select, serve, evaluate. Each step is a command that a user
can repeat."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from crane_serve.common.bars import bar

MODEL = "gemma-3-270m"
BUDGET = 0.005
METHODS = ("learned", "attnlrp", "lape", "random")
SCORED = 48  # documents of each language
LEARNING = ("--steps", 32)
SERVER_START_S = 420


class DemoError(RuntimeError):
    """A step of the demonstration failed."""


def run_demo(model: Path, out: Path, *, documents: int, keep: bool, report: Callable[[str], None] = print) -> None:
    """Run every step, leaving masks, matrix and report in `out`; `keep` leaves the server running.

    `documents`: test documents per language. Raises DemoError naming the command that failed.
    """
    began = time.monotonic()
    scores, masks = out / "scores.safetensors", out / "masks"
    out.mkdir(parents=True, exist_ok=True)

    def step(*arguments: object) -> None:
        _step([str(argument) for argument in arguments], began, report)

    step("model", "fetch", MODEL, "--to", model)
    step("relevance", model, "--limit", SCORED, "--methods", "attnlrp,lape,random", "--out", scores)
    step("learn", model, scores, "--limit", SCORED, "--budget", BUDGET, *LEARNING)
    for method in METHODS:
        step("select", scores, "--method", method, "--budget", BUDGET, "--out", masks)

    port = _free_port()
    server_log = out / "server.log"
    server = _serve(model, masks, port, server_log, began, report)
    try:
        url = f"http://127.0.0.1:{port}"
        with bar("start of the server", "steps", f"its log is {server_log}", on_terminal=False):
            _wait_until_ready(url, server, server_log)
        step("eval", "--server", url, "--split", "test", "--limit", documents, "--out", out)
    except BaseException:
        _stop(server)
        raise
    if keep:
        report(f"the server goes on at {url} (process {server.pid}; its log is {server_log})")
        report(f"try: curl '{url}/generate?mask=zh' -H 'content-type: application/json' -d '{{\"prompt\": \"你好\"}}'")
    else:
        _stop(server)
    report(f"done in {time.monotonic() - began:.0f} s; see {out / 'report.md'} and {out / 'matrix.png'}")


def _crane(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "crane_serve", *arguments]


def _announce(arguments: Sequence[str], began: float, report: Callable[[str], None]) -> None:
    report(f"\n[{time.monotonic() - began:4.0f} s] $ crane {shlex.join(arguments)}")


def _step(arguments: Sequence[str], began: float, report: Callable[[str], None]) -> None:
    _announce(arguments, began, report)
    code = subprocess.run(_crane(arguments), check=False).returncode
    if code != 0:
        raise DemoError(f"crane {shlex.join(arguments)} failed with exit code {code}")


def _serve(
    model: Path, masks: Path, port: int, log: Path, began: float, report: Callable[[str], None]
) -> subprocess.Popen[bytes]:
    arguments = ["serve", str(model), "--masks", str(masks), "--port", str(port), "--max-model-len", "2048"]
    arguments += _dtype_flags()
    _announce(arguments, began, report)
    # By default vLLM leaves one core to the front end, which on two cores is half of the machine.
    environment = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **os.environ}
    with log.open("wb") as output:
        return subprocess.Popen(
            _crane(arguments), env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def _dtype_flags() -> list[str]:
    """Flags for float32 on processors that are slow at bfloat16."""
    import torch

    from crane_serve.common.models.processor import cpu_multiplies_bfloat16

    is_fast = torch.cuda.is_available() or cpu_multiplies_bfloat16()
    return [] if is_fast else ["--dtype", "float32"]


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    import httpx

    deadline = time.monotonic() + SERVER_START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise DemoError(f"the server exited with code {server.returncode}; see {log}")
        try:
            if httpx.get(f"{url}/ready", timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise DemoError(f"the server was not ready after {SERVER_START_S} s; see {log}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
