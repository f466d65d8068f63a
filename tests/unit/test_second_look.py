"""Ways through whole tables, beside an application and a daemon that go on: what is found, and who waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import apsw
import pytest

from harmonylite import clock, second_look
from harmonylite.db import evictions, sql
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.engine import Engine
from harmonylite.observe.metrics import Metrics
from harmonylite.second_look import SecondLook
from harmonylite.tasks import cancelled
from harmonylite.timekeeping import Timekeeper

SCHEMA = "CREATE TABLE t (id INTEGER PRIMARY KEY, v); CREATE UNIQUE INDEX i ON t (v)"
FILL = (
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < ?)"
    " INSERT INTO t SELECT x, 'v' || x FROM n"
)
VERSIONS = "SELECT count(*) FROM __harmonylite__t_version WHERE deleted = ?"


@dataclass
class Node:
    application: apsw.Connection
    engine: Engine
    looking: SecondLook

    def sql(self, text: str, *bindings: object) -> list[Any]:
        return self.application.execute(text, bindings).fetchall()

    def count(self, *, deleted: bool) -> int:
        return int(self.sql(VERSIONS, int(deleted))[0][0])

    async def look(self) -> int:
        self.looking._next_look.clear()
        return await self.looking.look_again()


@contextlib.asynccontextmanager
async def opened(folder: Path, rows: int = 0) -> AsyncIterator[Node]:
    """A node whose table had so many rows when capture was installed."""
    path = folder / "app.db"
    application = apsw.Connection(str(path))
    application.setbusytimeout(5000)
    application.execute("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF")
    application.execute(SCHEMA)
    if rows:
        application.execute(FILL, (rows,))
    engine = Engine(Replica(path, ReplicaSettings(node_id=1)), Timekeeper(60_000), Metrics("h", "l"), compress=False)
    await engine.open()
    try:
        yield Node(application, engine, SecondLook(engine))
    finally:
        await engine.close()
        application.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of more than three rows are large."""
    monkeypatch.setattr(evictions, "LOOK_ROWS", 3)


def test_large_tables_are_looked_through_now_and_then(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with opened(tmp_path) as node:
            engine, looking = node.engine, node.looking
            node.sql(FILL, 5)
            await engine.absorb()
            assert await looking.look_again() == 0
            node.sql("REPLACE INTO t VALUES (6, 'v1')")
            await engine.absorb()
            monkeypatch.setattr(looking, "_next_look", {"t": float("inf")})
            assert await looking.look_again() == 0, "not before its time"
            assert await node.look() == 1
            await engine.absorb()
            assert node.sql("SELECT k0 FROM __harmonylite__t_version WHERE deleted") == [(1,)]
            assert await node.look() == 0
            with monkeypatch.context() as patched:
                patched.setattr(engine.replica.unseen, "look_through", lambda table: pytest.fail("nothing was written"))
                assert await node.look() == 0
            # Offline, what may have evicted rows is absorbed soon, so that the time of the eviction is about right.
            node.sql("REPLACE INTO t VALUES (7, 'v2')")
            assert await engine.shorten_log(20_000) == 1

    asyncio.run(asyncio.wait_for(test(), 30))


def test_all_of_many_evicted_rows_are_found_by_one_look(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(tmp_path, 30_000) as node:
            await node.looking.stamp()
            node.sql("REPLACE INTO t SELECT id + 1000000, v FROM t WHERE id <= 25000")
            await node.engine.absorb_all()
            found = await node.look()
            await node.engine.absorb_all()
            assert found == node.count(deleted=True) == 25_000

    asyncio.run(asyncio.wait_for(test(), 60))


def test_nothing_that_is_published_waits_for_a_look(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with opened(tmp_path, 10) as node:
            looking, go_on = threading.Event(), threading.Event()
            step = evictions.Look.step

            def slow(look: evictions.Look) -> Any:
                looking.set()
                go_on.wait(20)
                return step(look)

            monkeypatch.setattr(evictions.Look, "step", slow)
            look = asyncio.create_task(node.look())
            await asyncio.to_thread(looking.wait, 10)
            try:
                # So many that the pinned reader reads them.
                node.sql(
                    "INSERT INTO t SELECT id + 100, 'x' || id FROM (WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL"
                    " SELECT id + 1 FROM n WHERE id < 1500) SELECT id FROM n)"
                )
                sent = await node.engine.take_outgoing(0)
                assert sum(packed.rows for packed in sent) >= 1_000
                assert not look.done()
            finally:
                go_on.set()
            assert await look == 0

    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_look_follows_a_table_that_was_dropped(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(tmp_path) as node:
            node.sql("DROP TABLE t")
            assert await node.looking.audit() == 0

    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_table_that_is_dropped_while_it_is_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with opened(tmp_path, 10) as node:
            step = evictions.Look.step

            def dropped(look: evictions.Look) -> Any:
                node.sql("DROP TABLE t")
                return step(look)

            monkeypatch.setattr(evictions.Look, "step", dropped)
            assert await node.looking.audit(["t"]) == 0
            assert node.engine.replica.schema.table("t") is None

    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_delete_in_the_log_keeps_its_time(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(tmp_path) as node:
            node.sql("INSERT INTO t VALUES (1, 'x')")
            node.sql("UPDATE __harmonylite__t_change_log SET ts = ts - 86400000")
            await node.engine.absorb()
            node.sql("DELETE FROM t")
            node.sql("UPDATE __harmonylite__t_change_log SET ts = ts - 36000000")
            assert await node.looking.audit() == 0
            assert clock.wall_ms() - node.sql("SELECT max(ts) FROM __harmonylite__t_version")[0][0] >= 36_000_000

    asyncio.run(asyncio.wait_for(test(), 30))


def test_rows_become_known_beside_the_application(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An eviction meanwhile is found, what is deleted meanwhile stays deleted, and the progress is told."""
    monkeypatch.setattr(second_look, "SAY_AFTER_S", 0.0)
    caplog.set_level(logging.INFO, "harmonylite.second_look")

    async def test() -> None:
        async with opened(tmp_path, 20_000) as node:
            assert node.count(deleted=False) == 0
            stamped = asyncio.create_task(node.looking.stamp())
            while node.count(deleted=False) < 1_000:
                await asyncio.sleep(0)
            node.sql("REPLACE INTO t VALUES (-1, 'v19999')")
            node.sql("DELETE FROM t WHERE id = 19998")
            node.sql("DELETE FROM t WHERE id = -1")  # nobody else sees a clash
            assert not stamped.done()
            await stamped
            await node.look()
            await node.engine.absorb_all()
            deleted = node.sql("SELECT k0 FROM __harmonylite__t_version WHERE deleted AND k0 > 0 ORDER BY k0")
            assert deleted == [(19_998,), (19_999,)]
            assert node.count(deleted=False) == 19_998
            assert not node.engine.replica.unseen.has_stamping()

    asyncio.run(asyncio.wait_for(test(), 60))
    told = [(record.message, cast(Any, record).fields) for record in caplog.records]
    assert "late" in told[0][0] and 0 < told[0][1]["rows"] < 20_000
    assert told[-1][0].startswith("rows are known") and told[-1][1]["rows"] == 20_000


def test_cancelled_it_goes_on_where_it_was(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(tmp_path, 20_000) as node:
            for turn in range(1, 6):
                task = asyncio.create_task(node.looking.stamp())
                while node.count(deleted=False) < turn * 1_000:
                    await asyncio.sleep(0)
                await cancelled(task)
            assert node.engine.replica.unseen.has_stamping()
            await node.looking.stamp()
            assert node.count(deleted=False) == 20_000

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_stop_does_not_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is missing: what looks for it goes through all of the table in one go."""
    monkeypatch.setattr(sql, "STOP_STEPS", 1_000)

    async def test() -> None:
        async with opened(tmp_path, 200_000) as node:
            await node.looking.stamp()
            node.sql("DELETE FROM __harmonylite__meta WHERE name = 'stamped'")
        started = time.monotonic()
        async with opened_again(tmp_path) as engine:
            task = asyncio.create_task(SecondLook(engine).stamp())
            await asyncio.sleep(0)
            await cancelled(task)
        assert time.monotonic() - started < 5

    asyncio.run(asyncio.wait_for(test(), 60))


@contextlib.asynccontextmanager
async def opened_again(folder: Path) -> AsyncIterator[Engine]:
    replica = Replica(folder / "app.db", ReplicaSettings(node_id=1))
    engine = Engine(replica, Timekeeper(60_000), Metrics("h", "l"), compress=False)
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


@pytest.mark.slow
def test_the_application_writes_in_between(tmp_path: Path) -> None:
    async def test() -> None:
        async with opened(tmp_path, 1_000_000) as node:
            writer = apsw.Connection(str(tmp_path / "app.db"))
            writer.setbusytimeout(5000)
            waits: list[float] = []
            done = threading.Event()

            def write() -> None:
                while not done.wait(0.005):
                    started = time.perf_counter()
                    writer.execute("UPDATE t SET v = ? WHERE id = 1", (f"changed {len(waits)}",))
                    waits.append(time.perf_counter() - started)

            writing = asyncio.create_task(asyncio.to_thread(write))
            try:
                await node.looking.stamp()
            finally:
                done.set()
                await writing
                writer.close()
            assert node.count(deleted=False) == 1_000_000
            waits.sort()
            print(f"{len(waits)} writes, median {waits[len(waits) // 2]:.4f} s, longest {waits[-1]:.4f} s")
            assert len(waits) >= 5

    asyncio.run(asyncio.wait_for(test(), 120))
