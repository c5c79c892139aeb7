"""Bars: in a log, lines at sensible times, on stderr."""

import time

import pytest

from crane_serve.common.bars import LogLines, bar, duration

DAY_S = 86_400.0


class Log:
    """Lines of a job on a clock that is set by hand."""

    def __init__(self, total: int | None, done: int = 0) -> None:
        self.now = 0.0
        self.lines: list[tuple[float, str]] = []
        self.bar = LogLines("job", "steps", lambda line: self.lines.append((self.now, line)), lambda: self.now)
        if total is not None:
            self.bar.start(total, done, "for en, vi")

    def pass_(self, seconds: float, units: int = 0) -> None:
        for _ in range(round(seconds / 5)):
            self.now += 5
            self.bar.tick()
        if units:
            self.bar.advance(units)


def test_a_short_job_has_a_first_and_a_last_line() -> None:
    log = Log(10)
    for _ in range(10):
        log.pass_(1, units=1)
    log.bar.end()
    assert [line for _, line in log.lines] == ["job: 10 steps for en, vi", "job: done, 10 of 10 steps, 0 s"]


def test_tenths_that_take_long_enough_are_said_with_the_time_left() -> None:
    log = Log(100)
    for _ in range(100):
        log.pass_(5, units=1)
    assert [time for time, _ in log.lines] == [0, *range(50, 500, 50)]
    assert log.lines[1][1] == "job: 10 of 100 steps (10%), 50 s, about 7 min 30 s left"
    log.bar.end()
    assert log.lines[-1][1] == "job: done, 100 of 100 steps, 8 min 20 s"


def test_a_silent_job_says_that_it_is_under_way() -> None:
    log = Log(None)
    log.pass_(600)
    assert [line for _, line in log.lines] == [f"job: under way, {minutes} min 0 s" for minutes in (3, 6, 9)]
    log = Log(1000)
    log.pass_(100, units=1)
    log.pass_(300)
    assert [time for time, _ in log.lines] == [0, 180, 360]


@pytest.mark.parametrize("total", [None, 50, 100_000])
@pytest.mark.parametrize("length", [3_600.0, DAY_S, 7 * DAY_S])
def test_no_job_fills_a_log(total: int | None, length: float) -> None:
    log = Log(total)
    for _ in range(1000):
        log.now += length / 1000
        log.bar.advance((total or 1000) // 1000)
    assert len(log.lines) <= 110
    assert max(second - first for (first, _), (second, _) in zip(log.lines, log.lines[1:], strict=False)) <= max(
        180 + length / 1000, length / 10
    )


def test_what_was_done_before_does_not_count_as_speed() -> None:
    log = Log(100, done=50)
    assert log.lines[0][1] == "job: 100 steps for en, vi, 50 of them done before"
    log.pass_(100, units=10)
    assert "60 of 100 steps (60%), 1 min 40 s, about 6 min 40 s left" in log.lines[-1][1]


def test_a_log_is_written_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("job", "steps", "of a model") as shown:
        shown.start(2, what="in en")
        shown.say("warning: something")
        shown.advance(2, "note")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "job: of a model",
        "job: 2 steps in en",
        "warning: something",
        "job: done, 2 of 2 steps, 0 s",
    ]


def test_a_job_that_fails_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), bar("job", "steps", "of a model"):
        raise ValueError("no")
    assert capsys.readouterr().err == "job: of a model\n"


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with bar("job", "steps", "of a model") as shown:
        shown.start(2)
        shown.advance(2, "[note]")
        shown.say("warning: something")
    output = capsys.readouterr()
    assert "2/2" in output.err
    assert "[note]" in output.err
    assert "of a model" not in output.err
    with bar("job", "steps", "of a model", on_terminal=False) as shown:
        shown.advance()
        shown.say("a stage")
    assert capsys.readouterr().err == "a stage\n"


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 125, 7260, 90_000)] == [
        "0 s",
        "1 min 0 s",
        "2 min 5 s",
        "2 h 1 min",
        "25 h 0 min",
    ]


def test_the_watcher_ends_with_the_job() -> None:
    import threading

    with bar("job", "steps"):
        pass
    time.sleep(0.01)
    assert not [thread for thread in threading.enumerate() if thread.name == "bar"]
