"""Two stores beside each other, and the choice of stores by configuration."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import nats.errors
import pytest
from nats.aio.client import Client

from harmonylite import clock
from harmonylite.config.model import Config, Snapshot, SnapshotFile, SnapshotNats, SnapshotS3
from harmonylite.config.values import Secret
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores import open_store
from harmonylite.snapshot.stores.base import (
    CorruptSnapshot,
    Ids,
    Manifests,
    Progress,
    SnapshotMissing,
    StoreUnavailable,
    no_progress,
)
from harmonylite.snapshot.stores.directory import DirectoryStore
from harmonylite.snapshot.stores.mirror import MirroredStore
from harmonylite.stream.log import api_request
from tests.snapshot.seaweed import Seaweed
from tests.snapshot.support import MIB, NOW_MS, like, snapshot
from tests.stream.logfixture import SETTINGS, client, single_server


class Breakable(DirectoryStore):
    """A folder that can be out of reach."""

    reachable = True

    def _check(self) -> None:
        if not self.reachable:
            raise StoreUnavailable("out of reach")

    async def list(self) -> Manifests:
        self._check()
        return await super().list()

    async def upload(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        self._check()
        await super().upload(manifest, path, progress)

    async def download(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        self._check()
        await super().download(manifest, path, progress)

    async def prune(self, retain: int | None) -> Ids:
        self._check()
        return await super().prune(retain)


class Pair:
    """A mirrored store in two folders, and one snapshot's bytes."""

    def __init__(self, folder: Path, *, retain: int = 3) -> None:
        self.first, self.second = Breakable(folder / "first"), Breakable(folder / "second")
        self.from_second: list[bool] = []
        self.store = MirroredStore(self.first, self.second, retain=retain, listed=self.from_second.append)
        self.source, self.target, self.work = folder / "source", folder / "target", folder / "work"
        self.work.mkdir()
        self.manifest = snapshot(self.source, 2 * MIB)


def in_both(scenario: Callable[[Pair], Awaitable[None]], folder: Path, *, retain: int = 3) -> None:
    async def run() -> None:
        await scenario(Pair(folder, retain=retain))

    asyncio.run(run())


def test_it_is_told_where_the_listed_ones_are(tmp_path: Path) -> None:
    async def scenario(pair: Pair) -> None:
        assert await pair.store.list() == []
        await pair.second.upload(pair.manifest, pair.source)
        assert await pair.store.list() == [pair.manifest]
        await pair.store.upload(pair.manifest, pair.source)
        assert await pair.store.list() == [pair.manifest]
        pair.first.reachable = False
        assert await pair.store.list() == [pair.manifest]
        assert pair.from_second == [False, True, False, True]

    in_both(scenario, tmp_path)


def test_the_mirror_gets_what_it_lacks_and_keeps_as_many(tmp_path: Path) -> None:
    async def scenario(pair: Pair) -> None:
        manifests = [pair.manifest, *(like(pair.manifest, age=age) for age in range(10, 50, 10))]
        for manifest in manifests:
            await pair.store.upload(manifest, pair.source)
        assert await pair.second.list() == []
        assert await pair.store.mirror(pair.work) == [manifest.id for manifest in manifests[:3]]
        assert await pair.second.list() == manifests[:3]
        assert await pair.store.mirror(pair.work) == []  # the first one keeps older ones: those are not copied
        newer = like(pair.manifest, age=-10)
        await pair.store.upload(newer, pair.source)
        assert await pair.store.mirror(pair.work) == [newer.id]
        assert await pair.second.list() == [newer, *manifests[:2]]
        assert list(pair.work.iterdir()) == []

    in_both(scenario, tmp_path)


def test_a_snapshot_from_the_future_keeps_no_good_one_out_of_the_mirror(tmp_path: Path) -> None:
    """A server dated it whose clock was ahead."""

    async def scenario(pair: Pair) -> None:
        future = like(pair.manifest, age=-73 * 365 * 86_400)
        await pair.store.upload(future, pair.source)
        assert await pair.store.mirror(pair.work) == [future.id]
        for age in (9, 1):
            good = like(pair.manifest, age=age)
            await pair.store.upload(good, pair.source)
            assert await pair.store.mirror(pair.work) == [good.id]
            assert await pair.second.list() == [good]
            assert await pair.store.mirror(pair.work) == []

    in_both(scenario, tmp_path, retain=1)


def test_a_machine_whose_clock_is_behind_mirrors_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has none that runs while it is off; the server's clock, which dates snapshots, is known."""

    async def scenario(pair: Pair) -> None:
        monkeypatch.setattr(clock, "wall_ms", lambda: NOW_MS - 5 * 86_400_000)
        store = MirroredStore(pair.first, pair.second, retain=1, now_ms=lambda: NOW_MS)
        await pair.second.upload(like(pair.manifest, age=6 * 86_400), pair.source)
        await pair.first.upload(pair.manifest, pair.source)
        assert await store.mirror(pair.work) == [pair.manifest.id]
        assert await pair.second.list() == [pair.manifest]

    in_both(scenario, tmp_path)


def test_a_mirror_out_of_reach_disturbs_nothing_and_is_brought_level_later(tmp_path: Path) -> None:
    async def scenario(pair: Pair) -> None:
        pair.second.reachable = False
        older = like(pair.manifest, age=10)
        await pair.store.upload(older, pair.source)
        await pair.store.upload(pair.manifest, pair.source)
        assert await pair.store.list() == [pair.manifest, older]
        await pair.store.download(pair.manifest, pair.target)
        assert await pair.store.prune(5) == []
        with pytest.raises(StoreUnavailable):
            await pair.store.mirror(pair.work)
        pair.second.reachable = True
        assert await pair.store.mirror(pair.work) == [pair.manifest.id, older.id]

    in_both(scenario, tmp_path)


@pytest.mark.parametrize("loss", ["empty", "out of reach", "damaged", "gone"])
def test_the_mirror_helps_when_the_store_has_lost_it(tmp_path: Path, loss: str) -> None:
    async def scenario(pair: Pair) -> None:
        await pair.store.upload(pair.manifest, pair.source)
        await pair.store.mirror(pair.work)
        stored = tmp_path / "first" / f"{pair.manifest.id}.sqlite.zst"
        if loss == "empty":
            await pair.first.delete(pair.manifest.id)
        elif loss == "out of reach":
            pair.first.reachable = False
        elif loss == "damaged":
            stored.write_bytes(bytes(2 * MIB))
        listed = await pair.store.list()
        assert listed == [pair.manifest]
        if loss == "gone":
            await pair.first.delete(pair.manifest.id)
        await pair.store.download(pair.manifest, pair.target)
        assert pair.target.read_bytes() == pair.source.read_bytes()

    in_both(scenario, tmp_path)


def test_what_neither_has_is_the_first_ones_error(tmp_path: Path) -> None:
    async def scenario(pair: Pair) -> None:
        assert await pair.store.list() == []
        pair.second.reachable = False
        assert await pair.store.list() == []
        with pytest.raises(SnapshotMissing):
            await pair.store.download(pair.manifest, pair.target)
        pair.first.reachable = False
        with pytest.raises(StoreUnavailable):
            await pair.store.list()

    in_both(scenario, tmp_path)


def test_a_damaged_snapshot_is_not_mirrored(tmp_path: Path) -> None:
    async def scenario(pair: Pair) -> None:
        older = like(pair.manifest, age=10)
        await pair.store.upload(older, pair.source)
        await pair.store.upload(pair.manifest, pair.source)
        (tmp_path / "first" / f"{pair.manifest.id}.sqlite.zst").write_bytes(bytes(2 * MIB))
        assert await pair.store.mirror(pair.work) == [older.id]
        assert list(pair.work.iterdir()) == []
        with pytest.raises(CorruptSnapshot):
            await pair.store.download(pair.manifest, pair.target)

    in_both(scenario, tmp_path)


@pytest.mark.slow
def test_snapshots_of_jetstream_are_mirrored_to_s3(tmp_path: Path, s3: Seaweed) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            settings = s3.settings("mirror")
            config = Config(snapshot=Snapshot(store="nats", mirror="s3", retain=2, s3=settings))
            store = open_store(config, lambda: connection, SETTINGS)
            manifest = snapshot(tmp_path / "source", 3 * MIB)
            await store.upload(manifest, tmp_path / "source")
            assert await store.mirror(tmp_path) == [manifest.id]
            alone = open_store(Config(snapshot=Snapshot(store="s3", s3=settings)), no_client, SETTINGS)
            assert await alone.list() == [manifest]
            await api_request(connection, SETTINGS, "STREAM.DELETE.harmonylite-snapshots")
            assert await store.list() == [manifest]
            await store.download(manifest, tmp_path / "target")
            await store.close()

    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def no_client() -> Client:
    raise nats.errors.ConnectionClosedError


def test_a_folder_is_opened_by_configuration(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = Config(snapshot=Snapshot(store="file", file=SnapshotFile(path=str(tmp_path / "share"))))
        store = open_store(config, no_client, SETTINGS)
        manifest = snapshot(tmp_path / "source", 100)
        await store.upload(manifest, tmp_path / "source")
        assert await store.list() == [manifest]
        assert await store.mirror(tmp_path) == []

    asyncio.run(scenario())


@pytest.mark.parametrize(("max_bytes", "bound"), [(-1, -1), (60 * MIB, 30 * MIB)])
def test_the_stream_is_named_bounded_and_kept_as_configured(tmp_path: Path, max_bytes: int, bound: int) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            settings = replace(SETTINGS, max_bytes=max_bytes, owns_store=True)
            config = Config(snapshot=Snapshot(nats=SnapshotNats(bucket="copies")))
            store = open_store(config, lambda: connection, settings)
            await store.upload(snapshot(tmp_path / "source", 100), tmp_path / "source")
            info = await api_request(connection, settings, "STREAM.INFO.copies")
            assert info["config"]["max_bytes"] == bound
            assert info["config"]["discard"] == "new"

    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def test_who_owns_the_store_puts_the_bound_right(tmp_path: Path) -> None:
    async def bound(connection: Client) -> int:
        info = await api_request(connection, SETTINGS, "STREAM.INFO.harmonylite-snapshots")
        return int(info["config"]["max_bytes"])

    async def scenario() -> None:
        async with client(server.url) as connection:
            config = Config()
            manifest = snapshot(tmp_path / "source", 100)
            await open_store(config, lambda: connection, SETTINGS).upload(manifest, tmp_path / "source")
            assert await bound(connection) == -1
            small, large = replace(SETTINGS, max_bytes=60 * MIB), replace(SETTINGS, max_bytes=120 * MIB)
            await open_store(config, lambda: connection, small).list()
            assert await bound(connection) == 30 * MIB
            await open_store(config, lambda: connection, large).list()
            assert await bound(connection) == 30 * MIB
            await open_store(config, lambda: connection, replace(large, owns_store=True)).list()
            assert await bound(connection) == 60 * MIB
            assert await open_store(config, lambda: connection, SETTINGS).list() == [manifest]

    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def test_an_empty_bucket_name_is_the_default() -> None:
    config = Config(snapshot=Snapshot(store="s3", s3=SnapshotS3(bucket="b", access_key=Secret("k"))))
    assert open_store(config, no_client, SETTINGS) is not None
    named = open_store(Config(snapshot=Snapshot(nats=SnapshotNats(bucket=""))), no_client, SETTINGS)
    assert named._store._stream._name == "harmonylite-snapshots"  # type: ignore[attr-defined]


def test_a_list_is_costly_when_a_costly_store_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirror, while the store holds nothing."""

    async def scenario(pair: Pair) -> None:
        monkeypatch.setattr(pair.second.__class__, "costly", property(lambda store: store is pair.second))
        await pair.store.list()
        assert pair.store.costly
        await pair.store.upload(pair.manifest, pair.source)
        await pair.store.list()
        assert not pair.store.costly
        pair.first.reachable = False
        with contextlib.suppress(StoreUnavailable):
            await pair.store.list()
        assert pair.store.costly

    in_both(scenario, tmp_path)
