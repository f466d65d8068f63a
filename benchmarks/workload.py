"""The application that the benchmarks play: sensors whose readings go into one SQLite table.

It uses Python's own `sqlite3`, as an application would, and its own connection: write-ahead log, `synchronous` NORMAL
unless told otherwise (the usual setting with a write-ahead log, and the harder one for us: with FULL the disk's sync
hides the cost of the triggers).
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Rows to a transaction, where rows come in bulk.
BULK_ROWS = 500

CREATE = "CREATE TABLE {name} (id {key}, device TEXT{unique}, value REAL, taken_at INTEGER, state TEXT)"
INSERT = "INSERT INTO {name} VALUES (?, ?, ?, ?, ?)"
UPDATE = "UPDATE {name} SET value = ?, taken_at = ? WHERE id = ?"

# Odd, so that multiplying with it permutes the numbers of 32 bits: values that are all different, in no order.
SCATTER = 2_654_435_761

Reading = tuple[int | str, str, float, int, str]


@dataclass(frozen=True, slots=True)
class Kind:
    """A shape of table. text_key: its key is a random TEXT; unique: there is a UNIQUE index on another column."""

    name: str
    text_key: bool = False
    unique: bool = False

    def create(self, table: str) -> str:
        key = "TEXT PRIMARY KEY" if self.text_key else "INTEGER PRIMARY KEY"
        return CREATE.format(name=table, key=key, unique=" UNIQUE" if self.unique else "")

    def readings(self, first: int, count: int) -> list[Reading]:
        """Rows first..first+count-1, the same ones at every call; about 40 bytes each (`reading_bytes`)."""
        return [self._reading(number) for number in range(first, first + count)]

    def _reading(self, number: int) -> Reading:
        dice = random.Random(number)
        key = f"{dice.getrandbits(64):016x}" if self.text_key else number
        device = f"greenhouse-{number * SCATTER % 2**32:08x}" if self.unique else f"greenhouse-{number % 40:03d}"
        value = round(21.0 + dice.gauss(0.0, 0.8), 1)
        return (key, device, value, 1_767_225_600_000 + number * 250 + dice.randrange(20), "ok")


INTEGER_KEY = Kind("INTEGER key")
TEXT_KEY = Kind("TEXT key", text_key=True)
UNIQUE_INDEX = Kind("UNIQUE index", unique=True)


def reading_bytes(reading: Reading) -> int:
    """A row's own size: eight bytes a number, the bytes of each text."""
    return sum(len(value.encode()) if isinstance(value, str) else 8 for value in reading)


def connect(path: Path, *, synchronous: str = "NORMAL") -> sqlite3.Connection:
    """The application's connection, in autocommit mode; waits up to a minute for a lock."""
    connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    return connection


def in_bulk(connection: sqlite3.Connection, sql: str, rows: Sequence[Sequence[object]], size: int = BULK_ROWS) -> None:
    """Run `sql` for every row, `size` rows to a transaction."""
    for first in range(0, len(rows), size):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(sql, rows[first : first + size])
        connection.execute("COMMIT")


def one_by_one(connection: sqlite3.Connection, sql: str, rows: Sequence[Sequence[object]]) -> None:
    """Run `sql` for every row, each in its own transaction."""
    execute = connection.execute
    for row in rows:
        execute(sql, row)


def changes_of(readings: Sequence[Reading]) -> Iterator[tuple[float, int, int | str]]:
    """Bindings of UPDATE that give every reading another value and time."""
    for key, _, value, taken_at, _ in readings:
        yield (value + 0.1, taken_at + 7, key)


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds: by the clock, and of this process's processor time, which other work on the machine hardly touches."""

    wall: float
    cpu: float


def taken_by(job: Callable[[], object]) -> Taken:
    """How long `job` takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 120.0, every_s: float = 0.002) -> None:
    """Look every `every_s` until `condition()` is true. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(every_s)
