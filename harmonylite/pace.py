"""How much of the stream one write transaction takes: so much that the application hardly notices the lock.

How long a message takes depends on the machine, on the rows in it and on how well they were compressed, so it is
measured. A transaction of the sender stays one (I7): a single large one may hold the lock for longer.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final

# A transaction should hold the write lock for about so long; up to twice that is no reason to take less.
AIM_S: Final = 0.02
MOST_MESSAGES: Final = 256
LEAST_BYTES, MOST_BYTES = 4 << 10, 8 << 20
# Shorter locks are no hindrance: SQLite's busy handler looks again after 1, 3, 8, 18, .. ms.
SHORT_S: Final = 0.004
# Its pauses grow to 100 ms: whoever waits finds a lock that is free for so long.
LONGEST_PAUSE_S: Final = 0.1


@dataclass(slots=True)
class Pace:
    """What to read at a time: up to `messages`, and no further than where `bytes` of payload are reached."""

    messages: int = 1
    bytes: int = 16 << 10
    _free_until: float = 0.0

    def held(self, messages: int, size: int, seconds: float) -> None:
        """Applying so many messages of so many bytes held the lock for so many seconds; 0: nothing was applied."""
        if not seconds:
            return
        if seconds > 2 * AIM_S:
            part = AIM_S / seconds
            self.messages = max(1, min(self.messages, int(messages * part)))
            self.bytes = max(LEAST_BYTES, min(self.bytes, int(size * part)))
        elif seconds < AIM_S:
            if messages >= self.messages:
                self.messages = min(MOST_MESSAGES, self.messages * 2)
            if size >= self.bytes:
                self.bytes = min(MOST_BYTES, self.bytes * 2)

    def released(self, seconds: float) -> None:
        """The lock was held for so many seconds."""
        self._free_until = time.monotonic() + min(seconds, LONGEST_PAUSE_S) if seconds > SHORT_S else 0.0

    async def leave_free(self) -> None:
        """Before the next transaction: the lock stays free for as long as it was held, or for what the application's
        busy handler pauses at the most. Else it would find the lock taken each time it looks."""
        if (pause := self._free_until - time.monotonic()) > 0:
            await asyncio.sleep(pause)
