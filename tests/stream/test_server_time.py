"""The server's time is known before anything is published, whatever the server: those before 2.10 do not say it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apsw
import pytest
from nats.aio.client import Client

from harmonylite import clock, replication, wire
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.engine import Engine
from harmonylite.observe.metrics import Metrics
from harmonylite.progress import Mode, Progress, Wakeup
from harmonylite.replication import Session
from harmonylite.snapshot.link import Link
from harmonylite.snapshot.stores import chunks
from harmonylite.snapshot.stores.chunks import ChunkStream
from harmonylite.stream import log as streamlog
from harmonylite.stream import registry as registrylog
from harmonylite.stream.log import LogSettings, ServerTime, StreamUnavailable, api_request, ask_time, stream_state
from harmonylite.stream.provision import ensure_streams
from harmonylite.stream.registry import NodeEntry, Registry
from harmonylite.tasks import cancelled
from harmonylite.timekeeping import Timekeeper
from tests.documented import node_may_publish
from tests.stream.logfixture import (
    SETTINGS,
    STREAM,
    TOPOLOGIES,
    Place,
    Server,
    client,
    confined,
    consumer_names,
    eventually_ensured,
    jetstream,
    running,
    single_server,
    topology,
)
from tests.stream.support import OLD_SERVER, eventually

TOLERANCE_MS = 60_000
YEAR_MS = 365 * 86_400_000
SLACK_MS = 10_000
HASTY = replace(SETTINGS, api_timeout_s=0.5)

SERVERS = (
    "silent",
    pytest.param("old", marks=pytest.mark.skipif(OLD_SERVER is None, reason="HARMONYLITE_OLD_NATS_SERVER")),
)


@contextlib.contextmanager
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every answer comes without `ts`, as from a server before 2.10."""

    async def without_ts(*arguments: Any, **options: Any) -> dict[str, Any]:
        answer = await api_request(*arguments, **options)
        answer.pop("ts", None)
        return answer

    with monkeypatch.context() as patched:
        patched.setattr(streamlog, "api_request", without_ts)
        patched.setattr(chunks, "api_request", without_ts)
        yield


@contextlib.contextmanager
def server_without_ts(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """`old`: 2.9; `silent`: today's, its `ts` removed; `server`: today's as it is."""
    binary = OLD_SERVER if name == "old" else None
    answers = silent(monkeypatch) if name == "silent" else contextlib.nullcontext()
    with single_server(folder / name, binary=binary) as server, answers:
        yield Place(server.url)


def true_ms() -> int:
    return time.time_ns() // 1_000_000


def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """This device's clock, as the daemon reads it, is a year ahead."""
    monkeypatch.setattr(clock, "wall_ms", lambda: true_ms() + YEAR_MS)


@dataclass
class Node:
    """A database whose writes are logged by a clock a year ahead."""

    application: apsw.Connection
    engine: Engine

    def insert(self, number: int) -> None:
        self.application.execute("BEGIN IMMEDIATE")
        self.application.execute("INSERT INTO t VALUES (?, 'x')", (number,))
        self.application.execute("UPDATE __harmonylite__t_change_log SET ts = ts + ?", (YEAR_MS,))
        self.application.execute("COMMIT")

    def versions(self) -> list[int]:
        return [int(ts) for (ts,) in self.application.execute("SELECT ts FROM __harmonylite__t_version ORDER BY k0")]

    def session(self, connected: Client, mode: Mode, settings: LogSettings = SETTINGS) -> Session:
        return Session(self.engine, connected, settings, mode, Wakeup(), Progress(), TOLERANCE_MS)


@contextlib.asynccontextmanager
async def opened(folder: Path, *, disciplined: bool) -> AsyncIterator[Node]:
    """disciplined: something says that it sets the clock, so that its times are bounded but not corrected."""
    path = folder / "app.db"
    application = apsw.Connection(str(path))
    application.setbusytimeout(5000)
    application.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT)")
    replica = Replica(path, ReplicaSettings(node_id=SETTINGS.node_id, boot_id="boot", tolerance_ms=TOLERANCE_MS))
    engine = Engine(
        replica, Timekeeper(TOLERANCE_MS, synchronized=lambda: disciplined), Metrics("h", "l"), compress=True
    )
    await engine.open()
    try:
        yield Node(application, engine)
    finally:
        await engine.close()
        application.close()


async def first_published(connected: Client, session: Session, settings: LogSettings = SETTINGS) -> wire.Part:
    """The first message that a session stores."""
    running_session = asyncio.create_task(session.run())
    deadline = time.monotonic() + 20
    try:
        while (await stream_state(connected, settings, STREAM)).last_seq == 0:
            assert not running_session.done(), running_session.exception()
            assert time.monotonic() < deadline, "nothing is published"
            await asyncio.sleep(0.02)
        answer = await api_request(connected, settings, f"STREAM.MSG.GET.{STREAM}", {"seq": 1})
        return wire.parse_part(base64.b64decode(answer["message"]["data"]))
    finally:
        await cancelled(running_session)


def run(test: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_any_server_is_asked_for_its_time(tmp_path: Path, name: str) -> None:
    """Nothing of that stays on the server."""

    async def main() -> None:
        async with client(place.url) as connected:
            await eventually_ensured(connected, place.settings)
            for _ in range(3):
                before_ms, started = true_ms(), time.monotonic()
                told = await ask_time(connected, place.settings)
                took_ms = (time.monotonic() - started) * 1000
                assert before_ms <= told.ms <= before_ms + took_ms + 1
                assert 0 < told.round_trip_ms <= took_ms
                await asyncio.sleep(0.1)
                assert abs(told.now_ms() - true_ms()) <= told.round_trip_ms + 2
            assert await consumer_names(connected, place.settings) == []
            assert (await stream_state(connected, place.settings, STREAM)).last_seq == 0

    with topology(name, tmp_path) as place:
        run(main)


@pytest.mark.parametrize("disciplined", [False, True], ids=["corrected", "bounded"])
@pytest.mark.parametrize("name", ["server", *SERVERS])
def test_a_node_a_year_ahead_publishes_bounded_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, disciplined: bool
) -> None:
    """The first message that it ever stores already is: others never see it bound a version that it claimed itself."""

    async def main() -> None:
        async with opened(tmp_path, disciplined=disciplined) as node, client(place.url) as connected:
            node.insert(1)
            await node.engine.absorb_all()
            assert node.versions()[0] > true_ms() + YEAR_MS - SLACK_MS
            node.insert(2)
            await ensure_streams(connected, place.settings)
            assert (await stream_state(connected, place.settings, STREAM)).server_ms is None or name == "server"
            part = await first_published(connected, node.session(connected, Mode()))
            offset = node.engine.time.offset_s()
            assert offset is not None and abs(offset * 1000 - YEAR_MS) < SLACK_MS
            assert part.max_ts <= true_ms() + TOLERANCE_MS
            if disciplined:
                assert node.engine.time.correction.delta_ms == 0
            else:
                assert abs(node.versions()[0] - true_ms()) < SLACK_MS
                assert abs(node.engine.time.correction.delta_ms + YEAR_MS) < SLACK_MS
            assert max(node.versions()) == part.max_ts
            bound_ms = node.engine.time.bound_ms()
            assert bound_ms is not None and abs(bound_ms - TOLERANCE_MS // 2 - true_ms()) < SLACK_MS

    ahead(monkeypatch)
    with server_without_ts(name, tmp_path, monkeypatch) as place:
        run(main)


def test_the_time_is_asked_again_while_connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's clock that is set is followed; one request serves all shards."""
    asked = 0
    set_by_ms = 0

    async def told(connected: Client, settings: LogSettings) -> ServerTime:
        nonlocal asked
        asked += 1
        answer = await ask_time(connected, settings)
        return replace(answer, ms=answer.ms + set_by_ms)

    async def main() -> None:
        nonlocal set_by_ms
        settings = replace(SETTINGS, shards=3)
        monkeypatch.setattr(replication, "ask_time", told)
        monkeypatch.setattr(replication, "CLOCK_INTERVAL_S", 0.1)
        async with opened(tmp_path, disciplined=True) as node, client(place.url) as connected:

            def follows() -> bool:
                now_ms = node.engine.time.server.now_ms()
                return now_ms is not None and abs(now_ms - true_ms() - set_by_ms) < SLACK_MS

            session = node.session(connected, Mode(), settings)
            await session._open_streams()
            assert (asked, follows()) == (1, True)
            running_session = asyncio.create_task(session.run())
            try:
                for hours in (1, 2):
                    set_by_ms = hours * 3_600_000
                    await eventually(follows, what="the server's clock is followed")
            finally:
                await cancelled(running_session)

    with server_without_ts("silent", tmp_path, monkeypatch) as place:
        run(main)


def test_a_time_that_waited_is_not_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are asked one after another, and each answer tells the time when it came."""

    async def main() -> None:
        async with opened(tmp_path, disciplined=True) as node, client(server.url) as connected:
            (state,) = await ensure_streams(connected, SETTINGS)
            assert state.server_ms is not None
            long_ago = replace(state, server_ms=state.server_ms - 5_000, answered=state.answered - 5.0)
            await node.session(connected, Mode())._learn_time([long_ago])
            assert abs((node.engine.time.server.now_ms() or 0) - true_ms()) < 1_000

    with single_server(tmp_path / "s") as server:
        run(main)


NODE_MAY_PUBLISH = node_may_publish("harmonylite-change-log", STREAM, "API.INFO")
FEWER = [subject for subject in NODE_MAY_PUBLISH if "CONSUMER.CREATE" not in subject]


@pytest.mark.parametrize("may", [NODE_MAY_PUBLISH, FEWER], ids=["documented", "fewer"])
@pytest.mark.parametrize("replicates", [True, False], ids=["replicates", "only publishes"])
def test_who_may_not_ask_for_the_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    may: list[str],
    replicates: bool,
) -> None:
    """It may not read the log either, and publishes nothing; if it only publishes, the time stays unknown to it."""

    async def main() -> None:
        async with (
            opened(tmp_path, disciplined=False) as node,
            client(server.url, user="admin", password="a") as admin,
            client(server.url, user="node7", password="n", inbox_prefix="_INBOX_7") as own,
        ):
            await ensure_streams(admin, HASTY)
            node.insert(1)
            mode = Mode(replicate=replicates)
            if may == FEWER and replicates:
                with pytest.raises(StreamUnavailable, match=r"CONSUMER\.CREATE"):
                    await node.session(own, mode, HASTY).run()
                assert (await stream_state(admin, HASTY, STREAM)).last_seq == 0
                return
            part = await first_published(admin, node.session(own, mode, HASTY), HASTY)
            if may == FEWER:
                assert part.max_ts > true_ms() + YEAR_MS - SLACK_MS
                assert node.engine.time.bound_ms() is None
                again = asyncio.create_task(node.session(own, mode, HASTY).run())
                await asyncio.sleep(1.0)
                await cancelled(again)
            else:
                assert abs(part.max_ts - true_ms()) < SLACK_MS

    ahead(monkeypatch)
    server = Server(tmp_path / "s", jetstream(tmp_path / "s") + confined(may))
    with running(server), silent(monkeypatch), caplog.at_level(logging.WARNING, "harmonylite.timekeeping"):
        run(main)
    unknown = [record for record in caplog.records if "server's time is not known" in record.message]
    assert len(unknown) == (1 if may == FEWER and not replicates else 0)


@pytest.mark.parametrize("name", SERVERS)
def test_the_other_places_that_need_the_servers_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Who is alive, whether an upload was given up, how new a snapshot can be: not by a clock a year ahead."""

    def stored(chunk_stream: ChunkStream) -> Link:
        return Link(chunk_stream._client(), SETTINGS, None, None)  # type: ignore[arg-type]

    async def main() -> None:
        async with client(place.url) as connected:
            await ensure_streams(connected, replace(SETTINGS, shards=2))
            registry = Registry(connected, SETTINGS)
            await registry.ensure_bucket()
            await registry.announce(NodeEntry(7, "abc"))
            assert [entry.alive for entry in await registry.nodes()] == [True]
            stream = ChunkStream(lambda: connected, SETTINGS, "harmonylite-snapshots", replicas=1, max_bytes=-1)
            assert await stream.now_ms() is None
            await stream.ensure()
            now_ms = await stream.now_ms()
            assert now_ms is not None and abs(now_ms - true_ms()) < SLACK_MS
            states: Mapping[str, Any] = await replace(stored(stream), settings=replace(SETTINGS, shards=2)).states()
            assert len(states) == 2
            assert all(abs(state.server_ms - true_ms()) < SLACK_MS for state in states.values())

    a_year_ahead = SimpleNamespace(time=lambda: time.time() + YEAR_MS / 1000, monotonic=time.monotonic)
    monkeypatch.setattr(registrylog, "time", a_year_ahead)
    with server_without_ts(name, tmp_path, monkeypatch) as place:
        run(main)
