"""The writer's connection and what this process believes of the database: our state, the schema as installed.

One rule holds it together: whatever a transaction did not commit, this process does not believe.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import apsw

from harmonylite.db import install, sql, tables, unread, versions
from harmonylite.db.checkpoint import Checkpoints
from harmonylite.db.schema import Schema, Skipped, schema_cookie, unwritable
from harmonylite.db.tables import State
from harmonylite.model import Position

log = logging.getLogger(__name__)

DAY_MS = 86_400_000

# A group's number: seconds since 1970 at the start, or one more than at the last start; then a counter.
EPOCH_SHIFT = 28


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """publish=False: no triggers, what the cluster says wins. group_rows: a group is closed once it holds that many
    rows. max_transaction_bytes: a transaction larger than that is cut. tolerance_ms: how far a version may be ahead
    of the stream's time (docs/rules.md, Clocks). boot_id: tells this boot of the machine from others;
    machine_id: this machine, empty if nothing tells."""

    node_id: int
    publish: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    group_rows: int = 512
    max_transaction_bytes: int = 64 << 20
    tolerance_ms: int = 60_000
    tombstone_retention_ms: int = 90 * DAY_MS
    boot_id: str = ""
    machine_id: str = ""


class PositionsLostError(Exception):
    """Version tables had to be rebuilt, and the stored positions with them: the stream has to be read again."""


class Database:
    """Owns the connections, the state and the schema. `on_schema` is called inside the transaction that installed
    capture for a schema, before anything else happens in it."""

    def __init__(
        self, path: Path, settings: ReplicaSettings, now_ms: Callable[[], int], on_schema: Callable[[Schema], None]
    ) -> None:
        self.path = path
        self._settings = settings
        self._now_ms = now_ms
        self._on_schema = on_schema
        self._loaded = False
        self._acknowledged = 0
        self._synced_ms = 0
        self._synced_latest_ms = versions.UNBOUNDED_MS
        self._noted: dict[str, Position] = {}
        self._forgotten: set[str] = set()
        self._lock_seconds = 0.0
        # How long the last transaction held the write lock, and when it let go of it, by time.monotonic().
        self.last_held_s = self.released_at = 0.0
        # The latest time that a write may claim, and what local times are off by, as the caller knows them.
        self.bound_ms = versions.UNBOUNDED_MS
        self.correction = versions.NO_CORRECTION
        self.state = State()
        self.schema: Schema | None = None
        # See schema.unwritable.
        self.unwritable: tuple[Skipped, ...] = ()
        # Inside `on_schema`: whether the last installation was committed; the new names of tables renamed since.
        self.reinstalling = False
        self.renamed: frozenset[str] = frozenset()
        self.instance_id = ""
        self.numbers: Iterator[int] = iter(())

    def open(self) -> None:
        """See Replica.open."""
        self.writer = sql.open_writer(self.path)
        try:
            self.checkpoints = Checkpoints(self.path, self.writer)
            with self.transaction():
                pass
            self._forgotten.clear()  # nobody has read anything yet
            self.reader = sql.open_reader(self.path)
            self.looker = sql.open_reader(self.path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        checkpoints: Checkpoints | None = getattr(self, "checkpoints", None)
        if checkpoints is not None:
            checkpoints.close()
        for name in ("looker", "reader", "writer"):
            connection: apsw.Connection | None = getattr(self, name, None)
            if connection is not None:
                connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """A write transaction, with the schema as it is now. Notes how long the lock was held."""
        state, schema, loaded = self.state, self.schema, self._loaded
        noted: list[Position] = []
        started = 0.0
        self.checkpoints.before_write()
        try:
            with sql.write_transaction(self.writer):
                started = time.monotonic()
                self._prepare()
                noted = [each for each in self._noted.values() if each.stream not in self._forgotten]
                for position in noted:
                    tables.save_position(self.writer, position)
                yield
                tables.save_state(self.writer, self._stored, self.state)
        except BaseException:
            self.state, self._loaded = state, loaded
            if self.schema is not schema:
                self.schema = None  # TEMP triggers went back with the transaction, too: all is installed again
            raise
        finally:
            if started:
                self._note_lock(started)
        for position in noted:
            if self._noted.get(position.stream) is position:
                del self._noted[position.stream]
        self.checkpoints.after_commit()

    def _note_lock(self, since: float) -> None:
        """With the commit, which writes all changed pages into the log."""
        self.released_at = time.monotonic()
        self.last_held_s = self.released_at - since
        self._lock_seconds += self.last_held_s

    def _prepare(self) -> None:
        """What every transaction begins with."""
        if not self._loaded:
            tables.create(self.writer)
            self.state = tables.load_state(self.writer)
            self._acknowledged = max(self._acknowledged, self.state.published_batch)
            self._stored = self.state
            self._identify()
            self._loaded = True
        else:
            self._stored = self.state
        if self._acknowledged > self.state.published_batch:
            self.state = replace(self.state, published_batch=self._acknowledged)
            versions.forget_joins(self.writer, self._acknowledged)
        if self._synced_ms > self.state.synced_at_ms or self.state.synced_at_ms > self._synced_latest_ms:
            self.state = replace(self.state, synced_at_ms=self._synced_ms)
        self._synced_latest_ms = versions.UNBOUNDED_MS
        if self.is_stale(self.writer):
            self._install()

    def _identify(self) -> None:
        """Whose database this is, in which boot of the machine, and how groups are numbered."""
        self.instance_id = str(tables.get_meta(self.writer, "instance_id"))
        node_id = self._settings.node_id
        known = tables.get_meta(self.writer, "node_id")
        if known is not None and known != node_id:
            log.warning("node id changed since the last start", extra={"fields": {"from": known, "to": node_id}})
        if known != node_id:
            tables.set_meta(self.writer, "node_id", node_id)
        self._note_machine(same_node=known == node_id)
        # Group numbers must grow over restarts, restored backups and clocks that start in the past.
        epoch = max(sql.integer(self.writer, tables.META_VALUE, ("epoch",)) + 1, self._now_ms() // 1000)
        tables.set_meta(self.writer, "epoch", epoch)
        self.numbers = count(epoch << EPOCH_SHIFT)
        if tables.get_meta(self.writer, "boot_id") != self._settings.boot_id:
            tables.set_meta(self.writer, "boot_id", self._settings.boot_id)
            # Before the logs are absorbed: what is in them was mostly written in this boot, before the daemon started,
            # and a correction of its clock tells by the times what was not.
            self.state = replace(self.state, boot_batch=self.state.batch)

    def _note_machine(self, *, same_node: bool) -> None:
        """A card may be moved to a new board, or a backup restored there: that is no mistake, unless the old one is
        still in use with the same node id."""
        machine_id = self._settings.machine_id
        known = tables.get_meta(self.writer, "machine_id")
        if not machine_id or known == machine_id:
            return
        if known and same_node:
            log.warning(
                "this database was on another machine before, with this node id: if that one is still in use, one of"
                " the two needs another node_id; after a repair, or with a restored backup, all is as it should be",
                extra={"fields": {"node_id": self._settings.node_id}},
            )
        tables.set_meta(self.writer, "machine_id", machine_id)

    def _install(self) -> None:
        settings = self._settings
        wanted = install.Settings(settings.node_id, settings.publish, settings.include, settings.exclude)
        known = self.schema
        self.reinstalling = known is not None
        positions = {stream for (stream,) in sql.rows(self.writer, f"SELECT stream FROM {tables.POSITION}")}
        self.schema, self.state, self.renamed = install.install(
            self.writer, wanted, self.state, self.bound_ms, self.correction
        )
        kept = {stream for (stream,) in sql.rows(self.writer, f"SELECT stream FROM {tables.POSITION}")}
        self._forgotten |= (positions | self._noted.keys()) - kept if positions != kept else set()
        if known is not None:
            log.info("schema changed", extra={"fields": {"tables": len(self.schema.tables)}})
        self._on_schema(self.schema)
        self._tell_unwritable(unwritable(self.writer, self.schema))

    def _tell_unwritable(self, found: tuple[Skipped, ...]) -> None:
        for each in found:
            if each not in self.unwritable:
                log.warning(
                    "table cannot be written to here; the application alone has what it needs",
                    extra={"fields": {"table": each.table, "reason": each.reason}},
                )
        self.unwritable = found

    def installed(self) -> Schema:
        """The schema, where it is known to be installed."""
        schema = self.schema
        assert schema is not None, "open() first"
        return schema

    def is_stale(self, connection: apsw.Connection) -> bool:
        """Whether the schema that a connection sees is another than the one that capture was installed for."""
        schema = self.schema  # once: the writer's thread may replace it while the reader's asks
        return schema is None or schema_cookie(connection) != schema.cookie

    def published(self) -> int:
        """Batches up to this one were acknowledged, durably or not yet."""
        return max(self.state.published_batch, self._acknowledged)

    def mark_published(self, through: int) -> None:
        self._acknowledged = max(self._acknowledged, through)

    def note_synced(self, server_ms: int) -> None:
        # What is later than now was a mistake of the server's clock.
        self._synced_latest_ms = server_ms + self._settings.tolerance_ms
        if self._synced_ms > self._synced_latest_ms:
            self._synced_ms = 0
        self._synced_ms = max(self._synced_ms, server_ms)

    def note_position(self, position: Position) -> None:
        if position.stream not in self._forgotten:
            self._noted[position.stream] = position

    def forgot_position(self, stream: str) -> bool:
        """Whether the position of a stream was lost since it was read; says so once."""
        lost = stream in self._forgotten
        self._forgotten.discard(stream)
        if lost:
            self._noted.pop(stream, None)
        return lost

    def has_notes(self) -> bool:
        """Whether an acknowledgement or a position is known that the database does not have."""
        return (
            self._acknowledged > self.state.published_batch
            or self._synced_ms > self.state.synced_at_ms
            or bool(self._noted)
        )

    def count_unread(self) -> None:
        """Inside a transaction that changed what is kept of unread messages. Reads them all."""
        kept = unread.size(self.writer)
        self.state = replace(self.state, unread=kept.messages, unread_bytes=kept.bytes)

    def unread_changed(self, change: unread.Size) -> None:
        """As `count_unread`, knowing what came (or went, if negative)."""
        state = self.state
        self.state = replace(
            state, unread=state.unread + change.messages, unread_bytes=state.unread_bytes + change.bytes
        )

    def raise_floor(self, server_ms: int) -> None:
        """Inside a transaction that has emptied the change logs: what is written from now on was written after
        `server_ms`. Rows that are still in a log were written earlier, and must not be lifted to it."""
        bounded = min(self.state.floor_ms, server_ms + self._settings.tolerance_ms)
        self.state = replace(self.state, floor_ms=max(bounded, server_ms))

    def lower_floor(self, floor_ms: int) -> None:
        """Inside a transaction: the clock that the floor came from was ahead."""
        self.state = replace(
            self.state,
            floor_ms=min(self.state.floor_ms, floor_ms),
            open_floor_ms=min(self.state.open_floor_ms, floor_ms),
        )

    def take_lock_seconds(self) -> float:
        held, self._lock_seconds = self._lock_seconds, 0.0
        return held
