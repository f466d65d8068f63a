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

_JOINED, _TAKEN = "joined", "taken"


def exist(path: Path, schema: Schema, stop: Callable[[], bool] = lambda: False) -> bool:
    """Any thread. Whether there are any; if there are none, the keys of all rows are looked up.

    stop: asked all the while; raises apsw.InterruptError once it says so.
    """
    with contextlib.closing(sql.open_reader(path)) as connection, sql.snapshot(connection):
        sql.ask_to_stop(connection, stop)
        ours = capture.installed(connection).tables
        return any(_are_in(connection, table, ours) for table in schema.tables.values())


def _are_in(connection: apsw.Connection, table: Table, ours: Collection[str]) -> bool:
    version, content = version_table(table.name), quote(table.name)
    # Counting does not tell: there may be versions whose rows are gone, as their deletes are only logged or unseen.
    # Rows with NULL in their key have no version either.
    keyed = " AND ".join(f"r.{quote(part.name)} IS NOT NULL" for part in table.key if part.nullable) or "true"
    # (0, 0) says no more than no version (evictions.py).
    known = f"SELECT 1 FROM {version} AS v WHERE {key_match(table, 'v', 'r')} AND v.ts > 0"
    found = f"SELECT 1 FROM {content} AS r WHERE {keyed} AND NOT EXISTS ({known})"
    if (logged := log_table(table.name)).strip('"') in ours:
        # What was written a moment ago gets its version soon. A log has no index by key: IN reads it once, EXISTS would
        # read it for every new row.
        keys = ", ".join(f"r.{quote(part.name)}" for part in table.key)
        found += f" AND ({keys}) NOT IN (SELECT {key_columns(table)} FROM {logged} WHERE op = {capture.WRITTEN})"
    return bool(integer(connection, f"SELECT EXISTS ({found})"))


def is_joined(replica: Replica) -> bool:
    """Writer. Whether this database was merged with a snapshot, or is one."""
    return bool(tables.get_meta(replica.writer, _JOINED))


def set_joined(replica: Replica) -> None:
    """Writer. See `is_joined`."""
    if not is_joined(replica):
        with replica.transaction():
            tables.set_meta(replica.writer, _JOINED, 1)


def taken(replica: Replica) -> frozenset[str]:
    """Writer. Ids of snapshots that this very database holds all of, as they were copied from it before it joined. An
    older backup of it does not know them."""
    return frozenset(str(tables.get_meta(replica.writer, _TAKEN) or "").split())


def note_taken(replica: Replica, ids: Collection[str]) -> None:
    """Writer. See `taken`."""
    with replica.transaction():
        tables.set_meta(replica.writer, _TAKEN, " ".join(sorted(ids)))


def forget_joined(connection: apsw.Connection) -> None:
    """Inside a transaction. The next snapshot is merged, by the next connection: rows may be missing here that nobody
    has written since the installation, and nobody here knows which."""
    connection.execute(f"DELETE FROM {tables.META} WHERE name = ?", (_JOINED,))


def set_copy_joined(copy: apsw.Connection) -> None:
    """The same for a copy that becomes a node's first database, inside a transaction."""
    tables.set_meta(copy, _JOINED, 1)
