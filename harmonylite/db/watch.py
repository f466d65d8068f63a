"""Wakes the daemon when somebody commits to the database: inotify on its directory.

Nobody is polled: an idle database costs nothing. inotify is used through ctypes because no maintained binding is in
Debian 12; where that fails, the write-ahead log is looked at ten times a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

# <sys/inotify.h>, the same on every architecture of Linux.
_IN_MODIFY, _IN_MOVED_TO, _IN_CREATE, _IN_Q_OVERFLOW = 0x2, 0x80, 0x100, 0x4000
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_EVENT = struct.Struct("iIII")  # wd, mask, cookie, length of the name
_READ_BYTES = 65_536

FALLBACK_INTERVAL_S = 0.1
# A folder that is not there is looked for that often.
DIRECTORY_S = 1.0


class Watch:
    """Calls `on_change` on the event loop, without arguments, when the database or its write-ahead log was written.

    The call comes at the write, a moment before the commit is visible to readers (2.4 ms at the median): look again
    a little later. It also comes for the daemon's own commits.
    """

    def __init__(self, path: Path, on_change: Callable[[], None]) -> None:
        self._directory = path.parent
        self._names = {path.name.encode(), f"{path.name}-wal".encode()}
        self._wal = Path(f"{path}-wal")
        self._on_change = on_change
        self._descriptor: int | None = None
        self._poller: asyncio.Task[None] | None = None

    def start(self) -> None:
        try:
            self._watch()
        except FileNotFoundError:
            self._poller = asyncio.create_task(self._wait_for_directory())
        except (OSError, ImportError, MemoryError) as error:
            log.warning(
                "inotify is not available; the write-ahead log is polled instead",
                extra={"fields": {"error": str(error), "interval_s": FALLBACK_INTERVAL_S}},
            )
            self._poller = asyncio.create_task(self._poll())

    def _watch(self) -> None:
        self._descriptor = _watch_directory(self._directory)
        asyncio.get_running_loop().add_reader(self._descriptor, self._readable)

    async def _wait_for_directory(self) -> None:
        """Its disk may not be mounted yet."""
        while not self._directory.exists():
            await asyncio.sleep(DIRECTORY_S)
        self._poller = None
        self.start()
        self._on_change()

    async def close(self) -> None:
        if self._descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None
        if self._poller is not None:
            self._poller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poller

    def _readable(self) -> None:
        assert self._descriptor is not None
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return
        if any(mask & _IN_Q_OVERFLOW or name in self._names for mask, name in _events(data)):
            self._on_change()

    async def _poll(self) -> None:
        seen = None
        while True:
            try:
                status = self._wal.stat()
                state = (status.st_mtime_ns, status.st_size)
            except OSError:
                state = None
            if state != seen:
                seen = state
                self._on_change()
            await asyncio.sleep(FALLBACK_INTERVAL_S)


def _watch_directory(directory: Path) -> int:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    wanted = _IN_MODIFY | _IN_MOVED_TO | _IN_CREATE
    if libc.inotify_add_watch(descriptor, os.fsencode(directory), wanted) < 0:
        number = ctypes.get_errno()
        os.close(descriptor)
        raise OSError(number, os.strerror(number), str(directory))
    return int(descriptor)


def _events(data: bytes) -> list[tuple[int, bytes]]:
    """(mask, file name) of each event in what was read."""
    found = []
    offset = 0
    while offset < len(data):
        _, mask, _, length = _EVENT.unpack_from(data, offset)
        offset += _EVENT.size
        found.append((mask, data[offset : offset + length].rstrip(b"\0")))
        offset += length
    return found
