"""Columns that kept an older version than their row.

A message from a node whose table has fewer columns sets only those it carries. What order such messages arrive in
must not matter, so each column that was passed over remembers the version its value has; a message that loses to
the row still fills the columns whose version is older. The table is empty unless schemas differ. Keys are
`rows.identity`.
"""

from __future__ import annotations

from collections.abc import Iterable

import apsw

from harmonylite.db import tables
from harmonylite.db.sql import rows

ColumnVersion = tuple[int, int]  # ts, node


def tables_with_entries(connection: apsw.Connection) -> frozenset[str]:
    return frozenset(name for (name,) in rows(connection, f"SELECT DISTINCT tbl FROM {tables.SPARSE}"))


def entries(
    connection: apsw.Connection, name: str, key: bytes, *, table: str = tables.SPARSE
) -> dict[str, ColumnVersion]:
    """The columns of one row that are older than the row, with their versions; `table`: where, as SQL."""
    found = rows(connection, f"SELECT col, ts, node FROM {table} WHERE tbl = ? AND key = ?", (name, key))
    return {column: (ts, node) for column, ts, node in found}


def remember(connection: apsw.Connection, table: str, key: bytes, column: str, version: ColumnVersion) -> None:
    connection.execute(
        f"INSERT INTO {tables.SPARSE} VALUES (?, ?, ?, ?, ?) ON CONFLICT (tbl, key, col)"
        " DO UPDATE SET ts = excluded.ts, node = excluded.node",
        (table, key, column, *version),
    )


def forget(connection: apsw.Connection, table: str, key: bytes, columns: Iterable[str] | None = None) -> None:
    """The columns (None: all of the row) have the row's version again."""
    if columns is None:
        connection.execute(f"DELETE FROM {tables.SPARSE} WHERE tbl = ? AND key = ?", (table, key))
        return
    for column in columns:
        connection.execute(f"DELETE FROM {tables.SPARSE} WHERE tbl = ? AND key = ? AND col = ?", (table, key, column))
