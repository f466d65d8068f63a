"""Once in a database's life: rows from before the installation, which have no version and are in no message.

They travel in snapshots alone. A node that has such rows merges the first snapshot that it sees, and publishes what
that lacks; if there is none although there are other nodes, it takes one. A node without such rows merges the first
snapshot only if that has some. After that it has joined. Its own snapshot is none of those: a database that says that
it was taken of it (a backup from before does not) has all that is in it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time

import apsw

from harmonylite.catchup import CatchUp
from harmonylite.engine import Engine
from harmonylite.snapshot.keeper import SnapshotKeeper
from harmonylite.snapshot.link import Link
from harmonylite.snapshot.local import has_unversioned, is_joined, set_joined, taken_here
from harmonylite.snapshot.stores.base import StoreError
from harmonylite.snapshot.workfiles import SnapshotFailed
from harmonylite.stream.log import LogError
from harmonylite.stream.registry import Registry

log = logging.getLogger(__name__)

# Pauses between two looks: short at first, while several nodes may be starting, long afterwards.
EARLY_S, LATE_S, EARLY_FOR_S = 5.0, 120.0, 60.0


class Joiner:
    """One per daemon."""

    def __init__(self, engine: Engine, keeper: SnapshotKeeper, catch_up: CatchUp) -> None:
        self._engine = engine
        self._keeper = keeper
        self._catch_up = catch_up
        self._has_none = False

    async def run(self, link: Link) -> None:
        """Until cancelled."""
        begun = time.monotonic()
        while not await is_joined(self._engine):
            early = time.monotonic() - begun < EARLY_FOR_S
            # Not all at the same moment: the first one to take a snapshot spares the others theirs.
            await asyncio.sleep((EARLY_S if early else LATE_S) * random.uniform(0.5, 1.0))
            try:
                await self._try(link)
            except (StoreError, SnapshotFailed, LogError, OSError, apsw.Error) as error:
                log.debug("joining waits", extra={"fields": {"reason": str(error)}})
            except Exception as error:  # whatever it is, replication must not end with it
                log.error("a mistake in harmonylite: joining fails", extra={"fields": {"error": repr(error)}})
        await asyncio.Event().wait()

    async def _try(self, link: Link) -> None:
        if self._keeper.why_not() is not None or self._keeper.store_is_away:
            return
        if await is_joined(self._engine):  # a snapshot was taken meanwhile
            return
        manifests = await self._keeper.refresh(link)
        if not manifests and self._has_none:
            return
        taken = await taken_here(self._engine)
        others = [manifest for manifest in manifests if manifest.id not in taken]
        if len(others) < len(manifests) and not await self._keeper.to_merge(link, manifests):
            await set_joined(self._engine)
            return
        self._has_none = not await has_unversioned(self._engine)
        if self._has_none and manifests and not any(manifest.unversioned for manifest in others):
            await set_joined(self._engine)
        elif others and await self._catch_up.merge_another(link, but=taken):
            return
        elif not self._has_none and len(others) == len(manifests):
            nodes = await Registry(link.client, link.settings).nodes()
            if any(node.node_id != link.settings.node_id for node in nodes):
                await self._keeper.save("rows from before the installation")
