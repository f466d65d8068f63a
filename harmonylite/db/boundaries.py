"""Where transactions are known to end in the change logs, so that a long log need not become one long transaction.

A log does not say which transaction a row belongs to. But whoever looks at all logs at once sees whole transactions:
none crosses where they end then. Absorbing a long log piece by piece looks often, and while the application has the
lock, the reader does; so what is written meanwhile is absorbed as transactions of a moderate size, not as one with all
that was there before.
"""

from __future__ import annotations

from collections.abc import Mapping

Ends = Mapping[str, int]
"""The last row (seq) of each log that has any, by table."""


class Boundaries:
    """What was seen in this process; forgotten whenever it may not be true any more, which only makes pieces longer."""

    def __init__(self) -> None:
        self._seen: list[dict[str, int]] = []  # oldest first, without what was absorbed
        self._batch = -1  # the state's batch after the last absorb; another one now: that was rolled back, say
        self._sighted: list[tuple[int, Ends]] = []

    def sighted(self, batch: int, ends: Ends) -> None:
        """Any thread. In one view of the database the state's batch and the logs' ends were these."""
        self._sighted.append((batch, ends))

    def forget(self) -> None:
        """The state's batch moves on without an absorb: if the last one was rolled back, it would not be noticed."""
        self._batch = -1

    def next(self, batch: int, before_first: Ends, ends: Ends, limit: int) -> Ends:
        """Up to where rows belong together: the last boundary within `limit` rows, else the first one.

        batch: the state's; before_first: of each log, one less than its first row; ends: as they are now.
        """
        if self._batch != batch:
            self._seen = []
        sighted, self._sighted = self._sighted, []
        # Only those of now: since another absorb, rows may have gone, and their numbers been given out again.
        for seen in [*(seen for at, seen in sighted if at == batch), ends]:
            last = self._seen[-1] if self._seen else {}
            if seen != last and all(end <= seen.get(name, 0) for name, end in last.items()):
                self._seen.append(dict(seen))
        while len(self._seen) > 1 and _rows(before_first, self._seen[1]) <= limit:
            del self._seen[0]
        return dict(self._seen[0])

    def absorbed(self, batch: int, taken: Ends) -> None:
        """The logs were absorbed up to `taken`; the state has `batch` now. A log that is empty counts from 1 again."""
        self._batch = batch
        left = [
            {name: end for name, end in seen.items() if end > taken.get(name, 0)}
            for seen in self._seen
        ]  # fmt: skip
        self._seen = [seen for seen in left if seen]


def _rows(before_first: Ends, ends: Ends) -> int:
    return sum(max(0, end - before_first.get(name, end)) for name, end in ends.items())
