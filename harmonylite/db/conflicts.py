"""The conflict log: rows that were discarded, kept for the operator (I10). And rows that wait, with their reason."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import apsw

from harmonylite import wire
from harmonylite.db import tables
from harmonylite.db.rows import Values, find_version
from harmonylite.db.schema import Table
from harmonylite.db.sql import rows
from harmonylite.model import Row, Version

log = logging.getLogger(__name__)

# The newest conflicts kept; older ones make room. The total ever seen stays in `__harmonylite__meta`.
KEEP_CONFLICTS = 10_000


@dataclass(frozen=True, slots=True)
class Parked:
    """A row that does not fit here yet. row: by column name; None for a delete. id: `rows.identity` of the key where
    the table is known here."""

    table: str
    key_names: tuple[str, ...]
    id: bytes
    key: Row
    version: Version
    base: tuple[int, int]
    row: Values | None
    reason: str
    detail: str


@dataclass(slots=True)
class Recorder:
    """Writes both logs inside the caller's transaction, and counts. `now_ms`: this node's clock."""

    connection: apsw.Connection
    now_ms: int
    conflicts: int = 0
    parked: int = 0
    parked_tables: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        names = rows(self.connection, f"SELECT DISTINCT tbl FROM {tables.PARKED}")
        self.parked_tables = {name for (name,) in names}

    def conflict(
        self,
        table: str,
        key: Row,
        loser: Version,
        winner: Version | None,
        reason: str,
        row: Values | None,
    ) -> None:
        """A discarded row. The same one is recorded once, however often it is delivered."""
        packed = wire.pack(dict(row)) if row is not None else None
        self.connection.execute(
            f"INSERT OR IGNORE INTO {tables.CONFLICT}"
            " (tbl, key, ts, node, rank, winner_ts, winner_node, reason, row, recorded_ms)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                table,
                wire.pack(list(key)),
                *loser,
                winner.ts if winner else None,
                winner.node if winner else None,
                reason,
                packed,
                self.now_ms,
            ),
        )
        self.conflicts += self.connection.changes()

    def park(self, row: Parked) -> None:
        """Keep a row until the schema fits; of one key the highest version is kept."""
        self.connection.execute(
            f"INSERT INTO {tables.PARKED} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (tbl, id) DO UPDATE SET key = excluded.key, ts = excluded.ts, node = excluded.node,"
            " rank = excluded.rank,"
            " key_names = excluded.key_names, base_ts = excluded.base_ts, base_node = excluded.base_node,"
            " deleted = excluded.deleted, row = excluded.row,"
            " reason = excluded.reason, detail = excluded.detail, parked_ms = excluded.parked_ms"
            " WHERE (excluded.ts, excluded.node, excluded.rank) > (ts, node, rank)",
            (
                row.table,
                row.id,
                wire.pack(list(row.key)),
                wire.pack(list(row.key_names)),
                *row.version,
                *row.base,
                int(row.row is None),
                wire.pack(dict(row.row or {})),
                row.reason,
                row.detail,
                self.now_ms,
            ),
        )
        if self.connection.changes():
            self.parked += 1
            if row.table not in self.parked_tables:
                log.warning(
                    "row parked: it waits until the schema here fits, see `harmonylite parked`",
                    extra={"fields": {"table": row.table, "reason": row.reason, "detail": row.detail}},
                )
        self.parked_tables.add(row.table)

    def unpark(self, table: str, id: bytes, version: Version) -> Parked | None:
        """A version of the row has taken effect: drop what is not newer, return (and take out) what is.

        What waited for this very row, a partial one for instance, may fit now.
        """
        if table not in self.parked_tables:
            return None
        waiting = _load(self.connection, "WHERE tbl = ? AND id = ?", (table, id))
        self.connection.execute(f"DELETE FROM {tables.PARKED} WHERE tbl = ? AND id = ?", (table, id))
        return next((each for each in waiting if each.version > version), None)

    def trim(self) -> None:
        """Keep the conflict log bounded."""
        if self.conflicts:
            self.connection.execute(
                f"DELETE FROM {tables.CONFLICT} WHERE id <= (SELECT max(id) FROM {tables.CONFLICT}) - ?",
                (KEEP_CONFLICTS,),
            )


def take_parked(connection: apsw.Connection) -> list[Parked]:
    """Remove and return every parked row, for another try."""
    found = _load(connection)
    connection.execute(f"DELETE FROM {tables.PARKED}")
    return found


def drop_beaten(connection: apsw.Connection, written: Sequence[Table]) -> None:
    """Parked rows that a write made here has beaten wait for nothing any more."""
    if not written:
        return
    waiting = {name for (name,) in rows(connection, f"SELECT DISTINCT tbl FROM {tables.PARKED}")}
    for table in written:
        for parked in _load(connection, "WHERE tbl = ?", (table.name,)) if table.name in waiting else ():
            local = find_version(connection, table, parked.key)
            if local is not None and local.version >= parked.version:
                connection.execute(f"DELETE FROM {tables.PARKED} WHERE tbl = ? AND id = ?", (table.name, parked.id))


def _load(connection: apsw.Connection, where: str = "", bindings: Sequence[object] = ()) -> list[Parked]:
    columns = "tbl, id, key_names, key, ts, node, rank, base_ts, base_node, deleted, row, reason, detail"
    return [
        Parked(
            table=name,
            key_names=tuple(_unpacked(key_names)),
            id=id,
            key=tuple(_unpacked(key)),
            version=Version(ts, node, rank),
            base=(base_ts, base_node),
            row=None if deleted else _unpacked(row),
            reason=reason,
            detail=detail,
        )
        for name, id, key_names, key, ts, node, rank, base_ts, base_node, deleted, row, reason, detail in rows(
            connection, f"SELECT {columns} FROM {tables.PARKED} {where}", bindings
        )
    ]


def _unpacked(data: bytes) -> Any:
    return wire.unpack(data)
