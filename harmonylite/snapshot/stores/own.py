"""The snapshots of one log in a place that holds those of others too: two databases on one NATS, one bucket for two.

A snapshot belongs to the log whose streams its positions name. Those of other logs are not listed, and not removed by
this log's retention.
"""

from __future__ import annotations

import logging
from pathlib import Path

from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores.base import Ids, Manifests, Progress, SnapshotStore, beyond, no_progress

log = logging.getLogger(__name__)


class OwnSnapshots:
    """A SnapshotStore: another one, as far as it is about the log with that `[nats] stream_prefix`."""

    def __init__(self, store: SnapshotStore, stream_prefix: str, where: str) -> None:
        """where: the setting that names the place, for the operator."""
        self._store = store
        self._prefix = stream_prefix
        self._where = where
        self._told = False

    @property
    def costly(self) -> bool:
        """See SnapshotStore."""
        return self._store.costly

    async def list(self) -> Manifests:
        """See SnapshotStore."""
        return self._own(await self._store.list())

    async def upload(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        """See SnapshotStore."""
        await self._store.upload(manifest, path, progress)

    async def download(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        """See SnapshotStore."""
        await self._store.download(manifest, path, progress)

    async def delete(self, snapshot_id: str) -> None:
        """See SnapshotStore."""
        await self._store.delete(snapshot_id)

    async def prune(self, retain: int | None) -> Ids:
        """See SnapshotStore; what is left of uploads that were given up goes whosever it is."""
        removed = [] if retain is None else beyond(await self.list(), retain)
        for snapshot_id in removed:
            await self._store.delete(snapshot_id)
        return [*removed, *await self._store.prune(None)]

    async def mirror(self, folder: Path, progress: Progress = no_progress) -> Ids:
        """See SnapshotStore."""
        return await self._store.mirror(folder, progress)

    async def close(self) -> None:
        """See SnapshotStore."""
        await self._store.close()

    def _own(self, manifests: Manifests) -> Manifests:
        own = [manifest for manifest in manifests if self._is_own(manifest)]
        if len(own) < len(manifests) and not self._told:
            self._told = True
            streams = {each.stream for manifest in manifests if manifest not in own for each in manifest.positions}
            log.warning(
                f"snapshots of another log are in the same place, and left alone; give each log its own {self._where}",
                extra={"fields": {"streams": ", ".join(sorted(streams))}},
            )
        return own

    def _is_own(self, manifest: Manifest) -> bool:
        """Whether it names a stream of the log (`LogSettings.stream`), or none at all."""
        names = [position.stream.rpartition("-") for position in manifest.positions]
        return not names or any(prefix == self._prefix and shard.isdigit() for prefix, _, shard in names)
