"""What this node knows of the time: its own clock, the server's, and what to correct (docs/rules.md, Clocks)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

from harmonylite import clock
from harmonylite.clock import ServerClock, Step, StepDetector
from harmonylite.db.versions import NO_CORRECTION, Correction

log = logging.getLogger(__name__)

# A local clock nearer than this to the server's is believed even if nothing disciplines it.
TRUSTED_OFFSET_MS = 2_000


@dataclass(frozen=True, slots=True)
class Proposal:
    """What an answer of the server changes: unsent times of this boot have to be moved by `moved_ms` first."""

    server: ServerClock
    correction: Correction
    moved_ms: int


class Timekeeper:
    """Owns the estimate of the server's time and the correction of local times.

    tolerance_ms: how far ahead of the stream's time a version may be; a node itself claims at most half of that, so
    that the error of its estimate does not matter.
    """

    def __init__(self, tolerance_ms: int, *, synchronized: Callable[[], bool | None] = clock.ntp_synchronized) -> None:
        self._tolerance_ms = tolerance_ms
        self._synchronized = synchronized
        self._steps = StepDetector()
        self._step: Step | None = None
        self._started_ms = clock.wall_ms() - clock.boottime_ms()
        self._said_unknown = False
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

    def heard(self, server_ms: int, round_trip_ms: float) -> ServerClock:
        """The server answered just now with its time: the clock as it will be believed after `commit`."""
        received = clock.boottime_ms()
        server = copy.copy(self.server)  # its samples are immutable
        server.sample(received - round(round_trip_ms), received, server_ms)
        return server

    def untold(self, reason: str) -> None:
        """The server does not let this node know its time; logged once."""
        if not self._said_unknown:
            self._said_unknown = True
            log.warning(
                "the server's time is not known: if the clock of this device is wrong, its writes are not corrected",
                extra={"fields": {"reason": reason}},
            )

    def propose(self, server: ServerClock) -> Proposal:
        """What follows from the server's time. Nothing changes before `commit`: until then absorbing goes on by the
        old rules, and what it takes is moved too.

        A clock that nobody disciplines and that is far from the server's is wrong; until something sets it, the
        difference is added to the times that it logs.
        """
        offset = server.offset_ms(clock.wall_ms())
        wanted = 0 if offset is None or abs(offset) < TRUSTED_OFFSET_MS or self._synchronized() else offset
        moved = wanted - self.correction.delta_ms
        if abs(moved) < TRUSTED_OFFSET_MS:
            return Proposal(server, self.correction, 0)
        return Proposal(server, Correction(wanted) if wanted else NO_CORRECTION, moved)

    def commit(self, proposal: Proposal) -> None:
        """Unsent times were moved, durably: the proposal holds from now on."""
        self.server, self.correction = proposal.server, proposal.correction
        if proposal.moved_ms:
            log.warning(
                "the clock of this device is wrong and nothing sets it; times of writing are corrected"
                if proposal.correction.delta_ms
                else "the clock of this device is right again",
                extra={"fields": {"offset_s": proposal.correction.delta_ms / 1000}},
            )

    def check_step(self) -> Step | None:
        """The jump of the wall clock that is not dealt with yet, if any: the same one until `stepped`. The caller
        corrects what was written before it."""
        if self._step is None:
            self._step = self._steps.check()
            if self._step is not None:
                log.info("the clock was set", extra={"fields": {"by_s": self._step.delta_ms / 1000}})
        return self._step

    def is_trusted(self, server: ServerClock | None = None) -> bool:
        """Whether the wall clock is believed: something disciplines it, or it agrees with the server's."""
        offset = (server or self.server).offset_ms(clock.wall_ms())
        return bool(self._synchronized()) or (offset is not None and abs(offset) < TRUSTED_OFFSET_MS)

    def stepped(self) -> None:
        """The times before the step are dealt with; the clock is believed again."""
        self._step = None
        self._started_ms = clock.wall_ms() - clock.boottime_ms()
        self.correction = NO_CORRECTION
