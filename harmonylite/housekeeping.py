"""What is done now and then: the clock, the watchdog, the status line, old tombstones, long logs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from harmonylite.config import Config
from harmonylite.engine import Engine
from harmonylite.mounts import is_read_only
from harmonylite.observe.log import Repeated
from harmonylite.observe.notify import Notifier, watchdog_interval
from harmonylite.progress import Progress
from harmonylite.report import Reporter
from harmonylite.second_look import SecondLook
from harmonylite.tasks import run_together
from harmonylite.uplink import Uplink

log = logging.getLogger(__name__)

CLOCK_S = 1.0
HOURLY_S = 3600.0
# So often it is asked whether the hourly look at old tombstones can be had: not while anything is still to be read.
TOMBSTONES_S = 60.0
# Rows without a key are counted that often, if anything was written: it reads an index of each table that may have any.
UNKEYED_S = 600.0
# Offline, a log is absorbed when it holds so many rows: then growth follows the rows changed, not the changes.
LONG_LOG_ROWS = 20_000
# A card with errors turns read-only; that is in the mount table, and looking there costs no access to the card.
DISK_S = 10.0
# Without any change the counts are looked at that seldom.
QUIET_REFRESH_S = 60.0


class Housekeeper:
    """Runs beside replication. touched: somebody committed since the last round; interval_s: between two rounds, may
    change at any time."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        progress: Progress,
        connection: Uplink,
        reporter: Reporter,
        notifier: Notifier,
    ) -> None:
        self._db_path = config.db_path
        self.interval_s = config.cleanup_interval / 1000
        self._engine = engine
        self._second_look = SecondLook(engine)
        self._progress = progress
        self._connection = connection
        self._reporter = reporter
        self._notifier = notifier
        self._refreshed = 0.0
        self._unkeyed_due = True
        self._tombstones_due_s = 0.0
        self.touched = True

    async def run(self, opened: asyncio.Event, on_replaced: Callable[[], None]) -> None:
        """For ever. on_replaced: called once when the database's path leads to another file than at `opened`."""
        jobs = [
            _every(lambda: self.interval_s, "status", lambda: self._keep_house(opened)),
            self._watch_file(opened, on_replaced),
            _every(DISK_S, "file system", self._look_at_disk),
            _every(CLOCK_S, "clock", self._engine.correcting.check_clock, opened),
            _every(TOMBSTONES_S, "tombstones", self._forget_tombstones, opened),
            _every(UNKEYED_S, "rows without a key", self._count_unkeyed, opened),
            _every(CLOCK_S, "rows to be known", self._second_look.stamp, opened),
            _every(CLOCK_S, "rebuilt tables", self._recapture, opened),
            _every(lambda: self.interval_s, "evicted rows", self._look_again, opened),
            _every(HOURLY_S, "audit", self._audit, opened, delay_s=HOURLY_S),
        ]
        if (interval := watchdog_interval()) is not None:
            jobs.append(_every(interval, "watchdog", lambda: self._feed_watchdog(opened)))
        await run_together(*jobs)

    async def _watch_file(self, opened: asyncio.Event, on_replaced: Callable[[], None]) -> None:
        """A file that is gone comes back, perhaps: only another one in its place is a reason to start again."""
        await opened.wait()
        first = self._file_id()
        while (now := self._file_id()) is None or now == first:
            await asyncio.sleep(CLOCK_S)
        on_replaced()
        await asyncio.Event().wait()

    def _file_id(self) -> tuple[int, int] | None:
        try:
            status = self._db_path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    async def _feed_watchdog(self, opened: asyncio.Event) -> None:
        """Only while the database answers, once it was opened: a daemon that hangs on it is started again."""
        if opened.is_set():
            await self._engine.ping()
        self._notifier.watchdog()

    async def _keep_house(self, opened: asyncio.Event) -> None:
        self._notifier.status(self._reporter.line())
        if not opened.is_set():
            return
        if not self.touched and time.monotonic() - self._refreshed <= QUIET_REFRESH_S:
            return
        touched, self.touched = self.touched, False
        self._refreshed = time.monotonic()
        self._unkeyed_due |= touched
        if touched:
            # Connected or not: a table that is new is captured from its first rows on.
            await self._engine.follow_schema()
        await self._reporter.refresh()
        if not self._connection.connected and (taken := await self._engine.shorten_log(LONG_LOG_ROWS)):
            log.debug("absorbed a long change log while offline", extra={"fields": {"rows": taken}})

    async def _look_at_disk(self) -> None:
        """Nobody may write for hours: the operator hears of it before the application does."""
        now = is_read_only(self._db_path.parent)
        if now == self._reporter.read_only:
            return
        self._reporter.read_only = now
        fields = {"db": self._db_path}
        if now:
            log.error("the database's file system is read-only; nothing can be written", extra={"fields": fields})
        else:
            log.warning("the database's file system can be written again", extra={"fields": fields})
        self._notifier.status(self._reporter.line())

    async def _forget_tombstones(self) -> None:
        """Not before everything was read: what is still to come may be older than a tombstone, and a log that is new is
        to be filled with them again. A device that is never on for an hour has its look, too."""
        server_ms = self._engine.time.server.now_ms()
        while server_ms is not None and self._connection.connected and self._progress.in_step:
            if time.monotonic() < self._tombstones_due_s:
                return
            if not (forgotten := await self._engine.prune(server_ms)):
                self._tombstones_due_s = time.monotonic() + HOURLY_S
                return
            log.debug("tombstones forgotten", extra={"fields": {"rows": forgotten}})

    async def _count_unkeyed(self) -> None:
        if self._unkeyed_due:
            self._unkeyed_due = False
            await self._reporter.count_unkeyed()

    async def _recapture(self) -> None:
        """Connected or not."""
        if self._engine.replica.recapturing.under_way is not None:
            await self._engine.recapture()

    async def _look_again(self) -> None:
        if evicted := await self._second_look.look_again():
            log.info("rows that OR REPLACE had removed were found", extra={"fields": {"rows": evicted}})

    async def _audit(self) -> None:
        """Second line behind the triggers: rows that should be there and are not."""
        if found := await self._second_look.audit():
            log.warning("rows were gone that no trigger had seen", extra={"fields": {"rows": found}})


async def _every(
    interval_s: float | Callable[[], float],
    name: str,
    job: Callable[[], Awaitable[None]],
    opened: asyncio.Event | None = None,
    *,
    delay_s: float = 0.0,
) -> None:
    """Do a job again and again, `interval_s` apart, from when the database is open. One that fails is tried again at
    its next turn: nothing that goes wrong here may end the others."""
    trouble = Repeated(log)
    if opened is not None:
        await opened.wait()
    await asyncio.sleep(delay_s)
    while True:
        try:
            await job()
        except Exception as error:
            trouble.error(
                "housekeeping failed; it is done again", {"job": name, "error": f"{type(error).__name__}: {error}"}
            )
        await asyncio.sleep(interval_s() if callable(interval_s) else interval_s)
