"""Columns whose values are older than their row, because newer messages came from nodes that did not have them.

`sparse` remembers which those are. Here stands what happens to them: a message that loses to the row still fills the
columns whose version is older, and brings nothing else. What it has for columns that this node's table does not have
is set aside among the parked rows until the table gets them.
"""

from __future__ import annotations

from collections.abc import Container

import apsw

from harmonylite.db import rows as store
from harmonylite.db import sparse
from harmonylite.db.conflicts import Parked
from harmonylite.db.context import Context
from harmonylite.db.rows import Values
from harmonylite.db.schema import Table
from harmonylite.db.sparse import ColumnVersion
from harmonylite.db.sql import normal
from harmonylite.model import Row, Value

# Before and after every version.
NEVER, LATER = (-1, -1), (1 << 63, 0)


class OlderColumns:
    """Inside the caller's transaction. What does not fit is raised as SQLite says it (context.MISFIT)."""

    def __init__(self, connection: apsw.Connection, context: Context) -> None:
        self._connection = connection
        self._context = context

    def fill(self, table: Table, key: Row, version: ColumnVersion, values: Values | None) -> None:
        """A message (None: a delete, which is a version of every column) lost to the row that is here."""
        if table.name not in self._context.sparse_tables:
            return
        id = store.identity(table, key)
        older = {
            column: values[column] if values is not None else store.default(self._connection, table, column)
            for column, known in sparse.entries(self._connection, table.name, id).items()
            if known < version and (values is None or column in values)
        }
        self._update(table, key, id, version, older)

    def fill_parked(self, parked: Parked) -> None:
        """Columns that were set aside, in a table that has them now, perhaps."""
        table = self._context.schema.table(parked.table)
        if table is None or parked.row is None or _folded(parked.key_names) != _folded(table.key_names):
            self._context.recorder.park(parked)
            return
        old = store.read(self._connection, table, parked.key)
        if old is None:
            return  # a delete is a newer version of every column
        known = sparse.entries(self._connection, table.name, parked.id)
        version = parked.version[:2]
        older: dict[str, Value] = {}
        for name, value in parked.row.items():
            column = table.column(name)
            if column is None or column.name in table.key_names:
                continue
            # Whoever wrote the row knew no such column, unless it has another value than a new column has.
            untouched = old[column.name] == store.default(self._connection, table, column.name)
            if known.get(column.name, NEVER if untouched else LATER) < version:
                older[column.name] = value
        self._update(table, parked.key, parked.id, version, older)
        self.set_aside(table, parked)

    def _update(self, table: Table, key: Row, id: bytes, version: ColumnVersion, values: Values) -> None:
        if not values:
            return
        store.update(self._connection, table, key, values)
        for column in values:
            sparse.remember(self._connection, table.name, id, column, version)
        self._context.sparse_tables |= {table.name}

    def set_aside(self, table: Table, parked: Parked) -> None:
        """Columns of a beaten row that the table does not have: when it gets them, no newer value is there."""
        if (kept := parked.leftover(table)) is not None:
            self._context.recorder.park(kept)

    def remember(self, table: Table, key: Row, carried: Container[str], previous: ColumnVersion) -> None:
        """A message with these columns won: the others keep the versions they had, `previous` or older ones."""
        passed_over = [name for name in table.column_names if name not in carried]
        if not passed_over and table.name not in self._context.sparse_tables:
            return
        id = store.identity(table, key)
        known = sparse.entries(self._connection, table.name, id)
        sparse.forget(self._connection, table.name, id)
        for column in passed_over:
            sparse.remember(self._connection, table.name, id, column, known.get(column, previous))
        if passed_over:
            self._context.sparse_tables |= {table.name}

    def forget(self, table: Table, key: Row) -> None:
        """The row is gone."""
        if table.name in self._context.sparse_tables:
            sparse.forget(self._connection, table.name, store.identity(table, key))


def _folded(names: tuple[str, ...]) -> list[str]:
    return list(map(normal, names))
