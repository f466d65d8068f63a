"""The careful way to apply one table's changes: row by row, every rule of docs/rules.md, Apply.

`apply` comes here when the fast way met something out of the ordinary: a clash, a concurrent edit, a row that does
not fit, a table that looks different here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import apsw

from harmonylite import wire
from harmonylite.db import clash, evictions, sparse
from harmonylite.db import rows as store
from harmonylite.db.columns import OlderColumns
from harmonylite.db.conflicts import Parked
from harmonylite.db.context import MISFIT, Context
from harmonylite.db.rows import NO_VERSION, Values, VersionRow
from harmonylite.db.schema import Table
from harmonylite.db.sql import normal
from harmonylite.model import UNVERSIONED, Row, Stamp, TableChanges, Value, Version

# Reasons in the conflict log.
CONCURRENT, CLASH, TWINS = "concurrent write", "unique clash", "same version, other content"


@dataclass(frozen=True, slots=True)
class Incoming:
    """One received row. values: None for a delete. stamped: as sent; version: bounded by the stream's time."""

    key: Row
    stamped: Version
    version: Version
    base: tuple[int, int]
    values: Values | None


@dataclass(frozen=True, slots=True)
class Winner:
    """An incoming row that beats what is here: `local`, with the content `old`.

    discards: why `old` belongs in the conflict log; None if the writer had seen it.
    """

    row: Incoming
    local: VersionRow
    old: Values | None
    discards: str | None = None


class Resolver:
    """Applies the changes of one table inside the caller's transaction."""

    def __init__(self, connection: apsw.Connection, context: Context, limit_ms: int) -> None:
        self._connection = connection
        self._context = context
        self._limit_ms = limit_ms
        self._columns = OlderColumns(connection, context)
        self._key_names: tuple[str, ...] = ()
        self._missing: list[str] = []
        self._again: list[Parked] = []

    def apply(self, changes: TableChanges) -> None:
        """Everything in `changes`; then rows that waited for one of those and may fit now."""
        self._apply(changes)
        while self._again:
            self._apply(self._again.pop().as_changes())

    def _apply(self, changes: TableChanges) -> None:
        self._key_names = changes.key
        table = self._context.schema.table(changes.table)
        if table is None:
            self._park_all(changes, changes.table, "missing table", "no replicated table of that name here")
            return
        if [normal(name) for name in changes.key] != [normal(name) for name in table.key_names]:
            detail = f"key there: {', '.join(changes.key)}; key here: {', '.join(table.key_names)}"
            self._park_all(changes, table.name, "different key", detail)
            return
        self._key_names = table.key_names
        self._missing = missing = [name for name in changes.columns if table.column(name) is None]
        winners: list[Winner] = []
        for row in self._incoming(changes, table):
            try:
                winner = self._judge(table, row)
            except MISFIT as error:
                self._park(table, row, "does not fit", _reason(error))
                continue
            if winner is None:
                continue
            if missing and row.values is not None:
                self._park(table, row, "missing column", ", ".join(missing))
            else:
                winners.append(winner)
        if table.uniques:
            self._write_around_clashes(table, winners)
        else:
            for winner in winners:
                self._write(table, winner)

    # -- what arrived

    def _incoming(self, changes: TableChanges, table: Table | None) -> Iterator[Incoming]:
        names = [self._local_name(table, name) for name in changes.columns]
        for key, values, stamp in zip(changes.row_keys(), changes.rows, changes.row_stamps, strict=True):
            yield self._row(key, stamp, dict(zip(names, values, strict=True)))
        for key, stamp in zip(changes.deleted, changes.deleted_stamps, strict=True):
            yield self._row(key, stamp, None)

    def _row(self, key: Row, stamp: Stamp, values: Values | None) -> Incoming:
        ts, node, rank, base_ts, base_node = stamp
        version = Version(min(ts, self._limit_ms), node, rank)
        return Incoming(key, Version(ts, node, rank), version, (base_ts, base_node), values)

    @staticmethod
    def _local_name(table: Table | None, name: str) -> str:
        column = table.column(name) if table else None
        return column.name if column else name

    # -- who wins

    def _judge(self, table: Table, row: Incoming) -> Winner | None:
        """A Winner, or None after everything that a losing row still does has been done."""
        local = store.find_version(self._connection, table, row.key) or NO_VERSION
        if row.version > local.version:
            old = store.read(self._connection, table, row.key)
            buried = row.version.rank == 1 and row.version[:2] == local.version[:2]
            # Nobody has seen what is pending here, however old it is.
            pending = local.batch is not None and local.batch > self._context.published
            hidden = pending and row.version.node != local.version.node and local.version[:2] != row.base
            unseen = old is not None and (buried or hidden or _unseen(local.version, row.version, row.base))
            return Winner(row, local, old, _why(row.version) if unseen else None)
        if row.stamped == local.version and row.version != local.version:
            # The stream bounded the time that this version claims; adopt what all others see.
            store.set_version(self._connection, table, row.key, replace(local, version=row.version))
        elif row.version == local.version:
            return self._judge_twins(table, row, local)
        else:
            if row.values is not None and _unseen(row.version, local.version, local.base):
                old = store.read(self._connection, table, row.key)
                if not _same(old, row.values):
                    self._conflict(table, row.key, row.version, local.version, _why(local.version), row.values)
            if not local.deleted:
                self._columns.fill(table, row.key, row.version[:2], row.values)
                if row.values is None:
                    self._context.recorder.outdate(table, store.identity(table, row.key), row.version)
                elif self._missing:
                    self._columns.set_aside(table, self._parked(table, row, "missing column", ""))
            if row.stamped[:2] == local.base and row.version != row.stamped:
                # What the write here has seen is known to all by its bounded version.
                store.set_version(self._connection, table, row.key, replace(local, base=row.version[:2]))
        return None

    def _log_eviction(self, table: Table, key: Row) -> bool:
        return evictions.log(self._connection, table, key) > 0

    def _judge_twins(self, table: Table, row: Incoming, local: VersionRow) -> Winner | None:
        """Equal versions: the same write again, or (a cloned card, a restored backup) two that must not differ."""
        old = store.read(self._connection, table, row.key)
        # Evicted, and nobody has noticed. Others send the row again, because a snapshot of this very moment lacks it.
        if old is None and table.evicts_unseen and self._context.publish and self._log_eviction(table, row.key):
            return None
        if row.version == UNVERSIONED and old is None and row.values is not None:
            return Winner(row, local, None)
        if self._context.sparse_tables and sparse.entries(self._connection, table.name, store.identity(table, row.key)):
            return None
        theirs, ours = _content(row.values, row.values), _content(old, row.values or old)
        if theirs == ours:
            if local.batch is not None and local.batch > self._context.published:
                # The stream has it, whoever sent it.
                store.set_version(self._connection, table, row.key, replace(local, batch=None))
            return None
        if theirs > ours:
            return Winner(row, local, old, TWINS if old is not None else None)
        if row.values is not None:
            self._conflict(table, row.key, row.version, local.version, TWINS, row.values)
        return None

    # -- writing winners

    def _write(self, table: Table, winner: Winner) -> None:
        """Write one winner into a table without secondary unique indexes, or park it."""
        try:
            self._put(table, winner)
            self._settle(table, winner)
        except MISFIT as error:
            self._park(table, winner.row, "does not fit", _reason(error))

    def _put(self, table: Table, winner: Winner) -> None:
        row = winner.row
        if row.values is None:
            store.delete(self._connection, table, row.key)
        elif winner.old is None:
            store.insert(self._connection, table, row.values)
        else:
            store.update(self._connection, table, row.key, row.values)

    def _write_around_clashes(self, table: Table, winners: Sequence[Winner]) -> None:
        """Old rows out first, so that unique values can be swapped; then the new ones, the newest first."""
        fitting: list[Winner] = []
        with clash.Trial(self._connection, table) as trial:
            for winner in winners:
                misfit = self._misfit(table, winner, trial)
                if misfit is None:
                    fitting.append(winner)
                else:
                    self._park(table, winner.row, "does not fit", misfit)
            for winner in fitting:
                if winner.old is not None:
                    store.delete(self._connection, table, winner.row.key)
            fitting.sort(key=lambda each: clash.order(each.row.version, each.row.key), reverse=True)
            for winner in fitting:
                if winner.row.values is None:
                    self._settle(table, winner)
                else:
                    self._place(table, winner, trial)

    def _misfit(self, table: Table, winner: Winner, trial: clash.Trial) -> str | None:
        """Why the row cannot be written, whatever stands beside it."""
        if winner.row.values is None:
            fits = not table.rowid_alias or isinstance(winner.row.key[0], int | float)
            return None if fits else "datatype mismatch"
        values = _merged(winner)
        # INSERT OR REPLACE would put a default in the NULL's place (https://sqlite.org/lang_conflict.html).
        for column in table.columns:
            alias = table.rowid_alias and column.name == table.key[0].name
            if column.not_null and not alias and values.get(column.name, 0) is None:
                return f"NOT NULL constraint failed: {table.name}.{column.name}"
        try:
            trial.rivals(values)
        except MISFIT as error:
            return _reason(error)
        return None

    def _place(self, table: Table, winner: Winner, trial: clash.Trial) -> None:
        """Insert a row whose own old row is out; settle the clash if there is one."""
        values = _merged(winner)
        rivals = [(key, self._rival(table, key)) for key in trial.rivals(values)]
        mine = clash.order(winner.row.version, winner.row.key)
        if any(clash.order(rival.version, key) > mine for key, rival in rivals):
            strongest = max(rivals, key=lambda each: clash.order(each[1].version, each[0]))[1]
            self._lose(table, winner, strongest.version)
            return
        for key, rival in rivals:
            self._bury(table, key, rival, winner.row.version)
        try:
            store.insert(self._connection, table, values)
        except MISFIT as error:
            self._park(table, winner.row, "does not fit", _reason(error))
            return
        self._settle(table, winner)

    def _rival(self, table: Table, key: Row) -> VersionRow:
        return store.find_version(self._connection, table, key) or NO_VERSION

    def _lose(self, table: Table, winner: Winner, rival: Version) -> None:
        """The incoming row beat its own old version but not a rival: it becomes a clash tombstone."""
        row = winner.row
        self._log_discarded(table, winner)
        self._conflict(table, row.key, row.version, rival, CLASH, row.values)
        if self._context.publish:
            self._entomb(table, row.key, row.version, row.base, winner.local.batch)
            return
        # This node cannot publish a tombstone: what the cluster says later wins.
        self._park(table, row, CLASH, f"a newer row has the same unique value ({rival.ts})")
        store.forget_version(self._connection, table, row.key)

    def _bury(self, table: Table, key: Row, rival: VersionRow, winner: Version) -> None:
        """A rival lost: take its row out, keep it in the conflict log, tell the others."""
        content = store.read(self._connection, table, key)
        store.delete(self._connection, table, key)
        self._conflict(table, key, rival.version, winner, CLASH, content)
        if self._context.publish:
            self._entomb(table, key, rival.version, rival.base, rival.batch)
            return
        lost = Incoming(key, rival.version, rival.version, rival.base, content)
        self._park(table, lost, CLASH, f"a newer row has the same unique value ({winner.ts})")
        store.forget_version(self._connection, table, key)

    def _entomb(self, table: Table, key: Row, version: Version, base: tuple[int, int], batch: int | None) -> None:
        pending = self._context.pending(self._connection, batch)
        tombstone = VersionRow(version._replace(rank=1), True, pending, base)
        store.set_version(self._connection, table, key, tombstone)
        self._columns.forget(table, key)

    def _settle(self, table: Table, winner: Winner) -> None:
        """The row is written: its version, its columns' versions, and what was parked for it."""
        row, local = winner.row, winner.local
        deleted = row.values is None
        self._log_discarded(table, winner)
        if row.version != UNVERSIONED or table.evicts_unseen:
            store.set_version(self._connection, table, row.key, VersionRow(row.version, deleted, None, row.base))
        if row.values is None:
            self._columns.forget(table, row.key)
        else:
            self._columns.remember(table, row.key, row.values, local.version[:2])
            self._publish_kept_columns(table, winner, row.values)
        again = self._context.recorder.unpark(table, store.identity(table, row.key), row.version, deleted=deleted)
        if again is not None:
            self._again.append(again)
        self._context.applied += 1

    def _publish_kept_columns(self, table: Table, winner: Winner, carried: Values) -> None:
        """The message lacks columns that were to be published from here (or deleted), and nobody else knows of that
        (I3): the merged row is a write of this node."""
        local, context = winner.local, self._context
        pending = local.batch is not None and local.batch > context.published
        if not pending or not context.publish:
            return
        if any(name not in carried for name in table.column_names):
            version = Version(winner.row.version.ts + 1, context.node_id)
            merged = VersionRow(version, False, context.pending(self._connection, local.batch), winner.row.version[:2])
            store.set_version(self._connection, table, winner.row.key, merged)
            self._columns.forget(table, winner.row.key)

    # -- what is not written

    def _log_discarded(self, table: Table, winner: Winner) -> None:
        row = winner.row
        if winner.discards is not None and not _same(winner.old, row.values):
            self._conflict(table, row.key, winner.local.version, row.version, winner.discards, winner.old)

    def _conflict(
        self, table: Table, key: Row, loser: Version, winner: Version, reason: str, values: Values | None
    ) -> None:
        self._context.recorder.conflict(table.name, key, loser, winner, reason, values)

    def _park_all(self, changes: TableChanges, table: str, reason: str, detail: str) -> None:
        for row in self._incoming(changes, None):
            self._park(table, row, reason, detail)

    def _park(self, table: Table | str, row: Incoming, reason: str, detail: str) -> None:
        """table: its name where the row's key means nothing here."""
        self._context.recorder.park(self._parked(table, row, reason, detail))

    def _parked(self, table: Table | str, row: Incoming, reason: str, detail: str) -> Parked:
        return Parked(
            table=table.name if isinstance(table, Table) else table,
            key_names=self._key_names,
            id=store.identity(table, row.key) if isinstance(table, Table) else wire.pack(list(row.key)),
            key=row.key,
            version=row.version,
            base=row.base,
            row=row.values,
            reason=reason,
            detail=detail,
        )


def _merged(winner: Winner) -> dict[str, Value]:
    """The whole new row: columns that the message does not carry keep their values."""
    return {**(winner.old or {}), **(winner.row.values or {})}


def _unseen(loser: Version, winner: Version, base: tuple[int, int]) -> bool:
    """Whether the writer of `winner`, who had seen `base`, cannot have seen `loser`. A node has seen its own writes."""
    return loser[:2] > base and loser.node != winner.node


def _same(old: Values | None, new: Values | None) -> bool:
    """Whether nothing is lost when `new` takes the place of `old`, as far as `new` says."""
    return new is not None and old is not None and _content(old, new) == _content(new, new)


def _why(winner: Version) -> str:
    return CLASH if winner.rank else CONCURRENT


def _content(values: Values | None, names: Values | None) -> bytes:
    """A hash of a row's content over the given columns; a row that is not there is less than any."""
    if values is None:
        return b""
    described = [[name, values.get(name)] for name in sorted(names or ())]
    return hashlib.sha256(wire.pack(described)).digest()


def _reason(error: BaseException) -> str:
    return str(error).replace("apsw.", "") or type(error).__name__
