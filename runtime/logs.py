"""The log of a server: events with fields, one line each, as text or as JSON.

No line has text of a prompt, an answer, a tool or a path. An event's fields are numbers, ids and words of ours; of
an exception the type and the places are told, never its message, which may quote anything; of other libraries'
messages nothing but where they came from.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
MAX_VALUE_CHARS = 300
MAX_FRAMES = 12
_OURS = ("caesura.", "uvicorn.")


@dataclass(frozen=True, slots=True)
class LogStyle:
    """How a process writes its log. Empty: it leaves logging as it is."""

    format: str = ""
    level: str = "info"


_style = LogStyle()


def style() -> LogStyle:
    """What ``configure`` was last told in this process, for processes that it starts."""
    return _style


def note(log: logging.Logger, level: int, event: str, *, exc_info: bool | BaseException = False, **fields: Any) -> None:
    """Write an event. Fields that are None are left out; text in them must be ours."""
    if log.isEnabledFor(level):
        found = {name: value for name, value in fields.items() if value is not None}
        log.log(level, "%s", _as_text(event, found), exc_info=exc_info, extra={"event": event, "fields": found})


def configure(wanted: LogStyle, stream: TextIO | None = None) -> None:
    """Write all logging of this process to ``stream`` (standard error) in the wanted style. For a process of our own:
    handlers that are there already stay alone in charge."""
    global _style
    root = logging.getLogger()
    if not wanted.format or root.handlers:
        return
    _style = wanted
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if wanted.format == "json" else TextLines())
    root.addHandler(handler)
    level = getattr(logging, wanted.level.upper())
    logging.getLogger("caesura").setLevel(level)
    logging.getLogger("uvicorn").setLevel(max(level, logging.WARNING))


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, event, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging."""
        event, fields = _event(record)
        head = {"time": _moment(record), "level": record.levelname.lower(), "logger": record.name, "event": event}
        return json.dumps({**head, **{name: _bounded(value) for name, value in fields.items()}}, default=str)


class TextLines(logging.Formatter):
    """The same for people: time, level, event, and ``name=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging."""
        event, fields = _event(record)
        return f"{_moment(record)} {record.levelname:7} {_as_text(event, fields)}"


def _event(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    event = getattr(record, "event", None)
    if event is not None:
        fields = dict(getattr(record, "fields", {}))
    elif record.name.startswith(_OURS):
        event, fields = "message", {"message": str(record.msg)}  # as it stands in the code, without its arguments
    else:
        event, fields = "elsewhere", {"source": record.name, "place": f"{record.module}:{record.lineno}"}
    if record.exc_info and record.exc_info[1] is not None:
        fields.update(_told(record.exc_info[1]))
    return str(event), fields


def _told(error: BaseException) -> dict[str, Any]:
    """An exception's type and where it passed, innermost last; its message may quote what must not be told."""
    frames = traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:]
    places = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}:{frame.name}" for frame in frames]
    cause = error.__cause__ or error.__context__
    told = {"exception": type(error).__name__, "places": places}
    return told if cause is None else {**told, "cause": type(cause).__name__}


def _moment(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _bounded(value: Any) -> Any:
    return value[:MAX_VALUE_CHARS] if isinstance(value, str) else value


def _as_text(event: str, fields: dict[str, Any]) -> str:
    return " ".join([event, *(f"{name}={_plain(value)}" for name, value in fields.items())])


def _plain(value: Any) -> str:
    """A value on one line, whatever is in it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ",".join(map(_plain, value))
    text = ascii(str(_bounded(value)))[1:-1]
    return f'"{text}"' if " " in text else text
