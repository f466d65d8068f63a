"""Unique clashes: rows of different keys that may not stand beside each other.

The rule, the same on every node whatever the order of arrival: an incoming row must beat all its rivals, or it
alone loses and no rival is touched. Rows are ordered by (ts, node, key). The loser becomes a tombstone of its own
version with rank 1: every node that sees the clash makes the same one, any later edit of the row beats it.
"""

from __future__ import annotations

import apsw

from harmonylite import wire
from harmonylite.db import rows as store
from harmonylite.db.outbox import decode_typed, typed_keys_sql
from harmonylite.db.rows import Values
from harmonylite.db.schema import Table
from harmonylite.db.sql import quote, rows
from harmonylite.model import Row, Version

_EVICTED = quote("__harmonylite__evicted")

# The savepoint around a trial write.
_TRIAL = "__harmonylite__trial"


def order(version: Version, key: Row) -> tuple[int, int, bytes]:
    """Who wins a unique clash; the same on every node."""
    return version.ts, version.node, wire.pack(list(key))


class Trial:
    """Tries to write rows of one table and takes the attempt back; tells which rows it would have evicted.

    SQLite itself finds the rivals: INSERT OR REPLACE deletes them, a TEMP trigger (recursive_triggers is on) notes
    their keys, and the savepoint is rolled back. That covers partial, expression and collated indexes alike.
    """

    def __init__(self, connection: apsw.Connection, table: Table) -> None:
        self._connection = connection
        self._table = table

    def __enter__(self) -> Trial:
        width = len(self._table.key)
        olds = ", ".join(f"OLD.{quote(name)}" for name in self._table.key_names)
        columns = ", ".join(f"k{i}" for i in range(width))
        self._connection.execute(f"CREATE TEMP TABLE {_EVICTED} ({columns})")
        self._connection.execute(
            f"CREATE TEMP TRIGGER {quote('__harmonylite__evict')} AFTER DELETE ON main.{quote(self._table.name)}"
            f" BEGIN INSERT INTO {_EVICTED} VALUES ({olds}); END"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.execute(f"DROP TRIGGER temp.{quote('__harmonylite__evict')}")
        self._connection.execute(f"DROP TABLE temp.{_EVICTED}")

    def rivals(self, values: Values) -> list[Row]:
        """The keys of the rows that `values` clashes with, its own row excepted.

        Raises apsw.Error if the row cannot be written at all (CHECK, a STRICT type, ...).
        """
        self._connection.execute(f"SAVEPOINT {_TRIAL}")
        try:
            self._connection.execute(f"DELETE FROM {_EVICTED}")
            store.insert(self._connection, self._table, values, on_conflict="REPLACE")
            keys = typed_keys_sql(self._table)
            evicted = [decode_typed(row) for row in rows(self._connection, f"SELECT {keys} FROM {_EVICTED}")]
        finally:
            # An error may have ended the whole transaction (disk full): then there is nothing to roll back to.
            if not self._connection.getautocommit():
                self._connection.execute(f"ROLLBACK TO {_TRIAL}")
                self._connection.execute(f"RELEASE {_TRIAL}")
        mine = store.identity(self._table, store.key_of(self._table, values))
        return [key for key in evicted if store.identity(self._table, key) != mine]
