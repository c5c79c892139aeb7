"""A disk that fails, or a machine that dies, at one of the calls by which a writer changes files: at each in turn."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CALLS = ("mkdir", "open", "write", "fsync", "chmod", "replace", "rename", "link", "unlink", "ftruncate", "truncate")
"""Of `os`; a file that is made by the built-in `open` changes nothing before it is written to."""


@contextmanager
def interrupted(at: int, fail: Callable[[], None], *, for_good: bool = False) -> Iterator[list[str]]:
    """Call `fail` instead of the call with this number, from 1 on, and with `for_good` instead of all after it, too.

    Yields the names of the calls made. A write that fails has written its first half.
    """
    made: list[str] = []
    originals = {name: getattr(os, name) for name in CALLS}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return originals[name](*args, **kwargs)
            made.append(name)
            if len(made) == at or (for_good and len(made) > at):
                if name == "write":
                    originals[name](args[0], args[1][: len(args[1]) // 2])
                fail()
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in CALLS:
            setattr(os, name, counting(name))
        yield made
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def is_full() -> None:
    """The failure of a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def dies() -> None:
    """The failure of a machine, or kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(number: int, act: Callable[[], object]) -> bool:
    """Run `act` in a child process that dies at this call; whether it came so far. Raises RuntimeError if it fails."""
    child = os.fork()
    if not child:
        code = 1
        try:
            with interrupted(number, dies):
                act()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"the child failed before its call {number}")
    return False
