"""Bridging gaps, with streams and stores that change in the middle of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from harmonylite import catchup
from harmonylite.catchup import CatchUp, Gap
from harmonylite.config.model import Snapshot as Config
from harmonylite.db.tables import load_state
from harmonylite.snapshot import workfiles
from harmonylite.snapshot.keeper import FETCHING, SnapshotKeeper
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.state import SnapshotState
from harmonylite.snapshot.stores.base import StoreUnavailable
from harmonylite.snapshot.workfiles import WorkFiles
from harmonylite.stream.log import StreamState, StreamUnavailable
from tests.unit.snapshot_fakes import STREAM, FakeLink, Lease, Node, Store, opened, stream

TRIMMED = Gap(STREAM, "messages 11 to 99 were discarded", lost=False, needed=99)
LOST = Gap(STREAM, "it was made anew", lost=True, needed=0)
RECREATED = "2026-11-24T09:00:00Z"


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
async def bench(folder: Path) -> AsyncIterator[Bench]:
    async with opened(folder / "one", 1) as node, opened(folder / "two", 2) as other:
        await node.at(10)
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
            assert it.state.refused == {newer.id}

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
            it.node.engine.replica.mark_published(load_state(it.node.engine.replica.writer).batch)
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


def test_a_lost_tail_with_a_snapshot_from_before_it(tmp_path: Path) -> None:
    """Only what the snapshot lacks is published again, and reading goes back to it."""

    async def main() -> None:
        async with bench(tmp_path) as it:
            it.other.write(*range(100))
            await it.snapshot(120)
            await it.bridge(TRIMMED)
            await it.node.at(180)
            it.node.write(1000, 1001)
            await it.node.engine.absorb()
            it.node.engine.replica.mark_published(load_state(it.node.engine.replica.writer).batch)
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
