"""Steps of a longer measurement: commands of crane, run one after the other."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

LANGUAGES = ("en", "zh", "vi")


def import_corpus(*arguments: object) -> None:
    """`crane corpus import` for the three languages."""
    crane("corpus", "import", "--languages", ",".join(LANGUAGES), *arguments)


def done(scores: Path, method: str) -> bool:
    """Whether `scores` holds `method`."""
    from relevance.scores import Scores

    return method in Scores.load(scores).by_method


def crane(*arguments: object) -> None:
    """Run a command of crane, saying which and how long it took; leave when it fails."""
    command = [str(argument) for argument in arguments]
    print(f"\n$ crane {shlex.join(command)}", flush=True)
    began = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "crane_serve", *command], check=False).returncode
    print(f"[{time.monotonic() - began:.0f} s]", flush=True)
    if code:
        sys.exit(code)
