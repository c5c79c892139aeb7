"""The wheel in an empty environment serves Gemma-3-270M with masks: `make release-check`.

Makes a virtual environment, HOME and working directory of their own in an empty directory, installs torch and
`crane-serve[cpu,demo]` from a wheel, makes masks, serves, asks unmasked and masked, and ends the server by SIGTERM.
Prints what it measured as JSON. Takes some minutes, and about 5 GB of disk, which it frees again.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROMPT = "Thủ đô của Việt Nam là"
TEXT = "Trời mưa suốt buổi sáng, nên bọn trẻ ở nhà và đọc sách."
START_TIMEOUT_S = 420
STOP_TIMEOUT_S = 120


class Place:
    """An empty directory with an environment that knows nothing of the checkout."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bin = directory / "venv" / "bin"
        self.work = directory / "work"
        home = directory / "home"
        for made in (self.work, home):
            made.mkdir(parents=True)
        unwanted = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in unwanted and "CRANE" not in name},
            "HOME": str(home),
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        subprocess.run([sys.executable, "-m", "venv", str(directory / "venv")], check=True)

    def run(self, *command: str | Path) -> str:
        """Run a command of the environment; what it prints. Its failure is shown and ends the check."""
        done = subprocess.run(
            [str(self.bin / command[0]), *map(str, command[1:])],
            cwd=self.work,
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def install(self, wheel: Path, torch: str) -> None:
        """torch's CPU build, from the configured index or PyTorch's own, then the wheel."""
        found = subprocess.run(
            [str(self.bin / "pip"), "install", "-qq", torch], cwd=self.work, env=self.environment, check=False
        )
        if found.returncode != 0:
            self.run("pip", "install", "-qq", "--index-url", CPU_INDEX, torch)
        self.run("pip", "install", "-qq", f"crane-serve[cpu,demo] @ {wheel.as_uri()}")
        self.run("pip", "uninstall", "-qq", "-y", "torchvision", "torchaudio", "torchcodec")


def ask(url: str, body: dict[str, object] | None = None) -> dict[str, object]:
    """What a route of the server answers; a POST if there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
        return json.load(answer)


def wait_until_ready(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            ask(f"{url}/ready")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
        else:
            return
    sys.exit(f"the server is not ready:\n{log.read_text(errors='replace')[-6000:]}")


def check(place: Path, wheel: Path, torch: str, model: Path | None) -> dict[str, object]:
    """Install, make masks, serve and ask. Exits with a message where something is not as it should be."""
    began = time.monotonic()
    seconds: dict[str, float] = {}

    def done(step: str) -> None:
        seconds[step] = round(time.monotonic() - began - sum(seconds.values()), 1)

    there = Place(place)
    there.install(wheel, torch)
    done("install")
    imported = there.run("python", "-c", "import crane_serve, server; print(crane_serve.__file__, server.__file__)")
    if imported.count(str(place)) != 2:
        sys.exit(f"expected the modules of the wheel, found {imported}")
    if model is None:
        model = there.work / "gemma-3-270m"
        there.run("crane", "model", "fetch", "gemma-3-270m", "--to", model)
        done("fetch")
    there.run("crane", "relevance", model, "--limit", "6", "--methods", "attnlrp", "--out", "scores.safetensors")
    there.run("crane", "select", "scores.safetensors", "--method", "attnlrp", "--budget", "0.01", "--out", "masks")
    done("masks")

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", place / "server.log"
    command = [there.bin / "crane", "serve", model, "--masks", "masks", "--port", port, "--dtype", "float32"]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*map(str, command), "--max-model-len", "512", "--max-num-seqs", "8"],
            cwd=there.work,
            env=there.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(url, server, log)
        done("start")
        texts, nats = {}, {}
        for mask in ("none", "vi", "zh"):
            body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0}
            generated = ask(f"{url}/generate?mask={mask}", body)
            scored = ask(f"{url}/score?mask={mask}", {"text": [TEXT]})
            if (generated["mask"] or {"name": "attnlrp-none"})["name"] != f"attnlrp-{mask}":
                sys.exit(f"asked for {mask}, answered under {generated['mask']}")
            texts[mask] = generated["outputs"][0]["text"]
            nats[mask] = -scored["scores"][0]["logprob"] / scored["scores"][0]["tokens"]
        done("questions")
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=STOP_TIMEOUT_S)
        done("stop")
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
    if code != 0:
        sys.exit(f"the server ended with {code} after SIGTERM:\n{log.read_text(errors='replace')[-6000:]}")
    if texts["vi"] == texts["none"] or not nats["vi"] > nats["zh"] > nats["none"]:
        sys.exit(f"the masks do not do what they should: {texts}, {nats}")
    return {
        "version": there.run("crane", "--version").strip(),
        "seconds": seconds,
        "environment_gb": round(_size(place / "venv") / 1e9, 2),
        "continuations": texts,
        "nats_per_token": {mask: round(value, 3) for mask, value in nats.items()},
        "exit_code": code,
    }


def _size(directory: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the wheel if none is given, and check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=Path, help="directory to make, and to remove afterwards")
    parser.add_argument("--wheel", type=Path, help="default: build one")
    parser.add_argument("--torch", required=True, help="requirement of torch's CPU build")
    parser.add_argument("--model", type=Path, help="checkpoint of Gemma-3-270M; default: fetch it")
    given = parser.parse_args(arguments)
    place = given.place.resolve()
    place.mkdir(parents=True)  # an error if it is there
    try:
        wheel = given.wheel
        if wheel is None:
            checkout = Path(__file__).resolve().parents[2]
            build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist")]
            subprocess.run([*build, str(checkout)], check=True, stdout=subprocess.DEVNULL)
            (wheel,) = (place / "dist").glob("*.whl")
        model = None if given.model is None else given.model.resolve()
        print(json.dumps(check(place / "empty", wheel.resolve(), given.torch, model), indent=2, ensure_ascii=False))
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
