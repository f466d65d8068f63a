"""What this node knows of the time: its own clock, the server's, and what to correct (DESIGN 8)."""

from __future__ import annotations

import logging
from collections.abc import Callable

from harmonylite import clock
from harmonylite.clock import ServerClock, Step, StepDetector
from harmonylite.db.versions import NO_CORRECTION, Correction

log = logging.getLogger(__name__)

# A local clock nearer than this to the server's is believed even if nothing disciplines it.
TRUSTED_OFFSET_MS = 2_000


class Timekeeper:
    """Owns the estimate of the server's time and the correction of local times.

    tolerance_ms: how far ahead of the stream's time a version may be; a node itself claims at most half of that, so
    that the error of its estimate does not matter.
    """

    def __init__(self, tolerance_ms: int, *, synchronized: Callable[[], bool | None] = clock.ntp_synchronized) -> None:
        self._tolerance_ms = tolerance_ms
        self._synchronized = synchronized
        self._steps = StepDetector()
        self._started_ms = clock.wall_ms() - clock.boottime_ms()
        self.server = ServerClock()
        self.correction = NO_CORRECTION

    @property
    def boot_started_ms(self) -> int:
        """When this boot began, by the clock as it was when the daemon started."""
        return self._started_ms

    def bound_ms(self) -> int | None:
        """The latest time that a write made here may claim; None while the server's time is not known."""
        now = self.server.now_ms()
        return None if now is None else now + self._tolerance_ms // 2

    def offset_s(self) -> float | None:
        """Local clock minus the server's, in seconds; None when never measured."""
        offset = self.server.offset_ms(clock.wall_ms())
        return None if offset is None else -offset / 1000

    def sample(self, server_ms: int, round_trip_ms: float) -> int:
        """The server answered just now with its time. Returns by how much unsent times of this boot must be moved.

        A clock that nobody disciplines and that is far from the server's is wrong; until something sets it, the
        difference is added to the times that it logs.
        """
        received = clock.boottime_ms()
        self.server.sample(received - round(round_trip_ms), received, server_ms)
        offset = self.server.offset_ms(clock.wall_ms())
        wanted = 0 if offset is None or abs(offset) < TRUSTED_OFFSET_MS or self._synchronized() else offset
        if abs(wanted - self.correction.delta_ms) < TRUSTED_OFFSET_MS:
            return 0
        moved = wanted - self.correction.delta_ms
        log.warning(
            "the clock of this device is wrong and nothing sets it; times of writing are corrected"
            if wanted
            else "the clock of this device is right again",
            extra={"fields": {"offset_s": wanted / 1000}},
        )
        self.correction = Correction(wanted) if wanted else NO_CORRECTION
        return moved

    def check_step(self) -> Step | None:
        """Whether the wall clock jumped since the last look. The caller corrects what was written before."""
        step = self._steps.check()
        if step is not None:
            log.info("the clock was set", extra={"fields": {"by_s": step.delta_ms / 1000}})
        return step

    def is_trusted(self) -> bool:
        """Whether the wall clock is believed: something disciplines it, or it agrees with the server's."""
        offset = self.server.offset_ms(clock.wall_ms())
        return bool(self._synchronized()) or (offset is not None and abs(offset) < TRUSTED_OFFSET_MS)

    def stepped(self) -> None:
        """The times before a step are dealt with; the clock is believed again."""
        self._started_ms = clock.wall_ms() - clock.boottime_ms()
        self.correction = NO_CORRECTION
