"""The daemon, taking note of every transaction for which it held the write lock.

`python -m benchmarks.traced FILE run --config ..`: as `harmonylite run --config ..`. At its end it writes the spans
to FILE as JSON: when each began and ended (seconds of CLOCK_MONOTONIC, which all processes of a machine share; the
commit included), and how long of that the thread computed. The rest of a span the thread waited: for the disk, for
the interpreter's lock, or for a processor that other work kept busy.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import apsw

from harmonylite.cli.main import main
from harmonylite.db import sql

_spans: list[tuple[float, float, float]] = []
_write_transaction = sql.write_transaction


@contextlib.contextmanager
def _noted(connection: apsw.Connection) -> Iterator[None]:
    began, computed = 0.0, 0.0
    try:
        with _write_transaction(connection):
            began, computed = time.monotonic(), time.thread_time()
            yield
    finally:
        if began:
            _spans.append((began, time.monotonic(), time.thread_time() - computed))


if __name__ == "__main__":
    file = Path(sys.argv[1])
    atexit.register(lambda: file.write_text(json.dumps(_spans)))
    sql.write_transaction = _noted
    sys.exit(main(sys.argv[2:]))
