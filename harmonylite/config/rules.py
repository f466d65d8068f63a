"""What a key may hold. A rule turns the value that the TOML reader gave into the value that `Config` holds.

`Rule.read` raises ValueError; its text goes on from the key's name ("must be ...") and never shows a secret.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmonylite.config.values import Secret, format_size, parse_server_url, parse_size, split_address

CREDENTIALS = "${CREDENTIALS_DIRECTORY}"
_DURATION = re.compile(r"(\d+(\.\d+)?(ms|s|m|h))+")


@dataclass(frozen=True, slots=True)
class Rule:
    """says: what is allowed, for people; read: raises ValueError; show: a value in people's words."""

    says: str
    read: Callable[[object], Any]
    secret: bool = False
    show: Callable[[Any], object] | None = None


def shown(value: object) -> str:
    """A value as its writer would recognise it, in TOML's notation, cut to a length that fits a line."""
    if isinstance(value, (str, bool)):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, dict):
        text = "a table"
    elif isinstance(value, list):
        text = "a list"
    else:
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def boolean() -> Rule:
    def read(value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, without quotes; it is {shown(value)}")
        return value

    return Rule("true or false", read)


def integer(low: int, high: int, unit: str = "") -> Rule:
    of = f" {unit}" if unit else ""
    says = f"{low} to {high}{of}" if high < 2**31 - 1 else f"{low} or more{of}"

    def read(value: object) -> int:
        # bool is a kind of int in Python, not in TOML.
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"must be a whole number ({says}); it is {shown(value)}")
        if not low <= value <= high:
            raise ValueError(f"must be from {low} to {high}{of}; it is {value}")
        return value

    return Rule(says, read)


def number(low: float, high: float, unit: str) -> Rule:
    says = f"{low:g} to {high:g} {unit}"

    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"must be a number ({says}); it is {shown(value)}")
        if not low <= value <= high:
            raise ValueError(f"must be from {says}; it is {value}")
        return float(value)

    return Rule(says, read)


def size(low: int, high: int, *, zero: str = "") -> Rule:
    """Bytes, as a number or as a text such as "2GB". zero: what 0 stands for, if 0 is allowed below `low`."""
    says = f"{format_size(low)} to {format_size(high)}" + (f", or 0: {zero}" if zero else "")

    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(f'must be bytes or a size such as "512MB" or "2GB"; it is {shown(value)}')
        amount = parse_size(value) if isinstance(value, str) else value
        if not low <= amount <= high and not (zero and amount == 0):
            raise ValueError(f"must be {says}; it is {shown(value)}")
        return amount

    return Rule(says, read, show=lambda amount: format_size(amount) if amount else 0)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text in quotes; it is {shown(value)}")
    if "\0" in value:
        raise ValueError("must not hold a NUL character")
    return value


def text() -> Rule:
    return Rule("text", _text)


def pattern(regex: str, says: str) -> Rule:
    compiled = re.compile(regex)

    def read(value: object) -> str:
        given = _text(value)
        if not compiled.fullmatch(given):
            raise ValueError(f"must be {says}; it is {shown(value)}")
        return given

    return Rule(says, read)


def choice(*allowed: str) -> Rule:
    says = ", ".join(f'"{name}"' for name in allowed)

    def read(value: object) -> str:
        given = _text(value)
        if given not in allowed:
            raise ValueError(f"must be one of {says}; it is {shown(value)}")
        return given

    return Rule(says, read)


def secret() -> Rule:
    def read(value: object) -> Secret:
        if not isinstance(value, str):
            raise ValueError("must be text in quotes")
        return Secret(value)

    return Rule("text", read, secret=True)


def listen(*, optional: bool = False, any_port: bool = False) -> Rule:
    """An address to listen on, kept as text; `split_address` takes it apart."""

    def read(value: object) -> str:
        given = _text(value).strip()
        if optional and not given:
            return given
        try:
            split_address(given, any_port=any_port)
        except ValueError as error:
            raise ValueError(f"{error}; it is {shown(value)}") from None
        return given

    return Rule("host:port" + (" (-1: any free port)" if any_port else ""), read)


def path() -> Rule:
    """A path, kept as text: empty means none. `~` and a leading `${CREDENTIALS_DIRECTORY}` are expanded.

    The latter stays as it is where systemd has set no such directory: `status` and its kin run outside the service.
    """

    def read(value: object) -> str:
        given = _text(value)
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        if folder and is_credential(given):
            return folder + given[len(CREDENTIALS) :]
        return str(_at_home(given)) if given else given

    return Rule("path", read)


def _at_home(given: str) -> Path:
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise ValueError(f"begins with the name of a user who has no home here; it is {shown(given)}") from None


def is_credential(path: str) -> bool:
    """Does the path begin with `${CREDENTIALS_DIRECTORY}`, not expanded?"""
    return path.startswith(CREDENTIALS + "/")


def database_path() -> Rule:
    """The database's real path: links are followed, as SQLite does when it names the -wal file beside it."""

    def read(value: object) -> Path:
        given = os.fspath(value) if isinstance(value, Path) else _text(value)
        if not given.strip():
            raise ValueError("must name the application's SQLite file")
        try:
            found = _at_home(given).resolve()
        except RuntimeError:  # Python before 3.13
            raise ValueError(f"is a link that leads to itself; it is {shown(given)}") from None
        if found.is_dir():
            raise ValueError(f"must name a file, but {found} is a directory")
        return found

    return Rule("path", read)


def _items(value: object, *, commas: bool) -> list[str]:
    if commas and isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return list(value)
    raise ValueError(f'must be a list of texts, for example ["a", "b"]; it is {shown(value)}')


def servers(*schemes: str, commas: bool = False) -> Rule:
    """Server addresses. commas: one text with commas is a list too, as on the command line."""

    def read(value: object) -> tuple[str, ...]:
        if isinstance(value, str) and not commas:
            raise ValueError('must be a list, for example ["nats://hub:4222"]')
        return tuple(parse_server_url(item, schemes) for item in _items(value, commas=commas))

    return Rule(f"list of addresses ({', '.join(schemes)})", read)


def globs() -> Rule:
    def read(value: object) -> tuple[str, ...]:
        items = _items(value, commas=False)
        if not all(items):
            raise ValueError("must not hold an empty pattern")
        return tuple(items)

    return Rule("list of glob patterns", read)


def sync_interval() -> Rule:
    """nats-server's `sync_interval`: `always`, or a duration in Go's notation; empty for our own choice."""
    says = '"always" or a duration such as "30s" or "2m"'

    def read(value: object) -> str:
        given = _text(value)
        if given not in ("", "always") and not _DURATION.fullmatch(given):
            raise ValueError(f"must be {says}; it is {shown(value)}")
        return given

    return Rule(says, read)
