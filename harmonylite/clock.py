"""Time on devices without a clock: steps of the wall clock, and the server's time (docs/rules.md, Clocks).

Wall times are milliseconds since 1970 (UTC); boot times milliseconds since this boot, also while suspended. Slewing
by NTP changes the rate of both clocks alike; only a step (settimeofday, a first NTP answer, a leap second) moves one
against the other. See clock_gettime(2).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BOOT_ID_VARIABLE = "HARMONYLITE_BOOT_ID"
# systemd-timesyncd's: the directory exists while it runs, the file from its first synchronisation on.
_TIMESYNC_SYNCHRONIZED = Path("/run/systemd/timesync/synchronized")

_TIME_ERROR = 5  # adjtimex(2): "the system clock is not synchronized to a reliable server"
_TIMEX_BYTES = 512  # struct timex has 208 bytes on 64-bit and 128 on 32-bit machines

Clock = Callable[[], int]


def wall_ms() -> int:
    """The wall clock."""
    return time.time_ns() // 1_000_000


def boottime_ms() -> int:
    """Time since boot; the monotonic clock where the kernel has no CLOCK_BOOTTIME."""
    try:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
    except (AttributeError, OSError):
        return time.monotonic_ns() // 1_000_000


def boot_id() -> str:
    """What tells this boot from all others; empty if nothing does.

    `ProcSubset=pid` hides the kernel's own id: then the unit passes it, `Environment=HARMONYLITE_BOOT_ID=%b`. Both
    give the same answer: %b has no dashes, and neither has this.
    """
    try:
        found = _BOOT_ID.read_text(encoding="ascii")
    except (OSError, ValueError):
        found = os.environ.get(_BOOT_ID_VARIABLE, "")
    return found.strip().replace("-", "")


def ntp_synchronized() -> bool | None:
    """Whether something disciplines the system's clock; None if that cannot be known.

    `ProtectClock=yes` forbids adjtimex even for reading: then systemd-timesyncd's mark tells, if it runs.
    """
    state = _adjtimex_state()
    if state is not None:
        return state != _TIME_ERROR
    if _TIMESYNC_SYNCHRONIZED.exists():
        return True
    return False if _TIMESYNC_SYNCHRONIZED.parent.is_dir() else None


def _adjtimex_state() -> int | None:
    """The state of the kernel's clock, TIME_OK (0) to TIME_ERROR (5); None if the kernel does not say."""
    try:
        # Imported here: MemoryDenyWriteExecute= can make the import itself fail.
        import ctypes

        buffer = ctypes.create_string_buffer(_TIMEX_BYTES)  # zeroed: modes = 0 changes nothing
        state = int(ctypes.CDLL(None).adjtimex(buffer))
    except (ImportError, OSError, AttributeError, MemoryError):
        return None
    return state if state >= 0 else None


@dataclass(frozen=True, slots=True)
class Step:
    """The wall clock jumped by `delta_ms`. `before_ms`: what the clock would show now, had it not.

    Rows whose times lie between this boot's start by the old clock and `before_ms` were written by the old clock.
    """

    delta_ms: int
    before_ms: int


class StepDetector:
    """Notices when the wall clock jumps against the boot clock. Slow drift between two checks is not a step."""

    _TRIES = 5
    _TIGHT_MS = 5

    def __init__(self, *, threshold_ms: int = 1000, wall: Clock = wall_ms, boottime: Clock = boottime_ms) -> None:
        self._threshold_ms = threshold_ms
        self._wall = wall
        self._boottime = boottime
        self._difference_ms, _, self._uncertainty_ms = self._read()

    def check(self) -> Step | None:
        """The jump since the last check, or since the detector was made, if it is larger than the threshold."""
        difference, boot, uncertainty = self._read()
        delta = difference - self._difference_ms
        before = boot + self._difference_ms
        stepped = abs(delta) > self._threshold_ms + uncertainty + self._uncertainty_ms
        if stepped or uncertainty <= max(self._TIGHT_MS, self._uncertainty_ms):
            self._difference_ms, self._uncertainty_ms = difference, uncertainty
        return Step(delta, before) if stepped else None

    def _read(self) -> tuple[int, int, int]:
        """Wall clock minus boot clock, the boot clock, and how far the first may be off.

        The process may be stopped between two readings: take the tightest of some.
        """
        best = self._read_once()
        for _ in range(self._TRIES):
            if best[2] <= self._TIGHT_MS:
                break
            best = min(best, self._read_once(), key=lambda reading: reading[2])
        return best

    def _read_once(self) -> tuple[int, int, int]:
        before, wall, after = self._boottime(), self._wall(), self._boottime()
        return wall - before, before, after - before


@dataclass(frozen=True, slots=True)
class _Sample:
    """At boot time `boot_ms` the server's clock showed `server_ms`, give or take `error_ms`."""

    boot_ms: int
    server_ms: int
    error_ms: int

    def server_at(self, boot_ms: int) -> int:
        return self.server_ms + boot_ms - self.boot_ms


class ServerClock:
    """Estimates the server's clock from its answers; steps of the local wall clock do not touch the estimate.

    Keeps the sample with the smallest round trip. It is replaced by any other one when it is older than `max_age_ms`,
    or when the two cannot both be true: then the server's clock was set.
    """

    # Two undisciplined quartz clocks drift apart by at most this much per second (100 ppm each).
    _DRIFT_PER_SECOND_MS = 0.2
    _RESOLUTION_MS = 2

    def __init__(self, *, boottime: Clock = boottime_ms, max_age_ms: int = 600_000) -> None:
        self._boottime = boottime
        self._max_age_ms = max_age_ms
        self._best: _Sample | None = None

    def sample(self, sent_boot_ms: int, received_boot_ms: int, server_ms: int) -> None:
        """The server answered `server_ms` to a request sent and answered at these boot times.

        Raises ValueError if the answer came before the request.
        """
        round_trip = received_boot_ms - sent_boot_ms
        if round_trip < 0:
            raise ValueError(f"answer received {-round_trip} ms before its request was sent")
        new = _Sample(sent_boot_ms + round_trip // 2, server_ms, (round_trip + 1) // 2)
        best = self._best
        if (
            best is None
            or new.error_ms <= best.error_ms
            or new.boot_ms - best.boot_ms > self._max_age_ms
            or self._contradict(best, new)
        ):
            self._best = new

    def now_ms(self) -> int | None:
        """The server's time; None before the first sample."""
        return None if self._best is None else self._best.server_at(self._boottime())

    def offset_ms(self, wall: int) -> int | None:
        """The server's time minus `wall`, the local wall clock read just now; None before the first sample."""
        now = self.now_ms()
        return None if now is None else now - wall

    @property
    def error_ms(self) -> int | None:
        """How far the estimate may be off: half the round trip of the sample it rests on."""
        return None if self._best is None else self._best.error_ms

    def _contradict(self, old: _Sample, new: _Sample) -> bool:
        drift = self._DRIFT_PER_SECOND_MS * (new.boot_ms - old.boot_ms) / 1000
        allowed = old.error_ms + new.error_ms + self._RESOLUTION_MS + abs(drift)
        return abs(new.server_ms - old.server_at(new.boot_ms)) > allowed
