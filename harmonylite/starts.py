"""Starts after bad ends, further and further apart.

systemd pauses between two starts; that the pause grows it knows since version 254 (RestartSteps=), and Debian 12 has
252. So the daemon keeps a distance between its own starts: whoever was killed, crashed or failed leaves a mark in the
service's runtime directory, which systemd keeps over restarts and removes when the service is stopped
(RuntimeDirectoryPreserve=restart). What counts is the time from start to start: a service manager that has paused long
enough by itself is not made to wait again.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harmonylite.observe.notify import Notifier

log = logging.getLogger(__name__)

# From one start to the next after the first bad end, doubled with each further one; the unit's own pauses are the same.
FIRST_S = 5.0
LONGEST_S = 60.0
# Who has run that long ran well: what ends it then is the first bad end again.
WELL_S = 600.0

_FILE = "last-start"
_SAY_S = 5.0


@dataclass(frozen=True, slots=True)
class _Mark:
    """A start that has not ended well yet. started_s: monotonic; bad: how many ended badly before; pid: of the process,
    which stays the same when the daemon begins anew by itself."""

    started_s: float
    bad: int
    pid: int


class Starts:
    """The starts of one service. file: where the mark is."""

    def __init__(self, file: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock

    @classmethod
    def of_service(cls) -> Starts | None:
        """Of the systemd service whose runtime directory the environment names (systemd.exec(5)); None: of no service,
        nobody starts it again and again."""
        folder = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
        return cls(Path(folder, _FILE)) if folder and os.environ.get("NOTIFY_SOCKET") else None

    def begin(self, notifier: Notifier) -> bool:
        """Wait as long as the last ends ask for, then mark this start. False: told to stop meanwhile."""
        now, last, mine = self._clock(), self._read(), os.getpid()
        if last is not None and last.pid == mine:
            return True
        bad, begin_s = 0, now
        # A mark of another boot, when the directory outlives it, may lie in the future.
        if last is not None and last.started_s - now <= LONGEST_S:
            bad = last.bad + 1 if now - last.started_s < WELL_S else 1
            begin_s = max(now, last.started_s + distance(bad))
        # Before the wait: killed during it, the next start knows of this one.
        self._write(_Mark(begin_s, bad, mine))
        if begin_s > now:
            fields = {"bad_ends": bad, "wait_s": round(begin_s - now, 1)}
            log.warning("the last starts ended badly; this one waits", extra={"fields": fields})
            if not self._wait(begin_s, bad, notifier):
                log.info("told to stop while it waited")
                self.ended_well()
                return False
        return True

    def ended_well(self) -> None:
        """The daemon was told to stop: the next start waits for nothing."""
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            self._complain(error)

    def _wait(self, until_s: float, bad: int, notifier: Notifier) -> bool:
        """False: a signal to stop came. No event loop runs yet, so signals are taken from the kernel one by one."""
        signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        ends = "start" if bad == 1 else f"{bad} starts"
        try:
            while (left := until_s - self._clock()) > 0:
                notifier.starting()
                notifier.status(
                    f"waiting {left:.0f} s: the last {ends} ended badly (systemctl restart: without waiting)"
                )
                came = signal.sigtimedwait(signals, min(left, _SAY_S))
                if came is not None and came.si_signo != signal.SIGHUP:
                    return False
            return True
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _read(self) -> _Mark | None:
        try:
            fields = json.loads(self._file.read_bytes())
            return _Mark(float(fields["started_s"]), int(fields["bad"]), int(fields["pid"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._complain(error)
            return None

    def _write(self, mark: _Mark) -> None:
        fields = {"started_s": mark.started_s, "bad": mark.bad, "pid": mark.pid}
        try:
            self._file.write_text(json.dumps(fields))
        except OSError as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        """Nothing here is worth not starting."""
        fields = {"file": self._file, "error": f"{type(error).__name__}: {error}"}
        log.warning("how the last start ended cannot be kept", extra={"fields": fields})


def distance(bad: int) -> float:
    """Seconds from one start to the next after `bad` bad ends in a row (from 1)."""
    return min(LONGEST_S, FIRST_S * 2.0 ** min(bad - 1, 10))
