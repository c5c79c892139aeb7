"""Follow docs/tutorial.md as a new user would: each of its commands, in one shell, in a clone of the repository.

Stops at the first command that fails or prints something else than the page says. `make tutorial` does this here.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.documents import TUTORIAL, blocks, differs

WORK = "results/tutorial"  # where the tutorial writes
INSTALLED = "crane model fetch"  # the first command after the installation


class Shell:
    """A shell that keeps its variables and jobs from one program to the next."""

    def __init__(self, directory: Path) -> None:
        # A user's shell has its own PATH, not that of the environment which runs this.
        outside = [part for part in os.environ["PATH"].split(":") if Path(part) != Path(sys.executable).parent]
        environment = {**os.environ, "PATH": ":".join(outside)}
        environment.pop("VIRTUAL_ENV", None)
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=directory,
            env=environment,
        )
        self._scratch = Path(tempfile.mkdtemp(prefix="tutorial-"))

    def run(self, program: str) -> tuple[int, str]:
        """The exit code of its first command that fails, else 0, and what it wrote to stdout; stderr passes through."""
        script, output = self._scratch / "program", self._scratch / "output"
        script.write_text(program)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        failed = 'set -E; trap "failed=1" ERR'  # not -e: it would end the shell, with the jobs it holds
        self._process.stdin.write(f"failed=0; {failed}; . {script} > {output}; trap - ERR; echo $failed\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return code, output.read_text()

    def close(self) -> None:
        """End the shell and what it has left running."""
        assert self._process.stdin is not None
        self._process.stdin.write("kill $(jobs -p) 2>/dev/null\nexit\n")
        self._process.stdin.close()
        self._process.wait(timeout=60)
        shutil.rmtree(self._scratch)


def follow(directory: Path) -> int:
    """The exit code: 0 if all went as the page says."""
    shutil.rmtree(directory / WORK, ignore_errors=True)
    shell, began, installed = Shell(directory), time.monotonic(), None
    try:
        for block in blocks(TUTORIAL):
            if block.language != "sh":
                continue
            if block.text.startswith(INSTALLED):
                installed = time.monotonic()
            started = time.monotonic()
            code, printed = shell.run(block.text)
            print(f"[{time.monotonic() - started:5.1f} s] {block.first_line}", flush=True)
            wrong = None if block.prints is None else differs(printed, block.prints)
            if code or wrong is not None:
                print(f"{printed}\nexit code {code}; expected {wrong!r}" if wrong else f"{printed}\nexit code {code}")
                return 1
    finally:
        shell.close()
    assert installed is not None, f"the page has no block that begins with {INSTALLED!r}"
    ended = time.monotonic()
    print(f"followed in {ended - began:.0f} s, {ended - installed:.0f} s of them after the installation")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(__file__).parent.parent, help="a clone")
    sys.exit(follow(parser.parse_args().directory))
