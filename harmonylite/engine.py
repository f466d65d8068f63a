"""The replica as the event loop sees it: its worker threads, its clock and its counters.

Each SQLite connection is used by one thread only. The writer's jobs run one after the other, so nothing else than
them ever writes; the reader reads pinned snapshots for publishing beside them, the looker goes through whole tables.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import apsw

from harmonylite import clock
from harmonylite.correcting import Correcting
from harmonylite.db.marking import Marking
from harmonylite.db.outbox import OutgoingGroup
from harmonylite.db.outgoing import Pinned
from harmonylite.db.recapture import RecaptureDueError
from harmonylite.db.replica import Applied, Replica
from harmonylite.db.versions import Absorbed
from harmonylite.model import Delivery, Position
from harmonylite.observe.metrics import Metrics
from harmonylite.pace import Pace
from harmonylite.packing import Packed, pack
from harmonylite.resting import Resting
from harmonylite.retrying import Retrying
from harmonylite.tasks import while_waiting
from harmonylite.timekeeping import Timekeeper

log = logging.getLogger(__name__)

T = TypeVar("T")

# Reading more rows than this goes to the reader's thread, so that applying does not wait for it.
INLINE_ROWS = 1_000

# A pinned snapshot keeps the write-ahead log from being reset: it is let go after so long.
PINNED_S = 2.0

# Rows of which nobody knows when they were written have versions up to this: they say nothing of the lag.
UNKNOWN_TIME_MS = 1_000_000

# So often it is looked where the application's transactions end, while they cannot be absorbed.
SIGHT_S = 0.01


class Engine:
    """Owns a Replica and the threads that use it. All methods are for one event loop."""

    def __init__(self, replica: Replica, timekeeper: Timekeeper, metrics: Metrics, *, compress: bool) -> None:
        self.replica = replica
        self.time = timekeeper
        self.correcting = Correcting(self)
        self.metrics = metrics
        self._compress = compress
        self._writer = ThreadPoolExecutor(1, "writer")
        self._reader = ThreadPoolExecutor(1, "reader")
        self._looker = ThreadPoolExecutor(1, "looker")
        self._retrying = Retrying(metrics, replica.take_lock_seconds)
        self._snapshot: Iterator[OutgoingGroup] | None = None
        self._pinned_at = 0.0
        self._sighted = 0.0
        self._recapture_lock = asyncio.Lock()
        self._resting = Resting(self._at_rest)
        self.pace = Pace()
        self.apply_held_s = 0.0
        self.last_applied_s: float | None = None
        self.last_published_s: float | None = None
        self.lag_s: float | None = None
        self.lag_measured = 0.0

    # -- life cycle

    async def open(self) -> None:
        """See Replica.open."""
        await self._on_writer(self.replica.open)

    async def close(self) -> None:
        """Finish what runs, make acknowledgements durable, close the connections."""
        self.replica.unseen.stop_stamping()
        self._resting.close()
        try:
            await self.on_looker(lambda: None)
            await self.release()
            await self._on_writer(self.replica.flush)
        except apsw.Error as error:
            log.warning("last write failed; it will be done again", extra={"fields": {"error": str(error)}})
        finally:
            await self._on_writer(self.replica.close)
            self._writer.shutdown()
            self._reader.shutdown()
            self._looker.shutdown()

    async def _on_writer(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, job)

    async def _on_reader(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reader, job)

    async def on_looker(self, job: Callable[[], T]) -> T:
        """Run a job of the replica's looker."""
        return await asyncio.get_running_loop().run_in_executor(self._looker, job)

    async def write(self, job: Callable[[], T]) -> T:
        """Run a job of the replica's writer. A lock, a full disk, an I/O error: tried again until it works."""
        return (await self._write(job))[0]

    async def write_gently(self, job: Callable[[], T]) -> T:
        """As `write`, for one of many in a row: see Pace.leave_free."""
        return (await self._gently(job))[0]

    async def _gently(self, job: Callable[[], T]) -> tuple[T, float]:
        await self.pace.leave_free()
        done = await self._write(job)
        self.pace.released(done[1], self.replica.released_at)
        return done

    async def _write(self, job: Callable[[], T]) -> tuple[T, float]:
        """As `write`; also how many seconds the job held the database's lock."""
        while True:
            try:
                done = await self._retrying.run(
                    lambda: self._on_writer(lambda: (job(), self.replica.take_lock_seconds()))
                )
                break
            except RecaptureDueError:
                await self.recapture()
        if done[1]:
            self._resting.wrote()
        return done

    async def recapture(self) -> None:
        """Replica.recapture until nothing is left; everything else that needs it waits for that."""
        async with self._recapture_lock:
            while (await self._gently(self._recapture_piece))[0]:
                pass

    def _recapture_piece(self) -> bool:
        """On the writer's thread."""
        return self.replica.recapture(self.time.bound_ms(), self.time.correction)

    def _at_rest(self, last: bool) -> asyncio.Future[bool]:
        return asyncio.get_running_loop().run_in_executor(self._writer, lambda: self.replica.at_rest(last=last))

    @property
    def last_error(self) -> str | None:
        """Why something that has to be written is not; see Retrying."""
        return self._retrying.last_error

    # -- publishing

    async def take_outgoing(self, after: int) -> list[Packed]:
        """Absorb what is new and read pending groups of batches after `after` (see Outgoing.read), encoded; empty if
        nothing is pending.

        A small result comes from the writer's thread in one go; a large one piece by piece from a pinned snapshot of
        the reader, which `release` lets go.
        """
        if self._snapshot is None:
            quick = await while_waiting(self.write(lambda: self._quick(after)), SIGHT_S, self._sight)
            if quick is not None:
                return quick
            await self._pin(after)
        elif time.monotonic() - self._sighted > SIGHT_S:
            await self._sight(on_writer=True)
        return await self._on_reader(self._next_piece)

    def _quick(self, after: int) -> list[Packed] | None:
        """On the writer's thread. None: there is more than INLINE_ROWS."""
        replica = self.replica
        taken = 0
        drained = False
        while not drained:
            absorbed = self._piece()
            drained = absorbed.drained
            taken += absorbed.rows
            if taken > INLINE_ROWS:
                return None
        if not replica.outgoing.pending_at_most(after, INLINE_ROWS):
            return None
        groups = replica.outgoing.read(after, on_writer=True)
        if groups is None:  # the application was faster
            return None
        try:
            return [pack(group, compress=self._compress) for group in groups]
        finally:
            groups.close()

    async def _pin(self, after: int) -> None:
        for _ in range(3):
            await self.absorb_all()
            if await self._on_reader(lambda: self._try_pin(after)):
                return
        locked = await self.write(
            lambda: self.replica.outgoing.read_locked(after, self.time.bound_ms(), self.time.correction)
        )
        self._snapshot, self._pinned_at = iter(locked), time.monotonic()

    def _try_pin(self, after: int) -> bool:
        # Kept by this very job: whoever waits for it may be cancelled meanwhile, and `release` has to find it.
        self._snapshot, self._pinned_at = self.replica.outgoing.read(after), time.monotonic()
        return self._snapshot is not None

    def _next_piece(self) -> list[Packed]:
        piece: list[Packed] = []
        rows = 0
        try:
            for group in self._snapshot or ():
                piece.append(pack(group, compress=self._compress))
                rows += len(group.group)
                if not group.torn and time.monotonic() - self._pinned_at > PINNED_S:
                    break
                if rows >= INLINE_ROWS:
                    return piece
        except BaseException:
            self._let_go()
            raise
        self._let_go()
        return piece

    def _let_go(self) -> None:
        snapshot, self._snapshot = self._snapshot, None
        if isinstance(snapshot, Pinned):
            snapshot.close()

    async def release(self) -> None:
        """Let go of the pinned snapshot."""
        await self._on_reader(self._let_go)

    async def published(self, packed: Packed) -> None:
        """The stream has a group, and everything before it but for what is held."""
        if not packed.is_held:
            self.replica.outgoing.mark_published(packed.through)
        elif packed.through == packed.hi:
            while await self.write_gently(partial(self.replica.outgoing.release, packed.hi)):
                pass
        self.metrics.published.inc(packed.rows)
        if packed.newest_ms > UNKNOWN_TIME_MS:
            self.last_published_s = packed.newest_ms / 1000
        if packed.torn:
            self.metrics.oversized_transactions.inc(1)

    # -- applying

    async def apply(self, delivery: Delivery) -> Applied | None:
        """Let a delivery take effect; one that only moves the position is noted for the next write."""
        self.apply_held_s = 0.0
        if not delivery.groups and not delivery.undecodable:
            self.replica.note_position(delivery.position)
            return None
        applied, self.apply_held_s = await self._gently(
            lambda: self.replica.apply(delivery, self.time.bound_ms(), self.time.correction)
        )
        self._count(applied)
        return applied

    def _count(self, applied: Applied) -> None:
        metrics = self.metrics
        metrics.applied.inc(applied.rows)
        metrics.conflicts.inc(applied.conflicts)
        metrics.undecodable.inc(applied.undecodable)
        times = [newest for newest in applied.newest_ms if newest > UNKNOWN_TIME_MS]
        if not applied.rows or not times:
            return
        now = self.time.server.now_ms() or clock.wall_ms()
        self.lag_measured = time.monotonic()
        for newest in times:
            self.lag_s = max(0.0, (now - newest) / 1000)
            metrics.replication_lag_seconds.observe(self.lag_s)
        self.last_applied_s = max(times) / 1000

    # -- snapshots (see snapshot.local)

    async def move_position(self, position: Position) -> None:
        """See Replica.move_position."""
        await self.write(lambda: self.replica.move_position(position))

    async def start_over(self, position: Position) -> None:
        """Everything is to be published again (see Marking), and reading goes on at `position`."""
        marking = Marking(self.replica)
        while await self.write_gently(marking.step):
            pass
        await self.write(partial(marking.finish, position))

    # -- questions

    async def position(self, stream: str) -> Position | None:
        """How far the stream was applied, positions that were only noted included: one before them would pass the gap
        test although groups that count as published are gone."""
        await self.write(self.replica.flush)
        return await self._on_writer(lambda: self.replica.position(stream))

    async def pending(self, *, held: bool = True) -> int:
        """See Replica.pending."""
        return await self._ask(partial(self.replica.pending, held=held))

    async def held(self) -> dict[int, int]:
        """See Outgoing.held."""
        return await self._ask(self.replica.outgoing.held)

    async def parked(self) -> int:
        return await self._ask(self.replica.parked)

    async def unkeyed(self) -> int:
        """See Replica.unkeyed: not for every minute."""
        return await self._ask(self.replica.unkeyed)

    async def logged(self) -> int:
        """Changes that are not absorbed yet."""
        return await self._ask(self.replica.logged)

    async def _ask(self, question: Callable[[], T]) -> T:
        try:
            return await self._on_reader(question)
        except apsw.SQLError:
            # The schema changed: a table went, or the writer is just installing one that the reader cannot see yet.
            await self._on_writer(self.replica.follow_schema)
            return await self._on_reader(question)

    async def ping(self) -> None:
        """Returns when both threads are free and the database answers."""
        await self._on_writer(self.replica.ping)
        await self._on_reader(lambda: None)

    async def absorb(self) -> int:
        """See Replica.absorb."""
        return (await while_waiting(self.write(self._piece), SIGHT_S, self._sight)).rows

    def _piece(self) -> Absorbed:
        """On the writer's thread."""
        absorbing = self.replica.absorbing
        absorbed = absorbing.absorb(self.time.bound_ms(), self.time.correction)
        if absorbed.rows:
            absorbing.took(absorbed.rows, self.replica.last_held_s)
        return absorbed

    async def _sight(self, *, on_writer: bool = False) -> None:
        self._sighted = time.monotonic()
        with contextlib.suppress(apsw.Error):  # without it, what is absorbed together is only larger
            sight = partial(self.replica.absorbing.sight, on_writer=on_writer)
            await (self._on_writer if on_writer else self._on_reader)(sight)

    async def absorb_all(self) -> int:
        """`absorb` until nothing was left for a moment: an application may never rest. Returns how many log rows were
        taken."""
        taken = 0
        while True:
            absorbed = await while_waiting(self.write_gently(self._piece), SIGHT_S, self._sight)
            taken += absorbed.rows
            if absorbed.drained:
                return taken

    async def shorten_log(self, longer_than: int) -> int:
        """Absorb everything if so many changes are logged, or some that may have evicted rows unseen. Returns how many
        were taken."""
        due = await self.logged() >= longer_than or await self._ask(self.replica.unseen.look_is_due)
        return await self.absorb_all() if due else 0

    async def follow_schema(self) -> None:
        """See Replica.follow_schema."""
        await self.write(self.replica.follow_schema)

    async def prune(self, server_ms: int) -> int:
        """See Replica.prune_tombstones."""
        return await self.write(lambda: self.replica.prune_tombstones(server_ms))
