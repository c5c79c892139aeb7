"""Engine processes that take turns: all alive, and only the one that is being measured awake."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

START_TIMEOUT_S, JOB_TIMEOUT_S, STOP_TIMEOUT_S = 600, 600, 15


class EngineFailed(RuntimeError):
    """An engine process died, did not answer in time, or answered with an error."""


class Engine:
    """One worker process in a session of its own. It starts at once; `wait` for it, then `ask`, then `stop`.

    `pause` stops its whole process group with SIGSTOP, `wake` continues it.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, *, answers: bool = True
    ) -> None:
        """answers: whether it is asked for jobs over its pipes; one that is not writes everything to the log."""
        self.name = name
        self.start_s: float | None = None  # from the start of the process until it could serve
        self._log = log
        self._buffer = b""
        self._began = time.perf_counter()
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE if answers else subprocess.DEVNULL,
                stdout=subprocess.PIPE if answers else errors,
                stderr=errors,
                env=dict(environment),
                start_new_session=True,
            )

    def wait(self) -> "Engine":
        """Return once the engine can serve. Raises EngineFailed, with the end of its log, if it cannot."""
        if self.start_s is None:
            self._read(START_TIMEOUT_S)
            self.start_s = time.perf_counter() - self._began
        return self

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Run a job and return the answer; the engine must be awake."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead; reading says so
            self._process.stdin.write(json.dumps(dict(job)).encode() + b"\n")
            self._process.stdin.flush()
        return self._read(JOB_TIMEOUT_S)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the process and all that it started."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(descriptor, 1 << 20) if ready else b""
            if not piece:
                what = "ended" if ready else f"did not answer within {timeout_s} s"
                raise EngineFailed(f"engine {self.name!r} {what}; the end of {self._log}:\n{self._tail()}")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"engine {self.name!r}: {answer['error']}; the end of {self._log}:\n{self._tail()}")
        return answer

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]


class Fleet:
    """The engines of one round. `measured` wakes one for a job while all others sleep."""

    def __init__(self, model: Path, masks: Path, concurrency: int, logs: Path, *, cold: bool = False) -> None:
        self._settings = {"model": str(model), "masks": str(masks), "concurrency": concurrency}
        self._masks = masks
        self._logs = logs
        self._cold = cold
        self.engines: dict[str, Engine] = {}

    def start(self, *names: str) -> None:
        """Start engines side by side and leave them asleep. Names: those of `ENGINES`."""
        for name in names:
            settings = {**self._settings, **ENGINES[name]}
            command = [sys.executable, str(Path(__file__).with_name("worker.py")), json.dumps(settings)]
            self.engines[name] = Engine(name, command, self._environment(name), self._logs / f"{name}.log")
        for name in names:
            self.engines[name].wait().pause()
            print(f"engine {name!r} started in {self.start_s(name):.1f} s", file=sys.stderr, flush=True)

    def ask(self, name: str, job: Mapping[str, Any]) -> dict[str, Any]:
        """Wake one engine for one job."""
        engine = self.engines[name]
        engine.wake()
        try:
            return engine.ask(job)
        finally:
            engine.pause()

    def start_s(self, name: str) -> float | None:
        return self.engines[name].start_s

    def end(self, *names: str) -> None:
        """Stop the engines that are named, or all."""
        for name in names or tuple(self.engines):
            self.engines.pop(name).stop()

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.end()

    def _environment(self, name: str) -> dict[str, str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("CRANE_")}
        environment.pop("VLLM_PLUGINS", None)
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if name.startswith("plugin"):
            masks = with_offsets(self._masks) if name == "plugin, offsets" else self._masks
            environment |= {"CRANE_MASKS": str(masks), "CRANE_MASK_ROWS": "256"}
            environment["CRANE_GATES"] = str(int(name == "plugin, gates"))
        else:
            environment["VLLM_PLUGINS"] = ""
        if self._cold:
            environment["VLLM_CACHE_ROOT"] = environment["TORCHINDUCTOR_CACHE_DIR"] = str(self._logs / f"cache-{name}")
        return environment


def with_offsets(masks: Path) -> Path:
    """Where the masks are that add to what they switch off."""
    return masks.with_name(f"{masks.name}-offsets")


# What each engine process is; names that begin with "plugin" have the plugin.
ENGINES: dict[str, dict[str, Any]] = {
    "no plugin": {"kind": "vllm"},
    "no plugin, second process": {"kind": "vllm"},
    "plugin": {"kind": "vllm"},
    "plugin, eager": {"kind": "vllm", "eager": True},
    "plugin, offsets": {"kind": "vllm"},
    "plugin, gates": {"kind": "vllm"},
    "patched, eager": {"kind": "patched"},
    "transformers": {"kind": "transformers"},
}
