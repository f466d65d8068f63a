"""One node's copy of the database: the facade over `db/`. Plain and synchronous, no thread, no clock, no network.

Two connections: the writer absorbs and applies, the reader reads pinned snapshots for publishing. Each must be
used by one thread at a time; methods say which they use.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import apsw

from harmonylite.db import (
    capture,
    conflicts,
    evictions,
    side_triggers,
    sql,
    tables,
    versions,
)
from harmonylite.db.apply import OutOfTheOrdinaryError
from harmonylite.db.applying import Applied, Applying, newest_ms
from harmonylite.db.copy import Copy
from harmonylite.db.database import Database, PositionsLostError, ReplicaSettings
from harmonylite.db.marking import Marking
from harmonylite.db.outbox import Outbox, OutgoingGroup
from harmonylite.db.resolve import MISFIT, Context
from harmonylite.db.schema import Schema, Skipped, Table, is_chosen, schema_text
from harmonylite.db.tables import State
from harmonylite.db.versions import NO_CORRECTION, Correction
from harmonylite.model import Delivery, Group, Position, Row

__all__ = ["Applied", "Replica", "ReplicaSettings", "newest_ms"]

log = logging.getLogger(__name__)

HOUR_MS = 3_600_000

# A tombstone pass forgets at most this many rows of a table in one transaction.
PRUNE_ROWS = 2_000

# A copy waits for a moment without unabsorbed changes; so often it is tried.
PIN_ATTEMPTS = 50

# So many vanished rows are taken note of at once.
VANISHED_ROWS = 1_000


class Pinned:
    """Groups of one snapshot, which lasts until the last of them was read, or until `close`.

    Not a generator: one that was never advanced would not let go when closed.
    """

    def __init__(self, connection: apsw.Connection, groups: Iterator[OutgoingGroup]) -> None:
        self._connection = connection
        self._groups = groups

    def __iter__(self) -> Pinned:
        return self

    def __next__(self) -> OutgoingGroup:
        try:
            return next(self._groups)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the snapshot."""
        _end(self._connection)


class Replica:
    """See the module. `now_ms` dates entries of the conflict log; it decides nothing."""

    def __init__(
        self, path: Path, settings: ReplicaSettings, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    ) -> None:
        self._settings = settings
        self._now_ms = now_ms
        self._database = Database(path, settings, now_ms, self._follow_schema)
        self._paused_tables = 0
        self._group_bytes = 0
        self._clamped = False

    # -- life cycle

    def open(self) -> None:
        """Open the file, install capture, take stock. Both connections belong to the threads that use them later.

        Raises apsw.CantOpenError if there is no such file, apsw.BusyError if the application holds its lock,
        ForeignDatabaseError if a newer version of this program was here.
        """
        self._database.open()

    def close(self) -> None:
        """Close both connections; what was not committed is undone."""
        self._database.close()

    @property
    def _writer(self) -> apsw.Connection:
        return self._database.writer

    @property
    def _reader(self) -> apsw.Connection:
        return self._database.reader

    @property
    def _state(self) -> State:
        return self._database.state

    def _follow_schema(self, schema: Schema) -> None:
        """Inside a transaction: build what depends on the schema, and try parked rows again if it changed."""
        settings = self._settings
        self._absorber = versions.Absorber(schema, settings.node_id)
        self._outbox = Outbox(
            schema,
            settings.node_id,
            numbers=self._database.numbers,
            group_rows=settings.group_rows,
            max_bytes=settings.max_transaction_bytes,
        )
        self._applying = Applying(self._database, schema, settings, self._now_ms)
        side_triggers.install(self._writer, frozenset(t.name for t in schema.tables.values()))
        # Not only tables and columns count: a CHECK may be gone.
        definitions = schema_text(self._writer)
        if tables.get_meta(self._writer, "definitions") != definitions:
            tables.set_meta(self._writer, "definitions", definitions)
            self._paused_tables = self._applying.retry_parked()
        elif settings.publish:
            # What was in the logs is absorbed by now.
            conflicts.drop_beaten(self._writer, list(schema.tables.values()), None)

    def _finish(self, context: Context) -> None:
        self._paused_tables = self._applying.finish(context)

    # -- limits that change while running

    def change_limits(self, *, group_rows: int, max_transaction_bytes: int, tombstone_retention_ms: int) -> None:
        """Any thread. Other values for these settings, for what is read or written from now on."""
        self._settings = replace(
            self._settings,
            group_rows=group_rows,
            max_transaction_bytes=max_transaction_bytes,
            tombstone_retention_ms=tombstone_retention_ms,
        )

    def limit_groups(self, group_bytes: int) -> None:
        """Any thread. Groups are cut to that size where that tears no transaction, so that they fit into their stream;
        0: no such limit."""
        self._group_bytes = group_bytes

    def _groups(self, connection: apsw.Connection, after: int) -> Iterator[OutgoingGroup]:
        """All that is pending in the connection's view, by the limits as they are now."""
        outbox, settings = self._outbox, self._settings
        outbox.group_rows, outbox.max_bytes = settings.group_rows, settings.max_transaction_bytes
        outbox.group_bytes = self._group_bytes
        return outbox.groups(connection, max(after, self._database.published()))

    # -- what the daemon asks

    @property
    def schema(self) -> Schema:
        schema = self._database.schema
        assert schema is not None, "open() first"
        return schema

    @property
    def skipped(self) -> Sequence[Skipped]:
        return self.schema.skipped

    def take_lock_seconds(self) -> float:
        """Writer. How long the write lock was held since the last call."""
        return self._database.take_lock_seconds()

    @property
    def conflicts_total(self) -> int:
        return self._state.conflicts_total

    def position(self, stream: str) -> Position | None:
        """Writer. How far the stream was applied."""
        return tables.load_position(self._writer, stream)

    @property
    def known_schema(self) -> Schema | None:
        """The schema as last installed; None before `open`, and after a failed write until the next one."""
        return self._database.schema

    @property
    def instance_id(self) -> str:
        """Tells this database from all others with the same node id, except its copies."""
        return self._database.instance_id

    @property
    def paused_tables(self) -> int:
        """Tables with rows that wait for the schema, as of the last apply."""
        return self._paused_tables

    def ping(self) -> None:
        """Writer. Raises apsw.Error if the database does not answer."""
        sql.integer(self._writer, "PRAGMA schema_version")

    def pending(self) -> int:
        """Reader. Rows that are not acknowledged yet: absorbed ones, and changes still in the logs."""
        schema = self._database.schema
        if schema is None:
            return 0
        # Not in one snapshot: the reader may be inside a pinned one.
        return versions.count_pending(self._reader, schema, self._database.published()) + self.logged()

    def logged(self) -> int:
        """Reader. Changes that are not absorbed yet."""
        schema = self._database.schema
        return versions.count_logged(self._reader, schema) if schema and self._settings.publish else 0

    def parked(self) -> int:
        """Reader."""
        return sql.integer(self._reader, conflicts.COUNT_WAITING)

    def unkeyed(self) -> int:
        """Reader. Rows with NULL in their key, which cannot be replicated. Reads an index of each table that may have
        such rows."""
        schema = self._database.schema
        return capture.count_unkeyed(self._reader, schema) if schema else 0

    # -- a second look

    def look_is_due(self) -> bool:
        """Reader. Whether a log holds writes that may have evicted rows unseen: absorbed soon, such a row's delete gets
        the time of its eviction, or little more."""
        return self._settings.publish and self._absorber.evictions.is_due(self._reader)

    def has_unlooked(self) -> bool:
        """Any thread."""
        return self._settings.publish and bool(self._absorber.evictions.unlooked)

    def take_unlooked(self) -> list[str]:
        """Writer. Tables that may have lost rows unseen, and that `absorb` did not look through: because they are large
        or the schema has just changed. Each is named once."""
        taken = list(self._absorber.evictions.unlooked)
        self._absorber.evictions.unlooked.clear()
        return taken

    def find_vanished(self, table: Table) -> list[Row]:
        """Reader. Rows of one table that went by a way no trigger sees (DESIGN 3); reads all of its versions."""
        return evictions.find(self._reader, table, VANISHED_ROWS) if self._settings.publish else []

    def log_vanished(self, name: str, keys: Sequence[Row]) -> None:
        """Writer. Have them absorbed as deletes, if they are still gone then."""
        with self._database.transaction():
            table = self.schema.table(name)
            if table is not None and self._settings.publish:
                for key in keys:
                    evictions.log(self._writer, table, key)

    # -- publishing

    def absorb(self, bound_ms: int | None = None, correction: Correction = NO_CORRECTION) -> int:
        """Writer. One short write transaction that moves the change logs into the version tables.

        bound_ms: the latest time that a write may claim (DESIGN 8); None: the server's time is not known.
        Returns the number of log rows taken; more may be left when the log is large.
        """
        if not self.has_log():
            return 0
        self._know_time(bound_ms, correction)
        with self._database.transaction():
            return self._absorb(bound_ms, correction)[0]

    def sight(self, *, on_writer: bool) -> None:
        """Reader (or writer). Remember where the application's transactions end now; takes no lock. For when nothing
        can be absorbed for a while."""
        connection = self._writer if on_writer else self._reader
        if not self._settings.publish or not connection.getautocommit():
            return  # inside a pinned snapshot, which shows nothing new
        connection.execute("BEGIN")
        try:
            if not self._database.is_stale(connection):
                self._absorber.sight(connection)
        finally:
            _end(connection)

    def has_log(self) -> bool:
        """Writer. Whether there is anything to absorb, or the schema has changed; takes no lock."""
        return self._database.is_stale(self._writer) or (
            self._settings.publish and self._absorber.has_log(self._writer)
        )

    def follow_schema(self) -> None:
        """Writer. Install capture for the schema as it is now, if that has changed; else takes no lock."""
        if self._database.is_stale(self._writer):
            with self._database.transaction():
                pass

    def _know_time(self, bound_ms: int | None, correction: Correction) -> None:
        """For what a transaction absorbs before its own work, when it finds that the schema has changed."""
        self._database.bound_ms = versions.UNBOUNDED_MS if bound_ms is None else bound_ms
        self._database.correction = correction

    def _absorb(self, bound_ms: int | None, correction: Correction = NO_CORRECTION) -> tuple[int, bool]:
        if not self._settings.publish:
            return 0, True
        bound = versions.UNBOUNDED_MS if bound_ms is None else bound_ms
        absorbed, self._database.state = self._absorber.absorb(
            self._writer, self._state, bound_ms=bound, correction=correction
        )
        conflicts.drop_beaten(self._writer, absorbed.tables, absorbed.batch)
        return absorbed.rows, absorbed.drained

    def pending_at_most(self, after: int, limit: int) -> bool:
        """Writer. Whether no more than `limit` absorbed rows of batches after `after` are pending."""
        after = max(after, self._database.published())
        counted = 0
        for table in self.schema.tables.values():
            counted += versions.count_pending_up_to(self._writer, table, after, limit + 1 - counted)
            if counted > limit:
                return False
        return True

    def outgoing(self, after: int = 0, *, on_writer: bool = False) -> Pinned | None:
        """Reader (or writer). Pending groups of one pinned snapshot, read as the iterator advances; close it to let go.

        after: batches up to this one were read before. None: the change logs were not empty in the snapshot, or the
        schema had changed; absorb and try again.
        """
        connection = self._writer if on_writer else self._reader
        connection.execute("BEGIN")
        try:
            stale = self._database.is_stale(connection)
            clean = not stale and not (self._settings.publish and self._absorber.has_log(connection))
        except BaseException:
            _end(connection)
            raise
        if not clean:
            _end(connection)
            return None
        return Pinned(connection, self._groups(connection, after))

    def outgoing_locked(
        self,
        after: int = 0,
        bound_ms: int | None = None,
        correction: Correction = NO_CORRECTION,
        limit: int = 2_000,
    ) -> list[OutgoingGroup]:
        """Writer. Absorb and read about `limit` pending rows under the write lock: for an application that commits
        so fast that no snapshot with empty logs is ever seen. Empty: the log was too large, call again."""
        self._know_time(bound_ms, correction)
        with self._database.transaction():
            _, drained = self._absorb(bound_ms, correction)
            found: list[OutgoingGroup] = []
            if drained:
                for group in self._groups(self._writer, after):
                    found.append(group)
                    if sum(len(each.group) for each in found) >= limit and not group.torn:
                        break
            return found

    def collect(self) -> list[OutgoingGroup] | None:
        """Reader. `outgoing` as a list."""
        groups = self.outgoing()
        return None if groups is None else list(groups)

    def mark_published(self, through: int) -> None:
        """Any thread. The stream has everything up to batch `through`; durable with the next write transaction."""
        self._database.mark_published(through)

    def note_position(self, position: Position) -> None:
        """Any thread. A position that moved past nothing new; durable with the next write transaction."""
        self._database.note_position(position)

    def flush(self) -> None:
        """Writer. Make acknowledgements and noted positions durable now (before stopping)."""
        if self._database.has_notes():
            with self._database.transaction():
                pass

    # -- applying

    def apply(self, delivery: Delivery, bound_ms: int | None = None, correction: Correction = NO_CORRECTION) -> Applied:
        """Writer. Everything in `delivery` takes effect and the position moves, in one write transaction.

        Raises apsw.BusyError, apsw.FullError, apsw.IOError with nothing changed: try again later; PositionsLostError
        when the stream has to be read again from the stored position.
        """
        self._know_time(bound_ms, correction)
        while True:
            try:
                applied = self._apply(delivery, bound_ms, correction, careful=False)
            except (OutOfTheOrdinaryError, TypeError, *MISFIT):  # TypeError: apsw cannot bind a RawText
                applied = self._apply(delivery, bound_ms, correction, careful=True)
            if applied is not None:
                return applied

    def _apply(
        self, delivery: Delivery, bound_ms: int | None, correction: Correction, *, careful: bool
    ) -> Applied | None:
        """None: the change log was too large for one transaction; a piece of it was absorbed."""
        stream = delivery.position.stream
        with self._database.transaction():
            lost = self._database.forgot_position(stream)
            if not lost and not self._absorb(bound_ms, correction)[1]:
                return None
            context = self._applying.context()
            newest = [] if lost else self._applying.deliver(delivery, context, careful=careful)
            self._finish(context)
            if not lost:
                tables.save_position(self._writer, delivery.position)
        if lost:
            raise PositionsLostError(f"the versions of a table were lost: stream {stream} is read again")
        recorder = context.recorder
        return Applied(
            rows=context.applied,
            conflicts=recorder.conflicts,
            parked=recorder.parked,
            undecodable=len(delivery.undecodable),
            newest_ms=tuple(newest),
        )

    def start_over(self, position: Position) -> None:
        """Writer. The log lost what this node may need others to have: everything is pending again, whoever wrote it,
        at the versions it has, and reading goes on at `position`. In many short transactions: see Marking."""
        marking = Marking(self)
        while marking.step():
            pass
        marking.finish(position)

    def move_position(self, position: Position) -> None:
        """Writer. Reading goes on at `position`, whatever was before it."""
        with self._database.transaction():
            tables.save_position(self._writer, position)

    def note_synced(self, server_ms: int) -> None:
        """Any thread. This node had read everything there was at that server time; durable with the next write
        transaction."""
        self._database.note_synced(server_ms)

    # -- snapshots

    @property
    def writer(self) -> apsw.Connection:
        """For the other modules of `db` that write in this node's name, on the writer's thread."""
        return self._database.writer

    @property
    def path(self) -> Path:
        return self._database.path

    def wants(self, table: str) -> bool:
        """Whether a table of that name would be replicated here, if it can be."""
        return is_chosen(table, self._settings.include, self._settings.exclude)

    def published(self) -> int:
        """Any thread. Batches up to this one were acknowledged."""
        return self._database.published()

    def synced_at_ms(self, positions: Sequence[Position]) -> int:
        """Writer. A time by the server's clock up to which this node knows all that streams held; 0: it never read
        any. positions: the streams that there are."""
        read = [tables.load_position(self._writer, position.stream) for position in positions]
        stored = [position.stored_ns // 1_000_000 if position else 0 for position in read]
        return max(self._state.synced_at_ms, min(stored, default=0))

    @property
    def tolerance_ms(self) -> int:
        """How far a version may be ahead of the stream's time."""
        return self._settings.tolerance_ms

    @property
    def publishes(self) -> bool:
        """Whether what is written here goes to the others."""
        return self._settings.publish

    @property
    def published_batch(self) -> int:
        """Writer, inside `transaction`. Rows of later batches are pending."""
        return self._state.published_batch

    @property
    def next_batch(self) -> int:
        """Writer, inside `transaction`. The batch for rows that become pending in it; see `use_batch`."""
        return self._state.batch + 1

    def use_batch(self) -> None:
        """Writer, inside `transaction`. `next_batch` was given to rows."""
        self._absorber.boundaries.forget()
        self._database.state = replace(self._state, batch=self.next_batch)

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """Writer. A write transaction, with capture installed for the schema as it is in it."""
        return self._database.transaction()

    def judge(
        self,
        job: Callable[[Context], None],
        bound_ms: int | None = None,
        correction: Correction = NO_CORRECTION,
    ) -> Context:
        """Writer. `job` lets something take effect in one write transaction, after everything logged was absorbed: in
        it, versions say what they should. A log too large for that is absorbed in pieces first. Raises as `apply`."""
        self._know_time(bound_ms, correction)
        while True:
            with self._database.transaction():
                if self._absorb(bound_ms, correction)[1]:
                    context = self._applying.context()
                    job(context)
                    self._finish(context)
                    return context

    def take(self, group: Group, context: Context) -> None:
        """Writer, inside `judge`. What another node's database holds takes effect here, by version."""
        self._applying.take(group, context, versions.UNBOUNDED_MS, careful=True)

    def arrive(self, positions: Sequence[Position], *, synced_at_ms: int, tombstones_since_ms: int) -> None:
        """Writer, inside `judge`. A snapshot was merged: the streams go on after `positions`, or after what was read
        already."""
        for position in positions:
            known = tables.load_position(self._writer, position.stream)
            if known is None or known.created != position.created or known.sequence < position.sequence:
                tables.save_position(self._writer, position)
        self._database.state = replace(
            self._state,
            synced_at_ms=max(self._state.synced_at_ms, synced_at_ms),
            tombstones_since_ms=tombstones_since_ms,
        )

    def start_copy(
        self, target: Path, bound_ms: int | None = None, correction: Correction = NO_CORRECTION
    ) -> Copy | None:
        """Writer. Fix a view of the database in which every change log is empty, to be written to `target` by
        `Copy.run` on any other thread, or given up by `Copy.close`.

        None: the application commits too fast just now; try again later. Raises apsw.BusyError.
        """
        self._know_time(bound_ms, correction)
        copy = Copy(self._database.path, target)
        try:
            for _ in range(PIN_ATTEMPTS):
                self.judge(lambda context: None, bound_ms, correction)
                with sql.locked(self._writer):
                    if not self.has_log():
                        pending = versions.count_pending(self._writer, self.schema, self._state.published_batch)
                        copy.pin(self.schema.fingerprint(), pending)
                        return copy
        except BaseException:
            copy.close()
            raise
        copy.close()
        return None

    # -- time

    def server_time(self, server_ms: int, correction: Correction = NO_CORRECTION) -> None:
        """Writer. The server's time is known: nothing written here may claim to be later than that (DESIGN 8).

        The floor becomes at least the server's time, so that a clock that starts in the past cannot make new writes
        lose to old ones. What was written before keeps its time: it is absorbed first. After the first call, only
        one an hour does anything.
        """
        bound = server_ms + self._settings.tolerance_ms
        if self._clamped and server_ms - HOUR_MS < self._state.floor_ms <= bound:
            return
        self._know_time(bound, correction)
        while not self._clamp(server_ms, bound, correction):
            pass
        self._clamped = True

    def _clamp(self, server_ms: int, bound_ms: int, correction: Correction) -> bool:
        """False: the change log was too large for one transaction; a piece of it was absorbed."""
        with self._database.transaction():
            if not self._absorb(bound_ms, correction)[1]:
                return False
            self._retime(
                partial(versions.clamp, published=self._state.published_batch, bound_ms=bound_ms),
            )
            self._database.raise_floor(server_ms)
            return True

    def shift_clock(self, *, from_ms: int, to_ms: int, delta_ms: int) -> None:
        """Writer. This boot's clock was behind by `delta_ms` while it showed from_ms..to_ms: correct the times of
        what was written then and not yet acknowledged."""
        with self._database.transaction():
            self._retime(
                partial(
                    versions.shift,
                    after_batch=max(self._state.published_batch, self._state.boot_batch),
                    from_ms=from_ms,
                    to_ms=to_ms,
                    delta_ms=delta_ms,
                )
            )
            # The logs come after that, already corrected: uncorrected they might be lifted to the floor.
            while not self._absorb(None, Correction(delta_ms, to_ms))[1]:
                pass

    def _retime(self, change: Callable[..., int]) -> None:
        """Give pending versions other times, in a batch of their own, joined to those that they leave."""
        batch = self.next_batch
        lows = [
            low
            for table in self.schema.tables.values()
            if (low := change(self._writer, table, node_id=self._settings.node_id, batch=batch))
        ]
        if lows:
            versions.join(self._writer, min(lows), batch)
            self.use_batch()

    def prune_tombstones(self, server_ms: int) -> int:
        """Writer. Start the retention of tombstones that the cluster has, forget those past it. Only while connected:
        `server_ms` is the server's time, so that a wrong local clock prunes nothing. Returns how many are forgotten."""
        with self._database.transaction():
            published = self._state.published_batch
            before = server_ms - self._settings.tombstone_retention_ms
            total = 0
            for table in self.schema.tables.values():
                versions.settle_tombstones(self._writer, table, published=published, server_ms=server_ms)
                total += versions.prune_tombstones(
                    self._writer, table, published=published, before_ms=before, limit=PRUNE_ROWS
                )
            conflicts.forget_older(self._writer, before)
            if total:
                since = max(self._state.tombstones_since_ms, before)
                self._database.state = replace(self._state, tombstones_since_ms=since)
            return total


def _end(connection: apsw.Connection) -> None:
    if not connection.getautocommit():
        connection.execute("ROLLBACK")
