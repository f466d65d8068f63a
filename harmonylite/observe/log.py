"""Log events with fields, as text for people and the journal or as JSON for collectors.

Every module logs `log.warning("nats-server exited", extra={"fields": {"code": 1, "restart_in_s": 2.0}})`: a
short phrase and its data. Secrets do not get out: a field whose name says secret is masked, and so is the
user and password part of any URL, in messages and tracebacks too.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any, Final, Literal, TextIO

Format = Literal["console", "json"]

MASK: Final = "********"
_SECRET_NAME: Final = re.compile(
    r"passw(or)?d|pwd|passphrase|secret|token|credential|authorization|nkey|jwt|(^|_)seed($|_)|(private|access|api)_?key",
    re.IGNORECASE,
)
# What names the place of a secret does not give it away, and the person on call needs it.
_NAMES_A_PLACE: Final = re.compile(r"_(file|path|dir)$", re.IGNORECASE)
# Up to the last "@" before the next URL: a password may contain "@" and "/".
_USERINFO: Final = re.compile(r"(\w://)(?:(?!://)\S)*@")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NEEDS_QUOTES: Final = re.compile(r'[\s="\\\x00-\x1f\x7f-\x9f]|^$')

# sd-daemon(3): the kernel's levels, which journald takes from a "<N>" in front of each line.
_PRIORITY: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_RESERVED: Final = frozenset({"time", "level", "logger", "message", "exception"})


def rfc3339(seconds: float) -> str:
    """Seconds since 1970 as RFC 3339 in UTC with milliseconds: `2024-05-03T14:02:11.123Z`."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def redact(text: str) -> str:
    """The text with the user and password of every URL in it masked."""
    if "@" not in text:
        return text
    return _USERINFO.sub(rf"\1{MASK}@", text)


def is_secret(name: str) -> bool:
    """Whether a value of this name must not be shown."""
    return bool(_SECRET_NAME.search(name)) and not _NAMES_A_PLACE.search(name)


def setup(*, verbose: bool, format: Format, stream: TextIO | None = None) -> None:
    """Send the log to `stream` (default: standard error); call again to change level or format later.

    Our own modules log from INFO (DEBUG when `verbose`), everybody else's (nats, asyncio) from WARNING.
    """
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if format == "json" else ConsoleFormatter(journal=_is_journal(stream)))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for other in ("nats", "asyncio"):
        logging.getLogger(other).setLevel(logging.WARNING)
    logging.getLogger("harmonylite").setLevel(logging.DEBUG if verbose else logging.INFO)


def _is_journal(stream: TextIO) -> bool:
    """Whether the stream goes to journald itself.

    systemd.exec(5): JOURNAL_STREAM holds device and inode; its mere presence means nothing, since shells
    started by a session manager inherit it.
    """
    try:
        state = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{state.st_dev}:{state.st_ino}"


class ConsoleFormatter(logging.Formatter):
    """`2024-05-03 14:02:11.123 WARNING message key=value`, local time; for the journal `<4>message key=value`."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """The line, followed by the lines of the traceback if there is one."""
        words = [_printable(redact(record.getMessage()))]
        words += [f"{name}={_as_word(value)}" for name, value in _fields(record).items()]
        trace = _traceback(self, record)
        # journald makes an entry of every line, each with the level that stands in front of it.
        prefix = f"<{_priority(record.levelno)}>" if self._journal else ""
        if not self._journal:
            moment = datetime.fromtimestamp(record.created).isoformat(" ", "milliseconds")
            words[:0] = [moment, record.levelname]
        lines = [" ".join(words), *trace.splitlines()]
        return "\n".join(prefix + line for line in lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `message`, the event's fields, `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        """The object; a field that has the name of one of ours gets a trailing underscore."""
        event: dict[str, Any] = {
            "time": rfc3339(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        for name, value in _fields(record).items():
            event[f"{name}_" if name in _RESERVED else name] = value
        if trace := _traceback(self, record):
            event["exception"] = trace
        return json.dumps(event, separators=(",", ":"), default=str)


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITY if level >= least), 7)


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    return redact(formatter.formatException(record.exc_info))


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "fields", None)
    return _plain_mapping(fields) if isinstance(fields, Mapping) else {}


def _plain_mapping(fields: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): MASK if is_secret(str(name)) and value else _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    """The value as JSON knows it, secrets masked."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        # NaN and the infinities are not JSON.
        return round(value, 6) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return _plain_mapping(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(one) for one in value]
    if isinstance(value, BaseException):
        return redact(str(value) or type(value).__name__)
    return redact(str(value))


def _as_word(value: Any) -> str:
    """A plain value as one word of a console line."""
    if isinstance(value, list):
        value = ",".join(one if isinstance(one, str) else json.dumps(one) for one in value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if _NEEDS_QUOTES.search(text):
        text = json.dumps(text, ensure_ascii=False)
    return _printable(text)


def _printable(text: str) -> str:
    """One line without control characters, so that data cannot forge a log line or drive the terminal."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


class Repeated:
    """One event that may come again every second: the first is logged, then at most one per interval.

    What was held back is counted in the field `suppressed` of the next line. Safe to use from several
    threads.
    """

    def __init__(
        self,
        logger: logging.Logger,
        interval_s: float = 60.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._last: float | None = None
        self._suppressed = 0

    def log(self, level: int, message: str, fields: Mapping[str, Any] | None = None) -> bool:
        """Log the event unless one was logged within the interval; whether it was logged."""
        with self._lock:
            now = self._clock()
            if self._last is not None and now - self._last < self._interval_s:
                self._suppressed += 1
                return False
            self._last = now
            held_back, self._suppressed = self._suppressed, 0
        shown = dict(fields or {})
        if held_back:
            shown["suppressed"] = held_back
        self._logger.log(level, message, extra={"fields": shown})
        return True

    def warning(self, message: str, fields: Mapping[str, Any] | None = None) -> bool:
        """`log` at level WARNING."""
        return self.log(logging.WARNING, message, fields)

    def error(self, message: str, fields: Mapping[str, Any] | None = None) -> bool:
        """`log` at level ERROR."""
        return self.log(logging.ERROR, message, fields)

    def reset(self) -> None:
        """The trouble is over: its next occurrence is news again."""
        with self._lock:
            self._last = None
            self._suppressed = 0
