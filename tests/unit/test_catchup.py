"""Bridging gaps, with streams and stores that change in the middle of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import apsw
import pytest

from harmonylite import catchup, clock
from harmonylite.catchup import CatchUp, Gap
from harmonylite.config.model import Snapshot as Config
from harmonylite.db.tables import load_state
from harmonylite.model import Delivery, Position, Undecodable, Unread
from harmonylite.snapshot import mend, state, workfiles
from harmonylite.snapshot.due import FETCHING
from harmonylite.snapshot.keeper import SnapshotKeeper
from harmonylite.snapshot.listing import Listing
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.mend import Mender
from harmonylite.snapshot.state import SnapshotState
from harmonylite.snapshot.stores.base import StoreUnavailable
from harmonylite.snapshot.workfiles import WorkFiles
from harmonylite.stream.log import StreamState, StreamUnavailable, parse_time_ns
from harmonylite.wire import unpack
from tests.unit.snapshot_fakes import CREATED, STREAM, FakeLink, Lease, Node, Store, opened, stream

TRIMMED = Gap(STREAM, "messages 11 to 99 were discarded", lost=False, needed=99)
LOST = Gap(STREAM, "it was made anew", lost=True, needed=0)
RECREATED = "2026-11-24T09:00:00Z"
DAY_MS = 86_400_000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catchup, "LOOK_S", 0.02)
    monkeypatch.setattr(catchup, "TROUBLE_S", 0.02)


class Bench:
    """A node that was away, and another one that takes snapshots."""

    def __init__(self, node: Node, other: Node, folder: Path) -> None:
        folder.mkdir()
        self.node, self.other = node, other
        self.log = stream(100, 200)
        self.store, self.lease = Store(folder), Lease(ttl_s=3.0)
        self.link = FakeLink(self.store, self.lease, lambda: self.log)
        self.state = SnapshotState("nats")
        self.files = WorkFiles(node.path)
        self.catch_up = CatchUp(node.engine, self.files, self.state)

    async def snapshot(self, sequence: int, created: str | None = None) -> Manifest:
        """The other node takes one there."""
        await self.other.at(sequence, *([created] if created else []))
        files = WorkFiles(self.other.path)
        keeper = SnapshotKeeper(
            Config(),
            1,
            self.other.engine,
            files,
            SnapshotState("nats"),
            why_not=lambda: None,
            ends=lambda: {},
            leaf=False,
        )
        keeper._link = FakeLink(self.store, Lease(), lambda: self.log)
        await asyncio.sleep(0.002)  # the next one is newer
        return await keeper.save()

    async def bridge(self, gap: Gap) -> bool:
        return await asyncio.wait_for(self.catch_up.bridge(self.link, gap), 10)

    @contextlib.asynccontextmanager
    async def waiting(self, gap: Gap) -> AsyncIterator[asyncio.Task[bool]]:
        task = asyncio.create_task(self.catch_up.bridge(self.link, gap))
        try:
            await until(lambda: "wait" in (self.state.catching_up or ""))
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def leftovers(self) -> list[str]:
        return [path.name for path in self.node.path.parent.glob(".*")]


async def until(condition: Callable[[], object]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 5 s")


@contextlib.asynccontextmanager
async def bench(folder: Path, synced_ms: int | None = None) -> AsyncIterator[Bench]:
    async with opened(folder / "one", 1) as node, opened(folder / "two", 2) as other:
        await node.at(10)
        node.engine.replica.completeness.note_synced(clock.wall_ms() if synced_ms is None else synced_ms)
        yield Bench(node, other, folder / "store")


def test_from_the_newest_snapshot(tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(tmp_path) as it:
            it.node.write(1, text="own")
            it.other.write(2, text="first")
            await it.snapshot(120)
            it.other.write(3, text="second")
            newest = await it.snapshot(150)
            assert not await it.bridge(TRIMMED), "nothing has to be filled again"
            assert it.store.downloads == [newest.id]
            assert it.node.rows() == {1: "own", 2: "first", 3: "second"}
            assert await it.node.position() == 150
            assert it.lease.wishes[0] == (FETCHING + newest.id, newest.id)
            assert it.lease.own_wish is None, "the wish is withdrawn"
            assert it.leftovers() == []
            assert it.state.catching_up is None
            assert await it.node.engine.pending() == 3, "its own row, and what the other one has not published yet"

    asyncio.run(main())


def test_a_snapshot_from_before_the_gap_is_of_no_use(tmp_path: Path) -> None:
    """Neither is one whose position the stream has left behind, nor one of another log."""

    async def main() -> None:
        async with bench(tmp_path) as it:
            await it.snapshot(50)
            await it.snapshot(150, RECREATED)
            async with it.waiting(TRIMMED) as task:
                assert "waiting for a snapshot, messages 11 to 99 were discarded" in str(it.state.catching_up)
                newest = (await it.store.list())[0]
                await until(lambda: it.lease.own_wish == (TRIMMED.reason, newest.id))
                assert await it.node.position() == 10, "it went on with a hole"
                await it.snapshot(160)
                await asyncio.wait_for(task, 5)
            assert await it.node.position() == 160

    asyncio.run(main())


def test_a_hole_in_the_middle_needs_a_snapshot_from_behind_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(tmp_path) as it:
            it.log = stream(1, 200)
            await it.snapshot(15)
            async with it.waiting(Gap(STREAM, "message 21 came", lost=False, needed=20)) as task:
                await it.snapshot(20)
                await asyncio.wait_for(task, 5)
            assert await it.node.position() == 20

    asyncio.run(main())


@pytest.mark.parametrize("how", ["corrupt", "gone"])
def test_a_useless_snapshot_is_tried_once_and_the_next_older_one_used(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with bench(tmp_path) as it:
            older, newer = await it.snapshot(120), await it.snapshot(150)
            if how == "corrupt":
                (it.store.folder / newer.id).unlink()
            else:
                it.store.on_transfer = lambda: it.store.manifests.remove(newer) if newer in it.store.manifests else None
            await it.bridge(TRIMMED)
            assert it.store.downloads == [newer.id, older.id]
            assert await it.node.position() == 120
            assert set(it.state.refused) == {newer.id}

    asyncio.run(main())


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    """Its digest is right: whoever took it had a broken disk."""

    async def main() -> None:
        async with bench(tmp_path) as it:
            older, newer = await it.snapshot(120), await it.snapshot(150)
            unpacked = it.files.unpacked(newer.id)
            unpacked.write_bytes(bytes(newer.size))
            await it.bridge(TRIMMED)
            assert it.store.downloads == [older.id]
            assert await it.node.position() == 120

    asyncio.run(main())


def test_the_stream_passes_the_snapshot_while_it_is_fetched(tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(tmp_path) as it:
            slow = await it.snapshot(120)

            def moves_on() -> None:
                it.log = stream(140, 300)

            it.store.on_transfer = moves_on
            async with it.waiting(TRIMMED) as task:
                await until(lambda: it.lease.own_wish == (TRIMMED.reason, slow.id))
                assert it.leftovers() == [], "what cannot be used is removed"
                assert await it.node.position() == 10
                await it.snapshot(250)
                await asyncio.wait_for(task, 5)
            assert await it.node.position() == 250

    asyncio.run(main())


def test_the_connection_is_lost_while_fetching(tmp_path: Path) -> None:
    """What was fetched is used by the next session, although there is a newer snapshot."""

    async def main() -> None:
        async with bench(tmp_path) as it:
            it.other.write(2)
            first = await it.snapshot(120)
            stuck = asyncio.Event()
            whole = it.store.download

            async def download(manifest: Manifest, path: Path, *_: object) -> None:
                path.write_bytes(b"a part")
                it.store.downloads.append(manifest.id)
                await stuck.wait()

            it.store.download = download  # type: ignore[method-assign]
            task = asyncio.create_task(it.catch_up.bridge(it.link, TRIMMED))
            await until(lambda: it.store.downloads)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert it.files.downloads() == [first.id]
            await it.snapshot(150)
            it.store.download = whole  # type: ignore[method-assign]
            await it.bridge(TRIMMED)
            assert it.store.downloads == [first.id, first.id]
            assert await it.node.position() == 120

    asyncio.run(main())


def test_a_store_that_is_away_and_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with bench(tmp_path) as it:
            await it.snapshot(150)
            it.store.trouble = StoreUnavailable("s3.example does not answer")
            async with it.waiting(TRIMMED) as task:
                assert it.state.catching_up == "waiting: s3.example does not answer"
                it.store.trouble = None
                with monkeypatch.context() as full:
                    full.setattr(workfiles, "ROOM_LEFT_BYTES", 1 << 60)
                    await until(lambda: "make room" in (it.state.catching_up or ""))
                    assert await it.node.position() == 10
                await asyncio.wait_for(task, 5)
            assert await it.node.position() == 150

    asyncio.run(main())


def test_a_log_that_cannot_be_asked_ends_the_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(tmp_path) as it:

            def unavailable() -> StreamState:
                raise StreamUnavailable("not connected")

            it.link = FakeLink(it.store, it.lease, unavailable)
            with pytest.raises(StreamUnavailable):
                await it.bridge(TRIMMED)
            assert it.state.catching_up is None

    asyncio.run(main())


def test_two_streams_with_one_snapshot(tmp_path: Path) -> None:
    """The gap of the second one is bridged already when its turn comes."""

    async def main() -> None:
        async with bench(tmp_path) as it:
            await it.snapshot(150)
            results = await asyncio.gather(it.bridge(TRIMMED), it.bridge(TRIMMED))
            assert results == [False, False]
            assert len(it.store.downloads) == 1

    asyncio.run(main())


def test_a_lost_log_that_begins_at_its_beginning_is_filled_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(tmp_path) as it:
            it.node.write(1, 2, 3)
            await it.node.engine.absorb()
            it.node.engine.replica.outgoing.mark_published(load_state(it.node.engine.replica.writer).batch)
            assert await it.node.engine.pending() == 0
            it.log = stream(1, 5, RECREATED)
            it.store.trouble = StoreUnavailable("no snapshot is needed for that")
            assert await it.bridge(LOST), "everybody has much to publish"
            assert await it.node.engine.pending() == 3
            assert await it.node.position() == 0

    asyncio.run(main())


@pytest.mark.parametrize(("first", "waits"), [(8, False), (50, True)])
def test_a_lost_tail_of_a_log_whose_beginning_is_gone(tmp_path: Path, first: int, waits: bool) -> None:
    """If it begins before what was read last, nothing in between can be missing; else nobody knows."""

    async def main() -> None:
        async with bench(tmp_path) as it:
            it.node.write(1)
            it.log = stream(first, 9 if first < 9 else 60)
            if first > 10:  # it was read further than the log goes now
                await it.node.at(70)
                it.link = FakeLink(it.store, it.lease, lambda: it.log, late_ns=1 << 60)
            if not waits:
                assert await it.bridge(LOST)
                assert await it.node.position() == first - 1
            else:
                async with it.waiting(LOST):
                    assert await it.node.position() == 70

    asyncio.run(main())


@pytest.mark.parametrize(
    ("first", "last", "there_ns", "server_ms", "refilled"),
    [
        (95, 150, None, 1, True),
        (95, 190, 500_000, None, True),
        (185, 190, None, 1, False),
        (95, 190, 96_000, 1, False),
        (95, 150, None, 0, False),
    ],
    ids=["as it was", "written on", "begins behind", "the clock went back", "the clock is behind"],
)
def test_what_a_servers_clock_says_of_a_lost_tail_counts_only_if_it_went_on(
    tmp_path: Path, first: int, last: int, there_ns: int | None, server_ms: int | None, refilled: bool
) -> None:
    """A hub without a clock of its own may start in the past after the power cut that lost the tail: then new messages
    that were dropped again unread look older than what was read last, 180, which was stored at 180,000 ns."""

    class Clocked(FakeLink):
        __slots__ = ()

        async def goes_on(self, state: StreamState, position: Position) -> bool:
            return position.sequence != 180

        async def stored_ns(self, state: StreamState, sequence: int) -> int | None:
            return {first: 95_000, 180: there_ns}[sequence]

    async def main() -> None:
        async with bench(tmp_path) as it:
            await it.node.at(180)
            it.log = replace(stream(first, last), server_ms=server_ms)
            it.link = Clocked(it.store, it.lease, lambda: it.log)
            if refilled:
                assert await it.bridge(LOST)
                assert await it.node.position() == 94
            else:
                async with it.waiting(LOST):
                    assert await it.node.position() == 180, "it goes on with a hole"

    asyncio.run(main())


def test_a_lost_tail_with_a_snapshot_from_before_it(tmp_path: Path) -> None:
    """Only what the snapshot lacks is published again, and reading goes back to it."""

    async def main() -> None:
        async with bench(tmp_path) as it:
            it.other.write(*range(100))
            await it.other.engine.absorb()
            it.other.engine.replica.outgoing.mark_published(load_state(it.other.engine.replica.writer).batch)
            await it.snapshot(120)
            await it.bridge(TRIMMED)
            await it.node.at(180)
            it.node.write(1000, 1001)
            await it.node.engine.absorb()
            it.node.engine.replica.outgoing.mark_published(load_state(it.node.engine.replica.writer).batch)
            it.log = stream(100, 150)
            assert not await it.bridge(LOST)
            assert await it.node.position() == 120
            assert await it.node.engine.pending() == 2

    asyncio.run(main())


def test_the_operator_declares_this_node_complete(tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(tmp_path) as it:
            it.node.write(1)
            async with it.waiting(TRIMMED) as task:
                it.catch_up.declare_complete()
                assert await asyncio.wait_for(task, 5), "what is here is published again"
            assert await it.node.position() == 99
            assert await it.node.engine.pending() == 1
            it.catch_up.caught_up()
            await it.node.at(10)
            async with it.waiting(TRIMMED):
                assert await it.node.position() == 10, "the next gap is another matter"

    asyncio.run(main())


def test_how_long_it_waits_decides_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with bench(tmp_path) as it, it.waiting(TRIMMED):
            assert "--force" not in str(it.state.catching_up)
            monkeypatch.setattr(catchup, "PATIENCE_S", 0.0)
            await until(lambda: "harmonylite snapshot save --force" in str(it.state.catching_up))

    asyncio.run(main())


def damage(path: Path, table: str, application: apsw.Connection) -> None:
    application.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ((root,),) = application.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,))
    with path.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(b"\xff" * 4096)


def test_a_damaged_database_is_not_taken_for_a_damaged_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The snapshot is kept and tried again, after longer and longer pauses; nobody is asked for another one."""
    monkeypatch.setattr(catchup, "DAMAGED_S", 0.3)
    begun: list[float] = []
    merge = catchup.merge_snapshot

    async def counted(*arguments: Any, **options: Any) -> Any:
        begun.append(time.monotonic())
        return await merge(*arguments, **options)

    monkeypatch.setattr(catchup, "merge_snapshot", counted)

    async def main() -> None:
        async with bench(tmp_path) as it:
            it.node.write(*range(300), text="z" * 300)
            while await it.node.engine.absorb():
                pass
            it.other.write(*range(200, 400))
            good = await it.snapshot(150)
            damage(it.node.path, "__harmonylite__t_version", it.node.application)
            async with it.waiting(TRIMMED):
                await until(lambda: len(begun) >= 6)
                pauses = [later - earlier for earlier, later in pairwise(begun[:6])]
                assert all(pause >= least for pause, least in zip(pauses, (0.02, 0.04, 0.08, 0.16, 0.3), strict=True))
                await until(lambda: "this node's database" in str(it.state.catching_up))
                assert "docs/disaster-recovery.md" in str(it.state.damage)
                assert not it.state.refused
                assert it.store.downloads == [good.id]
                assert it.lease.own_wish is None or it.lease.own_wish[0].startswith(FETCHING)
            assert it.files.downloads() == [good.id]
        assert sum("database is damaged; it cannot catch up" in line for line in caplog.messages) == 1

    asyncio.run(main())


class Slow:
    """A merge that takes a while, piece by piece, as that of a large snapshot does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = self.pieces = 0
        self.may_end = asyncio.Event()
        self._merge = catchup.merge_snapshot
        monkeypatch.setattr(catchup, "merge_snapshot", self)

    async def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.begun += 1
        while not self.may_end.is_set():
            self.pieces += 1
            await asyncio.sleep(0.01)
        return await self._merge(*arguments, **options)


def test_a_merge_goes_on_without_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a link that drops every few seconds it would begin again each time, and never end."""

    async def main() -> None:
        async with bench(tmp_path) as it:
            slow = Slow(monkeypatch)
            it.other.write(2)
            newest = await it.snapshot(150)
            for session in range(4):
                task = asyncio.create_task(it.catch_up.bridge(it.link, TRIMMED))
                await until(lambda reached=slow.pieces + 5: slow.pieces > reached)  # type: ignore[misc]
                assert "merging snapshot" in str(it.state.catching_up)
                if session == 3:
                    break
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert it.catch_up.busy, "so that this node takes no snapshot"
                assert it.node.engine.metrics.catching_up.value == 1
                it.catch_up.caught_up()
            slow.may_end.set()
            assert not await asyncio.wait_for(task, 10)
            assert slow.begun == 1
            assert it.store.downloads == [newest.id]
            assert await it.node.position() == 150
            assert it.node.rows() == {2: "x"}
            assert not it.catch_up.busy
            assert it.node.engine.metrics.catching_up.value == 0
            assert it.leftovers() == []

    asyncio.run(main())


@pytest.mark.parametrize("then", ["trimmed further", "made anew", "intact"])
def test_what_the_log_is_after_a_merge_without_a_connection_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    async def main() -> None:
        async with bench(tmp_path) as it:
            slow = Slow(monkeypatch)
            it.node.write(1, text="own")
            await it.snapshot(150)
            task = asyncio.create_task(it.catch_up.bridge(it.link, TRIMMED))
            await until(lambda: slow.begun)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            slow.may_end.set()
            await until(lambda: not it.catch_up.busy)
            assert it.state.catching_up is None
            assert await it.node.position() == 150
            if then == "trimmed further":
                it.log = stream(190, 300)
                async with it.waiting(Gap(STREAM, "messages 151 to 189", lost=False, needed=189)) as again:
                    assert await it.node.position() == 150
                    await it.snapshot(250)
                    await asyncio.wait_for(again, 5)
                assert await it.node.position() == 250
            elif then == "made anew":
                it.log = stream(1, 5, RECREATED)
                assert await it.bridge(LOST), "all of it is published again"
                assert await it.node.position() == 0
            else:
                assert not await it.bridge(TRIMMED)
                assert await it.node.position() == 150

    asyncio.run(main())


@pytest.mark.parametrize("for_a_gap", [True, False])
def test_nothing_is_read_while_a_gap_of_an_earlier_connection_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, for_a_gap: bool
) -> None:
    """The new connection may lead to another log, in which there is no gap."""

    async def main() -> None:
        async with bench(tmp_path) as it:
            slow = Slow(monkeypatch)
            await it.snapshot(150)
            await asyncio.wait_for(it.catch_up.may_read(), 1)
            merging = it.catch_up.bridge(it.link, TRIMMED) if for_a_gap else it.catch_up.merge_another(it.link)
            task = asyncio.ensure_future(merging)
            await until(lambda: slow.begun)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert it.catch_up.bridging == for_a_gap, "what an operator then declares complete is the gap"
            waiting = asyncio.create_task(it.catch_up.may_read())
            await asyncio.sleep(0.05)
            assert waiting.done() != for_a_gap
            slow.may_end.set()
            await asyncio.wait_for(waiting, 5)
            assert it.catch_up.busy != for_a_gap

    asyncio.run(main())


def test_a_merge_ends_with_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with bench(tmp_path) as it:
            slow = Slow(monkeypatch)
            newest = await it.snapshot(150)
            task = asyncio.create_task(it.catch_up.bridge(it.link, TRIMMED))
            await until(lambda: slow.begun)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.wait_for(it.catch_up.close(), 5)
            assert not it.catch_up.busy
            assert await it.node.position() == 10
            assert it.files.downloads() == [newest.id], "the next start goes on with it"

    asyncio.run(main())


@pytest.mark.parametrize("days", [89, 91])
def test_a_delete_that_all_have_forgotten_stays_one_after_the_log_was_made_anew(tmp_path: Path, days: int) -> None:
    """The hub was installed again. Nobody has the delete any more, and the new log does not: a node that was away for
    longer than deletes are kept must not publish what it has, nor may a snapshot of the new log say that it is new."""
    recreated_ms = parse_time_ns(RECREATED) // 1_000_000

    async def main() -> None:
        async with bench(tmp_path, recreated_ms - days * 86_400_000) as it:
            for each in (it.node, it.other):
                each.engine.time.server.now_ms = lambda: recreated_ms + 3_600_000  # type: ignore[method-assign]
            it.node.write(1, text="deleted by the others")
            it.other.write(2)
            for each in (it.node, it.other):
                await each.engine.absorb()
                each.engine.replica.outgoing.mark_published(1)
            written(it.node, recreated_ms - 100 * DAY_MS)
            it.log = stream(1, 5, RECREATED)
            if days < 90:
                assert await it.bridge(LOST), "they would still have the delete"
                assert await it.node.engine.pending() == 1
                return
            async with it.waiting(LOST) as task:
                assert "longer than deletes are remembered" in str(it.state.catching_up)
                assert "last in step at 2026-08-25T09:00:00.000Z" in str(it.state.catching_up), "for who chooses one"
                await until(lambda: it.lease.own_wish is not None)
                assert await it.node.engine.pending() == 0
                # Taken by a node that has read the new log, and never forgot a delete itself.
                await it.snapshot(5, RECREATED)
                assert not await asyncio.wait_for(task, 5)
            assert it.node.rows() == {2: "x"}
            assert await it.node.engine.pending() == 0
            ((key,),) = it.node.application.execute("SELECT key FROM __harmonylite__conflict")
            assert unpack(key) == [1], "kept for the operator"

    asyncio.run(main())


def test_the_operator_ends_that_waiting(tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(tmp_path, 1) as it:
            it.log = stream(1, 5, RECREATED)
            async with it.waiting(LOST) as task:
                it.catch_up.declare_complete()
                assert await asyncio.wait_for(task, 5)

    asyncio.run(main())


def test_a_refused_snapshot_is_tried_again_some_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was in the way may have passed; one that was stored anew is tried at once."""

    async def main() -> None:
        async with bench(tmp_path) as it:
            snapshot = await it.snapshot(150)
            content = it.store.folder / snapshot.id
            content.rename(tmp_path / "away")
            monkeypatch.setattr(state, "REFUSED_S", 0.2)
            async with it.waiting(TRIMMED) as task:
                await until(lambda: len(it.store.downloads) >= 3)
                assert it.state.refused[snapshot.id].pause_s >= 0.4, "after twice that"
                (tmp_path / "away").rename(content)
                await asyncio.wait_for(task, 5)
            assert await it.node.position() == 150
            it.state.refuse(snapshot)
            assert it.state.is_refused(snapshot)
            assert not it.state.is_refused(replace(snapshot, sha256="0" * 64))

    asyncio.run(main())


def test_what_was_missed_while_snapshots_were_off_comes_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mend, "LOOK_S", 0.02)

    async def main() -> None:
        async with bench(tmp_path) as it:
            replica = it.node.engine.replica
            await it.node.engine.write(
                lambda: replica.completeness.note_hole("stream s: messages 11 to 99 were discarded")
            )
            await it.node.at(120)
            running = asyncio.create_task(Mender(it.node.engine, it.catch_up, it.state).run(it.link))
            await until(lambda: it.lease.own_wish is not None)
            assert "11 to 99" in it.lease.wishes[-1][0]
            it.other.write(3)
            await it.snapshot(150)
            await until(lambda: replica.completeness.incomplete is None)
            await until(lambda: it.lease.own_wish is None)
            assert it.node.rows() == {3: "x"}
            assert await it.node.position() == 150
            fetched = len(it.store.downloads)
            await asyncio.sleep(0.1)
            assert len(it.store.downloads) == fetched, "once"
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def test_a_hole_in_the_middle_is_not_mended_by_a_snapshot_from_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the stream still continues, as the messages before the hole are there."""
    monkeypatch.setattr(mend, "LOOK_S", 0.02)

    async def main() -> None:
        async with bench(tmp_path) as it:
            replica = it.node.engine.replica
            await it.snapshot(120)
            end = Position(STREAM, CREATED, 140)
            await it.node.engine.write(lambda: replica.completeness.note_hole("message 141 came", end))
            await it.node.at(150)
            running = asyncio.create_task(Mender(it.node.engine, it.catch_up, it.state).run(it.link))
            await until(lambda: it.lease.own_wish is not None)
            assert it.store.downloads == []
            it.other.write(3)
            newer = await it.snapshot(145)
            await until(lambda: replica.completeness.incomplete is None)
            assert it.store.downloads == [newer.id]
            assert it.node.rows() == {3: "x"}
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def test_what_waits_in_a_snapshot_from_the_future_is_bounded_by_now(tmp_path: Path) -> None:
    """The server's clock was ahead when the snapshot was taken; one wrong clock must not win for ever."""

    async def main() -> None:
        async with bench(tmp_path) as it:
            now_ms = clock.wall_ms()
            it.node.engine.time.server.now_ms = lambda: now_ms  # type: ignore[method-assign]
            it.other.write(3)
            await it.other.engine.absorb()
            ahead = (now_ms + 10 * 86_400_000,)
            it.other.application.execute("UPDATE __harmonylite__t_version SET ts = ?", ahead)
            taken = await it.snapshot(150)
            it.store.manifests = [replace(taken, created_ms=taken.created_ms + 73 * 365 * 86_400_000)]
            await it.bridge(TRIMMED)
            ((ts,),) = it.node.application.execute("SELECT ts FROM __harmonylite__t_version WHERE k0 = 3")
            assert ts == now_ms + it.node.engine.replica.tolerance_ms

    asyncio.run(main())


def written(node: Node, ms: int) -> None:
    """As if all of its rows had been written at that time."""
    node.application.execute("UPDATE __harmonylite__t_version SET ts = ?", (ms,))


async def publish(node: Node) -> None:
    """All that was written is acknowledged."""
    await node.engine.absorb_all()
    node.engine.replica.outgoing.mark_published(load_state(node.engine.replica.writer).batch)


async def forget(node: Node, since_ms: int) -> None:
    """As if the node had forgotten its tombstones from before that time."""
    replica = node.engine.replica
    await node.engine.write(
        lambda: replica.judge(lambda _: replica.completeness.arrive((), synced_at_ms=0, tombstones_since_ms=since_ms)),
    )


def test_what_came_after_a_snapshot_stays_while_the_log_is_read_on(tmp_path: Path) -> None:
    """Nobody has written for long, so the time up to which this node knows all is long ago: but what the snapshot lacks
    is not what the others have deleted, it came since, and nothing reads it again."""

    async def main() -> None:
        now_ms = clock.wall_ms()
        async with bench(tmp_path, now_ms - 100 * DAY_MS) as it:
            replica = it.node.engine.replica
            await it.node.engine.write(lambda: replica.completeness.note_hole("stream s: messages 3 to 5"))
            for each in (it.node, it.other):
                each.write(1)
                await publish(each)
            await forget(it.other, now_ms - 10 * DAY_MS)
            await it.snapshot(120)
            await it.node.at(130)
            it.node.write(2)
            await publish(it.node)
            written(it.node, now_ms - 50 * DAY_MS)  # by a clock that was behind
            assert await it.catch_up.merge_another(it.link, in_step=False)
            assert it.node.rows() == {1: "x", 2: "x"}
            assert await it.node.position() == 130

    asyncio.run(main())


def test_a_delete_that_could_not_be_read_and_is_forgotten_stays_one(tmp_path: Path) -> None:
    """What was read after a message that this version cannot read does not make this node know all until then."""

    async def main() -> None:
        now_ms = clock.wall_ms()
        async with bench(tmp_path, now_ms - 100 * DAY_MS) as it:
            it.node.write(1, text="deleted in the message that was not read")
            await publish(it.node)
            written(it.node, now_ms - 101 * DAY_MS)
            unread = Undecodable(9, b"newer", "format 9", Unread(now_ms - 99 * DAY_MS, 2, joined=True))
            position = Position(STREAM, CREATED, 10, now_ms * 1_000_000)
            await it.node.engine.apply(Delivery(position, (), (unread,)))
            await forget(it.other, now_ms - 5 * DAY_MS)
            await it.snapshot(120)
            assert not await it.bridge(TRIMMED)
            assert it.node.rows() == {}
            assert await it.node.engine.pending() == 0, "it comes back everywhere"

    asyncio.run(main())


def test_a_costly_store_is_asked_when_that_is_due_and_the_others_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request expires within seconds, so it is repeated at each look; a list of S3 is a process each time."""

    async def main() -> None:
        async with bench(tmp_path) as it:
            asked = [True]

            async def due(*_: object) -> bool:
                return bool(asked) and asked.pop()

            monkeypatch.setattr(Listing, "due", due)
            await it.snapshot(50)
            it.store.lists = 0
            async with it.waiting(TRIMMED) as task:
                await until(lambda: len(it.lease.wishes) > 3)
                assert it.store.lists == 1
                await it.snapshot(160)
                it.store.lists = 0
                said = len(it.lease.wishes)
                await until(lambda: len(it.lease.wishes) > said + 3)
                assert (it.store.lists, task.done()) == (0, False)
                asked.append(True)
                await asyncio.wait_for(task, 5)
            assert await it.node.position() == 160

    asyncio.run(main())


def test_a_snapshot_that_cannot_be_fetched_is_not_tried_at_every_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 lists it, and goes away."""

    async def main() -> None:
        async with bench(tmp_path) as it:
            asked, answers = [True], 0

            async def due(*_: object) -> bool:
                nonlocal answers
                answers += 1
                return bool(asked) and asked.pop()

            def away() -> None:
                raise StoreUnavailable("s3.example does not answer")

            monkeypatch.setattr(Listing, "due", due)
            await it.snapshot(150)
            it.store.on_transfer = away
            async with it.waiting(TRIMMED) as task:
                await until(lambda: answers > 3)
                assert len(it.store.downloads) == 1
                assert it.state.catching_up == "waiting: s3.example does not answer"
                it.store.on_transfer = lambda: None
                asked.append(True)
                await asyncio.wait_for(task, 5)
            assert await it.node.position() == 150

    asyncio.run(main())


def test_while_something_is_missing_the_others_are_asked_again_without_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mend, "LOOK_S", 0.02)

    async def main() -> None:
        async with bench(tmp_path) as it:
            asked = [True]

            async def due(*_: object) -> bool:
                return bool(asked) and asked.pop()

            monkeypatch.setattr(Listing, "due", due)
            replica = it.node.engine.replica
            await it.node.engine.write(lambda: replica.completeness.note_hole("messages 11 to 99 were discarded"))
            await it.node.at(120)
            running = asyncio.create_task(Mender(it.node.engine, it.catch_up, it.state).run(it.link))
            await until(lambda: len(it.lease.wishes) > 3)
            assert it.store.lists == 1
            await it.snapshot(150)
            asked.append(True)
            await until(lambda: replica.completeness.incomplete is None)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())
