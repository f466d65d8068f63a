"""One snapshot on its way from the store: downloaded and unpacked beside the database, or found to be of no use."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from harmonylite.snapshot.due import FETCHING
from harmonylite.snapshot.link import Link
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.state import SnapshotState
from harmonylite.snapshot.workfiles import WorkFiles, megabytes, remove, unpack_download
from harmonylite.stream.log import LogError
from harmonylite.tasks import run_together

log = logging.getLogger(__name__)

# Until it is tried again to tell the others, if that failed.
TELL_S = 3.0


async def fetch(link: Link, files: WorkFiles, state: SnapshotState, manifest: Manifest) -> Path:
    """The unpacked snapshot's path; goes on from what an earlier call left. Raises StoreError, NoRoom, OSError."""
    path = files.unpacked(manifest.id)
    if not path.exists() or path.stat().st_size != manifest.size:
        await run_together(_tell(link, manifest), _fetch(link, files, state, manifest, path))
    return path


async def _fetch(link: Link, files: WorkFiles, state: SnapshotState, manifest: Manifest, path: Path) -> None:
    await files.keep_only(manifest.id)
    packed = files.download(manifest.id)
    files.check_room(manifest)
    log.info("fetching a snapshot", extra={"fields": {"id": manifest.id, "size": megabytes(manifest.stored_size)}})
    await link.store.download(manifest, packed, state.catch_up(f"fetching snapshot {manifest.id}"))
    await unpack_download(manifest, packed, path, state.catch_up(f"unpacking snapshot {manifest.id}"))
    await remove(packed)


async def _tell(link: Link, manifest: Manifest) -> None:
    """Let those who remove old snapshots know that this one is being fetched."""
    while True:
        try:
            await link.lease.ensure_bucket()
            await link.lease.wanted(FETCHING + manifest.id, manifest.id)
            await asyncio.sleep(link.lease.ttl_s / 3)
        except LogError as error:
            log.debug("fetching not announced", extra={"fields": {"error": str(error)}})
            await asyncio.sleep(TELL_S)


async def refuse(files: WorkFiles, state: SnapshotState, manifest: Manifest, reason: Exception) -> None:
    """A snapshot turned out to be of no use: see SnapshotState.refuse."""
    state.refuse(manifest)
    await files.forget(manifest.id)
    log.error(
        "a snapshot is of no use here; another one is used",
        extra={"fields": {"id": manifest.id, "reason": str(reason)}},
    )
