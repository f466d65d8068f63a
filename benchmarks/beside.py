"""An application in a process of its own that inserts a row every few milliseconds, how long each one took, and why.

The process: `python -m benchmarks.beside DATABASE TABLE FIRST_ID PAUSE_S`. It waits for database and table, writes
until its standard input is closed, and prints as JSON, for each write: when it began (seconds of CLOCK_MONOTONIC,
which all processes of a machine share), how long it took, and how long of that it waited for the database's lock.

What it waits for is told by comparison: `Beside.control` is the same application, at the same time on the same disk,
with a database that nobody else has. `explain` looks up in the daemon's own notes (`traced`) whether it had the lock.
"""

from __future__ import annotations

import contextlib
import json
import select
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmarks.workload import INSERT, INTEGER_KEY, connect

PAUSE_S = 0.005
_LOOK_S = 0.05
_NOTHING_S = 0.0005


@dataclass(frozen=True, slots=True)
class Write:
    """at: when it began, by time.monotonic(); took_s: until its commit returned; waited_s: of that, for the lock. The
    rest is the disk's: whoever commits may have to copy the write-ahead log into the database."""

    at: float
    took_s: float
    waited_s: float


@dataclass(frozen=True, slots=True)
class Hold:
    """since, until: while the daemon held the write lock, by time.monotonic(); computed_s: processor time of that."""

    since: float
    until: float
    computed_s: float

    @property
    def seconds(self) -> float:
        return self.until - self.since


def read_holds(trace: Path) -> list[Hold]:
    """What `traced` has written; the daemon must have ended."""
    return [Hold(*each) for each in json.loads(trace.read_text())]


def explain(write: Write, holds: Sequence[Hold]) -> str:
    """Where the time of one write went, in milliseconds. Without `holds` it is not known who had the lock."""
    rest = write.took_s - write.waited_s
    at_last = [f"commit and disk {1000 * rest:.0f}"] if rest > _NOTHING_S else []
    if not holds:
        return f"{1000 * write.took_s:.0f} = {' + '.join([f'lock {1000 * write.waited_s:.0f}', *at_last])}"
    locked = write.at + write.waited_s
    during = [hold for hold in holds if hold.until > write.at and hold.since < locked]
    held = sum(min(hold.until, locked) - max(hold.since, write.at) for hold in during)
    computed = sum(hold.computed_s for hold in during)
    parts = [f"lock held {1000 * held:.0f} by {len(during)} (computing {1000 * computed:.0f})"] if during else []
    if (paused := write.waited_s - held) > _NOTHING_S:
        parts.append(f"free, but paused {1000 * paused:.0f}")
    return f"{1000 * write.took_s:.0f} = {' + '.join([*parts, *at_last]) or 'below 1'}"


class Beside:
    """The application while the `with` block runs; its table has the columns of `workload.CREATE`."""

    def __init__(self, database: Path, table: str, first: int, pause_s: float = PAUSE_S) -> None:
        """first: the key of the first row; the others follow."""
        self._command = [sys.executable, "-m", "benchmarks.beside", str(database), table, str(first), str(pause_s)]
        self.writes: list[Write] = []

    @classmethod
    def control(cls, folder: Path, pause_s: float = PAUSE_S) -> Beside:
        """The same application, with a database in `folder` that only it has."""
        folder.mkdir(exist_ok=True)
        path = folder / f"control-{len(list(folder.iterdir()))}.db"
        with contextlib.closing(connect(path)) as application:
            application.execute(INTEGER_KEY.create("own"))
        return cls(path, "own", 0, pause_s)

    def __enter__(self) -> Beside:
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(
            self._command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Raises RuntimeError when a write failed: no application may fail because of us."""
        if kind is not None:
            self._process.kill()
        told, complaint = self._process.communicate()
        if kind is None:
            if self._process.returncode:
                raise RuntimeError(f"the application failed: {complaint.decode(errors='replace').strip()[-500:]}")
            self.writes = [Write(*each) for each in json.loads(told)]


def main() -> int:
    """See above."""
    path, table, first, pause_s = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    writes: list[tuple[float, float, float]] = []
    connection = _when_there(path, table)
    if connection is not None:
        sql = INSERT.format(name=table)
        with contextlib.closing(connection):
            while not _ended(pause_s):
                (reading,) = INTEGER_KEY.readings(first + len(writes), 1)
                began = time.monotonic()
                connection.execute("BEGIN IMMEDIATE")
                locked = time.monotonic()
                connection.execute(sql, reading)
                connection.execute("COMMIT")
                writes.append((began, time.monotonic() - began, locked - began))
    print(json.dumps(writes))
    return 0


def _when_there(path: Path, table: str) -> sqlite3.Connection | None:
    """The database once it has the table; None if the end comes before."""
    while not _ended(_LOOK_S):
        if path.exists():
            connection = connect(path)
            if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (table,)).fetchone():
                return connection
            connection.close()
    return None


def _ended(pause_s: float) -> bool:
    return bool(select.select([sys.stdin], [], [], pause_s)[0])


if __name__ == "__main__":
    sys.exit(main())
