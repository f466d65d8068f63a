"""A store with a second one beside it, which gets a copy of every snapshot when it can be reached.

The first one decides and does not wait for the second, which may be unreachable for weeks: only `mirror` writes there.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores.base import (
    CorruptSnapshot,
    Ids,
    Manifests,
    Progress,
    SnapshotMissing,
    SnapshotStore,
    StoreError,
    no_progress,
)
from harmonylite.snapshot.stores.files import in_thread

log = logging.getLogger(__name__)


class MirroredStore:
    """A SnapshotStore made of two, the second of which keeps the newest `retain`."""

    def __init__(self, first: SnapshotStore, second: SnapshotStore, *, retain: int) -> None:
        self._first = first
        self._second = second
        self._retain = retain

    async def list(self) -> Manifests:
        """What the first store has; what the second has if the first has nothing, or fails."""
        try:
            found = await self._first.list()
        except StoreError:
            with contextlib.suppress(StoreError):
                if rescued := await self._second.list():
                    return rescued
            raise
        if found:
            return found
        try:
            return await self._second.list()
        except StoreError as error:
            log.info("mirror could not be asked", extra={"fields": {"error": str(error)}})
            return []

    async def upload(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        """To the first store."""
        await self._first.upload(manifest, path, progress)

    async def download(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        """From the first store; from the second, going on from what is there, if the first cannot."""
        try:
            await self._first.download(manifest, path, progress)
        except StoreError as error:
            try:
                await self._second.download(manifest, path, progress)
            except StoreError as second:
                log.info("mirror could not help", extra={"fields": {"id": manifest.id, "error": str(second)}})
                raise error from None
            fields = {"id": manifest.id, "error": str(error)}
            log.warning("snapshot came from the mirror: the store failed", extra={"fields": fields})

    async def delete(self, snapshot_id: str) -> None:
        """From the first store."""
        await self._first.delete(snapshot_id)

    async def prune(self, retain: int) -> Ids:
        """The first store."""
        return await self._first.prune(retain)

    async def mirror(self, folder: Path, progress: Progress = no_progress) -> Ids:
        """Copy what the second store lacks of the newest snapshots, then prune it; the ids copied, newest first.

        folder: where one snapshot may lie meanwhile, and is gone on with if this breaks. Raises StoreError.
        """
        present = await self._second.list()
        mine = await self._first.list()
        known = {manifest.id: manifest for manifest in (*present, *mine)}
        kept = sorted(known.values(), key=Manifest.sort_key, reverse=True)[: self._retain]
        copied: Ids = []
        for manifest in kept:
            if manifest not in present and await self._copy(manifest, folder, progress):
                copied.append(manifest.id)
        await self._second.prune(self._retain)
        return copied

    async def close(self) -> None:
        """Close both."""
        await self._first.close()
        await self._second.close()

    async def _copy(self, manifest: Manifest, folder: Path, progress: Progress) -> bool:
        """Whether it was copied: retention may have taken it meanwhile, or it is of no use to anybody."""
        path = folder / f"mirror-{manifest.id}.sqlite.zst"
        try:
            await self._first.download(manifest, path, progress)
            await self._second.upload(manifest, path, progress)
        except (SnapshotMissing, CorruptSnapshot) as error:
            log.warning("snapshot not mirrored", extra={"fields": {"id": manifest.id, "error": str(error)}})
            return False
        await in_thread(lambda beat: path.unlink(missing_ok=True), where=path)
        return True
