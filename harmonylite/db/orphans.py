"""Rows whose parent was deleted elsewhere: found, so that the conflict log can list them; nothing is deleted.

Foreign keys are off where changes of other nodes are written, since rows arrive in any order. One node deletes
a parent while another inserts a child of it: both writes stand, and the child is an orphan on every node. Only
a parent with a tombstone counts. One that is merely absent may still be on its way.

Limits: a foreign key that refers to something else than the parent's primary key is not looked at (versions
and tombstones know primary keys only), nor are tables that are not replicated. Where parent and child column
have different affinities ('01' in a TEXT column that refers to an INTEGER), the search from a deleted parent
compares by the child's affinity.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import apsw

from harmonylite.db.outbox import decode_typed, typed_sql
from harmonylite.db.rows import bound, marker
from harmonylite.db.schema import KeyColumn, Schema, Table
from harmonylite.db.sql import normal, quote, rows, version_table
from harmonylite.model import Row, Value

log = logging.getLogger(__name__)

# Bound parameters of one statement; SQLite allows 32766. A child table without an index on its foreign key is
# scanned once for so many values of deleted keys.
MAX_PARAMETERS = 10_000

# An application that never enforces its foreign keys may leave a million children behind with one DELETE.
MAX_ORPHANS = 1_000


@dataclass(frozen=True, slots=True)
class Orphan:
    """Keys in the order of each table's primary key; the parent's spelled as the child refers to it."""

    child_table: str
    child_key: Row
    parent_table: str
    parent_key: Row


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """A reference to a parent's primary key. `columns` are the child's, in the order of the parent's key.

    `indexed`: the child has an index, or its rowid, to look a parent's key up with.
    """

    child: str
    child_key: tuple[str, ...]
    columns: tuple[str, ...]
    parent: str
    parent_key: tuple[KeyColumn, ...]
    indexed: bool


@dataclass(frozen=True, slots=True)
class ForeignKeys:
    """The foreign keys between replicated tables, by normal(child) and by normal(parent)."""

    by_child: Mapping[str, tuple[ForeignKey, ...]] = field(default_factory=dict)
    by_parent: Mapping[str, tuple[ForeignKey, ...]] = field(default_factory=dict)


def load_foreign_keys(connection: apsw.Connection, schema: Schema) -> ForeignKeys:
    """Read the foreign keys of the replicated tables; once per schema change."""
    by_child: dict[str, list[ForeignKey]] = {}
    by_parent: dict[str, list[ForeignKey]] = {}
    for child in schema.tables.values():
        for parent_name, pairs in _declared(connection, child.name):
            parent = schema.table(parent_name)
            columns = _columns_in_key_order(parent, pairs) if parent else None
            if parent is None or columns is None:
                continue
            indexed = _indexed(connection, child, dict(zip(columns, parent.key, strict=True)))
            key = ForeignKey(child.name, child.key_names, columns, parent.name, parent.key, indexed)
            by_child.setdefault(normal(child.name), []).append(key)
            by_parent.setdefault(normal(parent.name), []).append(key)
    return ForeignKeys(
        {name: tuple(keys) for name, keys in by_child.items()},
        {name: tuple(keys) for name, keys in by_parent.items()},
    )


def find(
    connection: apsw.Connection,
    foreign_keys: ForeignKeys,
    written: Mapping[str, Sequence[Row]],
    deleted: Mapping[str, Sequence[Row]],
    limit: int = MAX_ORPHANS,
) -> list[Orphan]:
    """The orphans that a group of changes made, each once, at most `limit`; more are only logged.

    To be called after the group was written, in its transaction. `written` and `deleted` hold, per table, the
    keys of rows that were just written and just deleted, in primary key order. A table without foreign keys
    costs one dictionary lookup, a written child two key lookups, all deleted keys of a table together one search
    of each child table. A key of another width (its node has another schema) is passed over.
    """
    found: dict[Orphan, None] = {}
    for table, keys in written.items():
        for foreign_key in foreign_keys.by_child.get(normal(table), ()):
            fitting = [key for key in keys if len(key) == len(foreign_key.child_key)]
            _collect(connection, foreign_key, _written_sql, fitting, found, limit)
    for table, keys in deleted.items():
        for foreign_key in foreign_keys.by_parent.get(normal(table), ()):
            fitting = [key for key in keys if len(key) == len(foreign_key.parent_key)]
            _collect(connection, foreign_key, _deleted_sql, fitting, found, limit)
    if len(found) > limit:
        fields = {"limit": limit, "children": sorted({orphan.child_table for orphan in found})}
        log.warning("more orphans than are kept; the rest is not in the conflict log", extra={"fields": fields})
    return list(found)[:limit]


def _declared(connection: apsw.Connection, table: str) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """(parent, [(child column, parent column)]) per foreign key; a parent column is None if not spelled out."""
    declared = rows(
        connection,
        'SELECT id, "table", "from", "to" FROM pragma_foreign_key_list(?, \'main\') ORDER BY id, seq',
        (table,),
    )
    for number in sorted({row[0] for row in declared}):
        mine = [row for row in declared if row[0] == number]
        yield mine[0][1], [(row[2], row[3]) for row in mine]


def _columns_in_key_order(parent: Table, pairs: Sequence[tuple[str, str | None]]) -> tuple[str, ...] | None:
    """The child's columns in the order of the parent's primary key; None if they refer to something else."""
    if len(pairs) != len(parent.key):
        return None
    if pairs[0][1] is None:
        return tuple(column for column, _ in pairs)
    by_parent_column = {normal(to): column for column, to in pairs if to is not None}
    if set(by_parent_column) != {normal(part.name) for part in parent.key}:
        return None
    return tuple(by_parent_column[normal(part.name)] for part in parent.key)


def _indexed(connection: apsw.Connection, child: Table, references: Mapping[str, KeyColumn]) -> bool:
    wanted = {(normal(column), part.collation.upper()) for column, part in references.items()}
    if child.rowid_alias and normal(child.key[0].name) in {column for column, _ in wanted}:
        return True
    leading = rows(
        connection,
        "SELECT x.name, x.coll"
        " FROM pragma_index_list(?, 'main') AS l, pragma_index_xinfo(l.name, 'main') AS x"
        " WHERE NOT l.partial AND x.seqno = 0 AND x.name IS NOT NULL",
        (child.name,),
    )
    return any((normal(name), collation.upper()) in wanted for name, collation in leading)


def _collect(
    connection: apsw.Connection,
    foreign_key: ForeignKey,
    statement: Callable[[ForeignKey, str], str],
    keys: Sequence[Row],
    found: dict[Orphan, None],
    limit: int,
) -> None:
    """Run the statement for all keys and add to `found`, until it holds more than `limit`."""
    width = 2 * len(foreign_key.child_key)
    for values, bindings in _values(keys):
        if len(found) > limit:
            return
        # One more than the limit shows that there are more; those found before may come up again.
        sql = statement(foreign_key, values)
        for row in rows(connection, sql, (*bindings, limit + 1 + len(found))):
            child_key, parent_key = decode_typed(row[:width]), decode_typed(row[width:])
            found[Orphan(foreign_key.child, child_key, foreign_key.parent, parent_key)] = None


# A tombstone of the parent of a child that was just written. `+`: the child's value takes the affinity of the
# parent's column, as foreign keys compare, and the parent's index is used.
_WRITTEN = """
WITH given({names}) AS (VALUES {values})
SELECT {result}
FROM given
CROSS JOIN main.{child} AS c ON {child_is_given}
CROSS JOIN main.{version} AS v ON {version_is_parent} AND v.deleted = 1
WHERE NOT EXISTS (SELECT 1 FROM main.{parent} AS p WHERE {parent_is_referred})
LIMIT ?"""

_DELETED_BY_INDEX = """
WITH given({names}) AS (VALUES {values})
SELECT {result}
FROM given
CROSS JOIN main.{child} AS c ON {child_refers}
WHERE NOT EXISTS (SELECT 1 FROM main.{parent} AS p WHERE {parent_is_referred})
LIMIT ?"""

# One scan, whatever the number of keys. (A join would scan the child once per key, or index it first.)
_DELETED_BY_SCAN = """
WITH given({names}) AS (VALUES {values})
SELECT {result}
FROM main.{child} AS c
WHERE ({referring}) IN given
AND NOT EXISTS (SELECT 1 FROM main.{parent} AS p WHERE {parent_is_referred})
LIMIT ?"""


def _written_sql(key: ForeignKey, values: str) -> str:
    own = enumerate(key.child_key)
    return _WRITTEN.format(
        names=_names(len(key.child_key)),
        values=values,
        result=_result(key),
        child=quote(key.child),
        child_is_given=" AND ".join(f"c.{quote(column)} = given.k{i}" for i, column in own),
        version=version_table(key.parent),
        version_is_parent=" AND ".join(f"v.k{i} = +c.{quote(column)}" for i, column in enumerate(key.columns)),
        parent=quote(key.parent),
        parent_is_referred=_parent_is_referred(key),
    )


def _deleted_sql(key: ForeignKey, values: str) -> str:
    # The collation of the parent's column decides, whatever the child's is (https://sqlite.org/foreignkeys.html).
    referring = [
        f"c.{quote(column)} COLLATE {quote(part.collation)}"
        for column, part in zip(key.columns, key.parent_key, strict=True)
    ]
    template = _DELETED_BY_INDEX if key.indexed else _DELETED_BY_SCAN
    return template.format(
        names=_names(len(key.parent_key)),
        values=values,
        result=_result(key),
        child=quote(key.child),
        child_refers=" AND ".join(f"{column} = given.k{i}" for i, column in enumerate(referring)),
        referring=", ".join(referring),
        parent=quote(key.parent),
        parent_is_referred=_parent_is_referred(key),
    )


def _names(count: int) -> str:
    return ", ".join(f"k{i}" for i in range(count))


def _parent_is_referred(key: ForeignKey) -> str:
    pairs = zip(key.parent_key, key.columns, strict=True)
    return " AND ".join(f"p.{quote(part.name)} = +c.{quote(column)}" for part, column in pairs)


def _result(key: ForeignKey) -> str:
    """The child's key and what it refers to."""
    columns = [f"c.{quote(column)}" for column in (*key.child_key, *key.columns)]
    return ", ".join(map(typed_sql, columns))


def _values(keys: Sequence[Row]) -> Iterator[tuple[str, Sequence[Value]]]:
    """The rows of a VALUES clause and their bindings, as many at once as a statement takes."""
    if not keys:
        return
    at_once = max(1, MAX_PARAMETERS // len(keys[0]))
    for start in range(0, len(keys), at_once):
        chunk = keys[start : start + at_once]
        yield (
            ", ".join(f"({', '.join(map(marker, key))})" for key in chunk),
            bound([value for key in chunk for value in key]),
        )
