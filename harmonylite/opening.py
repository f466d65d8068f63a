"""Opening the database, however long that takes, and telling the service manager when this node is ready."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import apsw

from harmonylite.db.tables import ForeignDatabaseError
from harmonylite.engine import Engine
from harmonylite.observe.log import Repeated
from harmonylite.observe.notify import STARTING_S, Notifier
from harmonylite.report import Reporter
from harmonylite.tasks import run_together

log = logging.getLogger(__name__)

# Between two tries to open a database that is not there or locked.
RETRY_S = 1.0


class Opening:
    """Once per daemon. opened: set when capture is installed; ready: whether the service manager was told."""

    def __init__(self, path: Path, engine: Engine, reporter: Reporter, notifier: Notifier) -> None:
        self._path = path
        self._engine = engine
        self._reporter = reporter
        self._notifier = notifier
        self.opened = asyncio.Event()
        self.ready = False

    async def run(self) -> None:
        """Open the database, however long that takes; raises only for what waiting cannot mend.

        Ready is who captures, or waits for a database that is not there yet or locked: the application may come hours
        later, and a service manager would take that for a start that failed.
        """
        complain = Repeated(log, 600.0)
        while True:
            try:
                await run_together(self._engine.open(), self._ask_for_time())
                break
            except ForeignDatabaseError:
                raise
            except apsw.Error as error:
                reason = f"{error}"
                if not self._path.exists():
                    reason = "there is no such file yet"
                self._reporter.database_error = reason
                complain.warning("the database cannot be opened; trying again", {"db": self._path, "reason": reason})
                self._say_ready()
                await asyncio.sleep(RETRY_S)
        self._reporter.database_error = None
        tables = self._engine.replica.schema.tables
        log.info("database open, capture installed", extra={"fields": {"tables": len(tables)}})
        self.opened.set()
        await self._reporter.refresh()
        self._say_ready()

    async def _ask_for_time(self) -> None:
        """While the database is being opened: taking stock of a large one, on a slow card, takes its time."""
        while not self.ready:
            self._notifier.starting()
            await asyncio.sleep(STARTING_S / 4)
        await asyncio.Event().wait()

    def _say_ready(self) -> None:
        if self.ready:
            self._notifier.status(self._reporter.line())
        else:
            self._notifier.ready(self._reporter.line())
        self.ready = True
