"""One node's copy of the database: the facade over `db/`. Plain and synchronous, no thread, no clock, no network.

Three connections: the writer absorbs and applies, the reader reads pinned snapshots for publishing, the looker goes
through whole tables. Each must be used by one thread at a time; methods say which they use.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import apsw

from harmonylite.db import capture, conflicts, left_out, side_triggers, sql, tables, versions
from harmonylite.db.absorbing import Absorbing
from harmonylite.db.apply import OutOfTheOrdinaryError
from harmonylite.db.applying import Applied, Applying, newest_ms
from harmonylite.db.completeness import Completeness
from harmonylite.db.context import MISFIT, Context
from harmonylite.db.database import Database, PositionsLostError, ReplicaSettings
from harmonylite.db.outgoing import Outgoing
from harmonylite.db.retime import Times
from harmonylite.db.schema import Schema, Skipped, is_chosen, schema_text
from harmonylite.db.tables import State
from harmonylite.db.unseen import Unseen
from harmonylite.db.versions import NO_CORRECTION, Correction
from harmonylite.model import Delivery, Group, Position

__all__ = ["Applied", "Replica", "ReplicaSettings", "newest_ms"]

# A tombstone pass forgets at most this many rows of a table in one transaction.
PRUNE_ROWS = 2_000


class Replica:
    """See the module. `now_ms` dates entries of the conflict log; it decides nothing.

    absorbing: the change logs; recapturing: tables that capture was off for, see `recapture`; outgoing: what is
    published; unseen: rows that went unseen; times: corrections of what was written by a wrong clock; completeness:
    whether anything is missing here.
    """

    def __init__(
        self, path: Path, settings: ReplicaSettings, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    ) -> None:
        self._settings = settings
        self._tombstone_retention_ms = settings.tombstone_retention_ms
        self._now_ms = now_ms
        self._database = Database(path, settings, now_ms, self._follow_schema)
        self.absorbing = Absorbing(self._database, settings)
        self.recapturing = self.absorbing.recapturing
        self._paused_tables = 0
        self.outgoing = Outgoing(self._database, self.absorbing, settings)
        self.unseen = Unseen(self._database, self.absorbing, settings)
        self.times = Times(self._database, self.absorbing, settings)
        self.completeness = Completeness(self._database)

    # -- life cycle

    def open(self) -> None:
        """Open the file, install capture, take stock. The connections belong to the threads that use them later.

        Raises apsw.CantOpenError if there is no such file, apsw.BusyError if the application holds its lock,
        ForeignDatabaseError if a newer version of this program was here.
        """
        self._database.open()

    def close(self) -> None:
        """Close the connections; what was not committed is undone."""
        self.unseen.close()
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
        self.absorbing.follow(schema)
        self.unseen.follow(schema)
        self.outgoing.follow(schema)
        self._applying = Applying(self._database, schema, settings, self._now_ms)
        side_triggers.install(self._writer, frozenset(t.name for t in schema.tables.values()))
        left_out.follow(self._writer, self.wants)
        self._follow_parked(schema)

    def _follow_parked(self, schema: Schema) -> None:
        """Inside a transaction: try parked rows again if the schema is another one than when that was done last."""
        if self.recapturing.is_due(self._writer):
            return  # what they would be compared with is not known yet
        # Not only tables and columns count: a CHECK may be gone.
        definitions = schema_text(self._writer)
        if tables.get_meta(self._writer, "definitions") != definitions:
            tables.set_meta(self._writer, "definitions", definitions)
            self._paused_tables = self._applying.retry_parked()
        elif self._settings.publish:
            # What the installation has absorbed; of the rest, each piece does that by itself.
            conflicts.drop_beaten(self._writer, list(schema.tables.values()), None)

    def _finish(self, context: Context) -> None:
        self._paused_tables = self._applying.finish(context)

    def change_limits(self, *, group_rows: int, max_transaction_bytes: int, tombstone_retention_ms: int) -> None:
        """Any thread. Other values for these settings, for what is read or written from now on."""
        self.outgoing.change_limits(group_rows=group_rows, max_transaction_bytes=max_transaction_bytes)
        self._tombstone_retention_ms = tombstone_retention_ms

    # -- what the daemon asks

    @property
    def schema(self) -> Schema:
        return self._database.installed()

    @property
    def unwritable(self) -> Sequence[Skipped]:
        """Any thread. Tables that rows of other nodes cannot be written to, and why."""
        return self._database.unwritable

    def take_lock_seconds(self) -> float:
        """Writer. How long the write lock was held since the last call."""
        return self._database.take_lock_seconds()

    @property
    def last_held_s(self) -> float:
        """Writer. How long the last transaction held the write lock."""
        return self._database.last_held_s

    @property
    def released_at(self) -> float:
        """Any thread. When the last transaction let go of the write lock, by time.monotonic()."""
        return self._database.released_at

    def at_rest(self, *, last: bool) -> bool:
        """Writer. Nothing was written for a while: see Checkpoints.at_rest. last: it will not be tried again."""
        checkpoints = self._database.checkpoints
        if checkpoints.at_rest():
            return True
        if last:
            checkpoints.step_aside()
        return last

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

    def pending(self, *, held: bool = True) -> int:
        """Reader. Rows that are not acknowledged yet: absorbed ones, and changes still in the logs. held: whether rows
        count that the stream cannot hold."""
        schema = self._database.schema
        if schema is None:
            return 0
        # Not in one snapshot: the reader may be inside a pinned one.
        return versions.count_pending(self._reader, schema, self._database.published(), held=held) + self.logged()

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

    # -- publishing

    def absorb(self, bound_ms: int | None = None, correction: Correction = NO_CORRECTION) -> int:
        """Writer. One short write transaction that moves the change logs into the version tables.

        bound_ms: the latest time that a write may claim (docs/rules.md, Clocks); None: the server's time is not known.
        Returns the number of log rows taken; more may be left when the log is large.
        """
        return self.absorbing.absorb(bound_ms, correction).rows

    def follow_schema(self) -> None:
        """Writer. Install capture for the schema as it is now, if that has changed; else takes no lock."""
        if self._database.is_stale(self._writer):
            with self._database.transaction():
                pass

    def recapture(self, bound_ms: int | None = None, correction: Correction = NO_CORRECTION) -> bool:
        """Writer. Go through some rows of a table that capture was off for, if there is one, in one short write
        transaction; True: call it again. Until its end, whatever needs to know what was written here raises
        RecaptureDueError. bound_ms and correction as in `absorb`. Raises apsw.BusyError, apsw.FullError, apsw.IOError
        with nothing changed."""
        recapturing = self.recapturing
        if recapturing.step():
            return True
        if recapturing.under_way is None:
            return False
        self.absorbing.know_time(bound_ms, correction)
        with self._database.transaction():
            # What was written meanwhile comes first: parked rows are compared with it.
            if recapturing.is_due(self._writer) or not self.absorbing.piece(bound_ms, correction).drained:
                return True
            self._follow_parked(self.schema)
        recapturing.ended()
        return False

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

        Raises apsw.BusyError, apsw.FullError, apsw.IOError, RecaptureDueError with nothing changed: try again later;
        PositionsLostError when the stream has to be read again from the stored position.
        """
        self.absorbing.know_time(bound_ms, correction)
        while True:
            try:
                applied = self._apply(delivery, bound_ms, correction, careful=False)
            except (OutOfTheOrdinaryError, TypeError, *MISFIT):  # TypeError: apsw cannot bind a RawText
                applied = self._apply(delivery, bound_ms, correction, careful=True)
            if applied is not None:
                return applied
            self.recapturing.check()

    def _apply(
        self, delivery: Delivery, bound_ms: int | None, correction: Correction, *, careful: bool
    ) -> Applied | None:
        """None: the change log was too large for one transaction; a piece of it was absorbed."""
        stream = delivery.position.stream
        with self._database.transaction():
            lost = self._database.forgot_position(stream)
            if not lost and not self.absorbing.piece(bound_ms, correction).drained:
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

    def move_position(self, position: Position) -> None:
        """Writer. Reading goes on at `position`, whatever was before it."""
        with self._database.transaction():
            tables.save_position(self._writer, position)

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

    def leaves_out(self) -> bool:
        """Writer. Whether other nodes replicate tables that this one leaves out."""
        return bool(left_out.load(self._writer))

    def published(self) -> int:
        """Any thread. Batches up to this one were acknowledged."""
        return self._database.published()

    @property
    def tolerance_ms(self) -> int:
        """How far a version may be ahead of the stream's time."""
        return self._settings.tolerance_ms

    @property
    def tombstone_retention_ms(self) -> int:
        """How long a tombstone is kept that the cluster has."""
        return self._tombstone_retention_ms

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
        self.absorbing.took_batches(self.next_batch)

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

        def judged() -> Context:
            context = self._applying.context()
            job(context)
            self._finish(context)
            return context

        return self.absorbing.before(judged, bound_ms, correction)

    def take(self, group: Group, context: Context, limit_ms: int = versions.UNBOUNDED_MS) -> None:
        """Writer, inside `judge`. What another node's database holds takes effect here, by version. limit_ms: the
        latest time that counts."""
        self._applying.take(group, context, limit_ms, careful=True)

    def prune_tombstones(self, server_ms: int) -> int:
        """Writer. Start the retention of tombstones that the cluster has, forget those past it. Only while connected:
        `server_ms` is the server's time, so that a wrong local clock prunes nothing. Returns how many are forgotten."""
        with self._database.transaction():
            if self.recapturing.under_way is not None:
                return 0  # a row may be there again
            published = self._state.published_batch
            before = server_ms - self._tombstone_retention_ms
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
