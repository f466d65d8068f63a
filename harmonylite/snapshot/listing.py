"""What a store holds, for who waits for a snapshot: asked again and again, but not for ever as often where that costs.

Each list of S3 is a process of its own, a quarter of a second of a processor. So it is asked less and less often while
nothing happens; at once when the lease is taken or given back, which is cheap to know: a snapshot is being made.
"""

from __future__ import annotations

import contextlib
import time

from harmonylite.snapshot.link import Link
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores.base import StoreError
from harmonylite.stream.log import LogError

# So long it is asked at each look: a snapshot for a new device takes seconds, not minutes.
EARLY_S = 30.0
# The longest pause between two lists.
LONGEST_S = 60.0


class Listing:
    """One per waiter, over all its connections."""

    def __init__(self) -> None:
        self._since = self._asked = float("-inf")
        self._holder: int | None = None
        self._found: list[Manifest] | StoreError = []

    async def due(self, link: Link) -> bool:
        """Whether to ask now; then it counts as asked."""
        now = time.monotonic()
        if now - self._asked > 2 * LONGEST_S:  # nobody waited
            self._since, self._holder = now, None
        if link.store.costly and (waited := now - self._since) >= EARLY_S:
            holder = self._holder
            with contextlib.suppress(LogError):
                holder = await link.lease.holder()
            if holder != self._holder:
                self._holder, self._since = holder, now
            elif now - self._asked < min(waited / 4, LONGEST_S):
                return False
        self._asked = now
        return True

    async def manifests(self, link: Link) -> list[Manifest]:
        """What the store holds, or held a short while ago. Raises StoreError, or again the one of a short while ago."""
        if await self.due(link):
            try:
                self._found = await link.store.list()
            except StoreError as error:
                self._found = error
                raise
        if isinstance(self._found, StoreError):
            raise self._found.with_traceback(None)
        return self._found

    def failed(self, error: StoreError) -> None:
        """The store holds something, but did not give it: until it is asked again, `manifests` raises that."""
        self._found = error
