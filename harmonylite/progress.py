"""What the parts of replication tell each other: how far it is, that somebody committed, what this node does."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from harmonylite.model import Position
from harmonylite.tasks import wait_first


@dataclass(frozen=True, slots=True)
class TooLarge:
    """A batch that the stream refused: the bytes of the group, the rows that were in the batch."""

    size: int
    rows: int


@dataclass(slots=True)
class Progress:
    """What `status` shows. ends: of streams, as seen last; in_step: over the present connection the streams were read
    to their ends, or are not read here; publishing: so it is, and pending rows go out; gap: where the log did not go
    on, until that is bridged; error: why replication waits; refused: by held batch, why the stream cannot hold it;
    too_large: by held batch, how large it was then; emptied: see Consumer."""

    ends: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    catching_up: bool = False
    in_step: bool = False
    publishing: bool = False
    gap: str | None = None
    error: str | None = None
    refused: dict[int, str] = field(default_factory=dict)
    too_large: dict[int, TooLarge] = field(default_factory=dict)
    emptied: dict[str, Position] = field(default_factory=dict)


class Wakeup:
    """Tells the publisher that somebody committed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float | None) -> bool:
        """Wait for a commit (True), or for the time to pass (False)."""
        # Not wait_for: until Python 3.12 it swallows a cancellation that comes just after a commit, and SIGTERM hangs.
        if not await wait_first(self._event, timeout_s=timeout_s):
            return False
        self._event.clear()  # not when cancelled: the next one to wait must see it
        return True


@dataclass(frozen=True, slots=True)
class Mode:
    """What this node does. polling_s: look for changes that often besides being woken; None: never."""

    publish: bool = True
    replicate: bool = True
    polling_s: float | None = None
