"""What a daemon tells systemd, heard by a test."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path


class NotifySocket:
    """What systemd would hear. A context manager; the daemon gets `path` as NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._heard: list[str] = []

    def __enter__(self) -> NotifySocket:
        self._socket.bind(str(self.path))
        self._socket.setblocking(False)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def received(self) -> list[str]:
        """All lines so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._heard += self._socket.recv(65536).decode().splitlines()
        return self._heard
