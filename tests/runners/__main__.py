"""Runs pytest in a process, and with engines, that schedule asynchronously, under V1 or V2."""

import os
import sys
from pathlib import Path

from tests.runners import environment

ENGINE = ("offline", "schedules", "scoring", "activations", "families", "ranks", "recycled_blocks")
TESTS = (*(f"tests/engine/test_{name}.py" for name in ENGINE), "tests/e2e/test_service.py")


def main() -> None:
    runner, *options = sys.argv[1:] or [""]
    if runner not in ("v1", "v2"):
        sys.exit("usage: python -m tests.runners v1|v2 [options of pytest]")
    given = any(Path(option.partition("::")[0]).exists() for option in options)
    command = [sys.executable, "-m", "pytest", "-m", "engine and not release", *options, *(() if given else TESTS)]
    added = environment(runner)
    os.chdir(Path(__file__).parent.parent.parent)
    os.execve(sys.executable, command, {**os.environ, **added})


if __name__ == "__main__":
    main()
