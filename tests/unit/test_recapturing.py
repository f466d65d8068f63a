"""A large table is rebuilt beside a daemon that runs: whoever has to wait does, and the application does not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import apsw

from harmonylite.db import recapture
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.engine import Engine
from harmonylite.model import Delivery, Group, Position, ReceivedGroup
from harmonylite.observe.metrics import Metrics
from harmonylite.tasks import cancelled
from harmonylite.timekeeping import Timekeeper
from tests.db.harness import CREATED, EPOCH_MS, STREAM, stamp, wrote

ROWS = 20_000
FILL = (
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < ?)"
    " INSERT INTO t SELECT x, 'before' FROM n"
)
REBUILD = (
    "BEGIN; CREATE TABLE n (id INTEGER PRIMARY KEY, v); INSERT INTO n SELECT * FROM t; DROP TABLE t;"
    " ALTER TABLE n RENAME TO t; UPDATE t SET v = 'unseen' WHERE id = 1; COMMIT"
)
DONE = "SELECT count(*) FROM __harmonylite__t_version WHERE batch = (SELECT max(batch) FROM __harmonylite__t_version)"


def delivery(group: Group) -> Delivery:
    return Delivery(Position(STREAM, CREATED, 1), [ReceivedGroup(group, 1, EPOCH_MS * 2)])


def count(application: apsw.Connection) -> int:
    """Rows that are done so far."""
    return cast(int, application.execute(DONE).fetchall()[0][0])


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Engine]:
    engine = Engine(Replica(path, ReplicaSettings(node_id=1)), Timekeeper(60_000), Metrics("h", "l"), compress=False)
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


@contextlib.asynccontextmanager
async def rebuilt(folder: Path) -> AsyncIterator[tuple[apsw.Connection, Engine]]:
    """A node whose rows were all published before their table was rebuilt."""
    application = apsw.Connection(str(folder / "app.db"))
    application.setbusytimeout(5000)
    application.execute("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF")
    application.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v)")
    async with opened(folder / "app.db") as engine:
        application.execute(FILL, (ROWS,))
        await engine.absorb_all()
        while taken := await engine.take_outgoing(0):
            for packed in taken:
                await engine.published(packed)
        assert await engine.pending() == 0
        await engine.write(engine.replica.flush)
        application.execute(REBUILD)
        yield application, engine
    application.close()


def test_what_needs_the_versions_waits_and_the_application_writes(tmp_path: Path) -> None:
    async def test() -> None:
        async with rebuilt(tmp_path) as (application, engine):
            held: list[float] = []
            applying = asyncio.create_task(
                engine.apply(delivery(wrote("t", ("id", "v"), ((2, "theirs"), stamp(EPOCH_MS * 2, 2)))))
            )
            written = 0
            while not applying.done():
                application.execute("UPDATE t SET v = 'seen' WHERE id = ?", (ROWS - written,))
                written += 1
                held.append(engine.replica.last_held_s)
                await asyncio.sleep(0.001)
            assert written > 10, "in pieces, with the lock free between them"
            applied = await applying
            assert applied is not None and applied.rows == 1
            await engine.absorb_all()
            assert application.execute("SELECT v FROM t WHERE id IN (1, 2)").fetchall() == [("unseen",), ("theirs",)]
            pending = application.execute(
                "SELECT count(*) FROM __harmonylite__t_version WHERE batch >"
                " (SELECT value FROM __harmonylite__meta WHERE name = 'published_batch')"
            ).fetchall()
            assert pending == [(ROWS - 1,)]

    asyncio.run(asyncio.wait_for(test(), 60))


def test_cancelled_and_started_again_it_goes_on_where_it_was(tmp_path: Path) -> None:
    async def test() -> None:
        async with rebuilt(tmp_path) as (application, engine):
            task = asyncio.create_task(engine.absorb_all())
            while not (under_way := engine.replica.recapturing.under_way) or not under_way.rows:
                await asyncio.sleep(0)
            await cancelled(task)
            await engine.write(engine.replica.flush)
            done = count(application)
            assert 0 < done < ROWS
        async with opened(tmp_path / "app.db") as again:
            under_way = again.replica.recapturing.under_way
            assert under_way is not None and under_way.rows >= done
            await again.recapture()
            assert again.replica.recapturing.under_way is None
            assert await again.pending() == ROWS

    asyncio.run(asyncio.wait_for(test(), 60))


def test_what_is_taken_to_be_sent_is_one_group_of_all_of_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with rebuilt(tmp_path) as (_, engine):
            packed = await engine.take_outgoing(0)
            assert [(each.rows, each.torn) for each in packed] == [(ROWS, False)]
            assert recapture.AT_ONCE_ROWS < ROWS

    asyncio.run(asyncio.wait_for(test(), 60))
