"""Single rows of an application's table, and their versions: the careful path, one row at a time.

Every value keeps its storage class, TEXT that is not UTF-8 included. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import apsw

from harmonylite import wire
from harmonylite.db.capture import collate, key_columns
from harmonylite.db.outbox import decode_typed, typed_sql
from harmonylite.db.schema import KeyColumn, Table
from harmonylite.db.sql import columns_sql, normal, quote, rows, version_table
from harmonylite.model import UNVERSIONED, RawText, Row, Value, Version

# A row by column name, without generated columns.
Values = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class VersionRow:
    """What a version table says of one row. batch: the one it is published with; None: it came from elsewhere."""

    version: Version
    deleted: bool = False
    batch: int | None = None
    base: tuple[int, int] = (0, 0)


NO_VERSION = VersionRow(UNVERSIONED)


def marker(value: Value) -> str:
    """The placeholder through which a value arrives unchanged."""
    return "CAST(? AS TEXT)" if isinstance(value, RawText) else "?"


def bound(values: Sequence[Value]) -> tuple[Value, ...]:
    return tuple(bytes(value) if isinstance(value, RawText) else value for value in values)


def after(table: Table, last: Row | None) -> tuple[str, Row]:
    """A WHERE clause for versions with keys after `last`, in the order of the key, with its bindings; None: for all."""
    if last is None:
        return "", ()
    return f"WHERE ({key_columns(table)}) > ({', '.join(map(marker, last))})", bound(last)


def _where_key(parts: Sequence[KeyColumn], key: Row) -> str:
    return " AND ".join(
        f"{quote(part.name)} = {marker(value)}{collate(part)}" for part, value in zip(parts, key, strict=True)
    )


def _where_version(key: Row) -> str:
    return " AND ".join(f"k{i} = {marker(value)}" for i, value in enumerate(key))


def read(connection: apsw.Connection, table: Table, key: Row) -> dict[str, Value] | None:
    """The row with this key, or None."""
    columns = ", ".join(typed_sql(quote(name)) for name in table.column_names)
    sql = f"SELECT {columns} FROM {quote(table.name)} WHERE {_where_key(table.key, key)}"
    for row in rows(connection, sql, bound(key)):
        return dict(zip(table.column_names, decode_typed(row), strict=True))
    return None


def insert(connection: apsw.Connection, table: Table, values: Values, *, on_conflict: str = "ABORT") -> None:
    """Insert a row; columns that are not given take their defaults. The schema's own conflict clauses do not count."""
    markers = ", ".join(marker(value) for value in values.values())
    connection.execute(
        f"INSERT OR {on_conflict} INTO {quote(table.name)} ({columns_sql(list(values))}) VALUES ({markers})",
        bound(list(values.values())),
    )


def update(connection: apsw.Connection, table: Table, key: Row, values: Values) -> None:
    """Set columns of the row with this key."""
    assignments = ", ".join(f"{quote(name)} = {marker(value)}" for name, value in values.items())
    connection.execute(
        f"UPDATE OR ABORT {quote(table.name)} SET {assignments} WHERE {_where_key(table.key, key)}",
        (*bound(list(values.values())), *bound(key)),
    )


def delete(connection: apsw.Connection, table: Table, key: Row) -> None:
    connection.execute(f"DELETE FROM {quote(table.name)} WHERE {_where_key(table.key, key)}", bound(key))


def default(connection: apsw.Connection, table: Table, column: str) -> Value:
    """The value that a column takes when an INSERT does not name it."""
    found = table.column(column)
    if found is None or found.default is None:
        return None
    value: Value = rows(connection, f"SELECT {found.default}")[0][0]
    return value


def find_version(connection: apsw.Connection, table: Table, key: Row) -> VersionRow | None:
    sql = (
        f"SELECT ts, node, rank, deleted, batch, base_ts, base_node FROM {version_table(table.name)}"
        f" WHERE {_where_version(key)}"
    )
    for ts, node, rank, deleted, batch, base_ts, base_node in rows(connection, sql, bound(key)):
        return VersionRow(Version(ts, node, rank), bool(deleted), batch, (base_ts, base_node))
    return None


def set_version(connection: apsw.Connection, table: Table, key: Row, row: VersionRow) -> None:
    keys = ", ".join(marker(value) for value in key)
    connection.execute(
        f"INSERT INTO {version_table(table.name)}"
        f" ({key_columns(table)}, ts, node, rank, deleted, batch, base_ts, base_node)"
        f" VALUES ({keys}, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT ({key_columns(table)}) DO UPDATE SET"
        " ts = excluded.ts, node = excluded.node, rank = excluded.rank, deleted = excluded.deleted,"
        " batch = excluded.batch, base_ts = excluded.base_ts, base_node = excluded.base_node, settled_ms = NULL",
        (*bound(key), *row.version, int(row.deleted), row.batch, *row.base),
    )


def forget_version(connection: apsw.Connection, table: Table, key: Row) -> None:
    connection.execute(f"DELETE FROM {version_table(table.name)} WHERE {_where_version(key)}", bound(key))


def key_of(table: Table, values: Values) -> Row:
    """The key of a row, in the key's order."""
    return tuple(values[part.name] for part in table.key)


def identity(table: Table, key: Row) -> bytes:
    """One key, one byte string: equal exactly when SQLite takes the two keys for the same row's."""
    return wire.pack([_folded(part, value) for part, value in zip(table.key, key, strict=True)])


def unpack_key(identity: bytes) -> Row:
    """A key for which `identity` holds: SQLite finds the same row by it."""
    return tuple(cast("list[Value]", wire.unpack(identity)))


def _folded(part: KeyColumn, value: Value) -> Value:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    if isinstance(value, str):
        collation = part.collation.upper()
        if collation == "NOCASE":
            return normal(value)
        if collation == "RTRIM":
            return value.rstrip(" ")
    return value
