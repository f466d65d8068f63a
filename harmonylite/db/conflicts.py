"""The conflict log: rows that were discarded, kept for the operator (I10). And rows that wait, with their reason."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import apsw

from harmonylite import wire
from harmonylite.db import tables
from harmonylite.db.outbox import decode_typed, typed_keys_sql
from harmonylite.db.rows import Values, find_version, identity
from harmonylite.db.schema import Table, is_applications_own
from harmonylite.db.sql import integer, normal, rows, version_table
from harmonylite.model import Row, Stamp, TableChanges, Version

log = logging.getLogger(__name__)

# Why a parked row waits although a newer one has taken effect: it has columns that neither that one nor the table has.
OLDER = "older column"

# Why a parked row waits that the table does not take as it is.
DOES_NOT_FIT = "does not fit"

# Parked rows without those: nothing is late because of a column that was set aside.
COUNT_WAITING = f"SELECT count(*) FROM {tables.PARKED} WHERE reason <> '{OLDER}'"

# The newest conflicts kept; older ones make room. The total ever seen stays in `__harmonylite__meta`.
KEEP_CONFLICTS = 10_000

# Not a UNIQUE index: rows that differ may have one version, (0,0) above all, and each of them is a loss.
_RECORD = (
    f"INSERT OR IGNORE INTO {tables.CONFLICT}"
    " (tbl, key, ts, node, rank, winner_ts, winner_node, reason, row, recorded_ms)"
    " SELECT :tbl, :key, :ts, :node, :rank, :winner_ts, :winner_node, :reason, :row, :recorded_ms"
    f" WHERE NOT EXISTS (SELECT 1 FROM {tables.CONFLICT} WHERE (tbl, key, ts, node, rank)"
    " = (:tbl, :key, :ts, :node, :rank) AND row IS :row)"
)

# From one name to the next: DISTINCT would read every row, of which there may be thousands.
_PARKED_TABLES = (
    f"WITH RECURSIVE found(name) AS (SELECT min(tbl) FROM {tables.PARKED} UNION ALL"
    f" SELECT (SELECT min(tbl) FROM {tables.PARKED} WHERE tbl > name) FROM found WHERE name IS NOT NULL)"
    " SELECT name FROM found WHERE name IS NOT NULL"
)


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

    def as_changes(self) -> TableChanges:
        """A change to be tried again."""
        stamps = (Stamp(*self.version, *self.base),)
        if self.row is None:
            return TableChanges(self.table, self.key_names, self.key_names, deleted=(self.key,), deleted_stamps=stamps)
        return TableChanges(
            self.table, self.key_names, tuple(self.row), rows=(tuple(self.row.values()),), row_stamps=stamps
        )

    def leftover(self, table: Table) -> Parked | None:
        """What still waits when a newer row has taken effect that lacks columns of this one: these, until the table has
        them (docs/rules.md, Apply). None: nothing."""
        if self.row is None:
            return None
        missing = {name: value for name, value in self.row.items() if table.column(name) is None}
        if not missing:
            return None
        keys = {normal(name) for name in self.key_names}
        kept = {name: value for name, value in self.row.items() if name in missing or normal(name) in keys}
        return replace(self, row=kept, reason=OLDER, detail=", ".join(missing))


@dataclass(slots=True)
class Recorder:
    """Writes both logs inside the caller's transaction, and counts. `now_ms`: this node's clock."""

    connection: apsw.Connection
    now_ms: int
    conflicts: int = 0
    parked: int = 0
    parked_tables: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.parked_tables = {name for (name,) in rows(self.connection, _PARKED_TABLES)}

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
        self.connection.execute(
            _RECORD,
            {
                "tbl": table,
                "key": wire.pack(list(key)),
                "ts": loser.ts,
                "node": loser.node,
                "rank": loser.rank,
                "winner_ts": winner.ts if winner else None,
                "winner_node": winner.node if winner else None,
                "reason": reason,
                "row": wire.pack(dict(row)) if row is not None else None,
                "recorded_ms": self.now_ms,
            },
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
                    f"row parked: it waits until {waits_for(row.reason, row.detail)}, see `harmonylite parked`",
                    extra={"fields": {"table": row.table, "reason": row.reason, "detail": row.detail}},
                )
        self.parked_tables.add(row.table)

    def unpark(self, table: Table, id: bytes, version: Version, *, deleted: bool) -> Parked | None:
        """A version of the row has taken effect: drop what is not newer, return (and take out) what is.

        What waited for this very row, a partial one for instance, may fit now.
        """
        if table.name not in self.parked_tables:
            return None
        for waiting in load_parked(self.connection, "WHERE tbl = ? AND id = ?", (table.name, id)):
            if waiting.version > version:
                _forget(self.connection, waiting)
                return waiting
            _outdate(self.connection, waiting, table, deleted=deleted)
        return None

    def outdate(self, table: Table, id: bytes, version: Version) -> None:
        """A delete of that version has lost to the row: it is newer than columns of older ones all the same."""
        if table.name in self.parked_tables:
            for waiting in load_parked(self.connection, "WHERE tbl = ? AND id = ?", (table.name, id)):
                if waiting.version < version and waiting.reason == OLDER:
                    _forget(self.connection, waiting)

    def paused_tables(self) -> int:
        """Tables with rows that wait and count."""
        waits = f"SELECT EXISTS (SELECT 1 FROM {tables.PARKED} WHERE tbl = ? AND reason <> ?)"
        return sum(integer(self.connection, waits, (name, OLDER)) for name in self.parked_tables)

    def trim(self) -> None:
        """Keep the conflict log bounded."""
        if self.conflicts:
            self.connection.execute(
                f"DELETE FROM {tables.CONFLICT} WHERE id <= (SELECT max(id) FROM {tables.CONFLICT}) - ?",
                (KEEP_CONFLICTS,),
            )


def waits_for(reason: str, detail: str) -> str:
    """What has to change before a parked row can be applied."""
    if reason == DOES_NOT_FIT and is_applications_own(detail):
        return "no index, CHECK or generated column of its table needs what only the application has"
    return "the schema here fits"


def take_parked(connection: apsw.Connection) -> list[Parked]:
    """Remove and return every parked row, for another try."""
    found = load_parked(connection)
    connection.execute(f"DELETE FROM {tables.PARKED}")
    return found


def drop_beaten(connection: apsw.Connection, written: Sequence[Table], batch: int | None) -> None:
    """Parked rows that a write made here has beaten wait for nothing any more. batch: the writes', None: any."""
    for table in written:
        candidates: list[Parked] = []
        if batch is None:
            candidates = load_parked(connection, "WHERE tbl = ?", (table.name,))
        elif integer(connection, f"SELECT EXISTS (SELECT 1 FROM {tables.PARKED} WHERE tbl = ?)", (table.name,)):
            # Thousands may wait through a rolling upgrade, and this is done for every commit.
            keys = f"SELECT {typed_keys_sql(table)} FROM {version_table(table.name)} WHERE batch = ?"
            ids = [identity(table, decode_typed(key)) for key in rows(connection, keys, (batch,))]
            for id in ids:
                candidates += load_parked(connection, "WHERE tbl = ? AND id = ?", (table.name, id))
        for parked in candidates:
            local = find_version(connection, table, parked.key)
            if local is not None and local.version >= parked.version:
                _outdate(connection, parked, table, deleted=local.deleted)


def _outdate(connection: apsw.Connection, parked: Parked, table: Table, *, deleted: bool) -> None:
    """A newer version has taken effect, which was a delete or not."""
    kept = None if deleted else parked.leftover(table)
    if kept is None:
        _forget(connection, parked)
    elif kept != parked:
        connection.execute(
            f"UPDATE {tables.PARKED} SET row = ?, reason = ?, detail = ? WHERE tbl = ? AND id = ?",
            (wire.pack(dict(kept.row or {})), kept.reason, kept.detail, kept.table, kept.id),
        )


def _forget(connection: apsw.Connection, parked: Parked) -> None:
    connection.execute(f"DELETE FROM {tables.PARKED} WHERE tbl = ? AND id = ?", (parked.table, parked.id))


def forget_older(connection: apsw.Connection, before_ms: int) -> None:
    """Columns that are set aside since before that time, by this node's clock: nobody will add them any more."""
    connection.execute(f"DELETE FROM {tables.PARKED} WHERE reason = ? AND parked_ms < ?", (OLDER, before_ms))


def load_parked(
    connection: apsw.Connection, where: str = "", bindings: Sequence[object] = (), *, table: str = tables.PARKED
) -> list[Parked]:
    """Parked rows; `table`: where, as SQL."""
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
            connection, f"SELECT {columns} FROM {table} {where}", bindings
        )
    ]


def _unpacked(data: bytes) -> Any:
    return wire.unpack(data)
