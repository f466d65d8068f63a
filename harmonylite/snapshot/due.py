"""When a snapshot is due, by what the store lists and what other nodes ask for.

The server that dates them may have had a wrong clock. What claims to be from the future has no age: such a snapshot
does not keep the next one waiting, nor does it push a good one out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

from harmonylite.snapshot.manifest import Manifest, time_of
from harmonylite.stream.lease import SnapshotRequest

# Snapshots that only the number of messages makes due are at least so far apart: a slow node has to be able to fetch
# one before it is removed again.
APART_S = 600.0
# No more than so many are taken in that time, whatever is listed or asked for: each copies the whole database.
MOST = 3
# After the first failure.
RETRY_S = 60.0
# A request with this reason names the snapshot that its node is fetching.
FETCHING = "fetching "


class BackOff:
    """After a failure; each further one in a row doubles the pause, up to `longest_s`."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._failures = 0
        self._until = 0.0

    @property
    def waits(self) -> bool:
        """Whether it is too early for another try."""
        return time.monotonic() < self._until

    def failed(self) -> None:
        """A try failed."""
        self._until = time.monotonic() + self.pause_s
        self._failures += 1

    @property
    def pause_s(self) -> float:
        """How long the next failure will make one wait."""
        return min(RETRY_S * 2.0 ** min(self._failures, 16), self._longest_s)

    def succeeded(self) -> None:
        """A try went well, or there is a new reason for one."""
        self._failures, self._until = 0, 0.0


class Due:
    """What this node knows of when it took one. interval_ms: 0 for never; max_entries: so many messages make one due;
    tolerance_ms: how far ahead of now a time is believed."""

    def __init__(self, interval_ms: int, max_entries: int, tolerance_ms: int) -> None:
        self._interval_ms = interval_ms
        self._max_entries = max_entries
        self._tolerance_ms = tolerance_ms
        self._taken: deque[float] = deque(maxlen=MOST)

    def taken(self) -> None:
        """One was taken here just now."""
        self._taken.append(time.monotonic())

    def latest_ms(self, now_ms: int) -> int:
        """What claims a later time is not believed."""
        return now_ms + self._tolerance_ms

    def age_s(self, newest: Manifest | None, now_ms: int) -> float | None:
        """None if there is none, or if it is not known."""
        if newest is None or newest.created_ms > self.latest_ms(now_ms):
            return None
        return max(0.0, (now_ms - newest.created_ms) / 1000)

    def why(
        self, newest: Manifest | None, now_ms: int, ends: Mapping[str, int], requests: Sequence[SnapshotRequest]
    ) -> str | None:
        """Why one is due; None if it is not. newest: in the store; ends: the last sequence of each stream."""
        age_s = self.age_s(newest, now_ms)
        moved = _moved(newest if age_s is not None else None, ends)
        passed_s = time.monotonic() - self._taken[-1] if self._taken else None
        if (
            self._interval_ms
            and moved
            and all(each is None or each * 1000 >= self._interval_ms for each in (age_s, passed_s))
        ):
            return "the interval is over"
        if len(self._taken) == MOST and time.monotonic() - self._taken[0] < APART_S:
            return None
        for request in requests:
            if not request.reason.startswith(FETCHING) and self._is_wanted(request, newest, age_s, now_ms):
                return f"node {request.node_id} needs one: {request.reason}"
        if moved >= self._max_entries and (age_s is None or age_s >= APART_S):
            return f"{moved} messages since the last one"
        return None

    def _is_wanted(self, request: SnapshotRequest, newest: Manifest | None, age_s: float | None, now_ms: int) -> bool:
        if newest is None or age_s is None:
            return True
        seen_ms = time_of(request.newer_than)
        if seen_ms is not None and seen_ms > self.latest_ms(now_ms):
            return age_s >= APART_S  # nothing that is taken now would be newer
        return newest.id <= request.newer_than


def _moved(newest: Manifest | None, ends: Mapping[str, int]) -> int:
    """Messages since a snapshot."""
    taken = {position.stream: position.sequence for position in newest.positions} if newest is not None else {}
    # A stream that ends before the snapshot is another one.
    return sum(end - taken[name] if taken.get(name, end + 1) <= end else end for name, end in ends.items())
