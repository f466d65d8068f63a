"""Rows from before the installation: no trigger saw them written, they have no version and are in no message."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import apsw

from harmonylite.db import capture, sql, tables
from harmonylite.db.capture import key_columns, key_match
from harmonylite.db.schema import Schema, Table
from harmonylite.db.sql import integer, log_table, quote, version_table

if TYPE_CHECKING:
    from harmonylite.db.replica import Replica

_JOINED = "joined"

# Whoever waits for an answer may have to stop: it is asked after so many steps of SQLite's machine, a few milliseconds.
STOP_STEPS = 100_000


def exist(path: Path, schema: Schema, stop: Callable[[], bool] = lambda: False) -> bool:
    """Any thread. Whether there are any; reads as much as counting the rows does, unless there are some.

    stop: asked all the while; raises apsw.InterruptError once it says so.
    """
    with contextlib.closing(sql.open_reader(path)) as connection, sql.snapshot(connection):
        connection.setprogresshandler(stop, STOP_STEPS)
        ours = capture.installed(connection).tables
        return any(_are_in(connection, table, ours) for table in schema.tables.values())


def _are_in(connection: apsw.Connection, table: Table, ours: Collection[str]) -> bool:
    version, content = version_table(table.name), quote(table.name)
    # (0, 0) says no more than no version (evictions.py).
    live = integer(connection, f"SELECT count(*) FROM {version} WHERE deleted = 0 AND ts > 0")
    if live >= integer(connection, f"SELECT count(*) FROM {content}"):
        return False
    # Rows with NULL in their key have no version either.
    keyed = " AND ".join(f"r.{quote(part.name)} IS NOT NULL" for part in table.key if part.nullable) or "true"
    known = f"SELECT 1 FROM {version} AS v WHERE {key_match(table, 'v', 'r')} AND v.ts > 0"
    found = f"SELECT 1 FROM {content} AS r WHERE {keyed} AND NOT EXISTS ({known})"
    if (logged := log_table(table.name)).strip('"') in ours:
        # What was written a moment ago gets its version soon. A log has no index by key: IN reads it once, EXISTS would
        # read it for every new row.
        keys = ", ".join(f"r.{quote(part.name)}" for part in table.key)
        found += f" AND ({keys}) NOT IN (SELECT {key_columns(table)} FROM {logged})"
    return bool(integer(connection, f"SELECT EXISTS ({found})"))


def is_joined(replica: Replica) -> bool:
    """Writer. Whether this database was merged with a snapshot, or is one."""
    return bool(tables.get_meta(replica.writer, _JOINED))


def set_joined(replica: Replica) -> None:
    """Writer. See `is_joined`."""
    if not is_joined(replica):
        with replica.transaction():
            tables.set_meta(replica.writer, _JOINED, 1)


def set_copy_joined(copy: apsw.Connection) -> None:
    """The same for a copy that becomes a node's first database, inside a transaction."""
    tables.set_meta(copy, _JOINED, 1)
