"""Tables that are captured again, or from now on, with rows that no trigger saw: a migration has rebuilt one, say.

Everything in such a table may have changed (versions.recapture). A few rows are dealt with in the transaction that
installs capture. Millions would keep the application from its lock for seconds: they are done a piece at a time, each
in a transaction of its own.

What is due, and how far it is, stands in the database: after a kill it goes on there. Until its end the versions do not
say what is in the table, so nothing is absorbed, and therefore nothing published, applied, merged or copied, all of
which begin with that; `status` says so. The application's writes are in the change log meanwhile, like any that is not
absorbed. All pieces have the same batch, so that what may have been one transaction is published as one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import apsw

from harmonylite import wire
from harmonylite.db import tables, versions
from harmonylite.db.capture import collate, key_columns
from harmonylite.db.outbox import decode_typed, typed_keys_sql, typed_sql
from harmonylite.db.rows import after, bound, marker
from harmonylite.db.schema import Schema, Table
from harmonylite.db.sql import integer, normal, quote, rows, version_table
from harmonylite.model import Row, Value

if TYPE_CHECKING:
    from harmonylite.db.database import Database

log = logging.getLogger(__name__)

# So many rows and versions of one table are dealt with when capture is installed: about 10 ms on a small board.
AT_ONCE_ROWS = 2_000

# So many of one table are dealt with in one transaction at first, and in any; it should hold the lock for about AIM_S.
FIRST_ROWS, LEAST_ROWS, MOST_ROWS = 500, 50, 20_000
AIM_S = 0.007

_DUE = "recapture"


class RecaptureDueError(Exception):
    """Nothing was changed: call it again when `Recapturing.step` has nothing left to do."""


@dataclass(frozen=True, slots=True)
class Due:
    """A table that is gone through. batch: what its rows are published with; is_new: nothing of it was ever captured;
    rows: so many are pending because of it so far; in_rows: its versions are dealt with, rows without one are next;
    last: the key that was reached in that, None at its beginning."""

    table: str
    batch: int
    is_new: bool
    rows: int = 0
    in_rows: bool = False
    last: Row | None = None


def load(connection: apsw.Connection) -> tuple[Due, ...]:
    """What is due, in the connection's view of the database."""
    stored = tables.get_meta(connection, _DUE)
    if not isinstance(stored, str):
        return ()
    entries = cast("list[list[Value]]", wire.unpack(bytes.fromhex(stored)))
    return tuple(_due(*entry) for entry in entries)


def _due(table: Value, batch: Value, is_new: Value, found: Value, in_rows: Value, last: Value) -> Due:
    key = None if last is None else tuple(cast("list[Value]", last))
    return Due(str(table), cast(int, batch), bool(is_new), cast(int, found), bool(in_rows), key)


def is_due(connection: apsw.Connection) -> bool:
    """Whether anything is, in the connection's view of the database."""
    return bool(integer(connection, f"SELECT 1 FROM {tables.META} WHERE name = '{_DUE}'"))


def _save(connection: apsw.Connection, due: Sequence[Due]) -> None:
    if due:
        entries = [[d.table, d.batch, int(d.is_new), d.rows, int(d.in_rows), d.last] for d in due]
        tables.set_meta(connection, _DUE, wire.pack(entries).hex())
    else:
        connection.execute(f"DELETE FROM {tables.META} WHERE name = ?", (_DUE,))


def begin(connection: apsw.Connection, table: Table, *, batch: int, is_new: bool) -> None:
    """Inside the transaction that installs capture for a table. From the beginning, if it was under way."""
    others = [each for each in load(connection) if normal(each.table) != normal(table.name)]
    _save(connection, [*others, Due(table.name, batch, is_new)])
    log.info(
        "the rows of a table are gone through, a few at a time; nothing is published or applied until that is done",
        extra={"fields": {"table": table.name}},
    )


def forget(connection: apsw.Connection, table: Table) -> None:
    """Inside the transaction that installs capture for a table and has gone through all of it."""
    keep(connection, names(connection) - {normal(table.name)})


def rename(connection: apsw.Connection, old: str, new: str) -> None:
    """Inside the transaction that follows the renaming of a table."""
    if found := load(connection):
        _save(connection, [replace(d, table=new) if normal(d.table) == normal(old) else d for d in found])


def keep(connection: apsw.Connection, names: Collection[str]) -> None:
    """Inside the transaction that installs capture: only for these tables (by normal name)."""
    found = load(connection)
    kept = [each for each in found if normal(each.table) in names]
    if len(kept) != len(found):
        _save(connection, kept)


def names(connection: apsw.Connection) -> frozenset[str]:
    """Normal names of the tables that are due."""
    return frozenset(normal(each.table) for each in load(connection))


def is_small(connection: apsw.Connection, table: Table) -> bool:
    """Whether a table is dealt with at once: it has few rows and versions, or no order to go through it."""

    def few(name: str) -> bool:
        counted = f"SELECT count(*) FROM (SELECT 1 FROM {name} LIMIT {AT_ONCE_ROWS + 1})"
        return integer(connection, counted) <= AT_ONCE_ROWS

    return (few(quote(table.name)) and few(version_table(table.name))) or not _has_order(connection, table)


def _has_order(connection: apsw.Connection, table: Table) -> bool:
    """Whether an index serves the key's order. One with both ascending and descending columns does not: each piece
    would sort all of the table."""
    directions = rows(
        connection,
        "SELECT DISTINCT x.desc FROM pragma_index_list(?) AS l JOIN pragma_index_xinfo(l.name) AS x"
        " WHERE l.origin = 'pk' AND x.key",
        (table.name,),
    )
    return len(directions) <= 1


def step(connection: apsw.Connection, schema: Schema, *, node_id: int, published: int, limit: int) -> None:
    """Inside a write transaction: go through up to `limit` versions, or rows, of the first table that is due."""
    first, *others = load(connection)
    table = schema.table(first.table)
    if table is None:
        _save(connection, others)
        return
    piece = _rows_piece if first.in_rows else _versions_piece
    end, where, bindings = piece(connection, table, first.last, limit)
    if first.in_rows:
        found = versions.recapture_rows(connection, table, where, bindings, node_id=node_id, batch=first.batch)
    else:
        found = versions.recapture_versions(
            connection, table, where, bindings, node_id=node_id, batch=first.batch, published=published
        )
    first = replace(first, rows=first.rows + found, last=end)
    if end is not None:
        _save(connection, [first, *others])
    elif not first.in_rows:
        _save(connection, [replace(first, in_rows=True), *others])
    else:
        _save(connection, others)
        say(table, first.rows, is_new=first.is_new)


def _versions_piece(
    connection: apsw.Connection, table: Table, last: Row | None, limit: int
) -> tuple[Row | None, str, Row]:
    """The last key of the next `limit` versions after `last`, None for the end of the table, and the condition for
    them, on the version table."""
    beyond, bindings = after(table, last)
    listed = f"FROM {version_table(table.name)} {beyond} ORDER BY {key_columns(table)} LIMIT 1 OFFSET {limit - 1}"
    ends = rows(connection, f"SELECT {typed_keys_sql(table)} {listed}", bindings)
    return _between(key_columns(table), last, decode_typed(ends[0]) if ends else None)


def _rows_piece(connection: apsw.Connection, table: Table, last: Row | None, limit: int) -> tuple[Row | None, str, Row]:
    """The same for the application's rows, `r`, in the order of their key's index."""
    keys = [f"r.{quote(part.name)}" for part in table.key]
    ordered = ", ".join(
        name if table.rowid_alias else f"{name}{collate(part)}" for name, part in zip(keys, table.key, strict=True)
    )
    _, beyond, bindings = _between(ordered, last, None)
    present = "".join(f" AND {name} IS NOT NULL" for name, part in zip(keys, table.key, strict=True) if part.nullable)
    listed = f"FROM {quote(table.name)} AS r WHERE {beyond}{present} ORDER BY {ordered} LIMIT 1 OFFSET {limit - 1}"
    ends = rows(connection, f"SELECT {', '.join(map(typed_sql, keys))} {listed}", bindings)
    return _between(ordered, last, decode_typed(ends[0]) if ends else None)


def _between(keys: str, last: Row | None, end: Row | None) -> tuple[Row | None, str, Row]:
    """The end, the condition for keys after `last` up to it, its bindings; None: no such bound."""
    conditions: list[str] = []
    bindings: Row = ()
    for key, comparison in ((last, ">"), (end, "<=")):
        if key is not None:
            conditions.append(f"({keys}) {comparison} ({', '.join(map(marker, key))})")
            bindings = (*bindings, *bound(key))
    return end, " AND ".join(conditions) or "true", bindings


def say(table: Table, found: int, *, is_new: bool) -> None:
    """It is done: so many rows are pending because of it."""
    fields = {"table": table.name, "rows": found}
    if is_new:
        log.info("table is replicated from now on, with the rows that it has", extra={"fields": fields})
    elif found:
        log.warning(
            "table was rebuilt, or capture was off for it: all its rows are published again, at the versions they had",
            extra={"fields": fields},
        )
    else:
        log.info("table is captured again; it has no rows, and had none", extra={"fields": fields})


class Recapturing:
    """What is due in one database. under_way: the table that it is at, or was at last until `ended`; None: nothing is
    due."""

    def __init__(self, database: Database, node_id: int) -> None:
        self._database = database
        self._node_id = node_id
        self._size = FIRST_ROWS
        self.under_way: Due | None = None

    def follow(self) -> None:
        """Writer, inside the transaction that installed capture."""
        self.under_way = next(iter(load(self._database.writer)), None)

    def is_due(self, connection: apsw.Connection) -> bool:
        """Whether anything is, in a connection's view of the database."""
        return is_due(connection)

    def check(self) -> None:
        """Writer, outside of a transaction. Raises RecaptureDueError if something else has to wait."""
        if is_due(self._database.writer):
            raise RecaptureDueError

    def step(self) -> bool:
        """Writer. One short write transaction; True: call it again, there may be more. Raises apsw.BusyError,
        apsw.FullError, apsw.IOError with nothing changed."""
        database = self._database
        if not database.is_stale(database.writer) and not is_due(database.writer):
            return False
        with database.transaction():
            due = is_due(database.writer)
            if due:
                published = database.state.published_batch
                schema = database.installed()
                step(database.writer, schema, node_id=self._node_id, published=published, limit=self._size)
            left = load(database.writer)
        self.under_way = left[0] if left else self.under_way
        if due:
            factor = min(2.0, AIM_S / max(database.last_held_s, 1e-6))
            self._size = max(LEAST_ROWS, min(MOST_ROWS, int(self._size * factor)))
        return bool(left)

    def ended(self) -> None:
        """Writer. Nothing is due, and what had to wait for that is done."""
        self.under_way = None
