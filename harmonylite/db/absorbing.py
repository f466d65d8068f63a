"""The change logs become versions, in write transactions of the database: by themselves, or before other work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import apsw

from harmonylite.db import conflicts, sql, versions
from harmonylite.db.database import Database, ReplicaSettings
from harmonylite.db.evictions import Evictions
from harmonylite.db.recapture import Recapturing
from harmonylite.db.schema import Schema
from harmonylite.db.versions import NO_CORRECTION, NOTHING, UNBOUNDED_MS, Absorbed, Absorber, Correction
from harmonylite.pace import AIM_S

T = TypeVar("T")

# However long it takes, a piece has so many rows.
LEAST_ROWS = 250

# A piece grows to what holds the lock for so long, and no further: an application that logs even more all the time is
# not published before it rests.
LONGEST_HELD_S = 0.2

# Nothing is taken, and there may be something.
_WAITING = Absorbed(0, 1, 0, ())


class Absorbing:
    """Owns the absorber of the schema that is installed. Methods say which connection they use.

    bound_ms: the latest time that a write may claim (docs/rules.md, Clocks); None: the server's time is not known.
    """

    def __init__(self, database: Database, settings: ReplicaSettings) -> None:
        self._database = database
        self._settings = settings
        self.recapturing = Recapturing(database, settings.node_id)
        self._rows = versions.ABSORB_ROWS
        self._times = 1
        self._most = versions.UNBOUNDED_MS
        # What the last piece left, and the state's batch then.
        self._left = self._left_at = 0

    def follow(self, schema: Schema) -> None:
        """Inside the transaction that installed capture for it."""
        self._absorber = Absorber(schema, self._settings.node_id)
        self.recapturing.follow()

    @property
    def evictions(self) -> Evictions:
        return self._absorber.evictions

    def has_log(self, connection: apsw.Connection) -> bool:
        """Whether there is anything to absorb, or the schema has changed, as a connection sees it; takes no lock."""
        return self._database.is_stale(connection) or (
            self._settings.publish and (self.recapturing.is_due(connection) or self._absorber.has_log(connection))
        )

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

    def absorb(self, bound_ms: int | None = None, correction: Correction = NO_CORRECTION) -> Absorbed:
        """Writer. See Replica.absorb. Raises RecaptureDueError."""
        if not self.has_log(self._database.writer):
            return NOTHING
        self.know_time(bound_ms, correction)
        with self._database.transaction():
            absorbed = self.piece(bound_ms, correction)
        if not absorbed.rows:
            self.recapturing.check()
        return absorbed

    def piece(self, bound_ms: int | None, correction: Correction = NO_CORRECTION) -> Absorbed:
        """Writer, inside a transaction. As much as one transaction takes; nothing while a table is gone through (see
        `recapture`)."""
        if not self._settings.publish:
            return NOTHING
        database = self._database
        if self.recapturing.is_due(database.writer):
            return _WAITING
        bound = UNBOUNDED_MS if bound_ms is None else bound_ms
        before = database.state.batch
        taken, drained = 0, False
        # Not a larger batch: each is one transaction for those who receive it.
        while not drained and (not taken or taken < min(self._rows * self._times, self._most)):
            absorbed, database.state = self._absorber.absorb(
                database.writer, database.state, bound_ms=bound, correction=correction, limit=self._rows
            )
            conflicts.drop_beaten(database.writer, absorbed.tables, absorbed.batch)
            taken, drained = taken + absorbed.rows, absorbed.drained
        absorbed = replace(absorbed, rows=taken)
        self._keep_up(absorbed, before, database.state.batch)
        return absorbed

    def _keep_up(self, absorbed: Absorbed, before: int, batch: int) -> None:
        """An application that writes more between two pieces than one of them takes would keep the log from ever being
        empty, and nothing would be published: the pieces grow with it. A long log that does not grow is no reason. Nor
        is a piece that was rolled back, by a full disk say, and is taken again. before, batch: the state's."""
        if not self._left or self._left_at == before:
            grew = absorbed.left + absorbed.rows - self._left if self._left else 0
            if grew > absorbed.rows // 2:
                self._times = self._times * 2 if self._rows * self._times < self._most else self._times
            elif grew <= absorbed.rows // 8:
                self._times = max(1, self._times // 2)
        self._left, self._left_at = absorbed.left, batch

    def took(self, rows: int, held_s: float) -> None:
        """Any thread. A piece of so many rows held the lock for so long: random keys in a large table take twenty times
        as long as integers in their order, and boards differ as much."""
        if held_s > 1.5 * AIM_S:
            self._rows = max(LEAST_ROWS, min(self._rows, int(rows * AIM_S / held_s)))
        if rows * 2 <= self._rows:
            return  # so few tell nothing of more
        if held_s < AIM_S / 2:
            self._rows = min(versions.ABSORB_ROWS, self._rows * 2)
        self._most = int(rows * LONGEST_HELD_S / max(held_s, AIM_S / 10))

    def before(self, job: Callable[[], T], bound_ms: int | None, correction: Correction) -> T:
        """Writer. `job` in one write transaction, after everything logged was absorbed: in it, versions say what they
        should. A log too large for that is absorbed in pieces first. Raises RecaptureDueError."""
        self.know_time(bound_ms, correction)
        while True:
            with self._database.transaction():
                if self.piece(bound_ms, correction).drained:
                    return job()
            self.recapturing.check()

    def took_batches(self, newest: int) -> None:
        """Writer, inside a transaction. Batches up to `newest` were given to rows, and not by absorbing."""
        self._absorber.boundaries.forget()
        self._database.state = replace(self._database.state, batch=newest)
