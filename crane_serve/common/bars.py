"""Bars: the progress of a long job, on stderr: a bar on a terminal, and occasional lines in a log."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

_TICK_S = 5.0
_SOONEST_S = 30.0  # between two lines of a log
_SHARE = 0.1  # of the work; after it a line is due
_LATEST_S = 180.0  # a line is due after this time, however little was done
_SLOWING = 15  # a line is due after a 15th of the time passed so far: a week gives about 100 lines


class Bar(Protocol):
    """The progress of a job."""

    def start(self, total: int, done: int = 0, what: str = "") -> None:
        """The work begins: `total` units, `done` of them by an earlier run. what: more about the work, for a log."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """`units` more units are done. note: shown beside the figures."""

    def say(self, line: str) -> None:
        """A warning or notice in between."""


@contextmanager
def bar(name: str, unit: str, what: str = "", *, on_terminal: bool = True) -> Iterator[Bar]:
    """Show the progress of the job `name` while the context lasts, in `unit` (a plural, such as documents).

    what: the first line of a log, about the job. on_terminal: whether there is a bar on a terminal; else only notices
    are shown there.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        with _log(name, unit, what) as lines:
            yield lines
    elif on_terminal:
        with _rich(name, console) as progress_bar:
            yield progress_bar
    else:
        yield _Notices()


class LogLines:
    """A bar as lines of a log: when at least 30 s have passed and a tenth of the work is done, or after 3 minutes.

    These intervals grow with the time passed, so that a week gives about 100 lines.
    """

    def __init__(
        self, name: str, unit: str, write: Callable[[str], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._unit, self._write, self._now = name, unit, write, now
        self._start = self._work_start = self._last_line = now()
        self._total: int | None = None
        self._done = self._before = self._at_line = 0
        self._note = ""
        self._lock = threading.RLock()

    def start(self, total: int, done: int = 0, what: str = "") -> None:
        """See Bar."""
        with self._lock:
            self._total, self._done, self._before, self._at_line = total, done, done, done
            self._work_start = self._last_line = self._now()
            resumed = f", {done} of them done before" if done else ""
            self._write(f"{self._name}: {total} {self._unit}{f' {what}' if what else ''}{resumed}")

    def advance(self, units: int = 1, note: str = "") -> None:
        """See Bar."""
        with self._lock:
            self._done += units
            self._note = note
            self.tick()

    def tick(self) -> None:
        """Write a line if one is due."""
        with self._lock:
            silent, passed = self._now() - self._last_line, self._now() - self._start
            is_step = (
                silent >= _SOONEST_S and bool(self._total) and self._done - self._at_line >= _SHARE * (self._total or 0)
            )
            if (is_step and self._done != self._total) or silent >= max(_LATEST_S, passed / _SLOWING):
                self._line(passed)

    def say(self, line: str) -> None:
        """See Bar."""
        with self._lock:
            self._write(line)

    def end(self) -> None:
        """Write the last line, of a job that has ended without an error."""
        count = f"{self._done} {self._unit}" if self._total is None else f"{self._done} of {self._total} {self._unit}"
        done = f"{count}, " if self._done or self._total is not None else ""
        self._write(f"{self._name}: done, {done}{duration(self._now() - self._start)}")

    def _line(self, passed: float) -> None:
        parts = [f"{self._name}: {self._done} {self._unit}"] if self._done else [f"{self._name}: under way"]
        if self._total:
            parts = [f"{self._name}: {self._done} of {self._total} {self._unit} ({self._done / self._total:.0%})"]
        parts.append(duration(passed))
        if self._total and self._done > self._before:
            rate = (self._now() - self._work_start) / (self._done - self._before)
            parts.append(f"about {duration((self._total - self._done) * rate)} left")
        self._write(", ".join([*parts, self._note] if self._note else parts))
        self._last_line, self._at_line = self._now(), self._done


def duration(seconds: float) -> str:
    """`9 s`, `2 min 5 s`, `3 h 20 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, left = divmod(minutes, 60)
    return f"{minutes} min {rest} s" if hours == 0 else f"{hours} h {left} min"


@contextmanager
def _log(name: str, unit: str, what: str) -> Iterator[LogLines]:
    def write(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    lines = LogLines(name, unit, write)
    if what:
        write(f"{name}: {what}")
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_TICK_S):
            lines.tick()

    watcher = threading.Thread(target=watch, name="bar", daemon=True)
    watcher.start()
    try:
        yield lines
    finally:
        over.set()
        watcher.join()
    lines.end()


class _Notices:
    def start(self, total: int, done: int = 0, what: str = "") -> None:
        pass

    def advance(self, units: int = 1, note: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def _rich(name: str, console: "Console") -> Iterator[Bar]:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console) as display:
        task = display.add_task(name, total=None, note="")

        class RichBar:
            def start(self, total: int, done: int = 0, what: str = "") -> None:
                display.reset(task, total=total, completed=done)

            def advance(self, units: int = 1, note: str = "") -> None:
                display.update(task, advance=units, note=note)

            def say(self, line: str) -> None:
                console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

        yield RichBar()
