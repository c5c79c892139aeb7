"""Calls of `clients.bounded_process`: what others wrote into a plan runs in a process of its own, within bounds."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from clients.bounded_process import CPU_S

_PROGRAM = Path(__file__).with_name("bounded_process.py")


class BoundedError(ValueError):
    """What was run raised an error, or went beyond a bound; the message says which."""


def render(text: str, fields: Mapping[str, Any]) -> str:
    """The text that a Jinja2 template makes of fields. Raises BoundedError."""
    return str(_call("render", text, dict(fields)))


def value(text: str, fields: Mapping[str, Any]) -> Any:
    """The value, as JSON has it, of a template that is one `{{ expression }}`; else its text. Raises BoundedError."""
    return _call("value", text, dict(fields))


def first_groups(pattern: str, text: str) -> list[str | None]:
    """What the first group of a regular expression matches, at each of its places in a text. Raises BoundedError."""
    found: list[str | None] = _call("first_groups", pattern, text)
    return found


def _call(name: str, *arguments: Any) -> Any:
    content, problem = json.loads(_answer(json.dumps([name, arguments]).encode() + b"\n"))
    if problem is not None:
        raise BoundedError(problem)
    return content


@lru_cache(maxsize=256)  # the same examples stand before many items
def _answer(question: bytes) -> str:
    return _asker(os.getpid()).ask(question).decode("utf-8", "surrogatepass")


class _Asker:
    """One process, started with the first question, and again after a question that ended it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: bytes) -> bytes:
        """The line that answers a line. Raises BoundedError."""
        with self._lock:
            try:
                return self._asked(question)
            except BaseException:  # an interruption too: the next question must not get this one's answer
                self._end()
                raise

    def _asked(self, question: bytes) -> bytes:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is for this process, which ends the other
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(question)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            raise BoundedError(_how_it_ended(process.wait()))
        return answer

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGXCPU:
        return f"it takes more than {CPU_S} s of processor time"
    return f"the process that ran it died with exit code {code}"


@cache
def _asker(process: int) -> _Asker:
    """That of this process: one that was forked has a pipe of its own."""
    return _Asker()
