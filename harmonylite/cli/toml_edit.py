"""Setting keys in a configuration file that people wrote: everything else in it stays as it is."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Mapping
from typing import Any, cast

from harmonylite.config.locate import lines_of_keys
from harmonylite.config.model import TABLES

_toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

_ONE_LINE_VALUE = re.compile(
    r"""(?P<key>[^=]+=[ \t]*)
        (?:"(?:[^"\\]|\\.)*" | '[^']*' | \[[^\]\n]*\] | [^\s\[\]{}"'\#]+)
        (?P<rest>[ \t]*(?:\#.*)?)""",
    re.VERBOSE,
)


class EditRefused(Exception):  # noqa: N818
    """The file is written in a way that this module does not edit; the text says which key to set by hand."""


def parse(text: str) -> dict[str, Any]:
    """TOML text as dictionaries; raises ValueError with the parser's words."""
    return cast(dict[str, Any], _toml.loads(text))


def with_values(text: str, values: Mapping[str, str]) -> str:
    """The valid TOML `text` with these keys set.

    values: dotted key -> value in TOML's notation. A key that is there is replaced in its line; one that stands there
    as a comment (`# key = ...`) takes that line; otherwise its table gets a new line, after a table that is missing.
    Raises EditRefused, and ValueError where `text` is not valid TOML.
    """
    for key, value in values.items():
        edited = _with_value(text, key, value)
        if _parsed(edited) != _expected(parse(text), key, value):
            raise EditRefused(f"cannot be edited safely: set {key} = {value} by hand")
        text = edited
    return text


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return parse(text)
    except ValueError:
        return None


def _expected(data: dict[str, Any], key: str, value: str) -> dict[str, Any]:
    """What the edited file must say: the proof that nothing else was touched."""
    changed = copy.deepcopy(data)
    table = changed
    *tables, name = key.split(".")
    for part in tables:
        table = table.setdefault(part, {})
    table[name] = parse(f"value = {value}")["value"]
    return changed


def _with_value(text: str, key: str, value: str) -> str:
    table, _, name = key.rpartition(".")
    lines = text.splitlines()
    at = lines_of_keys(text)
    if key in at:
        there = _ONE_LINE_VALUE.fullmatch(lines[at[key] - 1])
        if there is None:
            raise EditRefused(f"line {at[key]} begins a value of several lines: set {key} = {value} by hand")
        lines[at[key] - 1] = f"{there['key']}{value}{there['rest']}"
        return _joined(lines)
    line = f"{name} = {value}"
    if table and table not in at:
        return _joined([*lines, "", f"[{table}]", line])
    begin = at[table] if table else 0
    headers = [at[other] for other in TABLES if other in at and at[other] > begin]
    end = min(headers, default=len(lines) + 1) - 1
    commented = re.compile(rf"#[ \t]*{re.escape(name)}[ \t]*=.*")
    for number in range(begin, end):
        if commented.fullmatch(lines[number]):
            lines[number] = line
            return _joined(lines)
    if not table:
        # After the comment that the file begins with.
        while begin < end and lines[begin].startswith("#"):
            begin += 1
    lines.insert(begin, line)
    return _joined(lines)


def _joined(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
