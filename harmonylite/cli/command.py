"""What every command shares: its shape, the configuration it works on, and how it prints."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from harmonylite import config as configuration
from harmonylite.config import Config, one_line
from harmonylite.model import RawText, Value


class Failure(Exception):  # noqa: N818
    """A command cannot do its work. The text is one line for the operator: what, where, what to do."""


class WrongUsage(Exception):  # noqa: N818
    """Options that do not go together; one line."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command. examples: command lines that work as they stand, for the help text; run: gives the exit code."""

    name: str
    summary: str
    examples: tuple[str, ...]
    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    description: str = ""


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", metavar="TABLE", help="of this table only")


# Flag -> key of the configuration that it overrides.
OVERRIDES = {
    "node_id": "node_id",
    "cluster_addr": "nats.cluster_addr",
    "cluster_peers": "nats.cluster_peers",
    "leaf_servers": "nats.leaf_servers",
}


def config_path(arguments: argparse.Namespace) -> Path:
    """The configuration file that the command line names, or the default one. Raises ConfigError if there is none."""
    return configuration.find(getattr(arguments, "config", None))


def load_config(arguments: argparse.Namespace) -> Config:
    """The configuration with what the command line overrides. Raises ConfigError."""
    given = {key: getattr(arguments, flag) for flag, key in OVERRIDES.items() if hasattr(arguments, flag)}
    return configuration.load(config_path(arguments), given)


def warn(message: str) -> None:
    """One line on standard error."""
    print(f"harmonylite: {one_line(message)}", file=sys.stderr)


def print_line(text: str) -> None:
    """One line on standard output, whatever names and values of the application are in it."""
    print(one_line(text))


def print_json(data: object) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Aligned lines of a name and a value."""
    found = [(name, one_line(value)) for name, value in pairs]
    width = max((len(name) for name, _ in found), default=0)
    for name, value in found:
        print(f"{name:<{width}}  {value}".rstrip())


def print_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Aligned columns under a header."""
    lines = [[one_line(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    for line in (header, *lines):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def json_value(value: Value) -> object:
    """A SQLite value for JSON. What JSON has no type for becomes {"blob": hex}, {"text": hex} or {"real": name}."""
    if isinstance(value, RawText):
        return {"text": value.data.hex()}
    if isinstance(value, bytes):
        return {"blob": value.hex()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"real": str(value)}
    return value


def sql_value(value: Value, limit: int = 60) -> str:
    """A SQLite value as a person reads it, in SQL's notation, cut to about `limit` characters."""
    if value is None:
        return "NULL"
    if isinstance(value, RawText):
        return sql_value(value.data.decode("utf-8", "backslashreplace"), limit)
    if isinstance(value, bytes):
        text = value[:limit].hex()
        return f"x'{text if len(text) <= limit else text[:limit] + '...'}'"
    if isinstance(value, str):
        text = one_line(value.replace("'", "''"))
        return "'" + (text if len(text) <= limit else text[:limit] + "...") + "'"
    return str(value)


def sql_key(key: Sequence[Value]) -> str:
    return "(" + ", ".join(sql_value(value) for value in key) + ")"


def sql_row(row: Mapping[str, Value]) -> str:
    return ", ".join(f"{name}={sql_value(value)}" for name, value in row.items())


def local_time(ms: int) -> str:
    """Milliseconds since 1970 as a date and time of this machine's zone; years beyond 9999 as the number."""
    try:
        return datetime.fromtimestamp(ms / 1000, timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return f"{ms} ms"


def writing(ms: int, node: int) -> str:
    """Who wrote a row version, and when: to the millisecond, since that decides between two of them."""
    if (ms, node) == (0, 0):
        return "before the installation"
    seconds = local_time(ms)
    return f"by node {node} at {seconds}" + (f".{ms % 1000:03d}" if not seconds.endswith("ms") else "")


def rfc3339(ms: int) -> str | None:
    """Milliseconds since 1970 as RFC 3339 in UTC; None for years beyond 9999."""
    try:
        moment = datetime.fromtimestamp(ms / 1000, timezone.utc)
    except (OverflowError, ValueError, OSError):
        return None
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def duration(seconds: float) -> str:
    """A length of time in its two largest units: `3 d 4 h`, `2 min 5 s`."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        amount, left = divmod(left, size)
        if amount:
            parts.append(f"{amount} {unit}")
    return " ".join(parts[:2]) or "0 s"


def size(number: int) -> str:
    """A number of bytes for people: `12.3 MB`, `4.1 kB`."""
    return f"{number / 1e6:,.1f} MB" if number >= 1e6 else f"{number / 1e3:,.1f} kB"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
