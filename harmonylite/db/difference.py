"""In what a snapshot and the live database differ, as SQL: which rows to take over, delete or publish again.

The statements run on a connection whose `main` is the live database and whose `snap` is the snapshot. Each goes
through one table in the order of its key, so that a long comparison is made of short pieces and can go on after any
of them. Versions are compared first; contents only where versions are equal, and no version counts as (0, 0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from sys import getsizeof
from types import MappingProxyType
from typing import NamedTuple

import apsw

from harmonylite.db.capture import collate, key_columns, key_match
from harmonylite.db.outbox import decode_typed, typed_keys_sql, typed_sql
from harmonylite.db.rows import bound, marker
from harmonylite.db.schema import Table
from harmonylite.db.sparse import ColumnVersion
from harmonylite.db.sql import normal, quote, rows, version_table
from harmonylite.model import Row, Stamp, Version

# What is to be done with the rows that a scan finds.
TAKE, DELETE, MARK = "take", "delete", "mark"

_COLLATE = re.compile(r' COLLATE (BINARY|"[^"]*")$')

# Rows that one piece of a scan looks at.
WINDOW_ROWS = 20_000


class Found(NamedTuple):
    """One row that differs. For TAKE: as the snapshot has it, `values` in the order of the snapshot's columns, None
    if deleted; pending: the snapshot's node had not published it; twin: the version is the same here; older: columns
    that have an older version than their row. For DELETE and MARK: the key and the version that it has here."""

    key: Row
    stamp: Stamp
    values: Row | None = None
    pending: bool = False
    twin: bool = False
    older: Mapping[str, ColumnVersion] = MappingProxyType({})

    @property
    def version(self) -> Version:
        return Version(*self.stamp[:3])


@dataclass(frozen=True, slots=True)
class Scan:
    """One way through one table. select: without its range and order; source, keys: what it goes through."""

    kind: str
    table: Table
    columns: tuple[str, ...]
    source: str
    keys: tuple[str, ...]
    where: str
    select: str
    versioned: bool

    def on(self, connection: apsw.Connection) -> Scan:
        """The same with the key's columns written plainly, where their collation is the primary key's anyway, which
        the plan for sorting by them tells: SQLite seeks several columns in an index only without COLLATE."""
        plain = tuple(_COLLATE.sub("", key) for key in self.keys)
        plan = rows(connection, f"EXPLAIN QUERY PLAN SELECT 1 FROM {self.source} ORDER BY {', '.join(plain)}")
        return self if any("TEMP B-TREE" in row[3] for row in plan) else replace(self, keys=plain)

    def end_of_piece(self, connection: apsw.Connection, last: Row | None, size: int) -> tuple[Row | None, int]:
        """The key of the row `size` rows after the key `last`, and `size`; None and how many are left, at the end."""
        condition, bindings = self._between(last, None)
        listed = f"FROM {self.source} WHERE {condition}"
        keys = ", ".join(typed_sql(key) for key in self.keys)
        found = rows(
            connection, f"SELECT {keys} {listed} ORDER BY {', '.join(self.keys)} LIMIT 1 OFFSET {size - 1}", bindings
        )
        if found:
            return decode_typed(found[0]), size
        left = f"SELECT count(*) FROM (SELECT 1 {listed} LIMIT {size})"
        return None, int(rows(connection, left, bindings)[0][0])

    def find(
        self,
        connection: apsw.Connection,
        last: Row | None,
        end: Row | None,
        published: int,
        max_rows: int,
        max_bytes: int,
    ) -> tuple[list[Found], bool]:
        """Rows that differ, with keys after `last` up to `end`. Whether those are all in that range.

        published: rows of later batches are pending, of the snapshot when taking, else of the database here.
        """
        condition, between = self._between(last, end)
        text = f"{self.select} AND {condition} ORDER BY {', '.join(self.keys)}"
        found: list[Found] = []
        size = 0
        width = len(self.keys)
        cursor = iter(connection.execute(text, (published, *between)))
        for row in islice(cursor, max_rows):
            each = self._decode(row, width)
            found.append(each)
            size += sum(map(getsizeof, each.key)) + sum(map(getsizeof, each.values or ()))
            if size >= max_bytes:
                break
        return found, len(found) < max_rows and size < max_bytes

    def lookup(self, connection: apsw.Connection, key: Row, published: int) -> Found | None:
        """The row with that key, if it is one that `find` would find."""
        keys = f"({', '.join(self.keys)}) = ({', '.join(map(marker, key))})"
        text = f"{self.select} AND {self.where} AND {keys}"
        for row in connection.execute(text, (published, *bound(key))):
            return self._decode(row, len(self.keys))
        return None

    def _decode(self, row: Row, width: int) -> Found:
        plain = 8 if self.kind == TAKE else 6
        values = decode_typed(row, plain)
        ts, node, rank, base_ts, base_node, deleted = values[:6]
        stamp = Stamp(ts, node, rank, base_ts, base_node)  # type: ignore[arg-type]
        key = values[plain : plain + width]
        if self.kind != TAKE:
            return Found(key, stamp)
        content = None if deleted else values[plain + width :]
        return Found(key, stamp, content, bool(values[6]), bool(values[7]))

    def _between(self, last: Row | None, end: Row | None) -> tuple[str, Row]:
        keys = f"({', '.join(self.keys)})"
        terms = [self.where]
        bindings: Row = ()
        if last is not None:
            terms.append(f"{keys} > ({', '.join(map(marker, last))})")
            bindings += bound(last)
            # The same for the first column alone, which SQLite always finds in the index.
            terms.append(f"{self.keys[0]} >= {marker(last[0])}")
            bindings += bound(last[:1])
        if end is not None:
            terms.append(f"{keys} <= ({', '.join(map(marker, end))})")
            bindings += bound(end)
        return " AND ".join(terms), bindings


def taking(theirs: Table, mine: Table | None) -> tuple[Scan, ...]:
    """What the snapshot has newer than this database, or other under the same version: versioned, then unversioned.

    mine None: all of it; no table here can be compared with it.
    """
    return _versioned(theirs, mine), _unversioned(theirs, mine)


def _versioned(theirs: Table, mine: Table | None) -> Scan:
    keys = _prefixed("s", theirs)
    joins = f"LEFT JOIN snap.{quote(theirs.name)} AS r ON {key_match(theirs, 's', 'r')}"
    there = f"(s.deleted OR r.{quote(theirs.key[0].name)} IS NOT NULL)"
    where, twin = there, "0"
    if mine is not None:
        joins = f"LEFT JOIN main.{version_table(mine.name)} AS v ON {_same_key(theirs)} {joins}"
        twin = "ifnull((s.ts, s.node, s.rank) = (v.ts, v.node, v.rank), 0)"
        where = (
            f"(v.ts IS NULL OR (s.ts, s.node, s.rank) > (v.ts, v.node, v.rank)"
            f" OR ((s.ts, s.node, s.rank) = (v.ts, v.node, v.rank)"
            f" AND (s.deleted <> v.deleted OR (s.deleted = 0 AND NOT {_same_here(theirs, mine)})))) AND {there}"
        )
    return Scan(
        versioned=True,
        kind=TAKE,
        table=theirs,
        columns=theirs.column_names,
        source=f"snap.{version_table(theirs.name)} AS s",
        keys=keys,
        where="(s.ts > 0 OR s.rank > 0)",
        select=(
            "SELECT s.ts, s.node, s.rank, s.base_ts, s.base_node, s.deleted,"
            f" ifnull(s.batch, 0) > ?, {twin}, {typed_keys_sql(theirs, 's.')}, {_typed_row(theirs)}"
            f" FROM snap.{version_table(theirs.name)} AS s {joins} WHERE {where}"
        ),
    )


def _unversioned(theirs: Table, mine: Table | None) -> Scan:
    """Rows that have no version on either side, here absent or different."""
    keys = _key_of_row("r", theirs)
    joins = f"LEFT JOIN snap.{version_table(theirs.name)} AS s ON {key_match(theirs, 's', 'r')}"
    where = "(s.ts IS NULL OR (s.ts = 0 AND s.rank = 0))"
    if mine is not None:
        joins += f" LEFT JOIN main.{version_table(mine.name)} AS v ON {key_match(theirs, 'v', 'r')}"
        none = f"{where} AND (v.ts IS NULL OR (v.ts = 0 AND v.rank = 0))"
        # In this order: contents are compared only where there are no versions.
        where = f"CASE WHEN {none} THEN NOT {_same_here(theirs, mine)} ELSE false END"
    typed_keys = ", ".join(typed_sql(f"r.{quote(name)}") for name in theirs.key_names)
    return Scan(
        versioned=False,
        kind=TAKE,
        table=theirs,
        columns=theirs.column_names,
        source=f"snap.{quote(theirs.name)} AS r",
        keys=keys,
        where=_present("r", theirs),
        select=(
            f"SELECT 0, 0, 0, 0, 0, 0, ifnull(s.batch, 0) > ?, 1, {typed_keys}, {_typed_row(theirs)}"
            f" FROM snap.{quote(theirs.name)} AS r {joins} WHERE {where}"
        ),
    )


def deleting(mine: Table, theirs: Table, latest_ms: int) -> tuple[Scan, ...]:
    """Rows that everybody else has deleted, so long ago that they have forgotten it: what the cluster had once and
    the snapshot does not know. latest_ms: what was written later cannot be forgotten yet."""
    gone = f"v.deleted = 0 AND s.ts IS NULL AND NOT {_in_snapshot(theirs, 'v')}"
    return (
        _local(DELETE, mine, f"{gone} AND v.ts <= {latest_ms}"),
        _local_unversioned(DELETE, mine, theirs),
    )


def marking(mine: Table, theirs: Table, published: int | None) -> tuple[Scan, ...]:
    """Rows and tombstones that the cluster needs to hear of again: newer here than there, unknown there, or the same
    there, where that node had not published them. published: its watermark; None: those have been published since."""
    waits = "false" if published is None else f"ifnull(s.batch, 0) > {published}"
    same = f"((v.ts, v.node, v.rank) = (s.ts, s.node, s.rank) AND {waits})"
    return (
        _local(MARK, mine, f"(s.ts IS NULL OR (v.ts, v.node, v.rank) > (s.ts, s.node, s.rank) OR {same})"),
        _local_unversioned(MARK, mine, theirs, waits),
    )


def _local(kind: str, mine: Table, where: str) -> Scan:
    return Scan(
        versioned=True,
        kind=kind,
        table=mine,
        columns=(),
        source=f"main.{version_table(mine.name)} AS v",
        keys=_prefixed("v", mine),
        where="(v.ts > 0 OR v.rank > 0)",
        select=(
            f"SELECT v.ts, v.node, v.rank, v.base_ts, v.base_node, v.deleted, {typed_keys_sql(mine, 'v.')}"
            f" FROM main.{version_table(mine.name)} AS v"
            f" LEFT JOIN snap.{version_table(mine.name)} AS s ON {_same_key(mine)}"
            f" WHERE (v.batch IS NULL OR v.batch <= ?) AND {where}"
        ),
    )


def _local_unversioned(kind: str, mine: Table, theirs: Table, also: str = "false") -> Scan:
    """Those that are not in the snapshot, or that are there and meet another condition on their mark `s`."""
    typed_keys = ", ".join(typed_sql(f"m.{quote(name)}") for name in mine.key_names)
    return Scan(
        versioned=False,
        kind=kind,
        table=mine,
        columns=(),
        source=f"main.{quote(mine.name)} AS m",
        keys=_key_of_row("m", mine),
        where=_present("m", mine),
        select=(
            f"SELECT 0, 0, 0, 0, 0, 0, {typed_keys} FROM main.{quote(mine.name)} AS m"
            f" LEFT JOIN main.{version_table(mine.name)} AS v ON {key_match(mine, 'v', 'm')}"
            f" LEFT JOIN snap.{version_table(mine.name)} AS s ON {key_match(mine, 's', 'm')}"
            " WHERE (v.ts IS NULL OR (v.ts = 0 AND v.rank = 0 AND (v.batch IS NULL OR v.batch <= ?)))"
            " AND (s.ts IS NULL OR (s.ts = 0 AND s.rank = 0))"
            f" AND ({also} OR NOT EXISTS (SELECT 1 FROM snap.{quote(theirs.name)} AS r"
            f" WHERE {_same_row(theirs, mine)}))"
        ),
    )


def comparable(theirs: Table, mine: Table) -> bool:
    """Whether a key there means the same row here."""
    return [normal(name) for name in theirs.key_names] == [normal(name) for name in mine.key_names]


def _prefixed(alias: str, table: Table) -> tuple[str, ...]:
    return tuple(f"{alias}.{name}" for name in key_columns(table).split(", "))


def _key_of_row(alias: str, table: Table) -> tuple[str, ...]:
    """The key's columns in the application's table, as its primary key compares them."""
    if table.rowid_alias:
        return (f"{alias}.{quote(table.key[0].name)}",)
    return tuple(f"{alias}.{quote(part.name)}{collate(part)}" for part in table.key)


def _present(alias: str, table: Table) -> str:
    return " AND ".join(f"{alias}.{quote(part.name)} IS NOT NULL" for part in table.key if part.nullable) or "true"


def _same_key(table: Table) -> str:
    return " AND ".join(f"v.{name} = s.{name}" for name in key_columns(table).split(", "))


def _same_row(theirs: Table, mine: Table) -> str:
    """The condition that `r` of the snapshot's table and `m` of the one here have the same key."""
    return " AND ".join(
        f"r.{quote(there.name)} = m.{quote(here.name)}" + ("" if mine.rowid_alias else collate(here))
        for there, here in zip(theirs.key, mine.key, strict=True)
    )


def _in_snapshot(theirs: Table, alias: str) -> str:
    table = quote(theirs.name)
    return f"EXISTS (SELECT 1 FROM snap.{table} AS r WHERE {key_match(theirs, alias, 'r')})"


def _same_here(theirs: Table, mine: Table) -> str:
    """The condition that the row `r` of the snapshot is here too, the same to the byte in all columns of both."""
    same = []
    for column in theirs.columns:
        here = mine.column(column.name)
        if here is not None:
            one, other = f"m.{quote(here.name)}", f"r.{quote(column.name)}"
            same.append(f"{one} COLLATE BINARY IS {other} AND typeof({one}) = typeof({other})")
    return f"EXISTS (SELECT 1 FROM main.{quote(mine.name)} AS m WHERE {_same_row(theirs, mine)} AND {_all(same)})"


def _all(conditions: Sequence[str]) -> str:
    """The conditions joined by AND, in halves: SQLite takes an expression only 1,000 deep, a table may be wider."""
    if len(conditions) < 8:
        return " AND ".join(conditions)
    middle = len(conditions) // 2
    return f"({_all(conditions[:middle])}) AND ({_all(conditions[middle:])})"


def _typed_row(table: Table) -> str:
    return ", ".join(typed_sql(f"r.{quote(name)}") for name in table.column_names)
