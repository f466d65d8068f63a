"""The change logs become versions, in write transactions of the database: by themselves, or before other work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import apsw

from harmonylite.db import conflicts, sql
from harmonylite.db.database import Database, ReplicaSettings
from harmonylite.db.evictions import Evictions
from harmonylite.db.schema import Schema
from harmonylite.db.versions import NO_CORRECTION, NOTHING, UNBOUNDED_MS, Absorbed, Absorber, Correction

T = TypeVar("T")


class Absorbing:
    """Owns the absorber of the schema that is installed. Methods say which connection they use.

    bound_ms: the latest time that a write may claim (docs/rules.md, Clocks); None: the server's time is not known.
    """

    def __init__(self, database: Database, settings: ReplicaSettings) -> None:
        self._database = database
        self._settings = settings

    def follow(self, schema: Schema) -> None:
        """Inside the transaction that installed capture for it."""
        self._absorber = Absorber(schema, self._settings.node_id)

    @property
    def evictions(self) -> Evictions:
        return self._absorber.evictions

    def has_log(self, connection: apsw.Connection) -> bool:
        """Whether there is anything to absorb, or the schema has changed, as a connection sees it; takes no lock."""
        return self._database.is_stale(connection) or (self._settings.publish and self._absorber.has_log(connection))

    def sight(self, *, on_writer: bool) -> None:
        """Reader (or writer). Remember where the application's transactions end now; takes no lock. For when nothing
        can be absorbed for a while."""
        connection = self._database.writer if on_writer else self._database.reader
        if not self._settings.publish or not connection.getautocommit():
            return  # inside a pinned snapshot, which shows nothing new
        connection.execute("BEGIN")
        try:
            if not self._database.is_stale(connection):
                self._absorber.sight(connection)
        finally:
            sql.rollback(connection)

    def know_time(self, bound_ms: int | None, correction: Correction) -> None:
        """Before a transaction: for what it absorbs before its own work, when it finds that the schema has changed."""
        self._database.bound_ms = UNBOUNDED_MS if bound_ms is None else bound_ms
        self._database.correction = correction

    def absorb(self, bound_ms: int | None = None, correction: Correction = NO_CORRECTION) -> int:
        """Writer. See Replica.absorb."""
        if not self.has_log(self._database.writer):
            return 0
        self.know_time(bound_ms, correction)
        with self._database.transaction():
            return self.piece(bound_ms, correction).rows

    def piece(self, bound_ms: int | None, correction: Correction = NO_CORRECTION) -> Absorbed:
        """Writer, inside a transaction. As much as one transaction takes."""
        if not self._settings.publish:
            return NOTHING
        database = self._database
        bound = UNBOUNDED_MS if bound_ms is None else bound_ms
        absorbed, database.state = self._absorber.absorb(
            database.writer, database.state, bound_ms=bound, correction=correction
        )
        conflicts.drop_beaten(database.writer, absorbed.tables, absorbed.batch)
        return absorbed

    def before(self, job: Callable[[], T], bound_ms: int | None, correction: Correction) -> T:
        """Writer. `job` in one write transaction, after everything logged was absorbed: in it, versions say what they
        should. A log too large for that is absorbed in pieces first."""
        self.know_time(bound_ms, correction)
        while True:
            with self._database.transaction():
                if self.piece(bound_ms, correction).drained:
                    return job()

    def took_batches(self, newest: int) -> None:
        """Writer, inside a transaction. Batches up to `newest` were given to rows, and not by absorbing."""
        self._absorber.boundaries.forget()
        self._database.state = replace(self._database.state, batch=newest)
