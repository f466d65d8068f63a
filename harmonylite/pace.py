"""How much of the stream one write transaction takes: so much that the application hardly notices the lock.

How long a message takes depends on the machine, on the rows in it and on how well they were compressed, so it is
measured. A transaction of the sender stays one (I7): a single large one may hold the lock for longer.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

# A transaction should hold the write lock for about so long, commit included; half as long again is no reason to take
# less: 18 ms, which is when SQLite's busy handler looks again. On a busy machine less would be better for the longest
# wait (who computes for longer than a time slice is made to wait by the scheduler in the midst of it, and the lock with
# it), but the lock would be free for most of the time.
AIM_S: Final = 0.012
MOST_MESSAGES: Final = 256
LEAST_BYTES, MOST_BYTES = 4 << 10, 8 << 20
# How long SQLite's own busy handler (sqliteDefaultBusyCallback) sleeps between two looks at the lock; later 0.1 s.
PAUSES_S: Final = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.025, 0.025, 0.05, 0.05)
LONGEST_PAUSE_S: Final = 0.1
_LOOKS_S: Final = tuple(accumulate(PAUSES_S))
# Who waits wakes up a little late.
SLACK_S: Final = 0.002
# No hindrance.
SHORT_S: Final = 0.001


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
        if seconds > 1.5 * AIM_S:
            part = AIM_S / seconds
            self.messages = max(1, min(self.messages, int(messages * part)))
            self.bytes = max(LEAST_BYTES, min(self.bytes, int(size * part)))
        elif seconds < AIM_S / 2:
            if messages >= self.messages:
                self.messages = min(MOST_MESSAGES, self.messages * 2)
            if size >= self.bytes:
                self.bytes = min(MOST_BYTES, self.bytes * 2)

    def released(self, seconds: float, at: float) -> None:
        """The lock was held for so many seconds, until `at` (time.monotonic)."""
        self._free_until = at + free_for(seconds)

    async def leave_free(self) -> None:
        """Before the next transaction: the application gets its turn. Else it would find the lock taken each time it
        looks."""
        if (pause := self._free_until - time.monotonic()) > 0:
            await asyncio.sleep(pause)


def free_for(held_s: float) -> float:
    """Seconds for which a lock that was held for `held_s` stays free: until everybody has looked who began to wait
    meanwhile. So nobody waits for longer than that and one pause."""
    if held_s < SHORT_S:
        return 0.0
    index = bisect.bisect_left(_LOOKS_S, held_s)
    pause = PAUSES_S[index] if index < len(PAUSES_S) else LONGEST_PAUSE_S
    return pause + SLACK_S
