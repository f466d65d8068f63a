"""Why a session ended: what the operator is told, and when the next one begins."""

from __future__ import annotations

import logging
from pathlib import Path

import apsw

from harmonylite.db.copy import DamagedDatabaseError
from harmonylite.observe.log import Repeated
from harmonylite.progress import Progress
from harmonylite.replication import BeginAgain
from harmonylite.stream.log import LogError

log = logging.getLogger(__name__)

# Until the next session. A database that is damaged does not mend itself: each pause is twice as long, up to the last.
PAUSE_S, DAMAGED_S, LONGEST_DAMAGED_S = 1.0, 10.0, 600.0


class Endings:
    """One per daemon."""

    def __init__(self, db_path: Path, progress: Progress) -> None:
        self._db_path = db_path
        self._progress = progress
        self._damaged_s = 0.0
        self._trouble = Repeated(log, 600.0)

    def note(self, error: Exception) -> float:
        """A session ended by this; the node goes on doing its local job. Returns the pause in seconds."""
        damaged_s, self._damaged_s = self._damaged_s, 0.0
        if isinstance(error, BeginAgain):
            log.info("replication begins again", extra={"fields": {"reason": str(error)}})
        elif isinstance(error, LogError):
            self._damaged_s = damaged_s
            self._progress.error = str(error)
            self._trouble.warning("replication waits", {"reason": str(error)})
        elif isinstance(error, (apsw.CorruptError, apsw.NotADBError)):
            self._damaged_s = min(2 * damaged_s, LONGEST_DAMAGED_S) if damaged_s else DAMAGED_S
            self._progress.error = str(DamagedDatabaseError(self._db_path, error))
            log.error("replication waits", extra={"fields": {"reason": self._progress.error}})
            return self._damaged_s
        else:
            self._progress.error = f"{type(error).__name__}: {error}"
            log.error(
                "replication failed; it starts again",
                exc_info=error if log.isEnabledFor(logging.DEBUG) else None,
                extra={"fields": {"error": self._progress.error}},
            )
        return PAUSE_S
