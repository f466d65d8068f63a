"""What capture costs the application: its own writes with our triggers against the same writes without.

Two databases, one bare and one captured, take turns: a round writes the same rows to both, and the ratio of the two
times counts. So whatever else the machine does hits both.
"""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.figures import Aim, Figure, Setting, median_of
from benchmarks.nodes import Node
from benchmarks.workload import (
    BULK_ROWS,
    INSERT,
    INTEGER_KEY,
    TEXT_KEY,
    UNIQUE_INDEX,
    UPDATE,
    Kind,
    Taken,
    changes_of,
    connect,
    in_bulk,
    one_by_one,
    taken_by,
    wait_for,
)
from harmonylite.db.replica import Replica, ReplicaSettings

SINGLE_AIM, BULK_AIM = Aim(1.6), Aim(2.2)

Writer = Callable[[sqlite3.Connection, str, Sequence[Sequence[object]]], None]


@dataclass(frozen=True, slots=True)
class Work:
    """rows: written to each database in one round; enough of them that a round holds several checkpoints."""

    name: str
    write: Writer
    rows: int
    rounds: int
    aim: Aim | None


def run(setting: Setting) -> Iterator[Figure]:
    """Triggers alone (no daemon runs), for three kinds of table; then with the daemon beside."""
    single = Work("one by one", one_by_one, setting.choose(2_000, 300), setting.choose(11, 3), SINGLE_AIM)
    bulk = Work(
        f"{BULK_ROWS} to a transaction", in_bulk, setting.choose(20_000, 2_000), setting.choose(11, 3), BULK_AIM
    )
    for kind in (INTEGER_KEY, TEXT_KEY, UNIQUE_INDEX):
        with _databases(setting.folder / f"write-{kind.name}", kind) as pair:
            for work in (single, bulk):
                yield from pair.measure(work)
    synced = Work("one by one, synchronous FULL", one_by_one, setting.choose(200, 30), setting.choose(7, 3), None)
    with _databases(setting.folder / "write-full", INTEGER_KEY, synchronous="FULL") as pair:
        yield from pair.measure(synced)
    with _databases(setting.folder / "write-daemon", INTEGER_KEY, with_daemon=True) as pair:
        for work in (single, bulk):
            beside = replace(work, name=f"{work.name}, daemon beside", rounds=setting.choose(7, 3), aim=None)
            yield from pair.measure(beside)


@dataclass(slots=True)
class _Databases:
    kind: Kind
    bare: sqlite3.Connection
    captured: sqlite3.Connection
    settle: Callable[[], None]
    written: int = 0

    def measure(self, work: Work) -> Iterator[Figure]:
        inserts, updates = [], []
        for turn in range(work.rounds + 1):
            readings = self.kind.readings(self.written, work.rows)
            self.written += work.rows
            insert = self._round(work.write, INSERT.format(name="readings"), readings, turn)
            update = self._round(work.write, UPDATE.format(name="readings"), list(changes_of(readings)), turn)
            if turn:  # the first warms caches
                inserts.append(insert)
                updates.append(update)
        for name, times in (("insert", inserts), ("update", updates)):
            bare = statistics.median(each.wall for each, _ in times) / work.rows
            cpu = statistics.median(captured.cpu / bare.cpu for bare, captured in times)
            total = sum(each.wall for _, each in times) / sum(each.wall for each, _ in times)
            yield median_of(
                f"{name}, {self.kind.name}, {work.name}",
                [captured.wall / bare.wall for bare, captured in times],
                "x bare",
                work.aim,
                f"{cpu:.2f}x in processor time; bare {bare * 1e6:.1f} us a row; {total:.2f}x over all rounds together",
            )

    def _round(self, write: Writer, sql: str, rows: Sequence[Sequence[object]], turn: int) -> tuple[Taken, Taken]:
        """Bare and captured; they take turns in going first."""
        taken = {}
        order = (self.bare, self.captured) if turn % 2 else (self.captured, self.bare)
        for connection in order:
            taken[connection] = taken_by(lambda: write(connection, sql, rows))  # noqa: B023
            if connection is self.captured:
                self.settle()
        return taken[self.bare], taken[self.captured]


@contextlib.contextmanager
def _databases(
    folder: Path, kind: Kind, *, synchronous: str = "NORMAL", with_daemon: bool = False
) -> Iterator[_Databases]:
    node = Node(folder, 1, {})
    bare_path = folder / "bare.db"
    with contextlib.ExitStack() as stack:
        for path in (bare_path, node.db):
            application = stack.enter_context(contextlib.closing(connect(path)))
            application.execute(kind.create("readings"))
        settle: Callable[[], None] = lambda: None  # noqa: E731
        if with_daemon:
            stack.enter_context(node)
            settle = node.wait_quiet
        else:
            replica = Replica(node.db, ReplicaSettings(node_id=1))
            replica.open()
            replica.close()
        bare = stack.enter_context(contextlib.closing(connect(bare_path, synchronous=synchronous)))
        captured = stack.enter_context(contextlib.closing(connect(node.db, synchronous=synchronous)))
        triggers = "SELECT count(*) >= 4 FROM sqlite_schema WHERE type = 'trigger'"
        wait_for(lambda: captured.execute(triggers).fetchone()[0], "capture is installed", 10.0, 0.01)
        yield _Databases(kind, bare, captured, settle)
