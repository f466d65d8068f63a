"""What is done now and then: the clock, the watchdog, the status line, old tombstones, long logs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from harmonylite.config import Config
from harmonylite.engine import Engine
from harmonylite.observe.notify import Notifier, watchdog_interval
from harmonylite.observe.status import summary
from harmonylite.report import Reporter
from harmonylite.stream.client import Connection
from harmonylite.tasks import run_together

log = logging.getLogger(__name__)

CLOCK_S = 1.0
HOURLY_S = 3600.0
# Offline, a log is absorbed when it holds so many rows: then growth follows the rows changed, not the changes.
LONG_LOG_ROWS = 20_000
# Without any change the counts are looked at that seldom.
QUIET_REFRESH_S = 60.0


class Housekeeper:
    """Runs beside replication. touched: somebody committed since the last round."""

    def __init__(
        self, config: Config, engine: Engine, connection: Connection, reporter: Reporter, notifier: Notifier
    ) -> None:
        self._db_path = config.db_path
        self._interval_s = config.cleanup_interval / 1000
        self._engine = engine
        self._connection = connection
        self._reporter = reporter
        self._notifier = notifier
        self.touched = True

    async def run(self, opened: asyncio.Event, on_replaced: Callable[[], None]) -> None:
        """For ever. on_replaced: called once when the database's path leads to another file than at `opened`."""
        jobs = [
            self._watch_clock(opened),
            self._watch_file(opened, on_replaced),
            self._keep_house(opened),
            self._forget_tombstones(opened),
            self._audit(opened),
        ]
        if (interval := watchdog_interval()) is not None:
            jobs.append(self._feed_watchdog(interval, opened))
        await run_together(*jobs)

    async def _watch_clock(self, opened: asyncio.Event) -> None:
        await opened.wait()
        while True:
            await self._engine.check_clock()
            await asyncio.sleep(CLOCK_S)

    async def _watch_file(self, opened: asyncio.Event, on_replaced: Callable[[], None]) -> None:
        await opened.wait()
        first = self._file_id()
        while self._file_id() == first:
            await asyncio.sleep(CLOCK_S)
        on_replaced()
        await asyncio.Event().wait()

    def _file_id(self) -> tuple[int, int] | None:
        try:
            status = self._db_path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    async def _feed_watchdog(self, interval_s: float, opened: asyncio.Event) -> None:
        """Only while the database answers, once it was opened: a daemon that hangs on it is started again."""
        while True:
            if opened.is_set():
                await self._engine.ping()
            self._notifier.watchdog()
            await asyncio.sleep(interval_s)

    async def _keep_house(self, opened: asyncio.Event) -> None:
        refreshed = 0.0
        while True:
            self._notifier.status(summary(self._reporter.current()))
            await asyncio.sleep(self._interval_s)
            if not opened.is_set():
                continue
            if self.touched or time.monotonic() - refreshed > QUIET_REFRESH_S:
                self.touched = False
                refreshed = time.monotonic()
                await self._reporter.refresh()
                if not self._connection.connected:
                    await self._shorten_log()

    async def _shorten_log(self) -> None:
        if await self._engine.logged() < LONG_LOG_ROWS:
            return
        taken = 0
        while count := await self._engine.absorb():
            taken += count
        log.debug("absorbed a long change log while offline", extra={"fields": {"rows": taken}})

    async def _forget_tombstones(self, opened: asyncio.Event) -> None:
        await opened.wait()
        while True:
            server_ms = self._engine.time.server.now_ms()
            if self._connection.connected and server_ms is not None:
                while forgotten := await self._engine.prune(server_ms):
                    log.debug("tombstones forgotten", extra={"fields": {"rows": forgotten}})
            await asyncio.sleep(HOURLY_S)

    async def _audit(self, opened: asyncio.Event) -> None:
        """Second line behind the triggers: rows that should be there and are not."""
        await opened.wait()
        while True:
            await asyncio.sleep(HOURLY_S)
            if found := await self._engine.audit():
                log.warning("rows were gone that no trigger had seen", extra={"fields": {"rows": found}})
