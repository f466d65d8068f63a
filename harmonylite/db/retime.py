"""Versions of rows that nobody has seen yet get other times, once it is known what the clock was off by
(docs/rules.md, Clocks)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import apsw

from harmonylite.db import held, versions
from harmonylite.db.absorbing import Absorbing
from harmonylite.db.database import Database, ReplicaSettings
from harmonylite.db.held import HELD
from harmonylite.db.schema import Schema, Table
from harmonylite.db.sql import integer, version_table
from harmonylite.db.versions import NO_CORRECTION, Correction

HOUR_MS = 3_600_000

# (connection, table, after_batch=.., until_batch=.., batch=..) -> the lowest batch that lost a row, 0 for none.
Change = Callable[..., int]


def clamped(*, node_id: int, bound_ms: int) -> Change:
    """Own pending versions that claim a time after `bound_ms` get that time, but stay above what they replaced."""
    return partial(
        _retime,
        ts="max(:bound, base_ts + 1)",
        where="node = :node AND rank = 0 AND ts > max(:bound, base_ts + 1)",
        bindings={"bound": bound_ms, "node": node_id},
    )


def shifted(*, node_id: int, from_ms: int, to_ms: int, delta_ms: int) -> Change:
    """Own pending versions with a time in from_ms..to_ms move by `delta_ms`."""
    return partial(
        _retime,
        ts="max(ts + :delta, base_ts + 1)",
        where="node = :node AND rank = 0 AND ts BETWEEN :from AND :to",
        bindings={"delta": delta_ms, "node": node_id, "from": from_ms, "to": to_ms},
    )


def retime(connection: apsw.Connection, schema: Schema, change: Change, *, after: int, boot: int, newest: int) -> int:
    """Apply `change` to the rows of batches after `after`, and to held ones of batches after `boot`.

    They move to batches of their own, as after any write: the acknowledgement of a message that carries the old version
    must not count for the new one. The ordinary ones are joined to those that they leave; of a held batch the other
    rows move along, so that it stays one, and apart.
    newest: the newest batch there is. Returns the newest after that.
    """
    batch = newest + 1
    lows = [
        low
        for table in schema.tables.values()
        if (low := change(connection, table, after_batch=after, until_batch=HELD, batch=batch))
    ]
    if lows:
        versions.join(connection, min(lows), batch)
        newest = batch
    for old in held.numbers(connection, schema):
        if old - HELD <= boot:
            continue
        span = {"after_batch": old - 1, "until_batch": old + 1, "batch": HELD + newest + 1}
        lows = [change(connection, table, **span) for table in schema.tables.values()]
        if any(lows):
            newest += 1
            held.renumber(connection, schema, old, HELD + newest)
    return newest


def _retime(
    connection: apsw.Connection,
    table: Table,
    *,
    ts: str,
    where: str,
    bindings: dict[str, int],
    after_batch: int,
    until_batch: int,
    batch: int,
) -> int:
    version = version_table(table.name)
    where = f"batch > :after AND batch < :until AND {where}"
    within = {**bindings, "after": after_batch, "until": until_batch}
    needed = {name: value for name, value in within.items() if f":{name}" in where}
    low = integer(connection, f"SELECT min(batch) FROM {version} WHERE {where}", needed)
    if low:
        connection.execute(f"UPDATE {version} SET ts = {ts}, batch = :batch WHERE {where}", {**within, "batch": batch})
    return low


class Times:
    """What the server's time, and a step of the local clock, mean for what was written here (docs/rules.md, Clocks)."""

    def __init__(self, database: Database, absorbing: Absorbing, settings: ReplicaSettings) -> None:
        self._database = database
        self._absorbing = absorbing
        self._settings = settings
        self._clamped = False

    def server_time(self, server_ms: int, correction: Correction = NO_CORRECTION) -> None:
        """Writer. The server's time is known: nothing written here may claim to be later than that.

        The floor becomes at least the server's time, so that a clock that starts in the past cannot make new writes
        lose to old ones. What was written before keeps its time: it is absorbed first. After the first call, only
        one an hour does anything.
        """
        bound = server_ms + self._settings.tolerance_ms
        if self._clamped and server_ms - HOUR_MS < self._database.state.floor_ms <= bound:
            return
        right = self._right_through(bound)
        self._absorbing.before(lambda: self._clamp(server_ms, bound, right), bound, correction)
        self._clamped = True

    def _right_through(self, bound_ms: int) -> int:
        """The newest batch if no pending version claims a time after `bound_ms`, else 0. Looked for without the lock,
        as there may be many: nobody but the writer changes versions."""
        database = self._database
        if database.is_stale(database.writer):
            return 0
        ahead = "batch > ? AND node = ? AND rank = 0 AND ts > max(?, base_ts + 1)"
        bindings = (database.published(), self._settings.node_id, bound_ms)
        for table in database.installed().tables.values():
            if integer(database.writer, f"SELECT 1 FROM {version_table(table.name)} WHERE {ahead} LIMIT 1", bindings):
                return 0
        return database.state.batch

    def _clamp(self, server_ms: int, bound_ms: int, right: int) -> None:
        """right: versions of batches up to this one claim no later time; 0: not known."""
        change = clamped(node_id=self._settings.node_id, bound_ms=bound_ms)
        self._retime(change, boot=right)
        self._database.raise_floor(server_ms)

    def shift_clock(self, *, from_ms: int, to_ms: int, delta_ms: int) -> None:
        """Writer. This boot's clock was behind by `delta_ms` (ahead, if negative) while it showed from_ms..to_ms:
        correct the times of what was written then and not yet acknowledged. What is in the logs counts as written
        then: whatever was logged before the daemon started has to be absorbed by now. Raises RecaptureDueError."""
        database, recapturing = self._database, self._absorbing.recapturing
        with database.transaction():
            if not recapturing.is_due(database.writer):
                self._shift(from_ms, to_ms, delta_ms)
                return
        recapturing.check()

    def _shift(self, from_ms: int, to_ms: int, delta_ms: int) -> None:
        database = self._database
        change = shifted(node_id=self._settings.node_id, from_ms=from_ms, to_ms=to_ms, delta_ms=delta_ms)
        self._retime(change, boot=database.state.boot_batch)
        if delta_ms < 0 and from_ms <= database.state.floor_ms <= to_ms:
            # Else what is in the logs, and what comes, would be lifted to the time of the clock that was ahead. No
            # lower than what keeps its time, or a version could be given out twice.
            kept = versions.newest_own(database.writer, database.installed(), self._settings.node_id)
            database.lower_floor(max(database.state.floor_ms + delta_ms, kept))
        # The logs come after that, already corrected: uncorrected they might be lifted to the floor.
        while not self._absorbing.piece(None, Correction(delta_ms, to_ms)).drained:
            pass

    def _retime(self, change: Change, *, boot: int) -> None:
        """Give pending versions other times, of batches after `boot`."""
        database, state = self._database, self._database.state
        after = max(state.published_batch, boot)
        newest = retime(database.writer, database.installed(), change, after=after, boot=boot, newest=state.batch)
        if newest != state.batch:
            self._absorbing.took_batches(newest)
