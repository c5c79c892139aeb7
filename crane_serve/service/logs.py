"""Log lines of the service: text for people or JSON for programs; no value can break a line or forge another."""

import json
import logging
import sys
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from crane_serve.service.settings import LogFormat, LogLevel

LOGGERS = ("crane", "uvicorn.error")
_BESIDE = "  | "


def configure_logging(log_format: LogFormat, level: LogLevel) -> None:
    """Write the lines of the service and of uvicorn to stderr, and nowhere else.

    JSON: one object a line with time (UTC, ISO 8601), level, logger, message, the record's extra fields, and exc_info.
    Text: one line with the extra fields as name=value; a traceback follows below it, indented.
    """
    handler = logging.StreamHandler(sys.stderr)
    kind = _JsonFormatter if log_format is LogFormat.JSON else _TextFormatter
    handler.setFormatter(kind(_no_fields()))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())


def escaped(text: str) -> str:
    """`text` with everything that is not printable (line ends, terminal and direction controls) as escapes."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _no_fields() -> frozenset[str]:
    """The attributes of a record that are not the caller's extra fields; other libraries add some to every record."""
    bare = vars(logging.makeLogRecord({}))
    return frozenset({*RESERVED_ATTRS, *bare, "color_message"})  # uvicorn's message once more, with terminal colours


class _JsonFormatter(JsonFormatter):
    def __init__(self, no_fields: Collection[str]) -> None:
        names = {"levelname": "level", "name": "logger"}
        fields = ["time", "levelname", "name", "message"]
        super().__init__(fields, rename_fields=names, reserved_attrs=list(no_fields))

    def format(self, record: logging.LogRecord) -> str:
        record.time = _time(record)
        return super().format(record)


class _TextFormatter(logging.Formatter):
    def __init__(self, no_fields: Collection[str]) -> None:
        super().__init__()
        self._no_fields = no_fields

    def format(self, record: logging.LogRecord) -> str:
        extra = {
            name: value for name, value in vars(record).items() if name not in self._no_fields and value is not None
        }
        fields = "".join(f" {name}={_value(value)}" for name, value in extra.items())
        line = f"{_time(record)} {record.levelname} {record.name} {escaped(record.getMessage())}{fields}"
        beside = self.formatException(record.exc_info) if record.exc_info else ""
        return "\n".join([line, *(_BESIDE + escaped(part) for part in beside.split("\n") if part)])


def _value(value: Any) -> str:
    """A value with a clear end: in quotes if it contains blanks, quotes or an equals sign."""
    text = str(value)
    if text and not any(sign in ' "=\\' or not sign.isprintable() for sign in text):
        return text
    return escaped(json.dumps(text, ensure_ascii=False))
