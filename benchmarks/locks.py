"""How long an application's writes wait while its node catches up, and for what.

The node was off while another one wrote; it starts, and applies the backlog while its application goes on writing
single rows of its own. At the same time the same application writes to a database of its own beside: what it waits
for is the machine's doing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.beside import Beside, Write, explain, read_holds
from benchmarks.figures import Aim, Figure, Setting, median_of, percentile
from benchmarks.nodes import Pair, shared_server
from benchmarks.workload import INSERT, INTEGER_KEY, connect, in_bulk, wait_for

PAUSE_S = 0.002
ROUNDS = 5


def run(setting: Setting) -> Iterator[Figure]:
    backlog = setting.choose(200_000, 5_000)
    rounds = [_Round(setting, number, backlog) for number in range(setting.choose(ROUNDS, 1))]
    told = "; ".join(explain(write, each.holds) for each in rounds for write in each.slowest()[:1])

    def longest(what: Callable[[_Round], Sequence[float]]) -> list[float]:
        return [1000 * max(what(each), default=0.0) for each in rounds]

    yield median_of(
        f"longest write beside {backlog:,} rows", longest(lambda each: each.ours), "ms", Aim(50.0), f"in ms: {told}"
    )
    yield median_of("the same without a daemon's lock", longest(lambda each: each.control), "ms")
    yield median_of("the same before the backlog", longest(lambda each: each.before), "ms")
    every = [took for each in rounds for took in each.ours]
    slow = sum(1000 * took > 50.0 for took in every)
    yield Figure(
        "p99 of the writes", 1000 * percentile(every, 0.99), "ms", None, f"{len(every)} writes, {slow} above 50 ms"
    )
    yield Figure("p50 of the writes", 1000 * percentile(every, 0.5), "ms")
    yield median_of(
        "longest time that the lock was held", longest(lambda each: [hold.seconds for hold in each.holds]), "ms"
    )
    yield median_of(
        "longest time computed with the lock", longest(lambda each: [hold.computed_s for hold in each.holds]), "ms"
    )
    speeds = [backlog / each.taken for each in rounds]
    yield median_of("rows caught up, from the daemon's start", speeds, "rows/s")


class _Round:
    """Both applications beside one backlog. ours, control, before: seconds per write."""

    def __init__(self, setting: Setting, number: int, backlog: int) -> None:
        schema = (INTEGER_KEY.create("readings"), INTEGER_KEY.create("own"))
        folder = setting.folder / f"locks-{number}"
        with shared_server(folder, *schema) as pair:
            self._catch_up(setting, pair, backlog, folder / "control")
            pair.second.stop()
        self.holds = [hold for hold in read_holds(folder / "holds.json") if self._started <= hold.until <= self._ended]

    def _catch_up(self, setting: Setting, pair: Pair, backlog: int, beside: Path) -> None:
        node = pair.second
        node.stop()
        with contextlib.closing(connect(pair.first.db)) as application:
            in_bulk(application, INSERT.format(name="readings"), INTEGER_KEY.readings(0, backlog))
        pair.first.wait_quiet()
        with Beside(node.db, "own", 10_000_000, PAUSE_S) as alone:
            time.sleep(setting.choose(3, 1))
        node.trace = beside.parent / "holds.json"
        with Beside.control(beside, PAUSE_S) as control, Beside(node.db, "own", 0, PAUSE_S) as ours:
            time.sleep(0.5)  # both write
            self._started = time.monotonic()
            node.start()
            with contextlib.closing(connect(node.db)) as reader:
                last = f"SELECT 1 FROM readings WHERE id = {backlog - 1}"
                wait_for(lambda: reader.execute(last).fetchone(), "the backlog is applied", 120.0, 0.01)
            self._ended = time.monotonic()
        self.taken = self._ended - self._started
        self._writes = self._meanwhile(ours)
        self.ours = [write.took_s for write in self._writes]
        self.control = [write.took_s for write in self._meanwhile(control)]
        self.before = [write.took_s for write in alone.writes]

    def _meanwhile(self, application: Beside) -> list[Write]:
        return [write for write in application.writes if self._started <= write.at <= self._ended]

    def slowest(self) -> list[Write]:
        return sorted(self._writes, key=lambda write: -write.took_s)
