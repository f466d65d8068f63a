"""A new node without a database, and rows from before the installation."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import pytest
import zstandard

from harmonylite import clock
from harmonylite.catchup import CatchUp
from harmonylite.config.model import Snapshot as Config
from harmonylite.db import unversioned
from harmonylite.db.tables import load_state
from harmonylite.snapshot import install, join
from harmonylite.snapshot.due import FETCHING
from harmonylite.snapshot.install import Installer
from harmonylite.snapshot.join import Joiner
from harmonylite.snapshot.keeper import SnapshotKeeper
from harmonylite.snapshot.listing import Listing
from harmonylite.snapshot.local import has_unversioned, is_joined
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.state import SnapshotState
from harmonylite.snapshot.workfiles import WorkFiles
from tests.disks import small_disk
from tests.unit.snapshot_fakes import FakeLink, Lease, Node, Store, opened, stream


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "GRACE_S", 0.0)
    monkeypatch.setattr(install, "LOOK_S", 0.02)
    monkeypatch.setattr(join, "EARLY_S", 0.02)


def keeper(node: Node, state: SnapshotState | None = None) -> SnapshotKeeper:
    return SnapshotKeeper(
        Config(),
        1000,
        node.engine,
        WorkFiles(node.path),
        state or SnapshotState("nats"),
        why_not=lambda: None,
        ends=lambda: {},
        leaf=False,
    )


class Bench:
    """A cluster's store with a snapshot in it, and a folder for a new node."""

    def __init__(self, folder: Path) -> None:
        (folder / "store").mkdir()
        (folder / "new").mkdir()
        self.db = folder / "new" / "app.db"
        self.store, self.lease = Store(folder / "store"), Lease()
        self.link = FakeLink(self.store, self.lease, lambda: stream(1, 200))
        self.installer = Installer(self.db, 9, WorkFiles(self.db), SnapshotState("nats"))

    async def fill(self, node: Node) -> None:
        await node.at(120)
        taker = keeper(node)
        taker._link = self.link
        await taker.save()

    def files(self) -> list[str]:
        return sorted(path.name for path in self.db.parent.iterdir())


def query(path: Path, sql: str) -> list[tuple[object, ...]]:
    connection = apsw.Connection(str(path))
    try:
        return list(connection.execute(sql))
    finally:
        connection.close()


def test_the_first_database_is_a_snapshot_under_the_node_s_own_name(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "one") as node:
            node.write(1, 2)
            bench = Bench(tmp_path)
            await bench.fill(node)
            await asyncio.wait_for(bench.installer.run(bench.link), 10)
        assert bench.files() == ["app.db"]
        assert bench.db.stat().st_mode & 0o777 == 0o660
        assert query(bench.db, "SELECT id FROM t ORDER BY id") == [(1,), (2,)]
        assert query(bench.db, "SELECT value FROM __harmonylite__meta WHERE name = 'node_id'") == [(9,)]
        async with opened(tmp_path / "new", 9) as new:
            assert await is_joined(new.engine), "it need not fetch it a second time"
            assert await new.position() == 120

    asyncio.run(main())


def test_a_database_that_the_application_makes_meanwhile_is_not_touched(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "one") as node:
            node.write(1)
            bench = Bench(tmp_path)
            await bench.fill(node)
            application: list[apsw.Connection] = []

            def makes_it() -> None:
                application.append(apsw.Connection(str(bench.db)))
                application[0].execute("CREATE TABLE mine (x); INSERT INTO mine VALUES (42)")

            bench.store.on_transfer = makes_it
            inode = None
            await asyncio.wait_for(bench.installer.run(bench.link), 10)
            inode = bench.db.stat().st_ino
            application[0].execute("INSERT INTO mine VALUES (43)")
            assert query(bench.db, "SELECT x FROM mine") == [(42,), (43,)]
            assert bench.db.stat().st_ino == inode
            assert bench.files() == ["app.db"]
            application[0].close()

    asyncio.run(main())


def test_without_a_snapshot_it_asks_and_waits_for_whoever_is_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "one") as node:
            bench = Bench(tmp_path)
            running = asyncio.create_task(bench.installer.run(bench.link))
            while bench.lease.own_wish is None:
                await asyncio.sleep(0.01)
            assert bench.lease.own_wish == ("a new node without a database", "")
            node.write(7)
            await bench.fill(node)
            await asyncio.wait_for(running, 10)
            assert query(bench.db, "SELECT id FROM t") == [(7,)]

    asyncio.run(main())


def test_an_installation_that_is_cancelled_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one uses the same file, and the first might link that one half-made. What was fetched is kept."""
    begun, go_on = threading.Event(), threading.Event()
    adopt = install.adopt_copy

    def slow(path: Path, node_id: int, *, latest_ms: int, cancelled: Callable[[], bool]) -> None:
        begun.set()
        assert go_on.wait(10)
        adopt(path, node_id, latest_ms=latest_ms, cancelled=cancelled)

    async def main() -> None:
        monkeypatch.setattr(install, "adopt_copy", slow)
        async with opened(tmp_path / "one") as node:
            node.write(1)
            bench = Bench(tmp_path)
            await bench.fill(node)
            [manifest] = bench.store.manifests
            running = asyncio.create_task(bench.installer.run(bench.link))
            assert await asyncio.to_thread(begun.wait, 10)
            running.cancel()
            done, _ = await asyncio.wait([running], timeout=0.2)
            assert not done
            go_on.set()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            assert bench.files() == [f".app.db.harmonylite-snapshot-{manifest.id}"]
            await asyncio.wait_for(bench.installer.run(bench.link), 10)
            assert bench.files() == ["app.db"]
            assert bench.store.downloads == [manifest.id]
            assert query(bench.db, "SELECT id FROM t") == [(1,)]

    try:
        asyncio.run(main())
    finally:
        go_on.set()


def test_a_disk_that_fills_up_while_a_first_database_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon waits and says so; the snapshot is not fetched again."""
    monkeypatch.setattr(install, "TROUBLE_S", 0.02)
    adopt, tries = install.adopt_copy, [0]

    async def main() -> None:
        async with opened(tmp_path / "one") as node:
            node.write(*range(50), text="x" * 3000)
            while await node.engine.absorb():
                pass
            bench = Bench(tmp_path)
            await bench.fill(node)
            with small_disk(bench.db.parent, "24m"):
                ballast = bench.db.parent / "ballast"

                def on_a_full_disk(path: Path, node_id: int, **options: Any) -> None:
                    tries[0] += 1
                    if not ballast.exists():
                        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                            while file.write(bytes(4096)):
                                pass
                    adopt(path, node_id, **options)

                monkeypatch.setattr(install, "adopt_copy", on_a_full_disk)
                running = asyncio.create_task(bench.installer.run(bench.link))
                while tries[0] < 3:
                    assert not running.done(), running
                    await asyncio.sleep(0.01)
                assert "database or disk is full" in str(bench.installer._state.catching_up)
                assert not bench.db.exists()
                ballast.unlink()
                monkeypatch.setattr(install, "adopt_copy", adopt)
                await asyncio.wait_for(running, 10)
                assert bench.files() == ["app.db"]
                assert query(bench.db, "SELECT count(*) FROM t") == [(50,)]
                assert query(bench.db, "PRAGMA integrity_check") == [("ok",)]
            assert len(bench.store.downloads) == 1
            assert sum("a first database cannot be" in line for line in caplog.messages) == 1, "not once per try"

    asyncio.run(main())


def test_a_snapshot_that_was_fetched_in_part_is_fetched_to_its_end(tmp_path: Path) -> None:
    """Over a slow link there is a newer one each time; and it is not removed from the store meanwhile."""

    async def main() -> None:
        async with opened(tmp_path / "one") as node:
            node.write(1)
            bench = Bench(tmp_path)
            await bench.fill(node)
            [first] = bench.store.manifests
            stuck = asyncio.Event()
            whole = bench.store.download

            async def download(manifest: Manifest, path: Path, *_: object) -> None:
                path.write_bytes(b"a part")
                stuck.set()
                await asyncio.Event().wait()

            bench.store.download = download  # type: ignore[method-assign, assignment]
            running = asyncio.create_task(bench.installer.run(bench.link))
            await stuck.wait()
            assert bench.lease.own_wish == (FETCHING + first.id, first.id)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await asyncio.sleep(1.0)  # ids have seconds
            await bench.fill(node)
            bench.store.download = whole  # type: ignore[method-assign]
            await asyncio.wait_for(bench.installer.run(bench.link), 10)
            assert bench.store.downloads == [first.id]
            assert bench.files() == ["app.db"]

    asyncio.run(main())


def test_a_copy_that_lacks_our_tables_is_refused(tmp_path: Path) -> None:
    """It would fail in the same way each time."""

    async def main() -> None:
        async with opened(tmp_path / "one") as node:
            node.write(1)
            bench = Bench(tmp_path)
            await bench.fill(node)
            [manifest] = bench.store.manifests
            unpacked = WorkFiles(bench.db).unpacked(manifest.id)
            strange = apsw.Connection(str(unpacked))
            strange.execute("CREATE TABLE __harmonylite__meta (name, value)")
            strange.execute("VACUUM")
            strange.close()
            with unpacked.open("ab") as file:
                file.truncate(manifest.size)
            running = asyncio.create_task(bench.installer.run(bench.link))
            while bench.lease.own_wish is None:
                assert not running.done(), running
                await asyncio.sleep(0.01)
            assert set(bench.installer._state.refused) == {manifest.id}
            assert bench.files() == []
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def test_a_damaged_snapshot_makes_no_database(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "one") as node:
            bench = Bench(tmp_path)
            await bench.fill(node)
            [bad] = bench.store.manifests
            (bench.store.folder / bad.id).unlink()
            running = asyncio.create_task(bench.installer.run(bench.link))
            while bench.lease.own_wish is None:
                await asyncio.sleep(0.01)
            assert bench.lease.own_wish[1] == bad.id, "one newer than the damaged one"
            assert not bench.db.exists()
            await bench.fill(node)
            await asyncio.wait_for(running, 10)
            assert bench.store.downloads.count(bad.id) == 1

    asyncio.run(main())


def spoil_stored(stored: Path, manifest: Manifest) -> Manifest:
    stored.write_bytes(stored.read_bytes()[:-100])
    return manifest


def spoil_content(stored: Path, manifest: Manifest) -> Manifest:
    """Its digest fits, as it was taken of a database that was damaged."""
    content = bytearray(zstandard.ZstdDecompressor().decompressobj().decompress(stored.read_bytes()))
    content[-4096:] = b"?" * 4096
    stored.write_bytes(zstandard.ZstdCompressor().compress(bytes(content)))
    return manifest


def spoil_date(stored: Path, manifest: Manifest) -> Manifest:
    """Good otherwise."""
    return replace(manifest, created_ms=manifest.created_ms + 30 * 86_400_000)


@pytest.mark.parametrize("spoil", [spoil_stored, spoil_content, spoil_date])
@pytest.mark.parametrize("server_knows", [True, False])
def test_the_next_older_snapshot_is_used_when_the_newest_is_not_to_be_believed(
    tmp_path: Path, spoil: Callable[[Path, Manifest], Manifest], server_knows: bool
) -> None:
    async def main() -> None:
        async with opened(tmp_path / "one") as node:
            bench = Bench(tmp_path)
            now_ms = clock.wall_ms() if server_knows else None
            bench.link = FakeLink(bench.store, bench.lease, lambda: replace(stream(1, 200), server_ms=now_ms))
            for key in (1, 2, 3):
                node.write(key)
                await bench.fill(node)
            # Ids have seconds.
            old, good, newest = bench.store.manifests
            bench.store.manifests = [
                replace(old, created_ms=old.created_ms - 3_600_000),
                replace(good, created_ms=good.created_ms - 60_000),
                spoil(bench.store.folder / newest.id, newest),
            ]
            await asyncio.wait_for(bench.installer.run(bench.link), 10)
        assert query(bench.db, "SELECT id FROM t ORDER BY id") == [(1,), (2,)]
        assert query(bench.db, "PRAGMA integrity_check") == [("ok",)]
        assert bench.files() == ["app.db"]
        assert bench.store.downloads == ([good.id] if spoil is spoil_date else [newest.id, good.id])
        assert bench.installer._state.newest is not None
        assert bench.installer._state.newest.id == (good.id if spoil is spoil_date else newest.id)

    asyncio.run(main())


def test_rows_without_a_version_are_found(tmp_path: Path) -> None:
    """Whatever the key; rows that cannot be replicated do not count."""
    (tmp_path / "app").mkdir()
    application = apsw.Connection(str(tmp_path / "app" / "app.db"))
    application.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT)")
    application.execute("CREATE TABLE named (name TEXT COLLATE NOCASE, part INTEGER, PRIMARY KEY (name, part))")

    async def found() -> bool:
        async with opened(tmp_path / "app") as node:
            return await has_unversioned(node.engine)

    assert not asyncio.run(found())
    application.execute("INSERT INTO named VALUES ('written after the installation', 1), (NULL, 2)")
    assert not asyncio.run(found()), "one is in the log, one has NULL in its key"
    application.execute("DELETE FROM __harmonylite__named_change_log")
    application.execute("DELETE FROM __harmonylite__named_version")
    assert asyncio.run(found())


def test_a_node_with_rows_from_before_joins_by_merging_or_by_being_the_first(tmp_path: Path) -> None:
    """It takes a snapshot if there is none and others are there; without such rows nobody fetches anything."""

    async def main() -> None:
        async with opened(tmp_path / "one", 1) as one, opened(tmp_path / "two", 2) as two:
            bench = Bench(tmp_path)
            state = SnapshotState("nats")
            joiner = Joiner(two.engine, keeper(two, state), CatchUp(two.engine, WorkFiles(two.path), state))
            running = asyncio.create_task(joiner.run(bench.link))
            await bench.fill(one)
            while not await is_joined(two.engine):
                await asyncio.sleep(0.01)
            assert bench.store.downloads == [], "no rows from before in it"
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def test_a_snapshot_with_rows_from_before_is_merged_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "one", 1) as one, opened(tmp_path / "two", 2) as two:
            one.write(5, text="from before")
            one.application.execute("DELETE FROM __harmonylite__t_change_log")
            bench = Bench(tmp_path)
            await bench.fill(one)
            [manifest] = bench.store.manifests
            assert manifest.unversioned
            state = SnapshotState("nats")
            joiner = Joiner(two.engine, keeper(two, state), CatchUp(two.engine, WorkFiles(two.path), state))
            running = asyncio.create_task(joiner.run(bench.link))
            while not await is_joined(two.engine):
                await asyncio.sleep(0.01)
            assert two.rows() == {5: "from before"}
            await bench.fill(one)
            await asyncio.sleep(0.2)
            assert bench.store.downloads == [manifest.id]
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def write_before(node: Node, key: int, text: str) -> None:
    """A row from before the installation."""
    node.write(key, text=text)
    node.application.execute("DELETE FROM __harmonylite__t_change_log")


def joining(node: Node, link: FakeLink) -> asyncio.Task[None]:
    state = SnapshotState("nats")
    taker = keeper(node, state)
    taker._link = link
    return asyncio.create_task(Joiner(node.engine, taker, CatchUp(node.engine, WorkFiles(node.path), state)).run(link))


async def stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_node_does_not_fetch_the_snapshot_that_it_has_taken_itself(tmp_path: Path) -> None:
    """Killed after it was stored, before the node had noted that it has joined."""

    async def main() -> None:
        async with opened(tmp_path / "one", 1) as one:
            write_before(one, 5, "from before")
            bench = Bench(tmp_path)
            await bench.fill(one)
            assert await is_joined(one.engine)
            one.application.execute("DELETE FROM __harmonylite__meta WHERE name = 'joined'")
            running = joining(one, bench.link)
            while not await is_joined(one.engine):
                assert not running.done()
                await asyncio.sleep(0.01)
            assert bench.store.downloads == []
            await stopped(running)

    asyncio.run(main())


def test_a_snapshot_that_is_taken_while_a_node_waits_to_join_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(join, "EARLY_S", 0.5)
        async with opened(tmp_path / "one", 1) as one:
            write_before(one, 5, "from before")
            bench = Bench(tmp_path)
            running = joining(one, bench.link)
            await asyncio.sleep(0.01)
            await bench.fill(one)
            await asyncio.sleep(0.7)
            assert await is_joined(one.engine) and bench.store.downloads == []
            await stopped(running)

    asyncio.run(main())


def test_a_restored_database_fetches_the_snapshot_that_it_has_taken_itself(tmp_path: Path) -> None:
    """What is in it came after the backup."""

    async def main() -> None:
        bench = Bench(tmp_path)
        (tmp_path / "backup").mkdir()
        async with opened(tmp_path / "one", 1) as one:
            write_before(one, 5, "from before")
            one.application.execute("VACUUM INTO ?", (str(tmp_path / "backup" / "app.db"),))
            write_before(one, 6, "after the backup")
            await bench.fill(one)
        async with opened(tmp_path / "backup", 1) as one:
            await one.at(120)
            running = joining(one, bench.link)
            while not await is_joined(one.engine):
                assert not running.done()
                await asyncio.sleep(0.01)
            assert one.rows() == {5: "from before", 6: "after the backup"}
            await stopped(running)

    asyncio.run(main())


def test_a_node_that_takes_a_snapshot_first_still_joins_with_another_s(tmp_path: Path) -> None:
    """Else neither would ever get the other's rows from before the installation: both had joined."""

    async def main() -> None:
        async with opened(tmp_path / "one", 1) as one, opened(tmp_path / "two", 2) as two:
            write_before(one, 1, "of one")
            write_before(two, 2, "of two")
            bench = Bench(tmp_path)
            await bench.fill(one)
            [first] = bench.store.manifests
            for _ in range(2):
                await bench.fill(two)
            assert not await is_joined(two.engine)
            running = joining(two, bench.link)
            while not await is_joined(two.engine):
                assert not running.done()
                await asyncio.sleep(0.01)
            assert bench.store.downloads == [first.id]
            assert two.rows() == {1: "of one", 2: "of two"}
            assert await two.engine.pending() == 1
            await stopped(running)

    asyncio.run(main())


def test_what_the_log_has_is_not_published_again_by_a_node_that_joins(tmp_path: Path) -> None:
    """The snapshot is old; what came after it was read from the log, or acknowledged by it."""

    async def main() -> None:
        async with opened(tmp_path / "one", 1) as one, opened(tmp_path / "two", 2) as two:
            bench = Bench(tmp_path)
            await bench.fill(one)
            two.write(1, 2, text="from before")
            two.application.execute("DELETE FROM __harmonylite__t_change_log")
            two.write(*range(10, 60), text="acknowledged since the snapshot")
            two.application.execute("DELETE FROM t WHERE id = 59")
            while await two.engine.absorb():
                pass
            two.engine.replica.outgoing.mark_published(load_state(two.engine.replica.writer).batch)
            two.write(70, text="not published yet")
            await two.at(190)
            assert await two.engine.pending() == 1
            state = SnapshotState("nats")
            joiner = Joiner(two.engine, keeper(two, state), CatchUp(two.engine, WorkFiles(two.path), state))
            running = asyncio.create_task(joiner.run(bench.link))
            while not await is_joined(two.engine):
                await asyncio.sleep(0.01)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert len(bench.store.downloads) == 1
            assert await two.engine.pending() == 3, "two rows without a version, and what was pending before"
            assert await two.position() == 190
            assert len(two.rows()) == 52, "nothing is deleted"

    asyncio.run(main())


def test_the_mark_of_having_joined_is_in_the_database(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path / "one") as node:
            assert not await is_joined(node.engine)
            await node.engine.write(lambda: unversioned.set_joined(node.engine.replica))
        async with opened(tmp_path / "one") as node:
            assert await is_joined(node.engine)

    asyncio.run(main())


def test_a_new_node_asks_a_costly_store_when_that_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(tmp_path / "one") as node:
            bench = Bench(tmp_path)
            asked = [True]

            async def due(*_: object) -> bool:
                return bool(asked) and asked.pop()

            monkeypatch.setattr(Listing, "due", due)
            running = asyncio.create_task(bench.installer.run(bench.link))
            while len(bench.lease.wishes) < 4:  # the test's time limit ends it
                await asyncio.sleep(0.01)
            assert bench.store.lists == 1
            await bench.fill(node)
            said = len(bench.lease.wishes)
            while len(bench.lease.wishes) < said + 3:
                await asyncio.sleep(0.01)
            assert not bench.db.exists()
            asked.append(True)
            await asyncio.wait_for(running, 10)
            assert bench.db.exists()

    asyncio.run(main())
