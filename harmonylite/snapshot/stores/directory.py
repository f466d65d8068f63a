"""Snapshots in a folder, for example a mounted share: `<id>.sqlite.zst` beside `<id>.json`.

What is being written has `.part` at its end; it is synced, then renamed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from harmonylite.snapshot.manifest import BadManifest, Manifest, is_id, node_of
from harmonylite.snapshot.stores.base import (
    ABANDONED_S,
    CorruptSnapshot,
    Ids,
    Manifests,
    Progress,
    SnapshotMissing,
    StoreRefused,
    beyond,
    no_progress,
)
from harmonylite.snapshot.stores.files import (
    PIECE_BYTES,
    Beat,
    fetch_verified,
    in_thread,
    patience_for_sync,
    require_size,
    size_or_none,
    sync_directory,
)

log = logging.getLogger(__name__)

OBJECT_SUFFIX = ".sqlite.zst"
MANIFEST_SUFFIX = ".json"
PART_SUFFIX = ".part"


class DirectoryStore:
    """A SnapshotStore in a folder. Several nodes may share it."""

    def __init__(self, folder: Path, *, abandoned_s: float = ABANDONED_S) -> None:
        """folder: is made if it is missing, its parent is not; abandoned_s: see ABANDONED_S."""
        self._folder = folder
        self._abandoned_s = abandoned_s

    @property
    def costly(self) -> bool:
        """See SnapshotStore."""
        return False

    async def list(self) -> Manifests:
        """See SnapshotStore. A manifest whose object is missing or has another size is left out too."""
        return await in_thread(self._list, where=self._folder)

    async def upload(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        """See SnapshotStore."""
        await require_size(path, manifest)
        tell = _from_thread(progress, manifest.stored_size)
        patience_s = patience_for_sync(manifest.stored_size)
        await in_thread(
            lambda beat: self._upload(manifest, path, tell, beat), where=self._folder, patience_s=patience_s
        )

    async def download(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        """See SnapshotStore."""
        tell = _from_thread(progress, manifest.stored_size)

        async def fetch(offset: int) -> None:
            await in_thread(lambda beat: self._fetch(manifest, path, offset, tell, beat), where=path)

        await fetch_verified(manifest, path, fetch)

    async def delete(self, snapshot_id: str) -> None:
        """See SnapshotStore."""
        await in_thread(lambda beat: self._delete(snapshot_id), where=self._folder)

    async def prune(self, retain: int | None) -> Ids:
        """See SnapshotStore."""
        return await in_thread(lambda beat: self._prune(retain, beat), where=self._folder)

    async def mirror(self, folder: Path, progress: Progress = no_progress) -> Ids:
        """There is no second store."""
        return []

    async def close(self) -> None:
        """Nothing is under way between calls."""

    # In the thread

    def _list(self, beat: Beat) -> Manifests:
        if not self._folder.is_dir():
            return []
        found: Manifests = []
        for file in self._folder.glob(f"*{MANIFEST_SUFFIX}"):
            beat()
            try:
                manifest = Manifest.from_json(file.read_bytes())
            except FileNotFoundError:  # removed since
                continue
            except BadManifest as error:
                log.warning("snapshot left out", extra={"fields": {"file": str(file), "error": str(error)}})
                continue
            size = size_or_none(self._object(manifest.id))
            if size != manifest.stored_size or file.stem != manifest.id:
                fields = {"file": str(file), "size": size, "expected": manifest.stored_size}
                log.warning("snapshot left out: its object is missing or torn", extra={"fields": fields})
                continue
            found.append(manifest)
        return sorted(found, key=Manifest.sort_key, reverse=True)

    def _upload(self, manifest: Manifest, path: Path, tell: Callable[[int], None], beat: Beat) -> None:
        self._folder.mkdir(exist_ok=True)
        for torn in self._torn(beat, manifest.node_id, manifest.id):
            self._delete(torn)
        described = self._manifest(manifest.id)
        stored = self._object(manifest.id)
        if described.exists() and size_or_none(stored) == manifest.stored_size:
            return
        if size_or_none(stored) != manifest.stored_size:
            part = _part(stored)
            _copy(path, part, manifest, tell, beat)
            part.replace(stored)
        beat()
        part = _part(described)
        with part.open("wb") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self._folder)  # the object's name before the manifest's
        part.replace(described)
        sync_directory(self._folder)

    def _fetch(self, manifest: Manifest, path: Path, offset: int, tell: Callable[[int], None], beat: Beat) -> None:
        try:
            source = self._object(manifest.id).open("rb")
        except FileNotFoundError:
            raise SnapshotMissing(f"{self._folder} holds no snapshot {manifest.id} any more") from None
        with source, path.open("ab") as target:
            source.seek(offset)
            tell(offset)
            while piece := source.read(PIECE_BYTES):
                beat()
                target.write(piece)
                offset += len(piece)
                tell(offset)

    def _delete(self, snapshot_id: str) -> None:
        if not is_id(snapshot_id):
            raise StoreRefused(f"{snapshot_id!r} is not the id of a snapshot")
        described, stored = self._manifest(snapshot_id), self._object(snapshot_id)
        # The manifest first: what is listed is whole.
        for file in (described, stored, _part(described), _part(stored)):
            file.unlink(missing_ok=True)

    def _prune(self, retain: int | None, beat: Beat) -> Ids:
        if not self._folder.is_dir():
            return []
        removed = [*beyond(self._list(beat), retain), *self._torn(beat)]
        for snapshot_id in removed:
            self._delete(snapshot_id)
        return removed

    def _torn(self, beat: Beat, node_id: int | None = None, wanted: str = "") -> Ids:
        """What was given up; of `node_id`, which makes one at a time, all but `wanted`."""
        with tempfile.TemporaryFile(dir=self._folder) as probe:
            now_s = os.fstat(probe.fileno()).st_mtime  # a share's clock, which its files' times are from
        torn: set[str] = set()
        for file in self._folder.iterdir():
            beat()
            snapshot_id = file.name.partition(".")[0]
            if not is_id(snapshot_id) or snapshot_id == wanted or self._manifest(snapshot_id).exists():
                continue
            try:
                age_s = now_s - file.stat().st_mtime
            except FileNotFoundError:  # just renamed
                continue
            if age_s > self._abandoned_s or node_of(snapshot_id) == node_id:
                torn.add(snapshot_id)
        return sorted(torn)

    def _object(self, snapshot_id: str) -> Path:
        return self._folder / f"{snapshot_id}{OBJECT_SUFFIX}"

    def _manifest(self, snapshot_id: str) -> Path:
        return self._folder / f"{snapshot_id}{MANIFEST_SUFFIX}"


def _part(file: Path) -> Path:
    return file.with_name(file.name + PART_SUFFIX)


def _copy(path: Path, part: Path, manifest: Manifest, tell: Callable[[int], None], beat: Beat) -> None:
    """Copy `path` to `part`, going on from what is there if that is its beginning. Raises CorruptSnapshot."""
    state = hashlib.sha256()
    with path.open("rb") as source, part.open("ab+") as target:
        done = _common_beginning(source.fileno(), target.fileno(), state.update, beat)
        target.truncate(done)
        source.seek(done)
        tell(done)
        while piece := source.read(PIECE_BYTES):
            beat()
            target.write(piece)
            state.update(piece)
            done += len(piece)
            tell(done)
        target.flush()
        os.fsync(target.fileno())
    if done != manifest.stored_size or state.hexdigest() != manifest.sha256:
        part.unlink()
        raise CorruptSnapshot(f"{path} is not what the manifest of snapshot {manifest.id} says")


def _common_beginning(source: int, target: int, take: Callable[[bytes], None], beat: Beat) -> int:
    """How many bytes, in whole pieces, two files have in common; they are given to `take`."""
    done = 0
    while True:
        beat()
        piece = os.pread(target, PIECE_BYTES, done)
        if len(piece) < PIECE_BYTES or os.pread(source, PIECE_BYTES, done) != piece:
            return done
        take(piece)
        done += PIECE_BYTES


def _from_thread(progress: Progress, total: int) -> Callable[[int], None]:
    """`progress`, for a thread: it is called in the event loop."""
    loop = asyncio.get_running_loop()

    def tell(done: int) -> None:
        loop.call_soon_threadsafe(progress, done, total)

    return tell
