"""The replica on its threads: clock corrections, pinned snapshots, schemas that change under the reader."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import pytest

from harmonylite import clock, engine
from harmonylite.clock import StepDetector
from harmonylite.db.outbox import OutgoingGroup
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.db.schema import Schema
from harmonylite.db.versions import ABSORB_ROWS
from harmonylite.engine import Engine
from harmonylite.model import Delivery, Position
from harmonylite.observe.metrics import Metrics
from harmonylite.pace import Pace
from harmonylite.packing import Packed
from harmonylite.timekeeping import Timekeeper

DAY_MS = 86_400_000
SLACK_MS = 10_000


@dataclass
class Node:
    application: apsw.Connection
    replica: Replica
    engine: Engine

    def insert(self, first: int, count: int = 1, *, age_ms: int = 0) -> None:
        """Rows in one transaction, logged as if by a clock that was behind."""
        self.application.execute(
            "WITH RECURSIVE s(x) AS (SELECT ?1 UNION ALL SELECT x + 1 FROM s WHERE x < ?1 + ?2 - 1)"
            " INSERT INTO t SELECT x, 'x' FROM s",
            (first, count),
        )
        self.application.execute("UPDATE __harmonylite__t_change_log SET ts = ts - ?", (age_ms,))

    def version_ms(self) -> int:
        return int(next(iter(self.application.execute("SELECT max(ts) FROM __harmonylite__t_version")))[0])


@contextlib.asynccontextmanager
async def opened(folder: Path, timekeeper: Timekeeper | None = None, **settings: Any) -> AsyncIterator[Node]:
    path = folder / "app.db"
    application = apsw.Connection(str(path))
    application.setbusytimeout(5000)
    application.execute("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, v TEXT)")
    replica = Replica(path, ReplicaSettings(**{"node_id": 1, "boot_id": "boot", **settings}))
    engine = Engine(replica, timekeeper or Timekeeper(60_000), Metrics("h", "l"), compress=True)
    await engine.open()
    try:
        yield Node(application, replica, engine)
    finally:
        await engine.close()
        application.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


# -- time


class WallClock:
    """The device's wall clock, which is behind until something sets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, behind_ms: int) -> None:
        self.behind_ms = behind_ms
        self.true_ms: Callable[[], int] = clock.wall_ms
        monkeypatch.setattr(clock, "wall_ms", self.shown_ms)

    def shown_ms(self) -> int:
        return self.true_ms() - self.behind_ms

    def timekeeper(self) -> Timekeeper:
        timekeeper = Timekeeper(60_000, synchronized=lambda: self.behind_ms == 0)
        timekeeper._steps = StepDetector(wall=self.shown_ms)
        return timekeeper


@pytest.mark.parametrize("corrected", [False, True])
def test_a_step_is_dealt_with_before_the_servers_time_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corrected: bool
) -> None:
    """NTP sets the clock, the connection comes up before the next look at the clock."""

    async def test() -> None:
        wall = WallClock(monkeypatch, 3 * DAY_MS)
        async with opened(tmp_path, wall.timekeeper()) as node:
            if corrected:
                await node.engine.correcting.server_time(wall.true_ms(), 1)
                assert abs(node.engine.time.correction.delta_ms - 3 * DAY_MS) < SLACK_MS
            node.insert(1, age_ms=3 * DAY_MS)
            if corrected:
                await node.engine.absorb()
            wall.behind_ms = 0
            await node.engine.correcting.server_time(wall.true_ms(), 1)
            (sent,) = await node.engine.take_outgoing(0)
            assert abs(wall.true_ms() - sent.newest_ms) < SLACK_MS
            await node.engine.correcting.check_clock()
            assert node.version_ms() == sent.newest_ms
            assert node.engine.time.correction.delta_ms == 0

    run(test())


def test_a_correction_holds_only_once_the_shift_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        wall = WallClock(monkeypatch, 3 * DAY_MS)
        async with opened(tmp_path, wall.timekeeper()) as node:
            node.insert(1, age_ms=3 * DAY_MS)
            await node.engine.absorb()
            node.application.execute("BEGIN IMMEDIATE")
            connecting = asyncio.create_task(node.engine.correcting.server_time(wall.true_ms(), 1))
            while not node.engine.last_error:
                await asyncio.sleep(0.01)
            connecting.cancel()  # the connection is lost again
            await asyncio.gather(connecting, return_exceptions=True)
            assert node.engine.time.correction.delta_ms == 0
            assert node.engine.time.server.now_ms() is None
            node.application.execute("COMMIT")
            await node.engine.correcting.server_time(wall.true_ms(), 1)
            assert abs(wall.true_ms() - node.version_ms()) < SLACK_MS

    run(test())


def test_a_step_is_not_forgotten_when_nobody_waits_for_its_correction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        wall = WallClock(monkeypatch, 3 * DAY_MS)
        async with opened(tmp_path, wall.timekeeper()) as node:
            node.insert(1, age_ms=3 * DAY_MS)
            wall.behind_ms = 0
            node.application.execute("BEGIN IMMEDIATE")
            connecting = asyncio.create_task(node.engine.correcting.server_time(wall.true_ms(), 1))
            while not node.engine.last_error:
                await asyncio.sleep(0.01)
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            node.application.execute("COMMIT")
            await node.engine.correcting.check_clock()
            assert abs(wall.true_ms() - node.version_ms()) < SLACK_MS

    run(test())


def test_all_that_a_corrected_clock_logged_is_absorbed_before_it_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one transaction takes: the rest would go by the clock as it is now, and be bounded only."""

    async def test() -> None:
        wall = WallClock(monkeypatch, -3 * DAY_MS)
        async with opened(tmp_path, wall.timekeeper()) as node:
            await node.engine.correcting.server_time(wall.true_ms(), 1)
            node.insert(1, 2 * ABSORB_ROWS + 1, age_ms=-3 * DAY_MS)
            wall.behind_ms = 0
            await node.engine.correcting.check_clock()
            await node.engine.absorb_all()
            assert abs(wall.true_ms() - node.version_ms()) < SLACK_MS

    run(test())


def test_what_another_boot_logged_is_not_corrected_with_this_ones_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon was off while the application wrote by a good clock; the next boot's clock is days behind."""

    async def test() -> None:
        async with opened(tmp_path):
            pass
        written = clock.wall_ms() - 4 * DAY_MS
        with contextlib.closing(apsw.Connection(str(tmp_path / "app.db"))) as application:
            application.execute("INSERT INTO t VALUES (1, 'x')")
            application.execute("UPDATE __harmonylite__t_change_log SET ts = ?", (written,))
        wall = WallClock(monkeypatch, 3 * DAY_MS)
        async with opened(tmp_path, wall.timekeeper(), boot_id="the next") as node:
            await node.engine.correcting.server_time(wall.true_ms(), 1)
            assert abs(node.engine.time.correction.delta_ms - 3 * DAY_MS) < SLACK_MS
            assert abs(node.version_ms() - written) < SLACK_MS

    run(test())


# -- writes that fail


def test_another_write_that_works_does_not_make_the_failing_one_forgotten(tmp_path: Path) -> None:
    async def test() -> None:
        full = threading.Event()
        full.set()

        def large() -> None:
            if full.is_set():
                raise apsw.FullError("database or disk is full")

        async with opened(tmp_path) as node:
            writing = asyncio.create_task(node.engine.write(large))
            while not node.engine.last_error:
                await asyncio.sleep(0.01)
            node.insert(1)
            assert await node.engine.absorb() == 1
            assert "disk is full" in (node.engine.last_error or "")
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            assert "disk is full" in (node.engine.last_error or "")
            await node.engine.write(lambda: None)  # writes nothing
            assert "disk is full" in (node.engine.last_error or "")
            node.insert(2)
            assert await node.engine.absorb() == 1
            assert node.engine.last_error is None
            writing = asyncio.create_task(node.engine.write(large))
            while not node.engine.last_error:
                await asyncio.sleep(0.01)
            full.clear()
            await writing
            assert node.engine.last_error is None

    run(test())


# -- snapshots


def test_a_snapshot_pinned_for_nobody_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with opened(tmp_path) as node:
            node.insert(1, 1_500)
            entered, go_on = threading.Event(), threading.Event()
            outgoing = node.replica.outgoing.read

            def slow(after: int = 0, *, on_writer: bool = False) -> Any:
                found = outgoing(after, on_writer=on_writer)
                if not on_writer:
                    entered.set()
                    go_on.wait(10)
                return found

            monkeypatch.setattr(node.replica.outgoing, "read", slow)
            taking = asyncio.create_task(node.engine.take_outgoing(0))
            await asyncio.to_thread(entered.wait, 10)
            taking.cancel()  # the connection is lost while the reader's thread is still at it
            await asyncio.gather(taking, return_exceptions=True)
            go_on.set()
            await node.engine.release()
            node.application.execute("DELETE FROM t WHERE id > 1")
            await node.engine.absorb()
            taken: list[Packed] = []
            while packed := await node.engine.take_outgoing(max([0, *(each.through for each in taken)])):
                taken += packed
            assert sum(each.rows for each in taken) == 1_500  # one row and the tombstones of all others

    run(test())


@pytest.mark.parametrize("rows", [3, 1_500])
def test_a_failure_while_packing_lets_the_snapshot_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    async def test() -> None:
        async with opened(tmp_path, group_rows=1) as node:
            node.insert(1, rows)
            await node.engine.absorb()
            node.insert(rows + 1)
            with monkeypatch.context() as broken:

                def fail(_: OutgoingGroup, **__: object) -> Packed:
                    raise MemoryError("once")

                broken.setattr(engine, "pack", fail)
                with pytest.raises(MemoryError):
                    await node.engine.take_outgoing(0)
            node.insert(rows + 2)
            taken: list[Packed] = []
            while packed := await node.engine.take_outgoing(max([0, *(each.through for each in taken)])):
                taken += packed
            assert sum(each.rows for each in taken) == rows + 2

    run(test())


def test_a_position_that_was_only_noted_is_where_the_next_session_begins(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(tmp_path) as node:
            position = Position("s", "created", 7, 1)
            await node.engine.apply(Delivery(position))
            assert await node.engine.position("s") == position

    run(test())


# -- the schema


def test_the_lock_is_free_between_the_pieces_when_everything_is_published_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application whose writes do not wait gets its turn before the next piece."""

    async def main() -> None:
        monkeypatch.setattr("harmonylite.db.marking.MARK_ROWS", 20)
        async with opened(tmp_path) as node:
            node.insert(1, 200)
            while packed := await node.engine.take_outgoing(0):
                for each in packed:
                    await node.engine.published(each)
            await node.engine.release()
            assert await node.engine.pending() == 0
            pieces = 0
            node.application.setbusytimeout(0)

            class Interleaved(Pace):
                async def leave_free(self) -> None:
                    nonlocal pieces
                    pieces += 1
                    node.application.execute("INSERT INTO t VALUES (?, 'meanwhile')", (1_000 + pieces,))

            node.engine.pace = Interleaved()
            await node.engine.start_over(Position("s", "c", 9, 9))
            assert pieces > 10
            assert await node.engine.position("s") == Position("s", "c", 9, 9)
            assert await node.engine.absorb_all() == pieces
            assert await node.engine.pending() == 200 + pieces

    run(main())


def test_counts_follow_a_table_that_was_dropped(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(tmp_path) as node:
            node.insert(1)
            node.application.execute("DROP TABLE t")
            node.application.execute("CREATE TABLE u (id INTEGER PRIMARY KEY)")
            await node.engine.follow_schema()
            assert await node.engine.pending() == 0
            node.application.execute("INSERT INTO u VALUES (1)")
            assert await node.engine.logged() == await node.engine.pending() == 1

    run(test())


def test_counts_while_a_table_is_being_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with opened(tmp_path) as node:
            database = node.replica._database
            installing, go_on = threading.Event(), threading.Event()
            install = database._on_schema

            def slow(schema: Schema) -> None:
                install(schema)
                installing.set()
                go_on.wait(10)

            monkeypatch.setattr(database, "_on_schema", slow)
            node.application.execute("CREATE TABLE u (id INTEGER PRIMARY KEY)")
            following = asyncio.create_task(node.engine.follow_schema())
            await asyncio.to_thread(installing.wait, 10)
            asking = asyncio.create_task(node.engine.pending())  # the reader cannot see the side tables of u yet
            await asyncio.sleep(0.05)
            go_on.set()
            assert await asking == 0
            await following

    run(test())


def test_after_much_was_written_the_log_can_begin_afresh(tmp_path: Path) -> None:
    """While we write, the application is kept from copying the write-ahead log; not for ever."""

    async def test() -> None:
        async with opened(tmp_path) as node:
            node.insert(0)
            reader = apsw.Connection(str(tmp_path / "app.db"))
            reader.execute("BEGIN; SELECT count(*) FROM t").fetchall()
            for first in range(1, 100_001, 20_000):
                node.insert(first, 20_000)
                assert await node.engine.absorb()
            reader.close()
            node.application.setbusytimeout(0)
            truncate = "PRAGMA wal_checkpoint(TRUNCATE)"
            assert node.application.execute(truncate).fetchall()[0][0] == 1  # busy
            while node.application.execute(truncate).fetchall() != [(0, 0, 0)]:
                await asyncio.sleep(0.05)

    run(test())
