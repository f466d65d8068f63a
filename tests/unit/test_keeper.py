"""Taking snapshots: when, by whom, and what happens when it goes wrong in the middle."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harmonylite.config.model import Snapshot as Config
from harmonylite.model import Delivery, Position, Undecodable, Unread
from harmonylite.snapshot import due, keeper, mirroring, workfiles
from harmonylite.snapshot.due import FETCHING, MOST
from harmonylite.snapshot.keeper import SnapshotKeeper
from harmonylite.snapshot.local import is_joined, set_joined
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.state import SnapshotState
from harmonylite.snapshot.stores.base import StoreRefused, StoreUnavailable
from harmonylite.snapshot.workfiles import SnapshotFailed, WorkFiles
from harmonylite.stream.lease import SnapshotRequest
from harmonylite.stream.log import parse_time_ns
from tests.unit.snapshot_fakes import CREATED, STREAM, FakeLink, Lease, Node, Store, opened, renamed, stream


class Bench:
    """A keeper, everything it uses, and what it is told of this node."""

    def __init__(self, node: Node, folder: Path, **config: object) -> None:
        self.node = node
        folder.mkdir()
        self.store, self.lease = Store(folder), Lease()
        self.link = FakeLink(self.store, self.lease, lambda: stream(1, self.ends[STREAM]))
        self.state = SnapshotState("nats")
        self.files = WorkFiles(node.path)
        self.ends = {STREAM: 10}
        self.why_not: str | None = None
        self.keeper = SnapshotKeeper(
            Config(**config),  # type: ignore[arg-type]
            100,
            node.engine,
            self.files,
            self.state,
            why_not=lambda: self.why_not,
            ends=lambda: self.ends,
            leaf=False,
        )
        self.keeper._link = self.link

    async def look(self) -> int:
        """One round; how many snapshots there are."""
        await self.keeper._round(self.link)
        return len(self.store.manifests)

    def again(self) -> None:
        """As a daemon that has just been started."""
        self.state.newest, self.keeper._listed_at = None, None
        self.keeper._taking.succeeded()
        self.keeper._asking.succeeded()
        self.keeper._due._taken.clear()

    def leftovers(self) -> list[str]:
        return [path.name for path in self.node.path.parent.glob(".*")]


def test_a_snapshot_is_due_after_so_many_messages(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            await node.at(10)
            assert await bench.look() == 0
            bench.ends[STREAM] = 100
            await node.at(100)
            assert await bench.look() == 1
            bench.ends[STREAM] = 300
            assert await bench.look() == 1, "too soon after the last one"
            bench.node.engine.time.server.now_ms = lambda: bench.store.manifests[0].created_ms + 700_000  # type: ignore[method-assign]
            assert await bench.look() == 2
            assert bench.leftovers() == []
            assert not bench.lease.held

    asyncio.run(main())


def test_the_interval_counts_only_when_the_log_has_moved(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store", interval=1)
            await node.at(10)
            assert await bench.look() == 1
            await asyncio.sleep(0.02)
            assert await bench.look() == 1
            bench.ends[STREAM] = 11
            assert await bench.look() == 2

    asyncio.run(main())


def test_a_node_that_needs_one_gets_one_newer_than_what_it_saw(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            await node.at(10)
            bench.lease.asked = [SnapshotRequest(1, "own", "", 0)]
            assert await bench.look() == 0, "its own wish"
            bench.lease.asked = [SnapshotRequest(2, "a gap", "", 0)]
            assert await bench.look() == 1
            assert await bench.look() == 1, "that one is newer than what it saw"
            newest = bench.store.manifests[0].id
            bench.lease.asked = [SnapshotRequest(2, FETCHING + newest, newest, 0)]
            assert await bench.look() == 1, "it is fetching it"
            bench.lease.asked = [SnapshotRequest(2, "damaged", newest, 0)]
            await asyncio.sleep(1.0)  # ids have seconds
            assert await bench.look() == 2

    asyncio.run(main())


def test_a_node_that_leaves_out_a_table_lets_others_go_first(tmp_path: Path) -> None:
    """Else it would take one after the other for a node that wants the table."""

    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            await node.at(10)
            node.application.execute("INSERT INTO __harmonylite__meta VALUES ('left_out', '[\"private\"]')")
            bench.lease.asked = [SnapshotRequest(2, "a gap", "", 0)]
            assert await bench.look() == 1, "it may be of use there"
            taken = bench.store.manifests[0]
            bench.lease.asked = [SnapshotRequest(2, "of no use", taken.id, 0)]
            await asyncio.sleep(1.0)  # ids have seconds
            assert await bench.look() == 1
            node.engine.time.server.now_ms = lambda: taken.created_ms + 700_000  # type: ignore[method-assign]
            assert await bench.look() == 2, "nobody else could"

    asyncio.run(main())


def test_only_a_complete_node_with_the_lease_takes_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            bench.ends[STREAM] = 100
            bench.why_not = "3 rows are parked here"
            assert await bench.look() == 0
            with pytest.raises(SnapshotFailed, match="parked"):
                await bench.keeper.save()
            bench.why_not, bench.lease.others = None, 7
            assert await bench.look() == 0
            with pytest.raises(SnapshotFailed, match="node 7 is taking one"):
                await bench.keeper.save()
            assert bench.state.failure is None, "that is no failure"

    asyncio.run(main())


def test_a_node_with_parked_rows_copies_nothing(tmp_path: Path) -> None:
    """Every snapshot would carry them on, and a copy each time would wear the card."""

    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            bench.ends[STREAM] = 100
            row = "'t', x'00', x'00', x'00', 1, 1, 0, 0, 0, 0, x'00', 'r', 'd', 0"
            node.application.execute(f"INSERT INTO __harmonylite__parked VALUES ({row})")
            bench.files.copy = tmp_path / "nowhere" / "copy"  # nothing can be copied there
            assert await bench.look() == 0
            with pytest.raises(SnapshotFailed, match="parked"):
                await bench.keeper.save()
            assert not bench.lease.held
            assert bench.state.failure is None

    asyncio.run(main())


def test_a_row_that_was_parked_just_before_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is what the copied view holds."""

    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            row = "'t', x'00', x'00', x'00', 1, 1, 0, 0, 0, 0, x'00', 'r', 'd', 0"
            node.application.execute(f"INSERT INTO __harmonylite__parked VALUES ({row})")

            async def none_yet() -> int:
                return 0

            monkeypatch.setattr(node.engine, "parked", none_yet)
            with pytest.raises(SnapshotFailed, match="parked"):
                await bench.keeper.save()
            assert bench.store.manifests == []
            assert bench.leftovers() == []

    asyncio.run(main())


@pytest.mark.parametrize("in_the_copy", [False, True], ids=["before", "seen in the copied view"])
def test_a_node_that_could_not_read_a_message_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_the_copy: bool
) -> None:
    """Who merges its snapshot would go on after that message, and never read it."""

    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            message = Undecodable(150, b"HL", "format 9 is unknown", Unread(1, 2, joined=False))
            await node.engine.apply(Delivery(Position(STREAM, CREATED, 150, 150_000), (), (message,)))
            if in_the_copy:  # it came after the first look
                monkeypatch.setattr(type(node.engine.replica.completeness), "incomplete", None)
            else:
                monkeypatch.setattr(bench.files, "copy", tmp_path / "nowhere" / "copy")  # nothing can be copied there
            bench.ends[STREAM] = 150
            assert await bench.look() == 0
            with pytest.raises(SnapshotFailed, match=r"1 message could not be read by this version.*upgrade"):
                await bench.keeper.save()
            assert bench.state.failure is None, "that is no failure"
            assert bench.leftovers() == []
            assert not bench.lease.held
            monkeypatch.undo()
            await node.engine.write(node.engine.replica.completeness.declare_complete)
            assert await bench.look() == 1

    asyncio.run(main())


def test_a_damaged_message_keeps_no_snapshot_back(tmp_path: Path) -> None:
    """No version can ever read it: all others have as little of it."""

    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            damaged = Undecodable(150, b"?", "a wrong checksum")
            await node.engine.apply(Delivery(Position(STREAM, CREATED, 150, 150_000), (), (damaged,)))
            bench.ends[STREAM] = 150
            assert await bench.look() == 1

    asyncio.run(main())


def test_a_hole_outlasts_a_restart(tmp_path: Path) -> None:
    """Messages were missed while snapshots were off; then they are switched on."""

    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            await node.at(99)
            await node.engine.write(
                lambda: node.engine.replica.completeness.note_hole("stream s: messages 11 to 99 were discarded")
            )
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            bench.ends[STREAM] = 200
            assert await bench.look() == 0
            with pytest.raises(SnapshotFailed, match="11 to 99"):
                await bench.keeper.save()

    asyncio.run(main())


def from_the_future(bench: Bench, **changes: Any) -> Manifest:
    """What is in the store, as a server dated it whose clock was 73 years ahead."""
    [real] = bench.store.manifests
    ahead = real.created_ms + 73 * 365 * 86_400_000
    return renamed(real, "20991124T074500Z-7-1a2b3c4d", created_ms=ahead, **changes)


@pytest.mark.parametrize("config", [{"interval": 1_000}, {}], ids=["interval", "messages"])
def test_a_snapshot_from_the_future_keeps_none_waiting(tmp_path: Path, config: dict[str, int]) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store", **config)
            bench.ends[STREAM] = 100
            await node.at(100)
            assert await bench.look() == 1
            bench.store.manifests = [from_the_future(bench)]
            bench.again()
            bench.ends[STREAM] = 300
            assert await bench.look() == 2
            assert bench.keeper.age_s() is not None
            assert bench.state.newest is not None
            assert bench.state.newest.id < "2099", "status shows the one with a date that can be"
            bench.keeper._listed_at = None
            assert await bench.look() == 2, "that one counts"

    asyncio.run(main())


def test_a_snapshot_from_the_future_pushes_no_good_one_out(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store", retain=2)
            await bench.keeper.save()
            future = from_the_future(bench)
            bench.store.manifests = [future, renamed(future, "20991124T074501Z-7-1a2b3c4d")]
            first = await bench.keeper.save()
            assert first in bench.store.manifests
            assert len(bench.store.manifests) == 2
            await asyncio.sleep(0.01)
            second = await bench.keeper.save()
            assert {each.id for each in bench.store.manifests} == {first.id, second.id}

    asyncio.run(main())


def test_the_one_just_stored_stays_whatever_is_listed(tmp_path: Path) -> None:
    """The server's clock went back by less than is believed of a date: all others look newer."""

    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store", retain=1)
            first = await bench.keeper.save()
            bench.store.manifests = [replace(first, created_ms=first.created_ms + 30_000)]
            second = await bench.keeper.save()
            assert second in bench.store.manifests

    asyncio.run(main())


def test_requests_that_nothing_answers_wear_no_card(tmp_path: Path) -> None:
    """Whatever is asked for and listed, only so many are taken in ten minutes."""

    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            await node.at(10)
            for request in ("20991124T074500Z-7-1a2b3c4d", "no id at all"):
                bench.again()
                bench.store.manifests = []
                bench.lease.asked = [SnapshotRequest(2, "a gap", request, 0)]
                before = node.engine.metrics.snapshots_taken.value
                for _ in range(8):
                    await bench.look()
                    bench.state.newest, bench.keeper._listed_at = None, None
                    if request == "no id at all":
                        bench.store.manifests = []  # it is lost each time
                taken = node.engine.metrics.snapshots_taken.value - before
                assert taken == (1 if request.startswith("2099") else MOST)

    asyncio.run(main())


def test_what_is_left_of_torn_uploads_makes_room_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store", retain=3)
            first = await bench.keeper.save()
            size = first.stored_size
            bench.store.given_up = {"20261124T074500Z-9-1a2b3c4d": size}
            bench.store.room = 2 * size + size // 2
            await asyncio.sleep(0.01)
            second = await bench.keeper.save()
            assert {each.id for each in bench.store.manifests} == {first.id, second.id}
            assert bench.store.given_up == {}

    asyncio.run(main())


def test_a_log_alone_does_not_know_what_was_forgotten_before_it_began(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            await node.at(10)
            created_ms = parse_time_ns(CREATED) // 1_000_000
            now_ms = created_ms + 10**9
            node.engine.time.server.now_ms = lambda: now_ms  # type: ignore[method-assign]
            retention_ms = node.engine.replica.tombstone_retention_ms
            assert (await bench.keeper.save()).tombstones_since_ms == created_ms - retention_ms
            now_ms = created_ms - 10**9  # the log was made while the server's clock was ahead
            assert (await bench.keeper.save()).tombstones_since_ms == now_ms - retention_ms
            replica = node.engine.replica
            await node.engine.write(
                lambda: replica.judge(
                    lambda _: replica.completeness.arrive((), synced_at_ms=0, tombstones_since_ms=created_ms)
                )
            )
            assert (await bench.keeper.save()).tombstones_since_ms == created_ms, "what it knows of itself counts"

    asyncio.run(main())


def test_the_lease_is_lost_while_storing(tmp_path: Path) -> None:
    """Another node may have begun: what is under way is given up, its files are removed, nothing is listed."""

    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            node.write(1)
            stuck = asyncio.Event()

            async def upload(*_: object) -> None:
                bench.lease.lost = True
                await stuck.wait()

            bench.store.upload = upload  # type: ignore[method-assign]
            with pytest.raises(SnapshotFailed, match="another node holds the lease"):
                await asyncio.wait_for(bench.keeper.save(), 5)
            assert bench.store.manifests == []
            assert bench.leftovers() == []
            assert bench.state.failure is not None
            assert bench.state.taking is None
            assert node.engine.metrics.snapshot_failures.value == 1

    asyncio.run(main())


def test_a_log_that_breaks_meanwhile(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            answers = iter([None, "it has not read everything yet"])
            bench.keeper.why_not = lambda: next(answers)
            with pytest.raises(SnapshotFailed, match="not read everything"):
                await bench.keeper.save()
            assert bench.store.manifests == []

    asyncio.run(main())


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            bench.ends[STREAM] = 100
            monkeypatch.setattr(workfiles, "ROOM_LEFT_BYTES", 1 << 60)
            assert await bench.look() == 0
            assert bench.state.failure is not None
            assert "make room" in bench.state.failure
            assert node.engine.metrics.snapshot_failures.value == 1
            monkeypatch.undo()
            assert await bench.look() == 0, "not at once again"
            await bench.keeper.save()
            assert bench.state.failure is None

    asyncio.run(main())


def test_a_damaged_database_is_not_stored(tmp_path: Path) -> None:
    """Its digest would fit, and every node that needs a snapshot would fetch it, refuse it and ask for another."""

    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            node.application.execute("CREATE TABLE large (id INTEGER PRIMARY KEY, v)")
            node.application.execute("INSERT INTO large VALUES (1, zeroblob(300000))")
            bench = Bench(node, tmp_path / "store")
            await node.at(10)
            while await node.engine.absorb():
                pass
            node.application.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            ((root,),) = node.application.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'large'")
            with node.path.open("r+b") as file:
                file.seek((root - 1) * 4096)
                file.write(b"\xff" * 4096)
            with pytest.raises(SnapshotFailed, match=r"this node's database .* is damaged: .*disaster-recovery"):
                await bench.keeper.save()
            assert bench.store.manifests == []
            assert bench.leftovers() == []
            assert "is damaged" in (bench.state.failure or "")
            assert await bench.look() == 0, "it tries again later"
            node.write(1)
            ((root,),) = node.application.execute(
                "SELECT rootpage FROM sqlite_schema WHERE name = '__harmonylite__t_version'"
            )
            with node.path.open("r+b") as file:
                file.seek((root - 1) * 4096)
                file.write(b"\xff" * 4096)
            with pytest.raises(SnapshotFailed, match=r"this node's database .* is damaged: .*disaster-recovery"):
                await bench.keeper.save()

    asyncio.run(main())


def test_pauses_grow_while_a_store_refuses(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            bench.ends[STREAM] = 100
            pauses = []
            for _ in range(9):
                pauses.append(bench.keeper._taking.pause_s)
                bench.keeper._note_failure(StoreRefused("access denied"))
                assert bench.keeper._taking.waits
            assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
            bench.keeper._taking.succeeded()
            assert (bench.keeper._taking.pause_s, bench.keeper._taking.waits) == (60, False)

    asyncio.run(main())


def test_as_many_are_kept_as_there_is_room_for(tmp_path: Path) -> None:
    """The oldest go first; the newest one that nodes can use stays until there is a newer one."""

    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store", retain=3)
            await node.at(10)
            first = await bench.keeper.save()
            size = first.stored_size
            bench.store.room = 2 * size + size // 2
            ids = [first.id]
            for _ in range(3):
                await asyncio.sleep(0.01)
                ids.append((await bench.keeper.save()).id)
            assert [manifest.id for manifest in await bench.store.list()] == [ids[3], ids[2]]
            bench.store.room = size + size // 2
            bench.store.manifests = bench.store.manifests[-1:]
            with pytest.raises(SnapshotFailed, match="does not fit beside"):
                await bench.keeper.save()
            assert [manifest.id for manifest in bench.store.manifests] == [ids[3]]
            assert not bench.store.torn, "what was begun is removed"
            # The stream has passed it: nobody can use it any more.
            bench.link = FakeLink(bench.store, bench.lease, lambda: stream(500, 600))
            bench.keeper._link = bench.link
            newest = await bench.keeper.save()
            assert [manifest.id for manifest in bench.store.manifests] == [newest.id]

    asyncio.run(main())


def test_what_is_being_fetched_stays(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store", retain=1)
            first = await bench.keeper.save()
            bench.lease.asked = [SnapshotRequest(2, FETCHING + first.id, first.id, 0)]
            await asyncio.sleep(0.01)
            second = await bench.keeper.save()
            await asyncio.sleep(0.01)
            third = await bench.keeper.save()
            assert [manifest.id for manifest in await bench.store.list()] == [third.id, first.id]
            bench.lease.asked = []
            await asyncio.sleep(0.01)
            fourth = await bench.keeper.save()
            assert [manifest.id for manifest in await bench.store.list()] == [fourth.id]
            assert second.id not in (first.id, third.id)

    asyncio.run(main())


def test_what_is_still_to_be_merged_here_stays(tmp_path: Path) -> None:
    """Two nodes with rows from before their installation take a snapshot at the same time. They are in nothing else:
    removed, the other node's would never come here."""

    async def main() -> None:
        async with opened(tmp_path / "one") as one, opened(tmp_path / "two", node_id=2) as two:
            await one.at(10)
            first = await Bench(one, tmp_path / "store").keeper.save()
            bench = Bench(two, tmp_path / "second", retain=1)
            bench.store.manifests = [first]
            await asyncio.sleep(0.01)
            second = await bench.keeper.save()
            assert [manifest.id for manifest in await bench.store.list()] == [second.id, first.id]
            assert not await is_joined(two.engine)
            await set_joined(two.engine)  # by merging it
            await asyncio.sleep(0.01)
            third = await bench.keeper.save()
            assert [manifest.id for manifest in await bench.store.list()] == [third.id]

    asyncio.run(main())


def test_after_the_stream_was_made_anew_its_own_messages_count(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store", interval=1)
            bench.ends[STREAM] = 500
            await node.at(500)
            assert await bench.look() == 1
            await asyncio.sleep(0.01)
            bench.ends[STREAM] = 3
            assert await bench.look() == 2

    asyncio.run(main())


def test_a_mirror_that_is_away_is_told_and_not_asked_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store", mirror="s3")
            monkeypatch.setattr(mirroring, "LOOK_S", 0.01)
            monkeypatch.setattr(mirroring, "MIRROR_S", 0.5)
            tries = 0
            away = True

            async def mirror(*_: object) -> list[str]:
                nonlocal tries
                tries += 1
                if away:
                    raise StoreUnavailable("s3.example does not answer")
                return [manifest.id for manifest in bench.store.manifests]

            bench.store.mirror = mirror  # type: ignore[method-assign]
            await bench.keeper.save()
            running = asyncio.create_task(bench.keeper._mirror.run(bench.link))
            await asyncio.sleep(0.3)
            assert tries == 1
            assert bench.state.trouble == "the mirror of the snapshots is behind: s3.example does not answer"
            away = False
            while bench.state.trouble is not None:
                await asyncio.sleep(0.01)
            assert tries == 2
            await asyncio.sleep(0.01)
            await bench.keeper.save()
            await asyncio.sleep(0.1)
            assert tries == 3, "a new one is copied at once"
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert bench.leftovers() == []

    asyncio.run(main())


def test_a_mirror_is_the_business_of_who_took_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store", mirror="s3")
            monkeypatch.setattr(mirroring, "LOOK_S", 0.01)

            async def mirror(*_: object) -> list[str]:
                raise StoreUnavailable("s3.example does not answer")

            bench.store.mirror = mirror  # type: ignore[method-assign]
            await bench.keeper.save()
            running = asyncio.create_task(bench.keeper._mirror.run(bench.link))
            while bench.state.trouble is None:
                await asyncio.sleep(0.01)
            mine = bench.state.newest
            assert mine is not None
            bench.state.newest = replace(mine, id=mine.id + "x", node_id=2)
            while bench.state.trouble is not None:  # the test's time limit ends it
                await asyncio.sleep(0.01)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize("trouble", [StoreRefused("access denied"), StoreUnavailable("s3.example does not answer")])
def test_a_store_that_does_not_say_what_it_has_is_told_and_not_asked_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    """Each list of S3 is a process of its own; and without a list no snapshot is taken."""

    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            failures = node.engine.metrics.snapshot_failures
            monkeypatch.setattr(keeper, "LOOK_S", 0.005)
            monkeypatch.setattr(due, "RETRY_S", 0.2)
            bench.store.trouble, bench.store.costly = trouble, True
            bench.ends[STREAM] = 50  # none is due
            running = asyncio.create_task(bench.keeper.run(bench.link))
            await asyncio.sleep(0.15)
            assert bench.store.lists == 1
            assert bench.state.unanswered == str(trouble)
            assert failures.value == 0, "no snapshot was to be taken"
            bench.ends[STREAM] = 100
            await asyncio.sleep(0.25)
            assert (bench.store.lists, failures.value) == (2, 1)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert bench.state.unanswered == str(trouble)
            running = asyncio.create_task(bench.keeper.run(bench.link))  # the link drops every minute
            await asyncio.sleep(0.1)
            assert bench.store.lists == 2
            bench.store.trouble = None
            while bench.state.unanswered is not None or not bench.store.manifests:  # the test's time limit ends it
                await asyncio.sleep(0.005)
            assert bench.state.failure is None
            assert failures.value == 1
            assert bench.keeper._asking.pause_s == due.RETRY_S
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def test_a_snapshot_by_hand_does_not_wait_for_the_store_to_be_asked_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            bench.store.trouble = StoreUnavailable("s3.example does not answer")
            assert await bench.look() == 0
            assert bench.keeper.store_is_away
            bench.store.trouble = None
            await bench.keeper.save()
            assert bench.state.unanswered is None
            assert not bench.keeper.store_is_away

    asyncio.run(main())


def test_after_the_connection_was_lost_a_store_behind_it_is_asked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store in NATS did not answer because there was no connection any more: that says nothing."""

    async def main() -> None:
        async with opened(tmp_path / "node") as node:
            bench = Bench(node, tmp_path / "store")
            bench.store.trouble = StoreUnavailable("not connected to NATS")
            with pytest.raises(StoreUnavailable):
                await bench.keeper.refresh(bench.link)
            bench.store.trouble = None
            running = asyncio.create_task(bench.keeper.run(bench.link))
            while bench.state.unanswered is not None:
                await asyncio.sleep(0.005)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())
