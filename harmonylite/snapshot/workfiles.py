"""The files that taking and merging snapshots need for a while: beside the database, on its file system.

Every name begins with `.<database>.harmonylite-`, so that whatever a killed daemon left is recognized: a download or
an unpacked snapshot is used again by the next try, everything else is removed at the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import zstandard

from harmonylite.db.copy import DATABASE_SUFFIXES
from harmonylite.snapshot.manifest import Manifest, is_id
from harmonylite.snapshot.stores.base import CorruptSnapshot

T = TypeVar("T")
Progress = Callable[[int, int], None]

# Level 3 costs a third more time than level 1 and saves a tenth of the bytes; links are slower than processors.
ZSTD_LEVEL = 3
CHUNK_BYTES = 1 << 20
# Left free for the application, whatever we do.
ROOM_LEFT_BYTES = 16 << 20


class SnapshotFailed(Exception):  # noqa: N818 - what happened
    """A snapshot cannot be taken or used now. One line for the operator."""


class NoRoom(SnapshotFailed):
    """The disk has too little room for it."""


class Stopped(Exception):  # noqa: N818
    """Whoever waited for the work does not any more."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A compressed file: bytes before and after, and the digest of the compressed bytes (hexadecimal)."""

    size: int
    stored_size: int
    sha256: str


class WorkFiles:
    """Names and removes the files of one database."""

    def __init__(self, db_path: Path) -> None:
        self._db_path = db_path
        self._folder = db_path.parent
        self._prefix = f".{db_path.name}.harmonylite-"
        # What is being made: of no use to anybody else. `mirror` is a folder.
        self.copy = self._path("copy")
        self.packed = self._path("packed")
        self.adopted = self._path("adopted")
        self.mirror = self._path("mirror")

    def database_bytes(self) -> int:
        """What the database takes, its write-ahead log included. Raises OSError if there is none."""
        log = self._db_path.with_name(f"{self._db_path.name}-wal")
        return self._db_path.stat().st_size + (log.stat().st_size if log.exists() else 0)

    def download(self, snapshot_id: str) -> Path:
        """Compressed bytes, perhaps not all of them yet."""
        return self._path(f"download-{snapshot_id}")

    def unpacked(self, snapshot_id: str) -> Path:
        """A whole SQLite file, checked when it was unpacked."""
        return self._path(f"snapshot-{snapshot_id}")

    def check_room(self, manifest: Manifest) -> None:
        """Raises NoRoom if the disk cannot take what is missing of a snapshot: packed and unpacked; then, without what
        was packed, unpacked and merged into the database, which may become as large."""
        packed = self.download(manifest.id)
        growth = max(0, manifest.size - self.database_bytes()) if self._db_path.exists() else 0
        there = sum(path.stat().st_size for path in (packed, _part(self.unpacked(manifest.id))) if path.exists())
        needed = manifest.size + max(manifest.stored_size, growth)
        check_room(self._folder, needed - there, f"snapshot {manifest.id}")

    def downloads(self) -> list[str]:
        """Ids of snapshots of which there is something here, the unpacked ones first."""
        found = []
        for kind in ("snapshot-", "download-"):
            for path in sorted(self._folder.glob(f"{_escaped(self._prefix + kind)}*")):
                name = path.name.removeprefix(self._prefix + kind)
                if is_id(name) and name not in found:
                    found.append(name)
        return found

    def tidy(self) -> None:
        """At the start: remove what a killed process left, except what catching up can use again."""
        kept = [path for snapshot_id in self.downloads() for path in self._of(snapshot_id)]
        _remove([path for path in self._folder.glob(f"{_escaped(self._prefix)}*") if path not in kept])

    async def keep_only(self, snapshot_id: str | None) -> None:
        """Remove what was fetched of all other snapshots."""
        await remove(*(path for other in self.downloads() if other != snapshot_id for path in self._of(other)))

    async def forget(self, snapshot_id: str) -> None:
        """Remove everything of one snapshot."""
        await remove(*self._of(snapshot_id))

    def _of(self, snapshot_id: str) -> tuple[Path, ...]:
        unpacked = self.unpacked(snapshot_id)
        return self.download(snapshot_id), unpacked, _part(unpacked)

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._prefix}{kind}"


def _part(unpacked: Path) -> Path:
    return Path(f"{unpacked}.part")


async def remove(*paths: Path) -> None:
    """Remove databases, and folders. Freeing a gigabyte takes a card long, so a thread does it; but their names are
    free at once, also when cancelled, so that nothing goes on unseen with a file that somebody makes anew."""
    gone = []
    for path in paths:
        for suffix in DATABASE_SUFFIXES:
            with contextlib.suppress(FileNotFoundError):
                aside = path.with_name(f"{path.name}.gone-{secrets.token_hex(4)}")
                gone.append(path.with_name(path.name + suffix).rename(aside))
    if gone:
        await asyncio.to_thread(_remove, gone)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _escaped(text: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in text)


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raises NoRoom if the file system of `folder` cannot take `needed` bytes more and leave some for others."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < needed + ROOM_LEFT_BYTES:
        raise NoRoom(
            f"{folder}: {what} needs {megabytes(needed)} and the disk has {megabytes(free)} free;"
            " make room, it is tried again by itself"
        )


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def pack(source: Path, target: Path, stop: threading.Event, progress: Progress) -> Packed:
    """Compress a file. Raises OSError, or Stopped soon after `stop` was set; what was written is then removed."""
    size = source.stat().st_size
    digest, stored, done = hashlib.sha256(), 0, 0
    with _unfinished(target), source.open("rb") as plain, target.open("wb") as packed:
        compressor = zstandard.ZstdCompressor(ZSTD_LEVEL, write_checksum=True, write_content_size=True)
        chunks = compressor.chunker(size=size, chunk_size=CHUNK_BYTES)

        def write(pieces: Iterator[bytes]) -> int:
            written = 0
            for piece in pieces:
                digest.update(piece)
                _write(packed, piece)
                written += len(piece)
            return written

        while chunk := plain.read(CHUNK_BYTES):
            _check(stop)
            stored += write(chunks.compress(chunk))
            done += len(chunk)
            progress(done, size)
        stored += write(chunks.finish())  # type: ignore[no-untyped-call]
        os.fsync(packed.fileno())
    return Packed(done, stored, digest.hexdigest())


def unpack(source: Path, target: Path, size: int, stop: threading.Event, progress: Progress) -> None:
    """Decompress a file that must become `size` bytes; `target` appears only when it is whole.

    Raises SnapshotFailed if it is something else, OSError, or Stopped soon after `stop` was set. What was written until
    then, or until a kill, is compared and not written again, which on a card takes a fraction of the time.
    """
    part = _part(target)
    done = 0
    with _unfinished(part, but=Stopped), source.open("rb") as packed, part.open("a+b") as plain:
        plain.seek(0)
        try:
            for chunk in zstandard.ZstdDecompressor().read_to_iter(packed, write_size=CHUNK_BYTES):
                _check(stop)
                done += len(chunk)
                if done > size:
                    break
                if plain.read(len(chunk)) != chunk:
                    plain.truncate(done - len(chunk))
                    _write(plain, chunk)
                progress(done, size)
        except zstandard.ZstdError as error:
            raise SnapshotFailed(f"{source.name} cannot be unpacked: {error}") from None
        if done != size:
            raise SnapshotFailed(f"{source.name} is not {size} bytes unpacked")
        plain.truncate(size)
        os.fsync(plain.fileno())
        part.rename(target)


async def unpack_download(manifest: Manifest, packed: Path, plain: Path, progress: Progress) -> None:
    """`unpack` in a thread that ends with us. Raises CorruptSnapshot, OSError."""
    try:
        await stoppable(lambda stop: unpack(packed, plain, manifest.size, stop, progress))
    except SnapshotFailed as error:
        raise CorruptSnapshot(str(error)) from None


@contextlib.contextmanager
def _unfinished(path: Path, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Removes a file that did not become whole; not after such an exception as `but`."""
    try:
        yield
    except but:
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write(file: BinaryIO, data: bytes) -> None:
    """To the disk at once: a gigabyte written back in one go makes the application's own commits wait for it."""
    file.write(data)
    file.flush()
    os.fdatasync(file.fileno())


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped


async def stoppable(job: Callable[[threading.Event], T]) -> T:
    """Run a job in a thread of its own. Cancelled, the job is told to stop and waited for: nothing goes on unseen."""
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(job, stop))
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        stop.set()
        await _patiently(task)
        raise
    return task.result()


async def _patiently(task: asyncio.Future[T]) -> None:
    """Wait for a task through further cancellations; how it ended is not told."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    if not task.cancelled():
        task.exception()
