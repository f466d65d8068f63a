"""nats-server's configuration language: quoting what we write, reading which settings somebody else's file makes.

The reader exists because an operator's file (`[nats] server_config`) and ours must not set the same thing twice:
nats-server applies top-level settings in no fixed order, so `listen` in one file and `port` in the other would win
by chance. Checking the file is left to nats-server: on a mistake the reader returns what it understood so far.
Syntax: https://docs.nats.io/running-a-nats-service/configuration
"""

from __future__ import annotations

import re
from pathlib import Path

# A setting's value: text of a scalar, items of a list, or a block.
Setting = str | list["Setting"] | dict[str, "Setting"]
Block = dict[str, Setting]

_WHITESPACE = " \t\r\n"
_SEPARATORS = _WHITESPACE + ",;"
_ESCAPES = {"t": "\t", "n": "\n", "r": "\r", '"': '"', "\\": "\\"}
_END_OF_RAW_LINES = re.compile(r"^[ \t]*\)[ \t]*$", re.MULTILINE)
_MAX_INCLUDES = 100


def quote(text: str) -> str:
    """`text` as a double-quoted string of the configuration language: nothing in it ends the string or is expanded.

    Control characters become `\\xNN`, which the language reads as one byte; other characters stay as they are.
    """
    parts = []
    for char in text:
        if char in '"\\':
            parts.append("\\" + char)
        elif ord(char) < 0x20 or char == "\x7f":
            parts.append(f"\\x{ord(char):02x}")
        else:
            parts.append(char)
    return '"' + "".join(parts) + '"'


def quote_path(path: Path) -> str:
    """`path` for an `include`, where the language knows no escapes. Raises ValueError if no quoting can hold it."""
    text = str(path)
    for mark in "\"'":
        if mark not in text and "\n" not in text:
            return mark + text + mark
    raise ValueError(f"cannot include a file whose name has both kinds of quotes or a line break: {text}")


def read_file(path: Path) -> Block:
    """The settings of a configuration file and of the files it includes, names in lower case.

    Raises OSError if the file, or one that it includes, cannot be read.
    """
    return _read(path, [0])


def _read(path: Path, includes: list[int]) -> Block:
    includes[0] += 1
    if includes[0] > _MAX_INCLUDES:
        raise OSError(f"{path}: more than {_MAX_INCLUDES} included files")
    return _Reader(path.read_text(encoding="utf-8", errors="surrogateescape"), path.parent, includes).block()


class _Reader:
    """Recursive descent over one file's text."""

    def __init__(self, text: str, directory: Path, includes: list[int]) -> None:
        self._text = text
        self._at = 0
        self._directory = directory
        self._includes = includes

    def block(self) -> Block:
        """Settings up to the closing brace or the end of the text."""
        found: Block = {}
        while True:
            self._skip(_SEPARATORS)
            if self._peek() in ("", "}", "]", ")"):
                self._at += 1
                return found
            start = self._at
            quoted = self._peek() in "\"'"
            name = self._quoted() if quoted else self._bare(_WHITESPACE + ":={")
            self._skip(" \t")
            if not quoted and name.lower() == "include" and self._peek() not in (":", "=", "{"):
                found.update(_read(self._directory / self._scalar(), self._includes))
                continue
            if self._peek() in (":", "="):
                self._at += 1
            self._skip(_WHITESPACE)
            found[name.lower()] = self._value()
            if self._at == start:
                return found

    def _value(self) -> Setting:
        first = self._peek()
        if first == "{":
            self._at += 1
            return self.block()
        if first == "[":
            self._at += 1
            return self._list()
        if first == "(":
            return self._raw_lines()
        return self._scalar()

    def _list(self) -> list[Setting]:
        items: list[Setting] = []
        while True:
            self._skip(_SEPARATORS)
            if self._peek() in ("", "]"):
                self._at += 1
                return items
            start = self._at
            items.append(self._value())
            if self._at == start:
                return items

    def _raw_lines(self) -> str:
        """A text in parentheses; it ends at a closing one that has a line to itself."""
        end = _END_OF_RAW_LINES.search(self._text, self._at)
        start, stop = self._at + 1, end.start() if end else len(self._text)
        self._at = end.end() if end else stop
        return self._text[start:stop]

    def _scalar(self) -> str:
        return self._quoted() if self._peek() in ('"', "'") else self._bare(_SEPARATORS + "]}")

    def _quoted(self) -> str:
        mark, parts = self._peek(), []
        self._at += 1
        while (char := self._peek()) not in ("", mark):
            self._at += 1
            if char == "\\" and mark == '"':
                escaped = self._peek()
                self._at += 1
                if escaped == "x":
                    digits, self._at = self._text[self._at : self._at + 2], self._at + 2
                    char = chr(int(digits, 16)) if _is_hex(digits) else ""
                else:
                    char = _ESCAPES.get(escaped, escaped)
            parts.append(char)
        self._at += 1
        return "".join(parts)

    def _bare(self, ends: str) -> str:
        start = self._at
        while self._peek() and self._peek() not in ends:
            self._at += 1
        return self._text[start : self._at]

    def _skip(self, chars: str) -> None:
        """Move over `chars` and comments (`#` or `//` to the end of the line)."""
        while char := self._peek():
            if char in chars:
                self._at += 1
            elif char == "#" or self._text.startswith("//", self._at):
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
                if "\n" not in chars:
                    return
            else:
                return

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]


def _is_hex(digits: str) -> bool:
    return len(digits) == 2 and all(digit in "0123456789abcdefABCDEF" for digit in digits)
