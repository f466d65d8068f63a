"""Two logs that keep their snapshots in one place."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from harmonylite.config.model import Config, Snapshot, SnapshotFile
from harmonylite.model import Position
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.retention import prune
from harmonylite.snapshot.stores import open_store
from harmonylite.snapshot.stores.base import Manifests, SnapshotStore
from harmonylite.snapshot.stores.directory import DirectoryStore
from harmonylite.snapshot.stores.own import OwnSnapshots
from tests.snapshot.support import like, snapshot
from tests.snapshot.test_mirror import no_client
from tests.stream.logfixture import SETTINGS


def of(manifest: Manifest, *streams: str) -> Manifest:
    return replace(manifest, positions=tuple(Position(stream, "2026-11-24T07:45:00Z", 1, 1) for stream in streams))


def shared(folder: Path, stream_prefix: str) -> SnapshotStore:
    config = Config(snapshot=Snapshot(store="file", file=SnapshotFile(path=str(folder))))
    return open_store(config, no_client, replace(SETTINGS, stream_prefix=stream_prefix))


def test_each_sees_and_removes_its_own_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        first, second = shared(tmp_path, "first"), shared(tmp_path, "first-2")
        manifest = snapshot(tmp_path / "source", 100)
        mine = [of(like(manifest, age=age), "first-1") for age in (0, 20, 40)]
        theirs = [of(like(manifest, age=age), "first-2-1") for age in (10, 30, 50)]
        for each in mine:
            await first.upload(each, tmp_path / "source")
        assert await first.list() == mine
        assert caplog.records == []
        for each in theirs:
            await second.upload(each, tmp_path / "source")
        assert (await first.list(), await second.list()) == (mine, theirs)
        assert await first.prune(1) == [mine[1].id, mine[2].id]
        assert (await first.list(), await second.list()) == (mine[:1], theirs)
        assert await second.prune(2) == [theirs[2].id]
        assert (await first.list(), await second.list()) == (mine[:1], theirs[:2])

    with caplog.at_level("WARNING"):
        asyncio.run(scenario())
    assert len(caplog.records) == 2, "each says so once"
    assert "own [snapshot.file] path" in caplog.text


def test_one_of_no_stream_or_of_other_shards_is_the_log_s_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = shared(tmp_path, "first")
        manifest = snapshot(tmp_path / "source", 100)
        found = [of(manifest), of(like(manifest, age=10), "first-2", "first-3")]
        for each in found:
            await store.upload(each, tmp_path / "source")
        assert await store.list() == found
        assert await store.prune(1) == [found[1].id]

    asyncio.run(scenario())


class Busy(DirectoryStore):
    """A folder in which a snapshot of another log appears each time that it was looked through."""

    def __init__(self, folder: Path, manifest: Manifest, source: Path) -> None:
        super().__init__(folder)
        self.manifest = manifest
        self.source = source
        self.newcomers: Manifests = []

    async def list(self) -> Manifests:
        found = await super().list()
        newcomer = of(like(self.manifest, age=-len(self.newcomers)), "second-1")
        await self.upload(newcomer, self.source)
        self.newcomers.insert(0, newcomer)
        return found


def test_a_snapshot_that_appears_meanwhile_costs_no_other_log_its_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        folder, source = tmp_path / "folder", tmp_path / "source"
        manifest = snapshot(source, 100)
        theirs = [of(like(manifest, age=age), "second-1") for age in (100, 200)]
        mine = [of(like(manifest, age=age), "first-1") for age in (10, 20, 30)]
        first, second = shared(folder, "first"), shared(folder, "second")
        for each in (*theirs, *mine):
            await first.upload(each, source)
        busy = Busy(folder, manifest, source)
        await prune(OwnSnapshots(busy, "first", "path"), 2, (), manifest.created_ms)
        assert await first.list() == mine[:2]
        assert await second.list() == [*busy.newcomers, *theirs]

    asyncio.run(scenario())


def test_of_two_logs_each_counts_its_own_and_those_from_the_future_last(tmp_path: Path) -> None:
    async def scenario() -> None:
        first, second = shared(tmp_path / "folder", "first"), shared(tmp_path / "folder", "second")
        manifest = snapshot(tmp_path / "source", 100)
        future = of(like(manifest, age=-7 * 86_400), "first-1")
        good = [of(like(manifest, age=age), "first-1") for age in (10, 30)]
        theirs = [of(like(manifest, age=age), "second-1") for age in (-8 * 86_400, 0, 20)]
        for each in (future, *good, *theirs):
            await first.upload(each, tmp_path / "source")
        await prune(first, 2, (), manifest.created_ms)
        assert await first.list() == good
        await prune(first, 1, (good[1].id,), manifest.created_ms)
        assert await first.list() == good, "one that is being fetched stays"
        assert await second.list() == theirs
        await prune(second, 2, (), manifest.created_ms)
        assert await second.list() == theirs[1:]

    asyncio.run(scenario())
