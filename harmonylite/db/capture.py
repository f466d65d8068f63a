"""Change data capture: the change logs and the triggers that fill them, installed and removed.

The triggers run inside the application's own statements, so they are as little as possible: one append to a
table without an index, only built-in functions, no column besides the key (an application could otherwise not
drop a column that a trigger mentions), except columns of a UNIQUE constraint, which SQLite refuses to drop anyway.
Rows that OR REPLACE evicts through any other unique index are found when the statement's own rows are absorbed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import apsw

from harmonylite.db.schema import KeyColumn, Schema, Table, UniqueIndex
from harmonylite.db.sql import PREFIX, integer, log_table, normal, quote, rows, version_table

# The `op` column of a change log.
WRITTEN, DELETED, MAYBE_EVICTED = 1, 2, 3

# What a table's triggers are for. No kind has an underscore, so that names tell table and kind apart. Without one of
# the first four, capture is off; the last two only see evictions.
KINDS = ("insert", "update", "rekey", "delete", "evict1", "evict2")
ESSENTIAL = KINDS[:4]

# Milliseconds since 1970 by the application's clock. SQLite has whole milliseconds, but hands them out as a fraction
# of a day: rounded, not cut off.
NOW_MS = "CAST((julianday('now')-2440587.5)*86400000+0.5 AS INTEGER)"


@dataclass(frozen=True, slots=True)
class Trigger:
    name: str
    sql: str


def key_columns(table: Table) -> str:
    """`k0, k1, ..`: the key's columns in our tables."""
    return ", ".join(f"k{i}" for i in range(len(table.key)))


def collate(part: KeyColumn) -> str:
    """An explicit collation, so that a comparison follows the key's index and not the column's declaration."""
    return f" COLLATE {quote(part.collation)}" if part.collation.upper() != "BINARY" else " COLLATE BINARY"


def key_match(table: Table, ours: str, theirs: str) -> str:
    """The condition that row `theirs` of the application's table has the key in k0.. of our table `ours`."""
    if table.rowid_alias:
        return f"{theirs}.{quote(table.key[0].name)} = {ours}.k0"
    return " AND ".join(f"{theirs}.{quote(part.name)} = {ours}.k{i}{collate(part)}" for i, part in enumerate(table.key))


def key_definition(table: Table) -> str:
    """Column definitions k0.. with the affinity and collation of the original key."""
    return ", ".join(f"k{i} {part.affinity} COLLATE {quote(part.collation)}" for i, part in enumerate(table.key))


def create_log_sql(table: Table) -> str:
    return (
        f"CREATE TABLE IF NOT EXISTS {log_table(table.name)} "
        f"(seq INTEGER PRIMARY KEY, ts INTEGER, op INTEGER, {key_definition(table)})"
    )


def create_version_sql(table: Table) -> tuple[str, ...]:
    """The version table and its two partial indexes: rows to be published, and tombstones by age."""
    name = version_table(table.name)
    if table.rowid_alias:
        keys, primary, suffix = "k0 INTEGER PRIMARY KEY", "", ""
    else:
        keys = key_definition(table)
        primary, suffix = f", PRIMARY KEY ({key_columns(table)})", " WITHOUT ROWID"
    return (
        f"CREATE TABLE IF NOT EXISTS {name} ({keys}, ts INTEGER NOT NULL, node INTEGER NOT NULL,"
        " rank INTEGER NOT NULL DEFAULT 0, deleted INTEGER NOT NULL DEFAULT 0, batch INTEGER,"
        " base_ts INTEGER NOT NULL DEFAULT 0, base_node INTEGER NOT NULL DEFAULT 0,"
        f" settled_ms INTEGER{primary}){suffix}",
        f"CREATE INDEX IF NOT EXISTS {quote(f'{PREFIX}{table.name}_pending')} ON {name} (batch)"
        " WHERE batch IS NOT NULL",
        f"CREATE INDEX IF NOT EXISTS {quote(f'{PREFIX}{table.name}_tombstones')} ON {name} (settled_ms)"
        " WHERE deleted = 1",
    )


def triggers(table: Table) -> tuple[Trigger, ...]:
    """Every trigger that the table should have, by exact text."""
    on = quote(table.name)
    changed = " OR ".join(f"OLD.{quote(k.name)}{collate(k)} IS NOT NEW.{quote(k.name)}" for k in table.key)
    made = [
        _trigger(table, "insert", f"AFTER INSERT ON {on}", _present(table, "NEW"), [_append(table, WRITTEN, "NEW")]),
        _trigger(table, "update", f"AFTER UPDATE ON {on}", _present(table, "NEW"), [_append(table, WRITTEN, "NEW")]),
        # Not UPDATE OF: `UPDATE t SET rowid = ..` changes the key without naming its column.
        _trigger(
            table,
            "rekey",
            f"AFTER UPDATE ON {on}",
            _both(f"({changed})", _present(table, "OLD")),
            [_append(table, DELETED, "OLD")],
        ),
        _trigger(table, "delete", f"AFTER DELETE ON {on}", _present(table, "OLD"), [_append(table, DELETED, "OLD")]),
    ]
    constraints = [index for index in table.uniques if index.columns]
    if constraints:
        evicted = [_append_evicted(table, index) for index in constraints]
        named = dict.fromkeys(quote(column) for index in constraints for column, _ in index.columns)
        made.append(_trigger(table, "evict1", f"BEFORE INSERT ON {on}", "", evicted))
        made.append(_trigger(table, "evict2", f"BEFORE UPDATE OF {', '.join(named)} ON {on}", "", evicted))
    return tuple(made)


def _trigger(table: Table, kind: str, event: str, when: str, body: Sequence[str]) -> Trigger:
    name = f"{PREFIX}{table.name}_{kind}"
    condition = f" WHEN {when}" if when else ""
    return Trigger(name, f"CREATE TRIGGER {quote(name)} {event}{condition} BEGIN {' '.join(body)} END")


def _append(table: Table, op: int, row: str) -> str:
    values = ", ".join(f"{row}.{quote(part.name)}" for part in table.key)
    return f"INSERT INTO {log_table(table.name)} (ts, op, {key_columns(table)}) VALUES ({NOW_MS}, {op}, {values});"


def _append_evicted(table: Table, index: UniqueIndex) -> str:
    """Log the row that this statement evicts if it is an OR REPLACE: no delete trigger fires for it."""
    rival = [f"rival.{quote(column)} = NEW.{quote(column)} COLLATE {quote(coll)}" for column, coll in index.columns]
    if present := _present(table, "rival"):
        rival.append(present)
    keys = ", ".join(f"rival.{quote(part.name)}" for part in table.key)
    return (
        f"INSERT INTO {log_table(table.name)} (ts, op, {key_columns(table)})"
        f" SELECT {NOW_MS}, {MAYBE_EVICTED}, {keys} FROM {quote(table.name)} AS rival WHERE {' AND '.join(rival)};"
    )


def _present(table: Table, row: str) -> str:
    """SQLite allows NULL in a primary key that is not an INTEGER one, many times: such rows have no identity."""
    return " AND ".join(f"{row}.{quote(part.name)} IS NOT NULL" for part in table.key if part.nullable)


def _both(first: str, second: str) -> str:
    return f"{first} AND {second}" if second else first


def definition(table: Table) -> str:
    """What our tables for it depend on: when this changes, its version table cannot be kept."""
    return json.dumps([[part.affinity, part.collation.upper()] for part in table.key] + [table.rowid_alias])


@dataclass(frozen=True, slots=True)
class Installed:
    """What is of ours in the database."""

    triggers: dict[str, tuple[str, str]]  # name -> (table it is on, SQL)
    tables: frozenset[str]  # normal names


def installed(connection: apsw.Connection) -> Installed:
    mine = f"{PREFIX}%".replace("_", "\\_")
    found = rows(
        connection, "SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE name LIKE ? ESCAPE '\\'", (mine,)
    )
    return Installed(
        {name: (on, sql) for kind, name, on, sql in found if kind == "trigger"},
        frozenset(normal(name) for kind, name, _, _ in found if kind == "table"),
    )


def drop_triggers(connection: apsw.Connection, names: Sequence[str]) -> None:
    for name in names:
        connection.execute(f"DROP TRIGGER IF EXISTS {quote(name)}")


def drop_log(connection: apsw.Connection, table: str) -> None:
    """Call after the table's triggers are gone: a trigger without its log breaks every write."""
    connection.execute(f"DROP TABLE IF EXISTS {log_table(table)}")


def count_unkeyed(connection: apsw.Connection, schema: Schema) -> int:
    """Rows with NULL in their key, which are not replicated."""
    total = 0
    for table in schema.tables.values():
        nulls = " OR ".join(f"{quote(part.name)} IS NULL" for part in table.key if part.nullable)
        if nulls:
            total += integer(connection, f"SELECT count(*) FROM {quote(table.name)} WHERE {nulls}")
    return total
