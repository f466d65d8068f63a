"""On which line of a TOML file a key stands. tomllib tells it for syntax errors only."""

from __future__ import annotations

import re

_PART = r"""(?:[A-Za-z0-9_-]+|"[^"\\]*"|'[^']*')"""
_DOTTED = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_HEADER = re.compile(rf"[ \t]*\[\[?[ \t]*({_DOTTED})[ \t]*\]")
_ASSIGNMENT = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")


def _plain(dotted: str) -> str:
    return ".".join(part.strip("\"'") for part in re.findall(_PART, dotted))


def lines_of_keys(text: str) -> dict[str, int]:
    """Dotted key or table -> the line (from 1) where the valid TOML `text` first names it.

    Keys inside inline tables are not listed; their table is.
    """
    found: dict[str, int] = {}
    table = ""
    closing = ""  # the quotes that end the multi-line text we are in
    depth = 0  # of brackets that a value has left open
    for number, line in enumerate(text.splitlines(), 1):
        rest = line
        if not closing and depth == 0:
            header, assignment = _HEADER.match(line), _ASSIGNMENT.match(line)
            if assignment is not None:
                key = _plain(assignment[1])
                found.setdefault(f"{table}.{key}" if table else key, number)
                rest = line[assignment.end() :]
            elif header is not None:
                table = _plain(header[1])
                found.setdefault(table, number)
                continue
        closing, depth = _state_after(rest, closing, depth)
    return found


_TOKEN = re.compile(
    r"""(?P<long>\"{3}|'{3})|(?P<text>"(?:[^"\\]|\\.)*"|'[^']*')|(?P<comment>\#)|(?P<open>[\[{])|(?P<close>[\]}])"""
)


def _state_after(text: str, closing: str, depth: int) -> tuple[str, int]:
    """Follow (the rest of) one line of a value: the quotes and the number of brackets still open after it."""
    at = 0
    while True:
        if closing:
            end = text.find(closing, at)
            if end < 0:
                return closing, depth
            at, closing = end + 3, ""
        token = _TOKEN.search(text, at)
        if token is None or token["comment"]:
            return "", depth
        at = token.end()
        if token["long"]:
            closing = token["long"]
        elif token["open"]:
            depth += 1
        elif token["close"]:
            depth -= 1
