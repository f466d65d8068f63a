"""Rows that OR REPLACE removes in a way that no trigger sees.

Triggers name the columns of UNIQUE constraints only, or the application could not drop an index together with its
column (capture.py). What is evicted through any other unique index is found when the statement's own rows are absorbed:
it is a version without a row. Every row of such a table therefore has a version, (0,0) if it is older than the
installation, and a difference of two counts tells whether there is anything to look for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import apsw

from harmonylite.db.capture import MAYBE_EVICTED, NOW_MS, key_columns, key_match
from harmonylite.db.outbox import decode_typed, typed_keys_sql
from harmonylite.db.rows import bound, marker
from harmonylite.db.schema import Table
from harmonylite.db.sql import integer, log_table, quote, rows, version_table
from harmonylite.model import Row

# A table of no more versions is looked through whenever it was written: reading so many takes half a millisecond.
LOOK_ROWS = 20_000


@dataclass(frozen=True, slots=True)
class _Statements:
    """size: the number of versions; small: whether it is at most LOOK_ROWS; surplus: live versions minus rows; log:
    logs the key of every live version without a row; stamp: gives the other rows the version (0,0)."""

    size: str
    small: str
    surplus: str
    log: str
    stamp: str

    @classmethod
    def of(cls, table: Table) -> _Statements:
        name, version, keys = quote(table.name), version_table(table.name), key_columns(table)
        nulls = " OR ".join(f"{quote(part.name)} IS NULL" for part in table.key if part.nullable)
        unkeyed = f" + (SELECT count(*) FROM {name} WHERE {nulls})" if nulls else ""
        theirs = ", ".join(f"r.{quote(part.name)}" for part in table.key)
        present = "".join(f" AND r.{quote(part.name)} IS NOT NULL" for part in table.key if part.nullable)
        return cls(
            size=f"SELECT count(*) FROM {version}",
            small=f"SELECT count(*) <= {LOOK_ROWS} FROM (SELECT 1 FROM {version} LIMIT {LOOK_ROWS + 1})",
            # Counted apart, each is a walk over the leaves of one b-tree.
            surplus=(
                f"SELECT (SELECT count(*) FROM {version}) - (SELECT count(*) FROM {version} WHERE deleted = 1)"
                f" - (SELECT count(*) FROM {name}){unkeyed}"
            ),
            log=(
                f"INSERT INTO {log_table(table.name)} (ts, op, {keys}) SELECT ?, {MAYBE_EVICTED}, {keys}"
                f" FROM {version} AS v WHERE {_vanished(table)}"
            ),
            stamp=(
                f"INSERT INTO {version} ({keys}, ts, node) SELECT {theirs}, 0, 0 FROM {name} AS r WHERE NOT EXISTS"
                f" (SELECT 1 FROM {version} AS v WHERE {key_match(table, 'v', 'r')}){present}"
            ),
        )


class Evictions:
    """Looks for such rows inside the transaction that absorbs; for those of the tables where they can be.

    unlooked: tables (by name) that may have lost rows unseen: too large to be looked through here, or not written since
    this was made.
    """

    def __init__(self, tables: Iterable[Table]) -> None:
        self._statements = {table.name: _Statements.of(table) for table in tables if table.evicts_unseen}
        self._due = tuple(f"SELECT EXISTS (SELECT 1 FROM {log_table(name)})" for name in self._statements)
        self._small: dict[str, bool] = {}
        self.unlooked = set(self._statements)

    def is_due(self, connection: apsw.Connection) -> bool:
        """Whether a log holds writes that may have evicted rows unseen."""
        return any(integer(connection, sql) for sql in self._due)

    def log(self, connection: apsw.Connection, table: Table, ts: int) -> bool:
        """Log the evicted rows of a table whose log is empty, with time `ts`, in milliseconds: that of the newest write
        just absorbed, one of those that may have evicted them. Returns whether there were any."""
        statements = self._statements.get(table.name)
        if statements is None:
            return False
        small = self._small.get(table.name)
        if small is None:
            small = self._small[table.name] = bool(integer(connection, statements.small))
        if not small:
            self.unlooked.add(table.name)
            return False
        # One that has grown is looked through once more.
        self._small[table.name] = integer(connection, statements.size) <= LOOK_ROWS
        self.unlooked.discard(table.name)
        if not integer(connection, statements.surplus):
            return False
        connection.execute(statements.log, (ts,))
        return connection.changes() > 0


def stamp_unversioned(connection: apsw.Connection, table: Table) -> int:
    """Give every row without a version the version (0,0). Returns how many there were."""
    statements = _Statements.of(table)
    if not integer(connection, statements.surplus):
        return 0
    connection.execute(statements.stamp)
    return connection.changes()


def find(connection: apsw.Connection, table: Table, limit: int) -> list[Row]:
    """Keys of rows of any table that should be there and are not. Reads all its versions."""
    sql = f"SELECT {typed_keys_sql(table, 'v.')} FROM {version_table(table.name)} AS v WHERE {_vanished(table)} LIMIT ?"
    return [decode_typed(row) for row in rows(connection, sql, (limit,))]


def log(connection: apsw.Connection, table: Table, key: Row) -> None:
    """As if a trigger had seen it; the row's absence is checked once more when this is absorbed."""
    markers = ", ".join(marker(value) for value in key)
    connection.execute(
        f"INSERT INTO {log_table(table.name)} (ts, op, {key_columns(table)})"
        f" VALUES ({NOW_MS}, {MAYBE_EVICTED}, {markers})",
        bound(key),
    )


def _vanished(table: Table) -> str:
    return f"v.deleted = 0 AND NOT EXISTS (SELECT 1 FROM {quote(table.name)} AS r WHERE {key_match(table, 'v', 'r')})"
