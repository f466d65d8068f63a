"""What the person who watches sees: short lines, coloured on a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

_BOLD, _DIM, _GREEN, _RED = "1", "2", "1;32", "1;31"
# A person reads; a pipe does not. This is no synchronisation: nothing depends on it.
_READING_S = 0.7


class Screen:
    """Prints the demo to `stream`, standard output by default."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._watched = self._stream.isatty()
        # https://no-color.org: set and not empty.
        self._coloured = self._watched and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._steps = 0

    def title(self, text: str) -> None:
        self._line(self._in(_BOLD, text))

    def step(self, text: str) -> None:
        """Begin the next step."""
        if self._watched and self._steps:
            time.sleep(_READING_S)
        self._steps += 1
        self._line("")
        self._line(self._in(_BOLD, f"{self._steps}. {text}"))

    def say(self, text: str) -> None:
        """What happens."""
        self._line(f"   {text}")

    def why(self, text: str) -> None:
        """Why it matters."""
        self._line(f"   {self._in(_DIM, text)}")

    def command(self, command: str, lines: Sequence[str] = ()) -> None:
        """A command, as one would type it, and lines that it printed."""
        self._line(f"   {self._in(_BOLD, '$ ' + command)}")
        for line in lines:
            self._line(f"     {line}")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column to the left, numbers and the like to the right."""
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        for number, row in enumerate((header, *rows)):
            cells = [
                f"{row[0]:<{widths[0]}}",
                *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            text = "   ".join(cells)
            self.say(text if number else self._in(_DIM, text))

    def verdict(self, text: str, *, good: bool) -> None:
        self._line("")
        self._line(self._in(_GREEN if good else _RED, text))

    def _in(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._coloured else text

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
