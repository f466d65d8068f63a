"""Received changes take effect, inside the write transactions of the caller; rows that wait are tried again.

Built anew for every schema. How a single group is applied is in `apply` and `resolve`; here stands what is done around
it: orphans, messages that nobody can read, and what the state says afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter

from harmonylite.db import conflicts, left_out, orphans, resolve, rows, sparse, tables, unread, versions
from harmonylite.db.apply import Applier
from harmonylite.db.columns import OlderColumns
from harmonylite.db.conflicts import Recorder
from harmonylite.db.context import MISFIT, Context
from harmonylite.db.database import Database, ReplicaSettings
from harmonylite.db.schema import Schema, is_chosen
from harmonylite.db.sql import normal
from harmonylite.model import Delivery, Group, Position, ReceivedGroup, Undecodable

log = logging.getLogger(__name__)

_RETRY = "__harmonylite__retry"


@dataclass(frozen=True, slots=True)
class Applied:
    """rows: winners written; newest_ms: the newest version time of each group, for the replication lag."""

    rows: int
    conflicts: int
    parked: int
    undecodable: int
    newest_ms: tuple[int, ...]


class Applying:
    """`now_ms` dates entries of the conflict log; it decides nothing. All methods: writer, inside a transaction."""

    def __init__(
        self, database: Database, schema: Schema, settings: ReplicaSettings, now_ms: Callable[[], int]
    ) -> None:
        self._database = database
        self._writer = database.writer
        self._schema = schema
        self._settings = settings
        self._now_ms = now_ms
        self._applier = Applier(self._writer, schema)
        self._foreign_keys = orphans.load_foreign_keys(self._writer, schema)

    def context(self) -> Context:
        """For one transaction; `finish` ends it."""
        state = self._database.state
        return Context(
            schema=self._schema,
            recorder=Recorder(self._writer, self._now_ms()),
            node_id=self._settings.node_id,
            publish=self._settings.publish,
            published=state.published_batch,
            batch=state.batch + 1,
            sparse_tables=sparse.tables_with_entries(self._writer),
        )

    def finish(self, context: Context) -> int:
        """The state follows what was done. Returns the number of tables with rows that wait."""
        context.recorder.trim()
        state = self._database.state
        self._database.state = replace(
            state,
            batch=context.batch if context.batch_used else state.batch,
            conflicts_total=state.conflicts_total + context.recorder.conflicts,
        )
        return context.recorder.paused_tables()

    def deliver(self, delivery: Delivery, context: Context, *, careful: bool) -> list[int]:
        """Everything in a delivery, in the stream's order. Returns the newest version time of each group."""
        newest: list[int] = []
        refused_ms = 0
        for item in _in_order(delivery):
            if isinstance(item, Undecodable):
                self._keep(delivery.position, item)
                continue
            limit = item.stored_ms + self._settings.tolerance_ms
            self.take(item.group, context, limit, careful=careful)
            newest.append(newest_ms(item.group))
            if item.group.publisher == self._settings.node_id and newest[-1] > limit:
                refused_ms = max(refused_ms, limit)
        if refused_ms:
            self._lower_floor(refused_ms)
        return newest

    def _lower_floor(self, limit_ms: int) -> None:
        """The stream took no time of this node's later than `limit_ms`, but for what it does not have yet: versions
        were set back to that, and a higher floor would give them out again."""
        state = self._database.state
        own = versions.newest_own(self._writer, self._schema, self._settings.node_id)
        self._database.state = replace(state, floor_ms=min(state.floor_ms, max(limit_ms, own)))

    def take(self, group: Group, context: Context, limit_ms: int, *, careful: bool) -> None:
        """One group. limit_ms: the latest time that counts. Not careful: see Applier.fast."""
        group = self._chosen(group)
        step = self._applier.careful if careful else self._applier.fast
        step(group, context, limit_ms)
        self._list_orphans(group, context)

    def _chosen(self, group: Group) -> Group:
        """Without the tables that `[tables]` leaves out here."""
        include, exclude = self._settings.include, self._settings.exclude
        names = {c.table for c in group.tables if self._schema.table(c.table) is None}
        unwanted = {name for name in names if not is_chosen(name, include, exclude)}
        if not unwanted:
            return group
        left_out.add(self._writer, unwanted)
        return replace(group, tables=tuple(c for c in group.tables if c.table not in unwanted))

    def retry_parked(self) -> int:
        """Rows that wait are tried again, as normal rows. Returns as `finish`."""
        context = self.context()
        for parked in conflicts.take_parked(self._writer):
            self._writer.execute(f"SAVEPOINT {_RETRY}")
            try:
                if parked.reason == conflicts.OLDER:
                    OlderColumns(self._writer, context).fill_parked(parked)
                else:
                    resolve.Resolver(self._writer, context, versions.UNBOUNDED_MS).apply(parked.as_changes())
            except (ValueError, TypeError, *MISFIT) as error:  # whatever it is, it must not keep the schema out
                self._writer.execute(f"ROLLBACK TO {_RETRY}")
                context.recorder.park(replace(parked, detail=str(error)))
            self._writer.execute(f"RELEASE {_RETRY}")
        return self.finish(context)

    def _keep(self, position: Position, message: Undecodable) -> None:
        if message.unread is not None:
            change = unread.keep(self._writer, position, message, message.unread, self._now_ms())
            self._database.unread_changed(change)
            unread.tell(position, message, change.messages, self._database.state)
            return
        stream = position.stream
        log.error(
            "message cannot be read; it is kept in __harmonylite__undecodable and passed over",
            extra={"fields": {"stream": stream, "sequence": message.sequence, "error": message.error}},
        )
        self._writer.execute(
            f"INSERT OR IGNORE INTO {tables.UNDECODABLE} VALUES (?, ?, ?, ?, ?)",
            (stream, message.sequence, message.data, message.error, self._now_ms()),
        )

    def _list_orphans(self, group: Group, context: Context) -> None:
        """Children whose parent was deleted elsewhere at the same time: kept, and listed for the operator."""
        children, parents = self._foreign_keys.by_child, self._foreign_keys.by_parent
        written = {c.table: c.row_keys() for c in group.tables if c.rows and normal(c.table) in children}
        deleted = {c.table: c.deleted for c in group.tables if c.deleted and normal(c.table) in parents}
        if not written and not deleted:
            return
        for orphan in orphans.find(self._writer, self._foreign_keys, written, deleted):
            table = self._schema.tables[normal(orphan.child_table)]
            local = rows.find_version(self._writer, table, orphan.child_key) or rows.NO_VERSION
            content = rows.read(self._writer, table, orphan.child_key)
            reason = f"orphan: its parent in {orphan.parent_table} was deleted"
            context.recorder.conflict(table.name, orphan.child_key, local.version, None, reason, content)


def _in_order(delivery: Delivery) -> Iterator[ReceivedGroup | Undecodable]:
    items: list[ReceivedGroup | Undecodable] = [*delivery.groups, *delivery.undecodable]
    yield from sorted(items, key=lambda item: item.sequence)


def newest_ms(group: Group) -> int:
    """The newest version time in a group, 0 if it is empty."""
    stamps = (stamps for changes in group.tables for stamps in (changes.row_stamps, changes.deleted_stamps))
    return max((max(map(itemgetter(0), each)) for each in stamps if each), default=0)
