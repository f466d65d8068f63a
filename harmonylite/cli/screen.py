"""Progress on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class Screen:
    """One line on a terminal that is written over and over; nothing where nobody looks."""

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty()
        self._width = 0
        self._last = 0.0

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()

    def show(self, text: str) -> None:
        if self._shows:
            sys.stderr.write("\r" + text.ljust(self._width))
            sys.stderr.flush()
            self._width = max(self._width, len(text))

    def progress(self, what: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            now = time.monotonic()
            if now - self._last >= 0.1 or done == total:
                self._last = now
                percent = f", {100 * done // total} %" if total else ""
                self.show(f"{what}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB{percent}")

        return report
