"""How many snapshots are kept: `[snapshot] retain` of them, and no more than their place can hold."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection

from harmonylite.snapshot.manifest import Manifest, in_order
from harmonylite.snapshot.stores.base import SnapshotStore, StoreFull
from harmonylite.snapshot.workfiles import megabytes

log = logging.getLogger(__name__)

# Tells why nobody could go on from a snapshot; None if somebody can.
WhyUnusable = Callable[[Manifest], Awaitable[str | None]]


async def prune(store: SnapshotStore, retain: int, needed: Collection[str], latest_ms: int) -> None:
    """Remove all but the newest `retain` snapshots, and torn uploads; not those that are needed: the one that was just
    stored, and those that are being fetched. What claims to be from after `latest_ms` counts as the oldest."""
    manifests = in_order(await store.list(), latest_ms)
    beyond = [each.id for each in manifests[retain:] if each.id not in needed]
    for snapshot_id in beyond:
        await store.delete(snapshot_id)
    removed = [*beyond, *await store.prune(None)]
    if removed:
        log.debug("old snapshots removed", extra={"fields": {"ids": removed}})


async def make_room(
    store: SnapshotStore,
    new: Manifest,
    why_unusable: WhyUnusable,
    in_use: Collection[str],
    full: StoreFull,
    latest_ms: int,
) -> None:
    """The store has no room for `new`: remove torn uploads, or else the oldest snapshot that can be missed. What claims
    to be from after `latest_ms` counts as the oldest.

    The newest one that nodes can go on from stays until there is a newer one. Raises StoreFull if nothing can go:
    what there is of `new` is then removed, so that the store is as it was.
    """
    listed = [manifest for manifest in await store.list() if manifest.id != new.id]
    if torn := await store.prune(None):
        log.info("what was left of torn uploads makes room for a snapshot", extra={"fields": {"ids": torn}})
        return
    manifests = in_order(listed, latest_ms)
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
