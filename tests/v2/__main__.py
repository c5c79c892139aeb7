"""Runs pytest in a process, and with engines, that use V2 through Triton's interpreter."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ENGINE = ("offline", "schedules", "scoring", "families", "ranks", "recycled_blocks")
TESTS = (*(f"tests/engine/test_{name}.py" for name in ENGINE), "tests/e2e/test_service.py")


def main() -> None:
    path = [str(HERE), str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    options = sys.argv[1:]
    given = any(Path(option.partition("::")[0]).exists() for option in options)
    command = [sys.executable, "-m", "pytest", "-m", "engine and not release", *options, *(() if given else TESTS)]
    os.chdir(HERE.parent.parent)
    os.execve(sys.executable, command, {**os.environ, **environment})


if __name__ == "__main__":
    main()
