"""Jobs: subprocesses that run one after the other, behind the tests that do not need them yet."""

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tests.runners import INTERPRETED

TIMEOUT_S = 3600 if INTERPRETED else 1200  # of one job; some start fifteen engines, beside other tests


class Jobs:
    """Scripts in the order in which they were added, each in a process of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._jobs: dict[str, Future[int]] = {}
        self._running: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def add(self, name: str, script: Path, *arguments: object, **environment: str) -> None:
        """Queue `python script arguments` with additions to the environment."""
        command = [sys.executable, str(script), *map(str, arguments)]
        self._jobs[name] = self._executor.submit(self._run, command, environment, self._log(name))

    def wait(self, name: str) -> None:
        """Wait until a job has ended; fail with the end of its log if it did not end well."""
        code = self._jobs[name].result(timeout=TIMEOUT_S * len(self._jobs))
        assert code == 0, self._log(name).read_text(errors="replace")[-6000:]

    def stop(self) -> None:
        """End what runs and forget what waits."""
        self._stopped = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._running is not None and self._running.poll() is None:
            self._running.kill()

    def _run(self, command: list[str], environment: Mapping[str, str], log: Path) -> int:
        if self._stopped:
            return -1
        with log.open("wb") as output:
            self._running = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            return self._running.wait(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._running.kill()
            return self._running.wait()

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"
