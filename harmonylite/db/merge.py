"""Merges a snapshot into the live database, row by row by version, the application running (docs/rules.md).

Reading and writing alternate: `find` compares a piece of the snapshot with the database on a connection of its own
and takes no lock; `write` lets what was found take effect in one short write transaction, in which everything is
judged again by version, because the application may have written in between. Nothing depends on how far an earlier
merge came: killed anywhere, it is simply run again.

First goes what the cluster has deleted and forgotten, so that no row of the snapshot can lose a unique clash to it.
Then comes what the snapshot has newer. At last rows that the cluster lacks are marked, to be published at the versions
they have.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import apsw

from harmonylite.db import difference, left_out, reconcile, schema, snapshot_file, sql, tables, versions
from harmonylite.db.conflicts import Parked, load_parked
from harmonylite.db.context import Context
from harmonylite.db.copy import DamagedDatabaseError, check_copy
from harmonylite.db.difference import DELETE, TAKE, WINDOW_ROWS, Found, Scan
from harmonylite.db.estimate import Estimate, MergeProgress
from harmonylite.db.rows import unpack_key
from harmonylite.db.schema import Schema, Table
from harmonylite.db.together import Together
from harmonylite.db.versions import NO_CORRECTION, Correction
from harmonylite.model import Position, Row

if TYPE_CHECKING:
    from harmonylite.db.replica import Replica

log = logging.getLogger(__name__)

# A write transaction should hold the lock about so long, commit included: see `pace`.
AIM_S = 0.007
# On a busy machine it should compute for less than the scheduler's time slice: who computes longer waits for the others
# in the midst of it, and the lock with it, for many times as long. At rest that would take twice as long for nothing.
BUSY_AIM_S, BUSY_FOR_S = 0.0028, 5.0
FIRST_ROWS, LEAST_ROWS, MOST_ROWS = 100, 10, 4_000

# Rows that share unique values are written together, so many at least.
LEAST_CHAIN = 30

# And holds no more bytes than this, or one row.
MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class MergeReport:
    """written: rows and tombstones taken from the snapshot; deleted: rows that the cluster has deleted so long ago that
    it has forgotten it; marked: rows to be published again, at the versions they have; longest_s: the longest write
    transaction."""

    written: int = 0
    deleted: int = 0
    marked: int = 0
    conflicts: int = 0
    parked: int = 0
    longest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """What one write transaction is to do; opaque to the caller. empty: nothing, `write` need not be called."""

    scan: Scan | None = None
    found: Sequence[Found] = ()
    parked: Sequence[Parked] = ()
    follow_schema: bool = False

    @property
    def empty(self) -> bool:
        return not (self.found or self.parked or self.follow_schema)


@dataclass(slots=True)
class PieceSize:
    """So many rows are written in one transaction, by how long the ones before took; busy_until: monotonic time."""

    rows: int = FIRST_ROWS
    busy_until: float = 0.0

    def took(self, rows: int, held_s: float, computed_s: float, now: float) -> None:
        """So many rows were written, for which the lock was held so long; computed_s: processor time of that."""
        if held_s > AIM_S and held_s > 2 * computed_s:
            self.busy_until = now + BUSY_FOR_S
        aim_s = BUSY_AIM_S if now < self.busy_until else AIM_S
        if rows * 2 > self.rows or held_s > aim_s:
            factor = min(2.0, max(0.25, aim_s / max(held_s, 1e-6)))
            self.rows = max(LEAST_ROWS, min(MOST_ROWS, int(rows * factor)))


class Merger:
    """One snapshot, one database.

    merger.open()
    while (work := merger.find()) is not None:
        if not work.empty:
            merger.write(work)
    report = merger.finish()
    merger.close()
    """

    def __init__(
        self,
        replica: Replica,
        snapshot: Path,
        positions: Sequence[Position],
        tombstones_since_ms: int,
        *,
        created_ms: int | None = None,
        in_step: bool = False,
        reads_on: bool = False,
        lost: bool = False,
    ) -> None:
        """positions, tombstones_since_ms, created_ms (server time): the manifest's. The snapshot's file is only read.

        created_ms bounds what the snapshot's node had not published, as the stream would have. in_step: all streams
        were read to their ends and missed nothing, so the cluster knows every version that is here. reads_on: they are
        read meanwhile; what the snapshot lacks may have come after it, and is not deleted for that. lost: the log lost
        messages that came after the snapshot; what waited there when it was taken may have been in them.
        """
        self._in_step = in_step
        self._reads_on = reads_on
        self._lost = lost
        self._latest_ms = versions.UNBOUNDED_MS if created_ms is None else created_ms + replica.tolerance_ms
        self._replica = replica
        self._path = snapshot
        self._positions = positions
        self._since_ms = tombstones_since_ms
        self._report = MergeReport()
        self._size = PieceSize()
        self._connection: apsw.Connection | None = None
        self._work: Iterator[Work] = iter(())
        self._progress = MergeProgress()

    def open(self) -> None:
        """Writer. Opens the connections that `find` uses. Raises DamagedCopyError, DamagedDatabaseError."""
        self._theirs = snapshot_file.load(self._path, self._replica.wants)
        with self._own():
            self._connection = self._theirs.attached(self._replica.path)
            self._plan()

    def close(self) -> None:
        """Any thread. Twice is fine; the snapshot's file stays."""
        self._work = iter(())
        if self._connection is not None:
            self._connection.close(True)

    @property
    def progress(self) -> MergeProgress:
        """Any thread."""
        return self._progress

    # -- what is to be done

    def _plan(self) -> None:
        """Writer. From the beginning, for the schema as it is here now; what is merged already is found equal."""
        replica = self._replica
        self._schema = replica.schema
        known = replica.completeness.synced_at_ms(self._positions)
        self._first_join = known == 0
        self._in_window = self._in_step or self._reads_on or known >= self._since_ms
        self._work = self._all_work(self._schema)

    def _scans(self, mine: Schema) -> Iterator[Scan]:
        """In the order in which they must run."""
        pairs: list[tuple[Table, Table]] = []
        takes: list[Scan] = []
        for theirs in self._theirs.schema.tables.values():
            if not self._theirs.replicates(theirs):
                continue
            here = mine.table(theirs.name)
            if here is not None and difference.comparable(theirs, here):
                pairs.append((theirs, here))
                takes += difference.taking(theirs, here)
            elif self._replica.wants(theirs.name):
                takes += difference.taking(theirs, None)
        for theirs, here in pairs:
            versioned, unversioned = difference.deleting(here, theirs, self._since_ms + self._replica.tolerance_ms)
            if not self._in_window:
                yield versioned
                if not self._first_join:
                    yield unversioned
        yield from takes
        for theirs, here in pairs if self._replica.publishes else ():
            published = self._theirs.state.published_batch if self._lost else None
            versioned, unversioned = difference.marking(here, theirs, published)
            if not self._in_step:
                yield versioned
            yield unversioned

    def _all_work(self, mine: Schema) -> Iterator[Work]:
        connection = self._connection
        assert connection is not None, "open() first"
        together = Together(connection, self._theirs, mine, self._latest_ms)
        scans = [scan.on(connection) for scan in self._scans(mine)]
        estimate = Estimate(scans, mine)
        for _ in estimate.count(connection):
            yield Work()
        for index, scan in enumerate(scans):
            if scan.kind != TAKE and index and scans[index - 1].kind == TAKE:
                yield from self._parked_work(connection)
            estimate.begin()
            for looked, work in self._scan_work(connection, scan, together):
                self._progress = estimate.after(looked, len(work.found))
                yield work
        if not scans or scans[-1].kind == TAKE:
            yield from self._parked_work(connection)

    def _scan_work(self, connection: apsw.Connection, scan: Scan, together: Together) -> Iterator[tuple[int, Work]]:
        """(rows looked at, about; what to do about them)"""
        last: Row | None = None
        while True:
            end, seen = scan.end_of_piece(connection, last, WINDOW_ROWS)
            published = self._theirs.state.published_batch if scan.kind == TAKE else self._replica.published()
            complete, told = False, 0
            while not complete:
                found, complete = scan.find(connection, last, end, published, self._size.rows, MAX_BYTES)
                if not complete:
                    last = found[-1].key
                reached = seen if complete else min(seen, told + len(found))  # those at least
                if scan.kind == TAKE and found:
                    found = together.completed(scan, found, max(self._size.rows, LEAST_CHAIN))
                yield reached - told, Work(scan, found)
                told = reached
            if end is None:
                break
            last = end
        if scan.kind == TAKE and scan.versioned and scan.table.name in self._theirs.sparse:
            yield from self._sparse_work(connection, scan, together)

    def _sparse_work(self, connection: apsw.Connection, scan: Scan, together: Together) -> Iterator[tuple[int, Work]]:
        """Rows whose version is the same on both sides may still have columns that are newer there."""
        everything = difference.taking(scan.table, None)[0]
        last = b""
        while keys := sql.rows(
            connection,
            f"SELECT DISTINCT key FROM snap.{tables.SPARSE} WHERE tbl = ? AND key > ? ORDER BY key LIMIT ?",
            (scan.table.name, last, self._size.rows),
        ):
            last = keys[-1][0]
            found = [
                together.with_older_columns(scan, each)
                for (key,) in keys
                if (each := everything.lookup(connection, unpack_key(key), self._theirs.state.published_batch))
            ]
            yield 0, Work(scan, [each._replace(pending=False) for each in found])

    def _parked_work(self, connection: apsw.Connection) -> Iterator[Work]:
        """What waits at the snapshot's node for its schema may fit here; if not, it waits here too."""
        last = ("", b"")
        while chunk := load_parked(
            connection, "WHERE (tbl, id) > (?, ?) ORDER BY tbl, id LIMIT 100", last, table=f"snap.{tables.PARKED}"
        ):
            last = (chunk[-1].table, chunk[-1].id)
            yield Work(parked=chunk)

    def find(self, cancelled: Callable[[], bool] = lambda: False) -> Work | None:
        """Any one thread, one call at a time, never while `write` runs: look at the next piece, for up to about a
        second. None: everything was looked at and `finish` is due.

        Raises DamagedCopyError or DamagedDatabaseError if either cannot be read; nothing was lost by what was merged
        already. To tell which, the snapshot is read as a whole: CopyCancelledError if that was cancelled.
        """
        assert self._connection is not None, "open() first"
        try:
            if self._is_stale(self._connection):
                return Work(follow_schema=True)
            return next(self._work, None)
        except apsw.SQLError:
            if not self._is_stale(self._connection):
                raise
            return Work(follow_schema=True)
        except (apsw.NotADBError, apsw.CorruptError) as error:
            check_copy(self._path, cancelled=cancelled)
            raise DamagedDatabaseError(self._replica.path, error) from error

    def _is_stale(self, connection: apsw.Connection) -> bool:
        return self._replica.known_schema is not self._schema or schema.schema_cookie(connection) != self._schema.cookie

    # -- doing it

    def write(self, work: Work, bound_ms: int | None = None, correction: Correction = NO_CORRECTION) -> None:
        """Writer. One short write transaction (more only while a long change log is absorbed first); bound_ms and
        correction as in Replica.apply. Raises apsw.BusyError, apsw.FullError, apsw.IOError with nothing changed:
        call it again with the same work; DamagedDatabaseError."""
        done = 0

        def job(context: Context) -> None:
            nonlocal done
            if self._replica.schema is self._schema:
                done = self._do(work, context)

        computed_s = time.thread_time()
        with self._own():
            context = self._replica.judge(job, bound_ms, correction)
        computed_s = time.thread_time() - computed_s
        took = self._replica.last_held_s
        kind = work.scan.kind if work.scan is not None else TAKE
        report = self._report
        self._report = MergeReport(
            written=report.written + (context.applied if kind == TAKE else 0),
            deleted=report.deleted + (done if kind == DELETE else 0),
            marked=report.marked + (0 if kind == DELETE else done),
            conflicts=report.conflicts + context.recorder.conflicts,
            parked=report.parked + context.recorder.parked,
            longest_s=max(report.longest_s, took),
        )
        self._size.took(len(work.found), took, computed_s, time.monotonic())
        if self._replica.schema is not self._schema:
            self._plan()

    def _do(self, work: Work, context: Context) -> int:
        """Rows marked or deleted."""
        if work.parked:
            reconcile.take_parked(self._replica, context, work.parked)
        if work.scan is None:
            return 0
        table = self._schema.table(work.scan.table.name)
        if work.scan.kind == TAKE:
            return reconcile.take(self._replica, context, work.scan, table, work.found)
        assert table is not None
        step = reconcile.delete if work.scan.kind == DELETE else reconcile.mark
        return step(self._replica, context, table, work.found)

    def finish(self, bound_ms: int | None = None, correction: Correction = NO_CORRECTION) -> MergeReport:
        """Writer. One transaction: positions (the larger of both per stream, the snapshot's where the lineage
        differs), `tombstones_since_ms` and `synced_at_ms` become those of the merged whole. Raises as `write`."""

        def job(_: Context) -> None:
            names = [each.name for each in self._theirs.schema.tables.values() if self._theirs.replicates(each)]
            left_out.add(self._replica.writer, [name for name in names if not self._replica.wants(name)])
            self._replica.completeness.arrive(
                self._positions,
                synced_at_ms=self._theirs.state.synced_at_ms,
                tombstones_since_ms=self._since_ms,
                unread_there=self._theirs.unread(self._connection) if self._connection is not None else [],
            )

        with self._own():
            self._replica.judge(job, bound_ms, correction)
        report = self._report
        log.info(
            "snapshot merged",
            extra={"fields": {"written": report.written, "deleted": report.deleted, "marked": report.marked}},
        )
        return report

    @contextlib.contextmanager
    def _own(self) -> Iterator[None]:
        try:
            yield
        except (apsw.NotADBError, apsw.CorruptError) as error:
            raise DamagedDatabaseError(self._replica.path, error) from error
