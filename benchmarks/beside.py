"""An application in a process of its own that inserts a row every few milliseconds, and how long each one took.

The process: `python -m benchmarks.beside DATABASE TABLE FIRST_ID PAUSE_S`. It waits for database and table, writes
until its standard input is closed, and prints as JSON, for each write: when it began (seconds of CLOCK_MONOTONIC,
which all processes of a machine share), how long it took, and how long of that it waited for the database's lock.
"""

from __future__ import annotations

import contextlib
import json
import select
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmarks.workload import INSERT, INTEGER_KEY, connect

PAUSE_S = 0.005
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Write:
    """at: when it began, by time.monotonic(); took_s: until its commit returned; waited_s: of that, for the lock. The
    rest is the disk's: whoever commits may have to copy the write-ahead log into the database."""

    at: float
    took_s: float
    waited_s: float


class Beside:
    """The application while the `with` block runs; its table has the columns of `workload.CREATE`."""

    def __init__(self, database: Path, table: str, first: int, pause_s: float = PAUSE_S) -> None:
        """first: the key of the first row; the others follow."""
        self._command = [sys.executable, "-m", "benchmarks.beside", str(database), table, str(first), str(pause_s)]
        self.writes: list[Write] = []

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
