"""Snapshots in a folder."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores import directory, files
from harmonylite.snapshot.stores.base import (
    CorruptSnapshot,
    SnapshotMissing,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
)
from harmonylite.snapshot.stores.directory import DirectoryStore
from harmonylite.snapshot.stores.files import in_thread
from tests.snapshot.support import MIB, Recorded, like, snapshot


async def cancelled_at(transfer: Callable[[Recorded], object], at: int) -> Recorded:
    """Start a transfer and cancel it as soon as `at` bytes are done."""
    loop = asyncio.get_running_loop()
    task: asyncio.Task[None]
    recorded = Recorded(at, lambda: loop.call_soon(lambda: task.cancel()) and None)
    task = asyncio.ensure_future(transfer(recorded))  # type: ignore[arg-type]
    with pytest.raises(asyncio.CancelledError):
        await task
    return recorded


def slow_pieces(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    """Small pieces, so that a cancellation comes between two of many."""
    monkeypatch.setattr(module, "PIECE_BYTES", 4096)


def test_what_was_uploaded_is_listed_newest_first_and_comes_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = DirectoryStore(tmp_path / "share")
        assert await store.list() == []
        manifest = snapshot(source, 5 * MIB + 17)
        older, newer = like(manifest, age=50), like(manifest, age=-50)
        for each in (manifest, newer, older):
            await store.upload(each, source, progress)
        await store.upload(newer, source)  # nothing happens
        assert await store.list() == [newer, manifest, older]
        await store.download(newer, target, progress)
        assert target.read_bytes() == source.read_bytes()
        await store.delete(newer.id)
        await store.delete(newer.id)
        assert await store.list() == [manifest, older]
        with pytest.raises(SnapshotMissing):
            await store.download(newer, tmp_path / "other")
        assert not (tmp_path / "other").exists()
        await store.close()

    source, target, progress = tmp_path / "source", tmp_path / "target", Recorded()
    asyncio.run(scenario())
    assert progress.last == (5 * MIB + 17, 5 * MIB + 17)
    assert sorted(path.suffix for path in (tmp_path / "share").iterdir()) == [".json", ".json", ".zst", ".zst"]


def test_a_cancelled_upload_is_not_listed_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        store = DirectoryStore(tmp_path / "share")
        manifest = snapshot(source, 16 * MIB)
        await cancelled_at(lambda progress: store.upload(manifest, source, progress), MIB // 8)
        assert await store.list() == []
        (torn,) = (tmp_path / "share").iterdir()
        kept = torn.stat().st_size
        assert MIB // 8 <= kept < 16 * MIB
        progress = Recorded()
        await store.upload(manifest, source, progress)
        assert progress.first == kept // 4096 * 4096
        assert await store.list() == [manifest]
        await store.download(manifest, tmp_path / "target")

    source = tmp_path / "source"
    slow_pieces(monkeypatch, directory)
    asyncio.run(scenario())


def test_a_torn_upload_with_other_bytes_is_written_anew(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = DirectoryStore(tmp_path / "share")
        manifest = snapshot(source, 3 * MIB)
        (tmp_path / "share").mkdir()
        part = tmp_path / "share" / f"{manifest.id}.sqlite.zst.part"
        part.write_bytes(source.read_bytes()[:MIB] + os.urandom(MIB))
        await store.upload(manifest, source)
        await store.download(manifest, tmp_path / "target")

    source = tmp_path / "source"
    asyncio.run(scenario())


@pytest.mark.parametrize("torn", ["no manifest", "no object", "short object", "broken manifest", "later format"])
def test_what_is_torn_is_not_listed(tmp_path: Path, torn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        store = DirectoryStore(share)
        bad = snapshot(source, MIB)
        good = like(bad, age=100)
        await store.upload(bad, source)
        await store.upload(good, source)
        stored, described = share / f"{bad.id}.sqlite.zst", share / f"{bad.id}.json"
        if torn == "no manifest":
            described.unlink()
        elif torn == "no object":
            stored.unlink()
        elif torn == "short object":
            os.truncate(stored, MIB - 1)
        elif torn == "broken manifest":
            described.write_bytes(described.read_bytes()[:50])
        else:
            described.write_bytes(replace(bad, format=2).to_json())
        with caplog.at_level(logging.WARNING):
            assert await store.list() == [good]
        assert len(caplog.records) == (torn != "no manifest")

    source, share = tmp_path / "source", tmp_path / "share"
    asyncio.run(scenario())


def test_a_broken_download_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        store = DirectoryStore(tmp_path / "share")
        manifest = snapshot(source, 16 * MIB)
        await store.upload(manifest, source)
        await cancelled_at(lambda progress: store.download(manifest, target, progress), MIB // 8)
        kept = target.stat().st_size
        assert MIB // 8 <= kept < 16 * MIB
        progress = Recorded()
        await store.download(manifest, target, progress)
        assert progress.first == kept
        assert target.read_bytes() == source.read_bytes()
        again = Recorded()
        await store.download(manifest, target, again)
        assert again.calls == []  # it is there, whole

    source, target = tmp_path / "source", tmp_path / "target"
    slow_pieces(monkeypatch, directory)
    asyncio.run(scenario())


@pytest.mark.parametrize("found", ["other bytes", "too long", "empty"])
def test_a_beginning_of_something_else_is_replaced(tmp_path: Path, found: str) -> None:
    async def scenario() -> None:
        store = DirectoryStore(tmp_path / "share")
        manifest = snapshot(source, 2 * MIB)
        await store.upload(manifest, source)
        target.write_bytes(os.urandom({"other bytes": MIB, "too long": 3 * MIB, "empty": 0}[found]))
        await store.download(manifest, target)
        assert target.read_bytes() == source.read_bytes()

    source, target = tmp_path / "source", tmp_path / "target"
    asyncio.run(scenario())


@pytest.mark.parametrize("partial", [0, MIB])
@pytest.mark.parametrize("damage", ["flipped", "short", "long"])
def test_a_damaged_object_is_detected_and_the_copy_removed(tmp_path: Path, damage: str, partial: int) -> None:
    async def scenario() -> Manifest:
        store = DirectoryStore(tmp_path / "share")
        manifest = snapshot(source, 2 * MIB)
        await store.upload(manifest, source)
        (stored,) = (tmp_path / "share").glob("*.zst")
        data = bytearray(stored.read_bytes())
        if damage == "flipped":
            data[MIB + 5] ^= 1
        stored.write_bytes({"flipped": data, "short": data[:-1], "long": data + b"x"}[damage])
        if partial:
            target.write_bytes(source.read_bytes()[:partial])
        await store.download(manifest, target)
        return manifest

    source, target = tmp_path / "source", tmp_path / "target"
    with pytest.raises(CorruptSnapshot) as caught:
        asyncio.run(scenario())
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_a_file_that_is_not_what_its_manifest_says_is_not_uploaded(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = DirectoryStore(tmp_path / "share")
        manifest = snapshot(source, MIB)
        for wrong in (b"x" * MIB, b"x"):
            source.write_bytes(wrong)
            with pytest.raises(CorruptSnapshot):
                await store.upload(manifest, source)
        assert await store.list() == []

    source = tmp_path / "source"
    asyncio.run(scenario())


def test_retention_keeps_the_newest_and_what_is_still_being_written(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = DirectoryStore(share)
        assert await store.prune(3) == []
        first = snapshot(source, 1000)
        manifests = [first, *(like(first, age=age) for age in range(10, 60, 10))]
        for manifest in manifests:
            await store.upload(manifest, source)
        writing, given_up = like(first, age=5000, node_id=8), like(first, age=6000, node_id=8)
        (share / f"{writing.id}.sqlite.zst.part").write_bytes(b"x")
        torn = share / f"{given_up.id}.sqlite.zst"
        torn.write_bytes(b"x")
        os.utime(torn, (time.time() - 4000, time.time() - 4000))
        unknown = share / "readme.txt"
        unknown.write_text("hello")
        os.utime(unknown, (0, 0))
        assert sorted(await store.prune(2)) == sorted([*(each.id for each in manifests[2:]), given_up.id])
        assert await store.list() == manifests[:2]
        left = {path.name.partition(".")[0] for path in share.iterdir()}
        assert left == {manifests[0].id, manifests[1].id, writing.id, "readme"}

    source, share = tmp_path / "source", tmp_path / "share"
    asyncio.run(scenario())


def test_a_node_that_begins_anew_removes_what_it_left_before(tmp_path: Path) -> None:
    async def scenario() -> None:
        share.mkdir()
        store = DirectoryStore(share)
        manifest = snapshot(source, 1000)
        mine, others = like(manifest, age=50), like(manifest, age=60, node_id=8)
        for torn in (mine, others):
            (share / f"{torn.id}.sqlite.zst.part").write_bytes(b"x")
        await store.upload(manifest, source)
        assert {path.name.partition(".")[0] for path in share.iterdir()} == {manifest.id, others.id}

    source, share = tmp_path / "source", tmp_path / "share"
    asyncio.run(scenario())


def test_a_name_that_is_no_id_removes_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "victim.json"
    victim.write_text("{}")
    with pytest.raises(StoreRefused):
        asyncio.run(DirectoryStore(tmp_path / "share").delete("../victim"))
    assert victim.exists()


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    async def scenario() -> None:
        manifest = snapshot(tmp_path / "source", 1000)
        (tmp_path / "plain").write_text("a file")
        for folder in (tmp_path / "no" / "parent", tmp_path / "plain" / "below"):
            with pytest.raises(StoreRefused) as caught:
                await DirectoryStore(folder).upload(manifest, tmp_path / "source")
            assert str(folder) in str(caught.value)
            assert "\n" not in str(caught.value)
        with pytest.raises(StoreRefused, match="No such file"):
            await DirectoryStore(tmp_path / "share").upload(manifest, tmp_path / "gone")

    asyncio.run(scenario())


def test_a_full_disk_is_told_as_such() -> None:
    error = files.file_error(OSError(28, "No space left on device"), Path("/share"))
    assert isinstance(error, StoreFull)
    assert str(error) == "/share: No space left on device: make room there"
    assert type(files.file_error(OSError(5, "Input/output error"), Path("/share"))) is StoreUnavailable


def test_a_share_that_hangs_is_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="did not answer"):
            await in_thread(lambda beat: release.wait(30), where=tmp_path, patience_s=0.3)
        assert time.monotonic() - began < 5

    release = threading.Event()
    try:
        asyncio.run(scenario())
    finally:
        release.set()


def test_work_that_beats_may_take_longer_than_the_patience(tmp_path: Path) -> None:
    def work(beat: Callable[[], None]) -> str:
        until = time.monotonic() + 0.9
        while time.monotonic() < until:
            beat()
            time.sleep(0.05)
        return "done"

    async def scenario() -> str:
        return await in_thread(work, where=tmp_path, patience_s=0.3)

    assert asyncio.run(scenario()) == "done"


def test_every_error_of_a_store_is_a_store_error() -> None:
    for kind in (StoreUnavailable, StoreRefused, StoreFull, CorruptSnapshot, SnapshotMissing):
        assert issubclass(kind, StoreError)
