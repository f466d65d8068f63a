"""The second copy of the snapshots: who brings it level, and when."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from harmonylite.observe.log import Repeated
from harmonylite.snapshot.link import Link
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.state import SnapshotState
from harmonylite.snapshot.stores.base import StoreError
from harmonylite.snapshot.workfiles import WorkFiles, remove

log = logging.getLogger(__name__)

# Between two looks for a new snapshot; the mirror itself is compared that often.
LOOK_S, MIRROR_S = 2.0, 300.0


class Mirroring:
    """One per daemon. wanted: whether there is a mirror; age_s: of the newest snapshot; leaf: others go first."""

    def __init__(
        self,
        wanted: bool,
        files: WorkFiles,
        state: SnapshotState,
        *,
        age_s: Callable[[], float | None],
        leaf: bool,
    ) -> None:
        self._wanted = wanted
        self._files = files
        self._state = state
        self._age_s = age_s
        self._leaf = leaf
        self._trouble = Repeated(log, 600.0)

    async def run(self, link: Link) -> None:
        """Until cancelled."""
        if not self._wanted:
            await asyncio.Event().wait()
        seen: str | None = None
        not_before = 0.0
        while True:
            newest = self._state.newest
            is_new = newest is not None and newest.id != seen and self._state.trouble is None
            due = is_new or time.monotonic() > not_before
            if newest is not None and not self._is_mirroring(link, newest):
                self._state.trouble = None  # who took the newest copies all, or says that it cannot
            elif due and newest is not None:
                try:
                    self._files.mirror.mkdir(exist_ok=True)
                    copied = await link.store.mirror(self._files.mirror)
                    if copied:
                        log.info("snapshots copied to the mirror", extra={"fields": {"ids": copied}})
                    seen, self._state.trouble = newest.id, None
                except (StoreError, OSError) as error:
                    self._state.trouble = f"the mirror of the snapshots is behind: {error}"
                    self._trouble.warning("the mirror of the snapshots is behind", {"reason": str(error)})
                except Exception as error:
                    self._trouble.error("a mistake in harmonylite: the mirror fails", {"error": repr(error)})
                finally:
                    not_before = time.monotonic() + MIRROR_S
                    await remove(self._files.mirror)
            await asyncio.sleep(LOOK_S)

    def _is_mirroring(self, link: Link, newest: Manifest) -> bool:
        """The one who took it copies it; the others look now and then, in case that one is gone."""
        age_s = self._age_s() or 0.0
        return newest.node_id == link.settings.node_id or age_s > MIRROR_S * (4 if self._leaf else 2)
