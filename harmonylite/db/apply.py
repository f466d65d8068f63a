"""What other nodes wrote takes effect here: versions compared in SQL, winners written, position stored, all in
one write transaction of the caller.

The fast way handles whole groups with a few statements. Whatever is out of the ordinary (a clash, a concurrent
edit, other columns, a row that does not fit) makes it step back, and `resolve` goes through that group row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import apsw

from harmonylite.db.capture import collate, key_columns
from harmonylite.db.context import MISFIT, Context
from harmonylite.db.resolve import Resolver
from harmonylite.db.rows import identity
from harmonylite.db.schema import LONGEST_SQL, KeyColumn, Schema, Table
from harmonylite.db.sql import columns_sql, normal, quote, version_table
from harmonylite.model import Group, Row, Stamp, TableChanges, Version

_SAVEPOINT = "__harmonylite__group"


class OutOfTheOrdinaryError(Exception):
    """The fast way does not cover this group."""


class _Statements:
    """The fast statements of one table, for messages that carry exactly its columns, in any order."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.columns = {normal(name) for name in table.column_names}
        self._key = [normal(name) for name in table.key_names]
        keys, version = key_columns(table), version_table(table.name)
        self._is_runnable = LONGEST_SQL is None or len(self.write(table.column_names).encode()) <= LONGEST_SQL
        width = len(table.key)
        marks = ", ".join(f"?{i + 1}" for i in range(width + 6))
        # A row whose writer had not seen the live one here is a conflict: left out, so that `resolve` logs it.
        self.store = (
            f"INSERT INTO {version} AS v ({keys}, ts, node, rank, base_ts, base_node, deleted) VALUES ({marks})"
            f" ON CONFLICT ({keys}) DO UPDATE SET ts = excluded.ts, node = excluded.node, rank = excluded.rank,"
            " base_ts = excluded.base_ts, base_node = excluded.base_node, deleted = excluded.deleted,"
            " batch = NULL, settled_ms = NULL"
            " WHERE (excluded.ts, excluded.node, excluded.rank) > (v.ts, v.node, v.rank)"
            " AND (v.deleted OR (v.node = excluded.node AND excluded.rank = 0)"
            " OR (v.ts, v.node) = (excluded.base_ts, excluded.base_node)"
            # Nobody has seen what is pending here, however old it is.
            f" OR ((v.ts, v.node) < (excluded.base_ts, excluded.base_node) AND ifnull(v.batch, 0) <= ?{width + 7}))"
        )
        # RETURNING costs more than all the rest: only where some rows do not win.
        self.compare = f"{self.store} RETURNING ?{width + 8}"
        where = " AND ".join(f"{quote(part.name)} = ?{collate(part)}" for part in table.key)
        self.delete = f"DELETE FROM {quote(table.name)} WHERE {where}"
        self.locate = f"SELECT ts, node, rank, base_ts, base_node, deleted, batch FROM {version} WHERE " + " AND ".join(
            f"k{i} = ?" for i in range(width)
        )

    def fits(self, changes: TableChanges) -> bool:
        return (
            self._is_runnable
            and len(changes.columns) == len(self.columns)
            and all(normal(name) in self.columns for name in changes.columns)
            and [normal(name) for name in changes.key] == self._key
        )

    def write(self, columns: Sequence[str]) -> str:
        """UPSERT of whole rows; OR ABORT overrides the conflict clauses of the schema, which could swallow a row."""
        table = self.table
        marks = ", ".join("?" for _ in columns)
        # An equal key may be spelled differently (NOCASE, 1 and 1.0), unless it is the rowid or plain text.
        same = {normal(part.name) for part in table.key if table.rowid_alias or _is_exact(part)}
        changing = [name for name in columns if normal(name) not in same] or list(table.key_names)
        assignments = ", ".join(f"{quote(name)} = excluded.{quote(name)}" for name in changing)
        return (
            f"INSERT OR ABORT INTO {quote(table.name)} ({columns_sql(columns)}) VALUES ({marks})"
            f" ON CONFLICT ({columns_sql(table.key_names)}) DO UPDATE SET {assignments}"
        )


class Applier:
    """Applies groups to the database of one connection. Built anew when the schema changes."""

    def __init__(self, connection: apsw.Connection, schema: Schema) -> None:
        self._connection = connection
        self._statements = {name: _Statements(table) for name, table in schema.tables.items()}

    def fast(self, group: Group, context: Context, limit_ms: int, *, all_win: bool = True) -> None:
        """Apply a group of ordinary changes. Raises OutOfTheOrdinaryError or apsw.Error, with the group half
        applied: the caller rolls back and uses `careful`. all_win: it is not ordinary that a row is old news."""
        for changes in group.tables:
            statements = self._statements.get(normal(changes.table))
            if statements is None or not statements.fits(changes):
                raise OutOfTheOrdinaryError(changes.table)
            if statements.table.name in context.sparse_tables:
                raise OutOfTheOrdinaryError(changes.table)
            # Deletes first: a unique value may have moved from a deleted row to a new one.
            if changes.deleted:
                won = self._compare(
                    statements, changes.deleted, changes.deleted_stamps, 1, limit_ms, all_win, context.published
                )
                self._connection.executemany(statements.delete, _picked(changes.deleted, won))
                self._settle(statements.table, changes.deleted, changes.deleted_stamps, won, context, deleted=True)
            if changes.rows:
                keys = changes.row_keys()
                won = self._compare(statements, keys, changes.row_stamps, 0, limit_ms, all_win, context.published)
                self._connection.executemany(statements.write(changes.columns), _picked(changes.rows, won))
                self._settle(statements.table, keys, changes.row_stamps, won, context, deleted=False)

    def careful(self, group: Group, context: Context, limit_ms: int) -> None:
        """Apply a group the fast way if that works, row by row otherwise."""
        self._connection.execute(f"SAVEPOINT {_SAVEPOINT}")
        applied = context.applied
        try:
            self.fast(group, context, limit_ms, all_win=False)
        except (OutOfTheOrdinaryError, TypeError, *MISFIT):  # TypeError: apsw cannot bind a RawText
            context.applied = applied
            self._connection.execute(f"ROLLBACK TO {_SAVEPOINT}")
            resolver = Resolver(self._connection, context, limit_ms)
            for changes in group.tables:
                resolver.apply(changes)
        self._connection.execute(f"RELEASE {_SAVEPOINT}")

    @staticmethod
    def _settle(
        table: Table,
        keys: Sequence[Row],
        stamps: Sequence[Stamp],
        won: Sequence[int],
        context: Context,
        *,
        deleted: bool,
    ) -> None:
        """Count the winners and drop what was parked for them."""
        context.applied += len(won)
        if table.name in context.recorder.parked_tables:
            if deleted and len(won) < len(keys):
                raise OutOfTheOrdinaryError("a delete that lost may be newer than a column that is set aside")
            for index in won:
                version = Version(*stamps[index][:3])
                if context.recorder.unpark(table, identity(table, keys[index]), version, deleted=deleted) is not None:
                    raise OutOfTheOrdinaryError("a newer version of this row waits for it")

    def _compare(
        self,
        statements: _Statements,
        keys: Sequence[Row],
        stamps: Sequence[Stamp],
        deleted: int,
        limit_ms: int,
        all_win: bool,
        published: int,
    ) -> Sequence[int]:
        """Store the versions that win; returns the indexes of their rows, ascending."""
        times = list(map(itemgetter(0), stamps))
        if max(times) > limit_ms or min(times) <= 0:
            raise OutOfTheOrdinaryError("a version with an impossible time")
        if all_win:
            before = self._connection.totalchanges()
            self._connection.executemany(
                statements.store,
                [(*key, *stamp, deleted, published) for key, stamp in zip(keys, stamps, strict=True)],
            )
            if self._connection.totalchanges() - before != len(keys):
                raise OutOfTheOrdinaryError(statements.table.name)
            return range(len(keys))
        bindings = [
            (*key, *stamp, deleted, published, index)
            for index, (key, stamp) in enumerate(zip(keys, stamps, strict=True))
        ]
        won = [row[0] for row in self._connection.executemany(statements.compare, bindings)]
        for index in set(range(len(keys))).difference(won):
            self._check_old(statements, keys[index], stamps[index], deleted, published)
        return won

    def _check_old(self, statements: _Statements, key: Row, stamp: Stamp, deleted: int, published: int) -> None:
        """A row that did not win is ordinary if it is the very write that is here, or one its writer had seen.

        An equal version with other content is the mark of a cloned card or a restored backup: rare, but only the
        careful way compares contents, so equal versions of live rows always go there; so do tombstones that are to be
        published, which the stream has now.
        """
        for ts, node, rank, base_ts, base_node, local_deleted, batch in self._connection.execute(
            statements.locate, key
        ):
            if stamp[:3] < (ts, node, rank) and (stamp[:2] <= (base_ts, base_node) or deleted or stamp[1] == node):
                return
            if stamp[:3] == (ts, node, rank) and deleted and local_deleted and (batch or 0) <= published:
                return
        raise OutOfTheOrdinaryError(statements.table.name)


def _is_exact(part: KeyColumn) -> bool:
    """Whether equal keys are the same to the byte."""
    return part.affinity == "TEXT" and part.collation.upper() == "BINARY"


def _picked(rows: Sequence[Row], won: Sequence[int]) -> Sequence[Row]:
    return rows if len(won) == len(rows) else [rows[index] for index in won]
