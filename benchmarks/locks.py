"""How long an application's writes wait while its node catches up.

The node was off while another one wrote; it starts, and applies the backlog while its application goes on writing
single rows of its own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure, Setting, percentile
from benchmarks.nodes import shared_server
from benchmarks.workload import INSERT, INTEGER_KEY, connect, in_bulk, wait_for

PAUSE_S = 0.002


def run(setting: Setting) -> Iterator[Figure]:
    backlog = setting.choose(200_000, 5_000)
    schema = (INTEGER_KEY.create("readings"), INTEGER_KEY.create("own"))
    with shared_server(setting.folder / "locks", *schema) as pair:
        pair.second.stop()
        with contextlib.closing(connect(pair.first.db)) as application:
            in_bulk(application, INSERT.format(name="readings"), INTEGER_KEY.readings(0, backlog))
        pair.first.wait_quiet()
        alone = _Writer(pair.second.db)
        alone.start()
        time.sleep(setting.choose(4, 1))
        alone.end()
        writer = _Writer(pair.second.db, first=alone.written)
        writer.start()
        started = time.perf_counter()
        pair.second.start()
        with contextlib.closing(connect(pair.second.db)) as reader:
            last = f"SELECT 1 FROM readings WHERE id = {backlog - 1}"
            wait_for(lambda: reader.execute(last).fetchone(), "the backlog is applied", 120.0, 0.01)
        taken = time.perf_counter() - started
        writer.end()
    yield Figure(
        f"longest write beside {backlog:,} rows", 1000 * max(writer.waits), "ms", None,
        f"{len(writer.waits)} writes; without the backlog {1000 * max(alone.waits):.1f} ms",
    )  # fmt: skip
    yield Figure("p99 of the writes", 1000 * percentile(writer.waits, 0.99), "ms")
    yield Figure("p50 of the writes", 1000 * percentile(writer.waits, 0.5), "ms")
    yield Figure("rows caught up, from the daemon's start", backlog / taken, "rows/s")


class _Writer(threading.Thread):
    """An application that inserts a row every PAUSE_S; waits[i]: seconds that the i-th took."""

    def __init__(self, path: Path, first: int = 0) -> None:
        super().__init__(daemon=True)
        self.waits: list[float] = []
        self.written = first
        self._path = path
        self._ending = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self._error = error

    def _write(self) -> None:
        sql = INSERT.format(name="own")
        with contextlib.closing(connect(self._path)) as application:
            while not self._ending.wait(PAUSE_S):
                (reading,) = INTEGER_KEY.readings(self.written, 1)
                started = time.perf_counter()
                application.execute(sql, reading)
                self.waits.append(time.perf_counter() - started)
                self.written += 1

    def end(self) -> None:
        """Stop writing. Raises what a write raised: no application may fail because of us."""
        self._ending.set()
        self.join(90.0)
        if self._error is not None:
            raise self._error
