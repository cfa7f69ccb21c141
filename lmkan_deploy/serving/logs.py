"""Log lines on stderr: text for people, or JSON, a line each."""

from __future__ import annotations

import logging
import sys
from typing import Any

import orjson

_FIELDS = ("request_id", "method", "path", "status", "seconds")
"""What log calls add to a line with `extra`; never contents of tensors."""


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{record.msecs:03.0f}",
            "level": record.levelname.lower(),
            "process": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {key: getattr(record, key) for key in _FIELDS if hasattr(record, key)}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(entry, default=str).decode()


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        more = " ".join(f"{key}={getattr(record, key)}" for key in _FIELDS if hasattr(record, key))
        return f"{line} {more}" if more else line


def set_up_logs(*, as_json: bool) -> None:
    """Sends this package's and uvicorn's messages to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _JsonFormatter() if as_json else _TextFormatter("%(asctime)s %(levelname)s [%(process)d] %(message)s")
    )
    for name, level in (("lmkan_deploy", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        if logger.level == logging.NOTSET or name == "uvicorn":
            logger.setLevel(level)
