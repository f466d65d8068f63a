"""What is done once nothing has been written for a while: the write-ahead log is to begin afresh."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

# So long after the last write, and so often.
REST_S: Final = 0.5
TRIES: Final = 4


class Resting:
    """at_rest: see Replica.at_rest; runs as a job of the writer's. All methods are for one event loop."""

    def __init__(self, at_rest: Callable[[bool], asyncio.Future[bool]]) -> None:
        self._at_rest = at_rest
        self._timer: asyncio.TimerHandle | None = None
        self._last_write = 0.0
        self._tries = 0
        self._closed = False

    def wrote(self) -> None:
        """Something was written just now."""
        self._last_write = asyncio.get_running_loop().time()
        self._tries = 0
        if self._timer is None:
            self._later(self._last_write + REST_S)

    def close(self) -> None:
        """Nothing is started any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _later(self, when: float) -> None:
        if not self._closed:
            self._timer = asyncio.get_running_loop().call_at(when, self._look)

    def _look(self) -> None:
        self._timer = None
        due = self._last_write + REST_S
        if asyncio.get_running_loop().time() < due:
            self._later(due)
            return
        self._tries += 1
        self._at_rest(self._tries >= TRIES).add_done_callback(self._done)

    def _done(self, done: asyncio.Future[bool]) -> None:
        if done.cancelled():
            return
        if (error := done.exception()) is not None:
            log.debug("write-ahead log not copied", extra={"fields": {"error": str(error)}})
        elif not done.result() and self._timer is None:
            self._later(asyncio.get_running_loop().time() + REST_S)
