"""Snapshots in JetStream, also through a leaf: an object travels as chunks (`chunks`), a few under way at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from harmonylite.snapshot.manifest import BadManifest, Manifest, is_id, node_of
from harmonylite.snapshot.stores.base import (
    ABANDONED_S,
    CorruptSnapshot,
    Ids,
    Manifests,
    Progress,
    SnapshotMissing,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    beyond,
    no_progress,
)
from harmonylite.snapshot.stores.chunks import CHUNK_BYTES, PIECE_CHUNKS, ChunkName, ChunkStream, Stored
from harmonylite.snapshot.stores.files import fetch_verified, in_thread, require_size

log = logging.getLogger(__name__)

T = TypeVar("T")

# Chunks under way at once: 1 MiB of memory, and enough for 20 MB/s over a link of 50 ms.
WINDOW_CHUNKS = 8
# A transfer survives a hub that is away for so long; its caller resumes it after that.
PATIENCE_S = 60.0
_RETRY_S = 1.0
# The marker of a snapshot that is being removed.
_REMOVING = b'{"removing": true}'


class NatsStore:
    """A SnapshotStore in a stream of chunks."""

    def __init__(
        self, stream: ChunkStream, *, patience_s: float = PATIENCE_S, abandoned_s: float = ABANDONED_S
    ) -> None:
        """patience_s: how long a transfer tries again without getting on; abandoned_s: see ABANDONED_S."""
        self._stream = stream
        self._patience_s = patience_s
        self._abandoned_s = abandoned_s

    @property
    def costly(self) -> bool:
        """See SnapshotStore."""
        return False

    async def list(self) -> Manifests:
        """See SnapshotStore."""
        found: Manifests = []
        for snapshot_id in await self._stream.names("manifest.*"):
            data = await self._stream.get(f"manifest.{snapshot_id}")
            if data is None:  # removed since
                continue
            try:
                found.append(Manifest.from_json(data))
            except BadManifest as error:
                log.warning("snapshot left out", extra={"fields": {"id": snapshot_id, "error": str(error)}})
        return sorted(found, key=Manifest.sort_key, reverse=True)

    async def upload(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        """See SnapshotStore."""
        await require_size(path, manifest)
        await self._persist(self._stream.ensure)
        await self._persist(lambda: self._remove_torn(manifest.node_id, manifest.id))
        name, marker = f"manifest.{manifest.id}", f"upload.{manifest.id}"
        if await self._persist(lambda: self._stream.last(name)) is not None:
            return
        resumed = await self._persist(lambda: self._stream.last(marker)) is not None
        await self._persist(lambda: self._stream.put(marker, manifest.to_json()))
        done = 0
        for piece in _pieces(manifest):
            stored = await self._stored(manifest, piece.start) if resumed else set()
            done += sum(_length(manifest, index) for index in piece if index in stored)
            progress(done, manifest.stored_size)
            for window in _windows([index for index in piece if index not in stored]):
                done += await self._send(manifest, path, window)
                progress(done, manifest.stored_size)
        await self._require_whole(manifest)
        await self._persist(lambda: self._stream.put(name, manifest.to_json()))
        with contextlib.suppress(StoreError):  # it is complete; `prune` removes the marker
            await self._stream.remove(marker)

    async def download(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        """See SnapshotStore."""

        async def fetch(offset: int) -> None:
            await self._require_manifest(manifest)
            begun = offset // CHUNK_BYTES
            done = begun * CHUNK_BYTES
            await in_thread(lambda beat: os.truncate(path, done), where=path)
            progress(done, manifest.stored_size)
            for window in _windows(range(begun, _count(manifest))):
                done += await self._receive(manifest, path, window)
                progress(done, manifest.stored_size)

        await fetch_verified(manifest, path, fetch)

    async def delete(self, snapshot_id: str) -> None:
        """See SnapshotStore."""
        if not is_id(snapshot_id):
            raise StoreRefused(f"{snapshot_id!r} is not the id of a snapshot")
        if await self._stream.exists():
            await self._remove(snapshot_id)

    async def prune(self, retain: int | None) -> Ids:
        """See SnapshotStore."""
        if not await self._stream.exists():
            return []
        removed = beyond(await self.list(), retain)
        for snapshot_id in removed:
            await self._remove(snapshot_id)
        return removed + await self._remove_torn()

    async def mirror(self, folder: Path, progress: Progress = no_progress) -> Ids:
        """There is no second store."""
        return []

    async def close(self) -> None:
        """Nothing is under way between calls; the connection is not ours."""

    async def _send(self, manifest: Manifest, path: Path, window: Sequence[int]) -> int:
        """Store these chunks; how many bytes they have."""
        chunks = await in_thread(lambda beat: _read(path, manifest, window), where=path)

        async def send(index: int, data: bytes) -> None:
            await self._persist(lambda: self._stream.put(ChunkName(manifest.id, index).tail, data))

        await _all_of([send(index, data) for index, data in zip(window, chunks, strict=True)])
        return sum(map(len, chunks))

    async def _receive(self, manifest: Manifest, path: Path, window: Sequence[int]) -> int:
        """Append these chunks to `path`; how many bytes they have. Raises CorruptSnapshot or SnapshotMissing."""

        async def receive(index: int) -> bytes:
            data = await self._persist(lambda: self._stream.get(ChunkName(manifest.id, index).tail))
            if data is None:
                await self._require_manifest(manifest)
                raise CorruptSnapshot(f"snapshot {manifest.id} lacks its chunk {index} in the store")
            if len(data) != _length(manifest, index):
                raise CorruptSnapshot(f"snapshot {manifest.id} has a chunk {index} of {len(data)} bytes in the store")
            return data

        chunks = await _all_of([receive(index) for index in window])
        await in_thread(lambda beat: _append(path, chunks), where=path)
        return sum(map(len, chunks))

    async def _require_manifest(self, manifest: Manifest) -> None:
        if await self._persist(lambda: self._stream.last(f"manifest.{manifest.id}")) is None:
            raise SnapshotMissing(f"the store holds no snapshot {manifest.id} any more")

    async def _stored(self, manifest: Manifest, first: int) -> set[int]:
        """Which chunks are stored of the piece that begins at `first`."""
        return await self._persist(lambda: self._stream.chunks_of_piece(manifest.id, first // PIECE_CHUNKS))

    async def _require_whole(self, manifest: Manifest) -> None:
        """A store that lost its tail, or another node that took this upload for given up, took something away."""
        for piece in _pieces(manifest):
            missing = len(piece) - len(await self._stored(manifest, piece.start))
            if missing:
                raise StoreUnavailable(
                    f"the store lost {missing} chunks of snapshot {manifest.id} during its upload: resume it"
                )

    async def _remove_torn(self, node_id: int | None = None, wanted: str = "") -> Ids:
        """Remove what was given up; of `node_id`, which makes one at a time, all but `wanted`. The removed ids."""
        removed: Ids = []
        complete = await self._stream.names("manifest.*")
        for snapshot_id in await self._stream.names("upload.*"):
            marker = await self._stream.last(f"upload.{snapshot_id}")
            if marker is None or snapshot_id == wanted or not is_id(snapshot_id):
                continue
            if snapshot_id in complete and marker.data != _REMOVING:
                await self._stream.remove(f"upload.{snapshot_id}")
            elif node_of(snapshot_id) == node_id or await self._is_abandoned(snapshot_id, marker):
                removed.append(snapshot_id)
        for snapshot_id in removed:
            await self._remove(snapshot_id)
        return removed

    async def _is_abandoned(self, snapshot_id: str, marker: Stored) -> bool:
        if marker.data == _REMOVING:
            return True
        chunk = await self._stream.last(f"chunk.{snapshot_id}.>")
        now_ms = await self._stream.now_ms() or int(time.time() * 1000)
        newest_ms = max(marker.stored_ms, chunk.stored_ms if chunk is not None else 0)
        return now_ms - newest_ms > self._abandoned_s * 1000

    async def _remove(self, snapshot_id: str) -> None:
        """The manifest before the chunks: what is listed is whole. The marker tells `prune` if this is torn."""
        with contextlib.suppress(StoreFull):  # then removing is all the more needed
            await self._stream.put(f"upload.{snapshot_id}", _REMOVING)
        for what in (f"manifest.{snapshot_id}", f"chunk.{snapshot_id}.>", f"upload.{snapshot_id}"):
            await self._stream.remove(what)

    async def _persist(self, action: Callable[[], Awaitable[T]]) -> T:
        """Do it again while the store is unavailable, for `patience_s`."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return await action()
            except StoreUnavailable:
                if time.monotonic() + _RETRY_S > deadline:
                    raise
            await asyncio.sleep(_RETRY_S)


async def _all_of(coroutines: Sequence[Awaitable[T]]) -> list[T]:
    """The results; when one fails, the others are ended before its error is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _count(manifest: Manifest) -> int:
    return -(-manifest.stored_size // CHUNK_BYTES)


def _length(manifest: Manifest, index: int) -> int:
    return min(CHUNK_BYTES, manifest.stored_size - index * CHUNK_BYTES)


def _pieces(manifest: Manifest) -> Iterator[range]:
    """The indexes of the chunks of each piece."""
    count = _count(manifest)
    for first in range(0, count, PIECE_CHUNKS):
        yield range(first, min(first + PIECE_CHUNKS, count))


def _windows(indexes: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(indexes), WINDOW_CHUNKS):
        yield indexes[first : first + WINDOW_CHUNKS]


def _read(path: Path, manifest: Manifest, indexes: Sequence[int]) -> list[bytes]:
    """Raises CorruptSnapshot if the file became shorter."""
    with path.open("rb") as file:
        chunks = [os.pread(file.fileno(), CHUNK_BYTES, index * CHUNK_BYTES) for index in indexes]
    if any(len(data) != _length(manifest, index) for index, data in zip(indexes, chunks, strict=True)):
        raise CorruptSnapshot(f"{path} changed while it was uploaded")
    return chunks


def _append(path: Path, chunks: Sequence[bytes]) -> None:
    with path.open("ab") as file:
        file.writelines(chunks)
