"""How the daemon waits for the application's lock.

SQLite's own handler soon looks every 100 ms only. An application that writes one large transaction after the other
leaves the lock free for some 20 microseconds to a few milliseconds between two of them, and is missed for minutes.
So the daemon looks often: every millisecond at first, as most transactions are short; ten times as often for a while,
for the gap between two of them; then, as this may be a long one, every millisecond again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# Until when (seconds since the wait began) it is looked how often (seconds between two looks).
STEPS_S = ((0.02, 0.001), (0.5, 0.0001))
LATER_S = 0.001


def busy_handler(patience_s: float) -> Callable[[int], bool]:
    """A handler for one connection (sqlite3_busy_handler): waits, and gives up after `patience_s`."""
    since = 0.0

    def wait(looks: int) -> bool:
        nonlocal since
        now = time.monotonic()
        if looks == 0:
            since = now
        waited = now - since
        if waited >= patience_s:
            return False
        time.sleep(next((pause for until, pause in STEPS_S if waited < until), LATER_S))
        return True

    return wait
