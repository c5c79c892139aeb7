"""Log lines: what they hold, and that no value can break or forge one."""

import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from crane_serve.service.logs import LOGGERS, configure_logging
from crane_serve.service.settings import LogFormat, LogLevel

NASTY = 'a\r\nb\x1b[31m\u2028c\u202ed\x00"e=f\\'


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    before = [(log, log.handlers, log.propagate, log.level) for log in map(logging.getLogger, LOGGERS)]
    yield
    for log, handlers, propagate, level in before:
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogFormat.JSON, LogLevel.INFO)
    logging.getLogger("crane.access").info(NASTY, extra={"path": NASTY, "status": 200, "mask": None})
    logging.getLogger("uvicorn.error").warning("second %s", NASTY)
    first, second = capsys.readouterr().err.split("\n")[:-1]
    assert first.isascii()
    assert first.isprintable()
    entry = json.loads(first)
    time = datetime.fromisoformat(entry.pop("time"))
    assert abs(datetime.now(UTC) - time) < timedelta(minutes=1)
    assert entry == {
        "level": "INFO",
        "logger": "crane.access",
        "message": NASTY,
        "path": NASTY,
        "status": 200,
        "mask": None,
    }
    assert json.loads(second)["message"] == f"second {NASTY}"


def test_json_holds_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogFormat.JSON, LogLevel.INFO)
    try:
        raise ValueError(NASTY)
    except ValueError:
        logging.getLogger("crane.api").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert entry["exc_info"].startswith("Traceback")
    assert NASTY in entry["exc_info"]


def test_text_is_one_readable_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogFormat.TEXT, LogLevel.INFO)
    extra = {"path": "/x status=200", "status": 404, "key": None, "empty": "", "name_": NASTY}
    logging.getLogger("crane.access").info("request\nERROR", extra=extra)
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert line.isprintable()
    time, rest = line.split(" ", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    name = r'"a\r\nb\u001b[31m\u2028c\u202ed\u0000\"e=f\\"'
    assert rest == (rf'INFO crane.access request\nERROR path="/x status=200" status=404 empty="" name_={name}')


def test_a_traceback_in_text_cannot_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogFormat.TEXT, LogLevel.INFO)
    forged = "2030-01-01T00:00:00.000Z INFO crane.access request status=200"
    try:
        raise ValueError(f"bad\n{forged}\r{forged}\u2028")
    except ValueError:
        logging.getLogger("crane.api").exception("failed")
    first, *others = capsys.readouterr().err.split("\n")[:-1]
    assert first.endswith("ERROR crane.api failed")
    assert others[0] == "  | Traceback (most recent call last):"
    assert others[-1] == rf"  | {forged}\r{forged}\u2028"
    assert all(line.startswith("  | ") for line in others)
    assert all(line.isprintable() for line in others)


@pytest.mark.parametrize("log_format", LogFormat)
def test_what_is_less_severe_is_left_out(capsys: pytest.CaptureFixture[str], log_format: LogFormat) -> None:
    configure_logging(log_format, LogLevel.WARNING)
    for name in LOGGERS:
        logging.getLogger(name).info("unsaid")
        logging.getLogger(name).warning("said")
    written = capsys.readouterr().err
    assert "unsaid" not in written
    assert written.count("said") == 2


def test_configuring_twice_writes_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogFormat.TEXT, LogLevel.INFO)
    configure_logging(LogFormat.JSON, LogLevel.DEBUG)
    logging.getLogger("crane.access").debug("once")
    assert json.loads(capsys.readouterr().err)["message"] == "once"


@pytest.mark.parametrize("log_format", LogFormat)
def test_what_libraries_add_to_every_record_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, log_format: LogFormat
) -> None:
    made = logging.getLogRecordFactory()

    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = made(*args, **kwargs)
        record.process_title = "MainProcess"
        return record

    monkeypatch.setattr(logging, "_logRecordFactory", make)
    configure_logging(log_format, LogLevel.INFO)
    logging.getLogger("crane.access").info("request", extra={"status": 200, "color_message": "\x1b[1mrequest"})
    written = capsys.readouterr().err
    assert "status" in written
    assert "MainProcess" not in written
    assert "color" not in written
