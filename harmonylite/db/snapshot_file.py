"""The file of a snapshot that is merged: what it says of itself. It is only read, and nobody else changes it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import apsw

from harmonylite.db import capture, left_out, schema, sql, tables, unread
from harmonylite.db.copy import DamagedCopyError
from harmonylite.db.schema import Schema, Table
from harmonylite.db.sparse import tables_with_entries
from harmonylite.db.tables import State

# The name under which a connection to the database has the snapshot beside it.
NAME = "snap"


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """schema, state: the snapshot's node's; tables: all of ours that are in it; sparse: tables with columns that are
    older than their row."""

    path: Path
    schema: Schema
    tables: frozenset[str]
    state: State
    sparse: frozenset[str]

    def replicates(self, table: Table) -> bool:
        """Whether the snapshot's node does: else its copy of a table says nothing about the cluster's."""
        return sql.normal(sql.version_table(table.name)).strip('"') in self.tables

    def attached(self, database: Path) -> apsw.Connection:
        """A connection to a database that has the snapshot beside it as NAME."""
        return sql.open_beside(database, NAME, immutable(self.path))

    def unread(self, connection: apsw.Connection) -> list[unread.Kept]:
        """What the snapshot's node could not read: hardly ever anything, as such a node takes none."""
        if tables.UNREAD.strip('"') not in self.tables:
            return []
        return list(unread.load(connection, table=f"{NAME}.{tables.UNREAD}"))


def load(path: Path, wants: Callable[[str], bool]) -> SnapshotFile:
    """wants: whether a table of that name is replicated here. Raises DamagedCopyError, also if the snapshot leaves out
    such a table."""
    with _reading(path):
        snapshot = apsw.Connection(immutable(path), flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
        try:
            ours = capture.installed(snapshot).tables
            if tables.META.strip('"') not in ours:
                raise DamagedCopyError(path, "not a copy of a replicated database")
            lacking = sorted(filter(wants, left_out.load(snapshot)))
            if lacking:
                detail = f"it leaves out the table {', '.join(lacking)}, which [tables] wants here"
                raise DamagedCopyError(path, detail)
            return SnapshotFile(
                path=path,
                schema=schema.load(snapshot),
                tables=frozenset(ours),
                state=tables.load_state(snapshot),
                sparse=tables_with_entries(snapshot),
            )
        finally:
            snapshot.close(True)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (apsw.NotADBError, apsw.CorruptError) as error:
        raise DamagedCopyError(path, error) from error


def immutable(path: Path) -> str:
    """The file as nobody else changes it: no locks, and nothing is made beside it."""
    return f"{path.resolve().as_uri()}?immutable=1"
