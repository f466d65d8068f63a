"""A store with a second one beside it, which gets a copy of every snapshot when it can be reached.

The first one decides and does not wait for the second, which may be unreachable for weeks: only `mirror` writes there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from harmonylite import clock
from harmonylite.snapshot.manifest import Manifest, in_order
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

# A snapshot may be dated so far ahead of what is known of the time.
AHEAD_MS = 3_600_000


class MirroredStore:
    """A SnapshotStore made of two, the second of which keeps the newest `retain`.

    listed: told by each `list` whether what it gave is from the second. now_ms: the time by the clock that dates
    snapshots, the server's where it is known: this machine's own may be days behind.
    """

    def __init__(
        self,
        first: SnapshotStore,
        second: SnapshotStore,
        *,
        retain: int,
        listed: Callable[[bool], None] = lambda from_second: None,
        now_ms: Callable[[], int] = clock.wall_ms,
    ) -> None:
        self._first = first
        self._second = second
        self._retain = retain
        self._listed = listed
        self._now_ms = now_ms
        self._second_asked = False

    @property
    def costly(self) -> bool:
        """See SnapshotStore."""
        return self._first.costly or (self._second_asked and self._second.costly)

    async def list(self) -> Manifests:
        """What the first store has; what the second has if the first has nothing, or fails."""
        found: Manifests = []
        rescued: Manifests = []
        self._second_asked = False
        try:
            found = await self._first.list()
        except StoreError:
            self._second_asked = True
            with contextlib.suppress(StoreError):
                rescued = await self._second.list()
            if not rescued:
                raise
        if not found and not rescued:
            self._second_asked = True
            try:
                rescued = await self._second.list()
            except StoreError as error:
                log.info("mirror could not be asked", extra={"fields": {"error": str(error)}})
        self._listed(bool(rescued))
        return found or rescued

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

    async def prune(self, retain: int | None) -> Ids:
        """The first store."""
        return await self._first.prune(retain)

    async def mirror(self, folder: Path, progress: Progress = no_progress) -> Ids:
        """Copy what the second store lacks of the newest snapshots, then prune it; the ids copied, newest first.

        folder: where one snapshot may lie meanwhile, and is gone on with if this breaks. Raises StoreError.
        """
        present = await self._second.list()
        mine = await self._first.list()
        known = {manifest.id: manifest for manifest in (*present, *mine)}
        # The second store prunes by date alone, and would keep what a server dated whose clock was ahead.
        latest_ms = self._now_ms() + AHEAD_MS
        kept = in_order(known.values(), latest_ms)[: self._retain]
        copied: Ids = []
        for manifest in kept:
            if manifest not in present and await self._copy(manifest, folder, progress):
                copied.append(manifest.id)
        for manifest in in_order(await self._second.list(), latest_ms)[self._retain :]:
            await self._second.delete(manifest.id)
        await self._second.prune(None)
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
