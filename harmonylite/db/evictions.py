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
from harmonylite.db.rows import after, bound, marker
from harmonylite.db.schema import Table
from harmonylite.db.sql import integer, log_table, quote, rows, version_table
from harmonylite.model import Row

# A table of no more versions is looked through whenever it was written: reading so many takes half a millisecond.
LOOK_ROWS = 20_000

# A larger one is looked through in pieces of so many versions: some 10 ms each, and the view of the database is let go.
PIECE_ROWS = 20_000


@dataclass(frozen=True, slots=True)
class _Statements:
    """size: the number of versions; small: whether it is at most LOOK_ROWS; surplus: live versions minus rows; log:
    logs the key of every live version without a row."""

    size: str
    small: str
    surplus: str
    log: str

    @classmethod
    def of(cls, table: Table) -> _Statements:
        name, version, keys = quote(table.name), version_table(table.name), key_columns(table)
        nulls = " OR ".join(f"{quote(part.name)} IS NULL" for part in table.key if part.nullable)
        unkeyed = f" + (SELECT count(*) FROM {name} WHERE {nulls})" if nulls else ""
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
        )


class Evictions:
    """Looks for such rows inside the transaction that absorbs; for those of the tables where they can be.

    unlooked: tables (by name) that may have lost rows unseen: too large to be looked through here, not written since
    this was made, or with rows that have no version yet.
    """

    def __init__(self, tables: Iterable[Table]) -> None:
        self._statements = {table.name: _Statements.of(table) for table in tables if table.evicts_unseen}
        self._due = tuple(f"SELECT EXISTS (SELECT 1 FROM {log_table(name)})" for name in self._statements)
        self._small: dict[str, bool] = {}
        self._incomplete: set[str] = set()
        self.unlooked = set(self._statements)

    def leave_to_look(self, names: Iterable[str]) -> None:
        """Tables with rows that have no version yet (stamping.py): there, the counts tell nothing."""
        self._incomplete.update(names)

    def complete(self, name: str) -> None:
        """Every row of a table that was left out has a version now; what was evicted meanwhile is to be looked for."""
        self._incomplete.discard(name)
        if name in self._statements:
            self.unlooked.add(name)

    def is_due(self, connection: apsw.Connection) -> bool:
        """Whether a log holds writes that may have evicted rows unseen."""
        return any(integer(connection, sql) for sql in self._due)

    def log(self, connection: apsw.Connection, table: Table, ts: int) -> bool:
        """Log the evicted rows of a table whose log is empty, with time `ts`, in milliseconds: that of the newest write
        just absorbed, one of those that may have evicted them. Returns whether there were any."""
        statements = self._statements.get(table.name)
        if statements is None:
            return False
        if table.name in self._incomplete:
            self.unlooked.add(table.name)
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


class Look:
    """A way through the versions of any one table, for rows that should be there and are not: in short pieces, so that
    no view of the database is held for long."""

    def __init__(self, connection: apsw.Connection, table: Table) -> None:
        self._connection = connection
        self._table = table
        self._last: Row | None = None
        self.ended = False

    def step(self) -> list[Row]:
        """Keys of such rows among the next PIECE_ROWS versions; `ended` after the last ones."""
        name, keys = version_table(self._table.name), key_columns(self._table)
        beyond, bindings = after(self._table, self._last)
        listed = f"FROM {name} {beyond} ORDER BY {keys} LIMIT 1 OFFSET {PIECE_ROWS - 1}"
        ends = rows(self._connection, f"SELECT {typed_keys_sql(self._table)} {listed}", bindings)
        where = f"{beyond} AND" if beyond else "WHERE"
        if ends:
            self._last = decode_typed(ends[0])
            where += f" ({keys}) <= ({', '.join(map(marker, self._last))}) AND"
            bindings = (*bindings, *bound(self._last))
        self.ended = not ends
        sql = f"SELECT {typed_keys_sql(self._table, 'v.')} FROM {name} AS v {where} {_vanished(self._table)}"
        return [decode_typed(row) for row in rows(self._connection, sql, bindings)]


def log(connection: apsw.Connection, table: Table, key: Row) -> int:
    """If that row should be there and is not, as if a trigger had seen it. Returns how many it was."""
    where = " AND ".join(f"v.k{i} = {marker(value)}" for i, value in enumerate(key))
    keys = key_columns(table)
    connection.execute(
        f"INSERT INTO {log_table(table.name)} (ts, op, {keys}) SELECT {NOW_MS}, {MAYBE_EVICTED}, {keys}"
        f" FROM {version_table(table.name)} AS v WHERE {where} AND {_vanished(table)}",
        bound(key),
    )
    return connection.changes()


def _vanished(table: Table) -> str:
    return f"v.deleted = 0 AND NOT EXISTS (SELECT 1 FROM {quote(table.name)} AS r WHERE {key_match(table, 'v', 'r')})"
