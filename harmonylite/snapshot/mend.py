"""Where reading went on although messages were missed, because snapshots were off then: another node's snapshot tells
what was in them, once snapshots are on."""

from __future__ import annotations

import asyncio
import logging

import apsw

from harmonylite.catchup import CatchUp
from harmonylite.engine import Engine
from harmonylite.observe.log import Repeated
from harmonylite.snapshot.link import Link
from harmonylite.snapshot.listing import Listing
from harmonylite.snapshot.state import SnapshotState
from harmonylite.snapshot.stores.base import StoreError
from harmonylite.snapshot.workfiles import SnapshotFailed
from harmonylite.stream.log import LogError

log = logging.getLogger(__name__)

# Between two looks; the list of snapshots is asked for only while something is missing, seldom where that is costly.
LOOK_S = 10.0


class Mender:
    """One per daemon."""

    def __init__(self, engine: Engine, catch_up: CatchUp, state: SnapshotState) -> None:
        self._engine = engine
        self._catch_up = catch_up
        self._state = state
        self._listing = Listing()
        self._trouble = Repeated(log, 600.0)

    async def run(self, link: Link) -> None:
        """Until cancelled. Nothing that goes wrong here ends replication."""
        while True:
            if (hole := self._engine.replica.completeness.hole) and not self._catch_up.busy:
                try:
                    await self._mend(link, hole)
                except (StoreError, SnapshotFailed, LogError, OSError, apsw.Error) as error:
                    self._trouble.warning("what was missed is still missing", {"reason": str(error)})
                except Exception as error:
                    self._trouble.error("a mistake in harmonylite: mending fails", {"error": repr(error)})
            await asyncio.sleep(LOOK_S)

    async def _mend(self, link: Link, hole: str) -> None:
        missed = self._engine.replica.completeness.hole_ends
        if await self._listing.due(link) and await self._catch_up.merge_another(link, in_step=False, missed=missed):
            if not self._engine.replica.completeness.hole:  # else the stream has passed what was fetched
                log.info("what was missed came with a snapshot", extra={"fields": {"hole": hole}})
            return
        newest = self._state.newest
        await link.lease.ensure_bucket()
        await link.lease.wanted(f"messages were missed: {hole}", newest.id if newest is not None else "")
        self._trouble.warning("the other nodes are asked for a snapshot, as messages were missed", {"hole": hole})
