"""Processes that fork from one which has imported everything: they start, and can be killed, within a moment."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

_PRELOADED = ("tests.api.serve_fake", "tests.tiny", "clients.commands", "relevance.scoring", "relevance.methods")


def context() -> ForkServerContext:
    """The context that all such processes come from."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(list(_PRELOADED))
    return fork


def forked(target: Callable[..., Any], *arguments: Any, log: Path | None = None) -> ForkServerProcess:
    """A process that calls a function of a module, and writes what it says to `log`."""
    process = context().Process(target=_call, args=(target, arguments, log), daemon=True)
    process.start()
    return process


def crane(*arguments: object, log: Path) -> ForkServerProcess:
    """The command `crane` with its arguments."""
    return forked(_crane, list(map(str, arguments)), log=log)


def _crane(arguments: list[str]) -> None:
    from crane_serve.cli import app

    app(arguments)


def _call(target: Callable[..., Any], arguments: tuple[Any, ...], log: Path | None) -> None:
    if log is not None:
        with log.open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
    try:
        target(*arguments)
    finally:
        sys.stdout.flush()
