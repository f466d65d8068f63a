"""The first database of a new node: a snapshot, put where the application expects its file."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

import apsw

from harmonylite import clock
from harmonylite.db.copy import CopyCancelledError, DamagedCopyError, adopt_copy, remove_database
from harmonylite.observe.log import Repeated
from harmonylite.snapshot.choice import USELESS
from harmonylite.snapshot.fetching import fetch, refuse
from harmonylite.snapshot.link import Link
from harmonylite.snapshot.listing import Listing
from harmonylite.snapshot.manifest import in_order
from harmonylite.snapshot.state import SnapshotState
from harmonylite.snapshot.stores.base import StoreError
from harmonylite.snapshot.stores.files import sync_directory
from harmonylite.snapshot.workfiles import NoRoom, WorkFiles, stoppable
from harmonylite.stream.log import LogError
from harmonylite.wiring import TOLERANCE_MS

log = logging.getLogger(__name__)

# So long an application that starts at the same time may take to make its database itself.
GRACE_S = 2.0
LOOK_S, TROUBLE_S = 3.0, 10.0

# The group may write, as the application usually is another user (the folder's group is its own).
FILE_MODE = 0o660


class Installer:
    """Waits for the database's file, or for a snapshot to make it of."""

    def __init__(self, db_path: Path, node_id: int, files: WorkFiles, state: SnapshotState) -> None:
        self._db_path = db_path
        self._node_id = node_id
        self._files = files
        self._state = state
        self._listing = Listing()
        self._trouble = Repeated(log, 600.0)

    async def run(self, link: Link) -> None:
        """Returns when there is a file, whoever made it."""
        await asyncio.sleep(GRACE_S)
        try:
            while not self._db_path.exists():
                try:
                    pause = await self._try(link)
                except (StoreError, LogError, NoRoom, OSError, apsw.Error) as error:
                    self._state.catching_up = f"there is no database yet: {error}"
                    self._trouble.warning("a first database cannot be made", {"reason": str(error)})
                    pause = TROUBLE_S
                if pause:
                    await asyncio.sleep(pause)
        finally:
            self._state.caught_up()

    async def _try(self, link: Link) -> float:
        """One round; how long to wait before the next one, seconds."""
        states = await link.states()
        known = [state.server_ms for state in states.values() if state.server_ms is not None]
        latest_ms = min(known, default=clock.wall_ms()) + TOLERANCE_MS
        # Last what claims to be from the future: the server's clock was ahead when it was taken.
        manifests = in_order(await self._listing.manifests(link), latest_ms)
        self._state.newest = manifests[0] if manifests else None
        here = self._files.downloads()
        # What was fetched, or in part, first: over a slow link there is always a newer one. The sort is stable.
        for manifest in sorted(manifests, key=lambda each: each.id not in here):
            if self._state.is_refused(manifest) or await link.why_unusable(manifest, states) is not None:
                continue
            try:
                path = await fetch(link, self._files, self._state, manifest)
                self._state.catching_up = f"making the first database of snapshot {manifest.id}"
                # Not from the future: the server's clock may have been ahead when it was taken.
                await self._install(path, min([manifest.created_ms, *known]) + TOLERANCE_MS)
            except USELESS as error:
                await refuse(self._files, self._state, manifest, error)
            except StoreError as error:
                self._listing.failed(error)
                raise
            return 0.0
        await link.lease.ensure_bucket()
        await link.lease.wanted("a new node without a database", manifests[0].id if manifests else "")
        self._state.catching_up = "there is no database yet: waiting for the application to make it, or for a snapshot"
        return LOOK_S

    async def _install(self, path: Path, latest_ms: int) -> None:
        """Waited for also when cancelled: the next installer works on the same file."""
        await stoppable(lambda stop: self._put_in_place(path, latest_ms, stop.is_set))

    def _put_in_place(self, path: Path, latest_ms: int, cancelled: Callable[[], bool]) -> None:
        """Never in the place of a file that the application made meanwhile. latest_ms: see `adopt_copy`.

        The snapshot is used up, unless something is in the way that has nothing to do with it.
        """
        mine = self._files.adopted
        remove_database(mine)
        path.rename(mine)
        try:
            try:
                adopt_copy(mine, self._node_id, latest_ms=latest_ms, cancelled=cancelled)
            except apsw.SQLError as error:
                raise DamagedCopyError(mine, error) from error
            mine.chmod(FILE_MODE)
            try:
                os.link(mine, self._db_path)
            except FileExistsError:
                log.info("the application has made its database itself; the snapshot is merged if need be")
                return
            sync_directory(self._db_path.parent)
        except (apsw.Error, OSError, CopyCancelledError):
            self._give_back(mine, path)
            raise
        finally:
            remove_database(mine)
        log.info("first database installed from a snapshot", extra={"fields": {"db": self._db_path}})

    def _give_back(self, mine: Path, path: Path) -> None:
        """For the next try, so that it need not be fetched again; unless SQLite could not undo what it had begun."""
        if not mine.with_name(f"{mine.name}-journal").exists() and not self._db_path.exists():
            mine.rename(path)
