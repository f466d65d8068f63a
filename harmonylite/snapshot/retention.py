"""How many snapshots are kept: `[snapshot] retain` of them, and no more than their place can hold."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection

from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores.base import SnapshotStore, StoreFull
from harmonylite.snapshot.workfiles import megabytes

log = logging.getLogger(__name__)

# Tells why nobody could go on from a snapshot; None if somebody can.
WhyUnusable = Callable[[Manifest], Awaitable[str | None]]


async def prune(store: SnapshotStore, retain: int, in_use: Collection[str]) -> None:
    """Remove all but the newest `retain` snapshots, and torn uploads; one that is being fetched stays a while."""
    manifests = await store.list()
    kept = len(manifests[:retain])
    for index, manifest in enumerate(manifests):
        if manifest.id in in_use:
            kept = max(kept, index + 1)
    for manifest in manifests[retain:kept]:
        if manifest.id not in in_use:
            await store.delete(manifest.id)
            kept -= 1
    removed = await store.prune(max(kept, 1))
    if removed:
        log.debug("old snapshots removed", extra={"fields": {"ids": removed}})


async def make_room(
    store: SnapshotStore, new: Manifest, why_unusable: WhyUnusable, in_use: Collection[str], full: StoreFull
) -> None:
    """The store has no room for `new`: remove the oldest snapshot that can be missed.

    The newest one that nodes can go on from stays until there is a newer one. Raises StoreFull if nothing can go:
    what there is of `new` is then removed, so that the store is as it was.
    """
    manifests = [manifest for manifest in await store.list() if manifest.id != new.id]
    needed = None
    for manifest in manifests:  # newest first
        if await why_unusable(manifest) is None:
            needed = manifest.id
            break
    for manifest in reversed(manifests):
        if manifest.id != needed and manifest.id not in in_use:
            log.info("an old snapshot makes room for a new one", extra={"fields": {"id": manifest.id}})
            await store.delete(manifest.id)
            return
    await store.delete(new.id)
    beside = f" beside {needed}, which is kept until it is stored" if needed else ""
    raise StoreFull(f"a snapshot of {megabytes(new.stored_size)} does not fit{beside}: {full}")
