"""Files on the way to or from a store: read, written and checked in a thread that can be stopped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores.base import (
    CorruptSnapshot,
    SnapshotMissing,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
)

T = TypeVar("T")

# Called by the work in a thread at least once per piece; it raises when the work is to stop.
Beat = Callable[[], None]
# Fetches an object from an offset on, and appends it to a file that has just that size.
Fetch = Callable[[int], Awaitable[None]]

# What is read or written at once, bytes.
PIECE_BYTES = 1 << 20
# A share that hangs may never answer a system call: its thread is then left to itself.
PATIENCE_S = 120.0
# One fsync writes what the kernel still holds of a file, at this pace at least.
_SLOWEST_DISK_BYTES_S = 1 << 20
_STOP_S = 5.0

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Stopped(Exception):  # noqa: N818 - never seen outside
    """The work was told to stop."""


async def in_thread(work: Callable[[Beat], T], *, where: Path, patience_s: float = PATIENCE_S) -> T:
    """Run `work` in a thread of its own; an OSError of it becomes a StoreError that names `where`.

    Ends when the thread has ended, also when cancelled, so that nobody writes a file behind the caller's back; except
    that StoreUnavailable is raised after `patience_s` without a beat.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()
    stop = threading.Event()
    heard = time.monotonic()

    def beat() -> None:
        nonlocal heard
        heard = time.monotonic()
        if stop.is_set():
            raise _Stopped

    def tell(result: T | None, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = work(beat)
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits any more
            loop.call_soon_threadsafe(tell, result, failure)

    # A daemon thread: one that hangs in the kernel must not keep the process from ending.
    threading.Thread(target=run, name="snapshot file", daemon=True).start()
    try:
        while not outcome.done():
            left_s = heard + patience_s - time.monotonic()
            if left_s <= 0:
                raise StoreUnavailable(f"{where} did not answer for {patience_s:g} s: is a share disconnected?")
            await asyncio.wait([outcome], timeout=left_s)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([outcome], timeout=_STOP_S)
        raise
    finally:
        stop.set()
        outcome.add_done_callback(_retrieve)
    try:
        return outcome.result()
    except OSError as error:
        raise file_error(error, where) from None


def _retrieve(outcome: asyncio.Future[T]) -> None:
    if not outcome.cancelled():
        outcome.exception()


def file_error(error: OSError, where: Path) -> StoreError:
    """What an OSError at `where` means for a store."""
    line = f"{error.filename or where}: {error.strerror or error}"
    if error.errno in _FULL:
        return StoreFull(f"{line}: make room there")
    if error.errno in _REFUSED:
        return StoreRefused(f"{line}: check that it exists and that this service may write there")
    return StoreUnavailable(line)


def patience_for_sync(size: int) -> float:
    """How long an fsync of a new file of `size` bytes may take, seconds."""
    return PATIENCE_S + size / _SLOWEST_DISK_BYTES_S


def size_or_none(path: Path) -> int | None:
    """Bytes of a file, None if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def digest(path: Path, beat: Beat) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            beat()
            state.update(piece)
    return state.hexdigest()


def sync_directory(folder: Path) -> None:
    """Make renames and removals in `folder` last."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot
            raise
    finally:
        os.close(handle)


async def require_size(path: Path, manifest: Manifest) -> None:
    """Raises CorruptSnapshot if a file to be uploaded has another size than its manifest says."""
    size = await in_thread(lambda beat: path.stat().st_size, where=path)
    if size != manifest.stored_size:
        raise CorruptSnapshot(f"{path} has {size} bytes, not the {manifest.stored_size} of snapshot {manifest.id}")


async def fetch_verified(manifest: Manifest, path: Path, fetch: Fetch) -> None:
    """Download with `fetch`, going on from what `path` holds, and check the result.

    Raises CorruptSnapshot or SnapshotMissing (`path` is then removed), and what `fetch` raises.
    """
    begun = await in_thread(lambda beat: size_or_none(path), where=path) or 0
    if begun > manifest.stored_size:
        begun = 0
    try:
        if begun:
            with contextlib.suppress(CorruptSnapshot):
                await _fetch_from(manifest, path, fetch, begun)
                return
            # What was there was the beginning of something else, or suffered in a power cut.
        await _fetch_from(manifest, path, fetch, 0)
    except (CorruptSnapshot, SnapshotMissing):
        await in_thread(lambda beat: path.unlink(missing_ok=True), where=path)
        raise


async def _fetch_from(manifest: Manifest, path: Path, fetch: Fetch, begun: int) -> None:
    if not begun:
        await in_thread(lambda beat: path.write_bytes(b""), where=path)
    if begun < manifest.stored_size:
        await fetch(begun)
    patience_s = patience_for_sync(manifest.stored_size)
    await in_thread(lambda beat: _check(manifest, path, beat), where=path, patience_s=patience_s)


def _check(manifest: Manifest, path: Path, beat: Beat) -> None:
    size = path.stat().st_size
    if size != manifest.stored_size:
        raise CorruptSnapshot(f"snapshot {manifest.id} has {size} bytes in the store, not {manifest.stored_size}")
    with path.open("rb") as file:
        os.fsync(file.fileno())
    beat()
    if digest(path, beat) != manifest.sha256:
        raise CorruptSnapshot(f"snapshot {manifest.id} is damaged in the store: its SHA-256 is another one")
