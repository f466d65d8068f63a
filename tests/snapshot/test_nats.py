"""Snapshots in JetStream, with real servers that die and come back."""

from __future__ import annotations

import asyncio
import logging
import os
import tracemalloc
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nats.errors
import pytest
from nats.aio.client import Client

from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores.base import (
    CorruptSnapshot,
    SnapshotMissing,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
)
from harmonylite.snapshot.stores.chunks import CHUNK_BYTES, PIECE_CHUNKS, ChunkStream
from harmonylite.snapshot.stores.nats import NatsStore
from harmonylite.stream.log import LogSettings, api_request
from tests.snapshot.support import MIB, Recorded, cluster, leader_of, like, snapshot
from tests.stream.logfixture import (
    SETTINGS,
    TOPOLOGIES,
    Place,
    Server,
    client,
    hub_and_leaf,
    jetstream,
    running,
    single_server,
    topology,
)
from tests.stream.support import eventually_does

STREAM = "harmonylite-snapshots"


class Counting(ChunkStream):
    """Counts what goes over the wire, and can do something at a certain chunk."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sent: list[str] = []
        self.fetched: list[str] = []
        self.before_put: Callable[[str], Awaitable[None]] | None = None

    async def put(self, tail: str, data: bytes) -> None:
        if self.before_put is not None:
            await self.before_put(tail)
        await super().put(tail, data)
        self.sent.append(tail)

    async def get(self, tail: str) -> bytes | None:
        self.fetched.append(tail)
        return await super().get(tail)

    def chunks(self, tails: list[str]) -> int:
        return sum(tail.startswith("chunk.") for tail in tails)


def opened(
    connection: Client,
    settings: LogSettings = SETTINGS,
    *,
    patience_s: float = 20.0,
    abandoned_s: float = 3600.0,
    max_bytes: int = -1,
) -> tuple[NatsStore, Counting]:
    stream = Counting(lambda: connection, settings, STREAM, replicas=1, max_bytes=max_bytes)
    return NatsStore(stream, patience_s=patience_s, abandoned_s=abandoned_s), stream


def on_server(folder: Path, scenario: Callable[[Client], Awaitable[None]]) -> None:
    """With one server, and a client of it."""

    async def run() -> None:
        async with client(server.url) as connection:
            await scenario(connection)

    with single_server(folder / "server") as server:
        asyncio.run(run())


async def messages(connection: Client, settings: LogSettings = SETTINGS) -> int:
    info = await api_request(connection, settings, f"STREAM.INFO.{STREAM}")
    return int(info["state"]["messages"])


async def cancelled_at(transfer: Callable[[Recorded], Any], at: int) -> Recorded:
    """Start a transfer and cancel it as soon as `at` bytes are done."""
    recorded = Recorded(at, lambda: task.cancel() and None)
    task: asyncio.Task[None] = asyncio.create_task(transfer(recorded))
    with pytest.raises(asyncio.CancelledError):
        await task
    return recorded


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_what_was_uploaded_is_listed_newest_first_and_comes_back(tmp_path: Path, name: str) -> None:
    async def scenario(place: Place) -> None:
        async with client(place.url) as connection:
            store, stream = opened(connection, place.settings)
            assert await eventually_does(store.list) == []
            manifest = snapshot(source, 40 * MIB + 17)  # two pieces
            older = like(manifest, age=50)
            small = snapshot(tmp_path / "small", 100, age=70)
            await store.upload(manifest, source, progress)
            await store.upload(older, source)
            await store.upload(small, tmp_path / "small")
            sent = len(stream.sent)
            await store.upload(manifest, source)
            assert len(stream.sent) == sent  # nothing happens
            assert await store.list() == [manifest, older, small]
            await store.download(manifest, target, progress)
            assert target.read_bytes() == source.read_bytes()
            await store.download(small, tmp_path / "small copy")
            await store.delete(manifest.id)
            await store.delete(manifest.id)
            assert await store.list() == [older, small]
            with pytest.raises(SnapshotMissing):
                await store.download(manifest, tmp_path / "other")
            assert not (tmp_path / "other").exists()
            await store.delete(older.id)
            assert await messages(connection, place.settings) == 2
            await store.close()

    source, target, progress = tmp_path / "source", tmp_path / "target", Recorded()
    with topology(name, tmp_path) as place:
        asyncio.run(scenario(place))
    assert progress.last == (40 * MIB + 17, 40 * MIB + 17)


def test_a_cancelled_upload_is_not_listed_and_is_resumed(tmp_path: Path) -> None:
    async def scenario(connection: Client) -> None:
        store, _ = opened(connection)
        manifest = snapshot(source, 20 * MIB)
        await cancelled_at(lambda progress: store.upload(manifest, source, progress), 5 * MIB)
        assert await store.list() == []
        stored = await messages(connection) - 1
        assert 5 * MIB <= stored * CHUNK_BYTES < 20 * MIB
        again, stream = opened(connection)
        progress = Recorded()
        await again.upload(manifest, source, progress)
        assert progress.first == stored * CHUNK_BYTES
        assert stream.chunks(stream.sent) == 20 * MIB // CHUNK_BYTES - stored
        assert await again.list() == [manifest]
        await again.download(manifest, tmp_path / "target")
        assert await messages(connection) == 20 * MIB // CHUNK_BYTES + 1

    source = tmp_path / "source"
    on_server(tmp_path, scenario)


def test_an_upload_goes_on_over_the_death_of_the_hub(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(leaf.url) as connection:
            store, stream = opened(connection, replace(SETTINGS, domain="hub", api_timeout_s=1.0))
            manifest = snapshot(source, 10 * MIB)
            killed: list[str] = []

            async def kill_hub(tail: str) -> None:
                if stream.chunks(stream.sent) >= 30 and not killed:
                    killed.append(tail)
                    hub.kill()
                    asyncio.get_running_loop().call_later(1.0, hub.start)

            await eventually_does(store.list)
            stream.before_put = kill_hub
            await store.upload(manifest, source)
            assert killed
            await store.download(manifest, tmp_path / "target")

    source = tmp_path / "source"
    with hub_and_leaf(tmp_path / "servers") as (hub, leaf):
        asyncio.run(scenario())


def test_a_hub_that_stays_away_ends_a_transfer_in_bounded_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            store, _ = opened(connection, replace(SETTINGS, api_timeout_s=0.5), patience_s=1.5)
            manifest = snapshot(source, 10 * MIB)
            await store.upload(manifest, source)
            server.freeze()
            loop = asyncio.get_running_loop()
            for call in (
                lambda: store.list(),
                lambda: store.upload(like(manifest, age=5), source),
                lambda: store.download(manifest, target),
                lambda: store.prune(1),
                lambda: store.delete(manifest.id),
            ):
                began = loop.time()
                with pytest.raises(StoreUnavailable) as caught:
                    await call()
                assert loop.time() - began < 8
                assert "\n" not in str(caught.value)
            server.thaw()

    source, target = tmp_path / "source", tmp_path / "target"
    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def test_a_broken_download_is_resumed(tmp_path: Path) -> None:
    async def scenario(connection: Client) -> None:
        store, stream = opened(connection)
        manifest = snapshot(source, 20 * MIB + 5)
        await store.upload(manifest, source)
        await cancelled_at(lambda progress: store.download(manifest, target, progress), 5 * MIB)
        kept = target.stat().st_size
        assert 5 * MIB <= kept < 20 * MIB
        with target.open("ab") as file:
            file.write(b"torn")  # less than a chunk
        stream.fetched.clear()
        progress = Recorded()
        await store.download(manifest, target, progress)
        assert progress.first == kept
        assert stream.chunks(stream.fetched) == 20 * MIB // CHUNK_BYTES + 1 - kept // CHUNK_BYTES
        assert target.read_bytes() == source.read_bytes()

    source, target = tmp_path / "source", tmp_path / "target"
    on_server(tmp_path, scenario)


@pytest.mark.parametrize("damage", ["flipped", "short chunk", "missing chunk"])
def test_a_damaged_object_is_detected_and_the_copy_removed(tmp_path: Path, damage: str) -> None:
    async def scenario(connection: Client) -> None:
        store, stream = opened(connection)
        manifest = snapshot(source, MIB)
        await store.upload(manifest, source)
        tail = f"chunk.{manifest.id}.0.3"
        if damage == "missing chunk":
            await stream.remove(tail)
        else:
            await stream.put(tail, os.urandom(CHUNK_BYTES - (damage == "short chunk")))
        with pytest.raises(CorruptSnapshot) as caught:
            await store.download(manifest, target)
        assert "\n" not in str(caught.value)
        assert not target.exists()

    source, target = tmp_path / "source", tmp_path / "target"
    on_server(tmp_path, scenario)


def test_a_manifest_that_cannot_be_read_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(connection: Client) -> None:
        store, stream = opened(connection)
        good = snapshot(source, 1000)
        torn, later = like(good, age=5), like(good, age=6)
        await store.upload(good, source)
        await stream.put(f"manifest.{torn.id}", b'{"format": 1')
        await stream.put(f"manifest.{later.id}", replace(later, format=2).to_json())
        with caplog.at_level(logging.WARNING):
            assert await store.list() == [good]
        assert len(caplog.records) == 2
        assert await store.prune(1) == []  # another version may read them

    source = tmp_path / "source"
    on_server(tmp_path, scenario)


def test_retention_keeps_the_newest_and_what_is_still_being_written(tmp_path: Path) -> None:
    async def scenario(connection: Client) -> None:
        store, stream = opened(connection)
        assert await store.prune(3) == []
        first = snapshot(source, MIB)
        manifests = [first, *(like(first, age=age) for age in range(10, 60, 10))]
        for manifest in manifests:
            await store.upload(manifest, source)
        torn = like(first, age=100)
        await cancelled_at(lambda progress: store.upload(torn, source, progress), MIB)
        removing = like(first, age=200)
        await stream.put(f"upload.{removing.id}", b'{"removing": true}')
        await stream.put(f"chunk.{removing.id}.0.0", b"x")
        removed = await store.prune(2)
        assert sorted(removed) == sorted([*(each.id for each in manifests[2:]), removing.id])
        assert await store.list() == manifests[:2]
        impatient, _ = opened(connection, abandoned_s=0.0)
        await asyncio.sleep(0.01)
        assert await impatient.prune(2) == [torn.id]
        assert await messages(connection) == 2 * (MIB // CHUNK_BYTES + 1)
        await store.upload(torn, source)  # its writer comes back after all
        await store.download(torn, tmp_path / "target")

    source = tmp_path / "source"
    on_server(tmp_path, scenario)


def test_a_node_that_begins_anew_removes_what_it_left_before(tmp_path: Path) -> None:
    async def scenario(connection: Client) -> None:
        store, stream = opened(connection)
        manifest = snapshot(source, 2 * MIB)
        mine, others = like(manifest, age=50), like(manifest, age=60, node_id=8)
        for torn in (others, mine):
            await cancelled_at(lambda progress, torn=torn: store.upload(torn, source, progress), MIB)
        await store.upload(manifest, source)
        assert await stream.names("upload.*") == {others.id}
        assert not await stream.chunks_of_piece(mine.id, 0)
        assert await stream.chunks_of_piece(others.id, 0)
        await store.upload(others, source)  # it is resumed
        assert await store.list() == [manifest, others]

    source = tmp_path / "source"
    on_server(tmp_path, scenario)


def test_a_full_server_still_lets_snapshots_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            store, stream = opened(connection, patience_s=1.0)
            first = snapshot(source, 2 * MIB)
            await store.upload(first, source)
            second = like(first, age=-5)
            with pytest.raises(StoreFull):
                await store.upload(second, source)
            with pytest.raises(StoreFull):
                for number in range(1000):
                    await stream.put(f"chunk.{second.id}.9.{number}", b"x" * 500)
            await store.delete(first.id)
            await store.upload(second, source)
            assert await store.list() == [second]

    source = tmp_path / "source"
    folder = tmp_path / "server"
    server = Server(folder, f'jetstream {{ store_dir: "{folder / "store"}", max_file_store: 4000000 }}')
    with running(server):
        asyncio.run(scenario())


def test_an_upload_whose_beginning_was_taken_away_does_not_end_in_a_manifest(tmp_path: Path) -> None:
    async def scenario(connection: Client) -> None:
        store, stream = opened(connection)
        other, _ = opened(connection, abandoned_s=-1.0)
        manifest = snapshot(source, 2 * MIB)
        pruned: list[list[str]] = []

        async def prune(tail: str) -> None:
            if stream.chunks(stream.sent) >= 8 and not pruned:
                pruned.append([])
                pruned[0] = await other.prune(1)

        stream.before_put = prune
        with pytest.raises(StoreUnavailable, match="resume"):
            await store.upload(manifest, source)
        assert pruned == [[manifest.id]]
        assert await store.list() == []
        await store.upload(manifest, source)
        await store.download(manifest, tmp_path / "target")

    source = tmp_path / "source"
    on_server(tmp_path, scenario)


def test_a_full_stream_is_told_as_such_and_fewer_snapshots_make_room(tmp_path: Path) -> None:
    async def scenario(connection: Client) -> None:
        unbounded, _ = opened(connection)
        manifest = snapshot(source, 4 * MIB)
        await unbounded.upload(manifest, source)
        store, _ = opened(connection, max_bytes=10 * MIB, patience_s=1.0)
        await store.upload(like(manifest, age=-5), source)
        third = like(manifest, age=-10)
        with pytest.raises(StoreFull, match="retain"):
            await store.upload(third, source)
        assert len(await store.list()) == 2
        await store.prune(1)
        await store.upload(third, source)
        await store.download(third, tmp_path / "target")

    source = tmp_path / "source"
    on_server(tmp_path, scenario)


def test_a_full_server_is_told_as_such(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            store, _ = opened(connection, patience_s=1.0)
            with pytest.raises(StoreFull):
                await store.upload(snapshot(source, 8 * MIB), source)
            assert await store.list() == []

    source = tmp_path / "source"
    folder = tmp_path / "server"
    server = Server(folder, f'jetstream {{ store_dir: "{folder / "store"}", max_file_store: 4MB }}')
    with running(server):
        asyncio.run(scenario())


def test_a_small_maximum_payload_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            store, _ = opened(connection)
            with pytest.raises(StoreRefused, match="max_payload"):
                await store.upload(snapshot(source, MIB), source)

    source = tmp_path / "source"
    folder = tmp_path / "server"
    server = Server(folder, jetstream(folder) + "\nmax_payload: 64KB")
    with running(server):
        asyncio.run(scenario())


def test_without_a_connection_everything_says_so(tmp_path: Path) -> None:
    def none() -> Client:
        raise nats.errors.ConnectionClosedError

    async def scenario() -> None:
        store = NatsStore(ChunkStream(none, SETTINGS, STREAM, replicas=1, max_bytes=-1), patience_s=0.1)
        manifest = snapshot(tmp_path / "source", 1000)
        for call in (
            store.list(),
            store.upload(manifest, tmp_path / "source"),
            store.download(manifest, tmp_path / "target"),
            store.prune(1),
            store.delete(manifest.id),
        ):
            with pytest.raises(StoreUnavailable, match="not connected"):
                await call

    asyncio.run(scenario())


def test_memory_is_bounded(tmp_path: Path) -> None:
    async def scenario() -> Manifest:
        async with client(server.url) as connection:
            store, _ = opened(connection)
            manifest = snapshot(source, 48 * MIB)
            tracemalloc.start()
            await store.upload(manifest, source)
            await store.download(manifest, target)
            return manifest

    source, target = tmp_path / "source", tmp_path / "target"
    with single_server(tmp_path / "server") as server:
        manifest = asyncio.run(scenario())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert target.stat().st_size == manifest.stored_size
    assert peak < 16 * MIB


def test_the_layout_is_the_same_in_every_version() -> None:
    assert (CHUNK_BYTES, PIECE_CHUNKS) == (131072, 256)


@pytest.mark.slow
def test_transfers_go_on_over_the_loss_of_the_leader(tmp_path: Path) -> None:
    settings = replace(SETTINGS, replicas=3, api_timeout_s=1.0)

    async def scenario(servers: list[Server]) -> None:
        urls = [server.url for server in servers]
        async with client(urls) as connection:  # type: ignore[arg-type]
            stream = Counting(lambda: connection, settings, STREAM, replicas=3, max_bytes=-1)
            store = NatsStore(stream, patience_s=60.0)
            manifest = snapshot(source, 20 * MIB)
            killed: list[Server] = []

            async def kill_leader(tail: str) -> None:
                if stream.chunks(stream.sent) >= 40 and not killed:
                    killed.append(servers[0])
                    info = await api_request(connection, settings, f"STREAM.INFO.{STREAM}")
                    killed[0] = leader_of(servers, info["cluster"]["leader"])
                    killed[0].kill()

            await eventually_does(stream.ensure, 60)
            stream.before_put = kill_leader
            await store.upload(manifest, source)
            assert killed
            await store.download(manifest, tmp_path / "target")
            killed[0].start()
            assert await store.list() == [manifest]

    source = tmp_path / "source"
    servers = cluster(tmp_path)
    with running(*servers):
        asyncio.run(scenario(servers))
