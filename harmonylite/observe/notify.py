"""Telling systemd how the daemon is (sd_notify(3)); without systemd nothing happens."""

from __future__ import annotations

import os
import time

import sdnotify

# How much longer a start may take each time that `Notifier.starting` says so.
STARTING_S = 60.0


class Notifier:
    """The connection to the service manager that NOTIFY_SOCKET names when this is made. Never raises."""

    def __init__(self) -> None:
        listening = bool(os.environ.get("NOTIFY_SOCKET"))
        self._systemd = sdnotify.SystemdNotifier() if listening else None
        self._status = ""

    def ready(self, status: str = "") -> None:
        """The local job runs: after the start, and after a reload."""
        self._send("READY=1", *self._status_line(status))

    def starting(self) -> None:
        """Not ready yet, but at work: the service manager grants another `STARTING_S` (systemd 236)."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(STARTING_S * 1_000_000)}")

    def status(self, text: str) -> None:
        """The line that `systemctl status` shows; sent only when it differs from the last one."""
        self._send(*self._status_line(text))

    def reloading(self) -> None:
        """A reload begins; `ready` ends it. systemd 253 tells reloads apart by the time."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def stopping(self, status: str = "") -> None:
        """The shutdown began."""
        self._send("STOPPING=1", *self._status_line(status))

    def watchdog(self) -> None:
        """The daemon lives and its database answers."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Nothing more is sent."""
        if self._systemd is not None and self._systemd.socket is not None:
            self._systemd.socket.close()
        self._systemd = None

    def _status_line(self, text: str) -> list[str]:
        line = " ".join(text.split())
        if not line or line == self._status:
            return []
        self._status = line
        return [f"STATUS={line}"]

    def _send(self, *assignments: str) -> None:
        if assignments and self._systemd is not None:
            # sdnotify encodes as Latin-1 and drops what does not fit; systemd reads UTF-8.
            self._systemd.notify("\n".join(assignments).encode(errors="replace").decode("latin-1"))


def watchdog_interval() -> float | None:
    """Seconds between two `Notifier.watchdog` calls: half of what systemd allows; None when it expects none.

    sd_watchdog_enabled(3): WATCHDOG_USEC counts only for the process that WATCHDOG_PID names.
    """
    try:
        limit_us = int(os.environ["WATCHDOG_USEC"])
        process = int(os.environ.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    if limit_us <= 0 or process != os.getpid():
        return None
    return limit_us / 2_000_000
