"""Rows per second from commit on one node to commit on the other, all processes on this machine.

From the first row written until the last row is visible on the other node, while the writer, both daemons and one
nats-server share the processors. Beside it: how fast the same rows go into a bare SQLite file.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence

from benchmarks.figures import Aim, Figure, Setting, median_of
from benchmarks.nodes import Pair, hub_and_leaf, shared_server
from benchmarks.workload import (
    BULK_ROWS,
    INSERT,
    INTEGER_KEY,
    UPDATE,
    changes_of,
    connect,
    in_bulk,
    taken_by,
    wait_for,
)

AIM = Aim(120_000, at_least=True)

CREATE = INTEGER_KEY.create("readings")
INTO, CHANGE = INSERT.format(name="readings"), UPDATE.format(name="readings")


def run(setting: Setting) -> Iterator[Figure]:
    """Inserts, updates, one large transaction over a shared server; inserts through a hub and a leaf."""
    rows = setting.choose(150_000, 5_000)
    rounds = setting.choose(5, 1)
    with shared_server(setting.folder / "shared", CREATE) as pair:
        yield from _Course(setting, pair).figures(rows, rounds)
    with hub_and_leaf(setting.folder / "hub", CREATE) as pair:
        course = _Course(setting, pair)
        speeds = [rows / course.inserts(rows, BULK_ROWS)[0] for _ in range(max(1, rounds // 2))]
        yield median_of("inserts, leaf to hub" if pair.first.name == "b" else "inserts, hub to leaf", speeds, "rows/s")


class _Course:
    """Writes ever more rows on the pair's first node and waits for them on the second."""

    def __init__(self, setting: Setting, pair: Pair) -> None:
        self._pair = pair
        self._written = 0
        self._bare = setting.folder / f"bare-{pair.first.folder.parent.name}.db"
        with contextlib.closing(connect(self._bare)) as bare:
            bare.execute(CREATE)

    def figures(self, rows: int, rounds: int) -> Iterator[Figure]:
        inserts, shares, writing, updates, update_shares = [], [], [], [], []
        for _ in range(rounds):
            taken, bare, wrote = self.inserts(rows, BULK_ROWS)
            inserts.append(rows / taken)
            shares.append(100 * bare / taken)
            writing.append(rows / wrote)
            taken, bare, _ = self.updates(rows)
            updates.append(rows / taken)
            update_shares.append(100 * bare / taken)
        whole = min(100_000, rows)
        large = [whole / self.inserts(whole, whole)[0] for _ in range(max(1, rounds // 2))]
        yield median_of("inserts, 500 to a transaction", inserts, "rows/s", AIM, f"{rows:,} rows a round")
        yield median_of("  as a share of bare executemany", shares, "%")
        yield median_of("  the application's own writing meanwhile", writing, "rows/s")
        yield median_of("updates, 500 to a transaction", updates, "rows/s")
        yield median_of("  as a share of bare executemany", update_shares, "%")
        yield median_of(f"inserts, one transaction of {whole:,}", large, "rows/s")

    def inserts(self, rows: int, size: int) -> tuple[float, float, float]:
        """Seconds until all are there, seconds for the same rows in a bare file, seconds that writing took."""
        readings = INTEGER_KEY.readings(self._written, rows)
        self._written += rows
        last = readings[-1][0]
        return self._run(INTO, readings, size, f"SELECT 1 FROM readings WHERE id = {last}")

    def updates(self, rows: int) -> tuple[float, float, float]:
        """Like `inserts`, for changes of the rows inserted last."""
        changes = list(changes_of(INTEGER_KEY.readings(self._written - rows, rows)))
        _, taken_at, key = changes[-1]
        return self._run(
            CHANGE, changes, BULK_ROWS, f"SELECT 1 FROM readings WHERE id = {key} AND taken_at = {taken_at}"
        )

    def _run(self, sql: str, rows: Sequence[Sequence[object]], size: int, last: str) -> tuple[float, float, float]:
        pair = self._pair
        for node in (pair.first, pair.second):
            node.wait_quiet()
        wrote = 0.0
        with (
            contextlib.closing(connect(self._bare)) as bare,
            contextlib.closing(connect(pair.first.db)) as application,
            contextlib.closing(connect(pair.second.db)) as reader,
        ):
            alone = taken_by(lambda: in_bulk(bare, sql, rows, size)).wall

            def replicate() -> None:
                nonlocal wrote
                wrote = taken_by(lambda: in_bulk(application, sql, rows, size)).wall
                wait_for(_finds(reader, last), "the last row arrives")

            taken = taken_by(replicate).wall
            # The last row may come before the others of another group: all must be there and be the same.
            wait_for(lambda: _digest(reader) == _digest(application), "both nodes hold the same rows", 60.0, 0.2)
        return taken, alone, wrote


def _finds(connection: sqlite3.Connection, sql: str) -> Callable[[], object]:
    return lambda: connection.execute(sql).fetchone()


def _digest(connection: sqlite3.Connection) -> object:
    return connection.execute("SELECT count(*), total(value), sum(taken_at) FROM readings").fetchone()
