"""Writes that are tried until they work: the application may hold the lock, the disk may be full for a while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import apsw

from harmonylite.observe.log import Repeated
from harmonylite.observe.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")

# Pauses between tries when the database is locked or its disk is full.
RETRY_FIRST_S, RETRY_LONGEST_S = 0.05, 5.0


class Retrying:
    """Runs writes, and knows which of them fail. take_held: seconds that the lock was held since it was asked last."""

    def __init__(self, metrics: Metrics, take_held: Callable[[], float]) -> None:
        self._metrics = metrics
        self._take_held = take_held
        self._said = Repeated(log)
        self._failing: dict[object, str] = {}  # by what is being tried again
        self._given_up: str | None = None

    async def run(self, attempt: Callable[[], Awaitable[tuple[T, float]]]) -> tuple[T, float]:
        """Try until it works; returns its result, and how many seconds it held the database's lock."""
        pause = RETRY_FIRST_S
        this = object()
        try:
            while True:
                try:
                    result, held = await attempt()
                except (apsw.BusyError, apsw.LockedError) as error:
                    self._metrics.busy_retries.inc(1)
                    self._complain(this, "the application holds the database's lock; trying again", error)
                except (apsw.FullError, apsw.IOError, apsw.CantOpenError, apsw.ReadOnlyError, apsw.NoMemError) as error:
                    self._complain(this, "the database cannot be written; trying again", error)
                else:
                    self._failing.pop(this, None)
                    if held:  # a transaction of its own, not just a look
                        self._given_up = None
                        self._metrics.apply_lock_seconds.observe(held)
                    return result, held
                await asyncio.sleep(pause)
                pause = min(pause * 2, RETRY_LONGEST_S)
        finally:
            # Not done, and nobody waits for it any more: that the database cannot be written is as true as before.
            self._given_up = self._failing.pop(this, self._given_up)

    def _complain(self, this: object, text: str, error: apsw.Error) -> None:
        if held := self._take_held():
            self._metrics.apply_lock_seconds.observe(held)
        self._failing[this] = f"{text}: {error}"
        self._said.warning(text, {"error": str(error)})

    @property
    def last_error(self) -> str | None:
        """Why something that has to be written is not; another write that works does not change that."""
        return next(iter(self._failing.values()), self._given_up)
