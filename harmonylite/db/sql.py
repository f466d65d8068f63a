"""Names, quoting and connections: the only place that opens a database or builds an identifier."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import apsw

from harmonylite.db.busy import busy_handler

log = logging.getLogger(__name__)

PREFIX = "__harmonylite__"

Bindings = Sequence[object] | Mapping[str, object]

# How long one statement waits for the application's lock before SQLITE_BUSY; the caller then tries again.
BUSY_TIMEOUT_MS = 5_000


# Between two looks at whether a statement is to stop, in instructions of SQLite's machine: some milliseconds.
STOP_STEPS = 100_000


def quote(name: str) -> str:
    """An identifier as SQL; any name that SQLite can store is safe."""
    return '"' + name.replace('"', '""') + '"'


def normal(name: str) -> str:
    """SQLite folds the ASCII letters of identifiers and no others (sqlite3StrICmp)."""
    return name.translate(_ASCII_LOWER)


_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def log_table(table: str) -> str:
    """The quoted name of the table's change log."""
    return quote(f"{PREFIX}{table}_change_log")


def version_table(table: str) -> str:
    """The quoted name of the table's version table."""
    return quote(f"{PREFIX}{table}_version")


def columns_sql(names: Sequence[str]) -> str:
    """Quoted and joined for a column list."""
    return ", ".join(quote(name) for name in names)


def open_writer(path: Path) -> apsw.Connection:
    """The connection that absorbs and applies; switches the database to WAL. apsw.CantOpenError if there is none.

    Triggers of the schema are off (I8): what the daemon writes came from a node where they already ran.
    `synchronous` is NORMAL: a power cut may undo our last commits, position included, and they are then done
    again; the application's own setting is per connection and untouched.
    """
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    connection.setbusyhandler(busy_handler(BUSY_TIMEOUT_MS / 1000))
    _prepare(connection)
    mode = scalar(connection, "PRAGMA journal_mode")
    if mode != "wal":
        now = scalar(connection, "PRAGMA journal_mode=WAL")
        log.info("database switched to write-ahead logging", extra={"fields": {"from": mode, "to": now}})
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0)
    connection.execute("PRAGMA foreign_keys=OFF")
    # The delete triggers of REPLACE tell which rows a unique clash would evict (clash.py).
    connection.execute("PRAGMA recursive_triggers=ON")
    return connection


def open_reader(path: Path) -> apsw.Connection:
    """A connection that only reads: pinned snapshots for publishing, and questions."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    connection.setbusytimeout(BUSY_TIMEOUT_MS)
    _prepare(connection)
    connection.execute("PRAGMA query_only=ON")
    return connection


def open_beside(path: Path, name: str, other: str) -> apsw.Connection:
    """A connection that only reads, with another database (a URI) under a name of its own."""
    flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_URI
    connection = apsw.Connection(path.resolve().as_uri(), flags=flags)
    try:
        connection.setbusytimeout(BUSY_TIMEOUT_MS)
        _prepare(connection)
        connection.execute(f"ATTACH ? AS {quote(name)}", (other,))
        connection.execute("PRAGMA query_only=ON")
    except BaseException:
        connection.close(True)
        raise
    return connection


def _prepare(connection: apsw.Connection) -> None:
    # Sorting for absorb stays in memory: no temporary files on the card.
    connection.execute("PRAGMA temp_store=MEMORY")


def ask_to_stop(connection: apsw.Connection, stop: Callable[[], bool]) -> None:
    """What runs on the connection asks `stop` now and then, every STOP_STEPS, and ends with apsw.InterruptError once it
    says so. SQLite before 3.41 does not ask in a `quick_check` or `integrity_check`."""
    connection.setprogresshandler(stop, STOP_STEPS)


def rows(connection: apsw.Connection, sql: str, bindings: Bindings = ()) -> list[tuple[Any, ...]]:
    """All rows of a query."""
    return connection.execute(sql, bindings).fetchall()


def scalar(connection: apsw.Connection, sql: str, bindings: Bindings = ()) -> Any:
    """The first value of the first row, or None."""
    found = rows(connection, sql, bindings)
    return found[0][0] if found else None


def integer(connection: apsw.Connection, sql: str, bindings: Bindings = ()) -> int:
    """`scalar` for a query that yields an integer or nothing (0)."""
    value = scalar(connection, sql, bindings)
    return value if isinstance(value, int) else 0


@contextlib.contextmanager
def write_transaction(connection: apsw.Connection) -> Iterator[None]:
    """BEGIN IMMEDIATE .. COMMIT; anything raised inside rolls back.

    Raises apsw.BusyError when the application holds the lock for longer than BUSY_TIMEOUT_MS.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        rollback(connection)
        raise


def rollback(connection: apsw.Connection) -> None:
    """End a transaction if there is one: SQLite may have rolled back by itself (disk full, I/O error)."""
    if not connection.getautocommit():
        connection.execute("ROLLBACK")


@contextlib.contextmanager
def locked(connection: apsw.Connection) -> Iterator[None]:
    """Nobody else can commit inside; nothing is written. Raises as `write_transaction`."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        rollback(connection)


@contextlib.contextmanager
def snapshot(connection: apsw.Connection) -> Iterator[None]:
    """One consistent view of the database for the reads inside."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        rollback(connection)
