"""One node with the fewest permissions that snapshots need; an administrator makes the stream and the bucket."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from harmonylite.snapshot.stores.base import StoreRefused, StoreUnavailable
from harmonylite.snapshot.stores.chunks import ChunkStream
from harmonylite.snapshot.stores.nats import NatsStore
from harmonylite.stream.lease import Lease
from harmonylite.stream.log import LogError
from tests.snapshot.support import MIB, snapshot
from tests.stream.logfixture import SETTINGS, Server, client, confined, jetstream, running

# A refusal is no answer at all.
HASTY = replace(SETTINGS, api_timeout_s=0.5)
STREAM = "harmonylite-snapshots"
LEASE = "harmonylite-changes-lease"
NODE_MAY_PUBLISH = [
    f"{STREAM}.>",
    f"$KV.{LEASE}.leader",
    f"$KV.{LEASE}.wanted.7",
    *(f"$JS.API.{request}.{STREAM}" for request in ("STREAM.INFO", "STREAM.MSG.GET", "STREAM.PURGE", "DIRECT.GET")),
    *(f"$JS.API.{request}.KV_{LEASE}" for request in ("STREAM.INFO", "STREAM.MSG.GET")),
]


def test_a_node_without_the_permission_to_create(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            client(server.url, user="admin", password="a") as admin,
            client(server.url, user="node7", password="n", inbox_prefix="_INBOX_7") as node,
        ):
            stream = ChunkStream(lambda: node, HASTY, STREAM, replicas=1, max_bytes=-1)
            store = NatsStore(stream, patience_s=0.5)
            lease = Lease(lambda: node, HASTY, ttl_ms=2000)
            manifest = snapshot(tmp_path / "source", 2 * MIB)
            assert await store.list() == []
            with pytest.raises((StoreRefused, StoreUnavailable), match="could not be created"):
                await store.upload(manifest, tmp_path / "source")
            with pytest.raises(LogError, match="administrator"):
                await lease.acquire()
            await ChunkStream(lambda: admin, HASTY, STREAM, replicas=1, max_bytes=-1).ensure()
            await Lease(lambda: admin, HASTY, ttl_ms=2000).ensure_bucket()

            assert await lease.acquire()
            await store.upload(manifest, tmp_path / "source")
            await lease.renew()
            await lease.release()
            await lease.wanted("new node")
            assert [request.node_id for request in await lease.requests()] == [7]
            await lease.withdraw()
            assert await store.list() == [manifest]
            await store.download(manifest, tmp_path / "target")
            assert await store.prune(1) == []
            await store.delete(manifest.id)
            assert await store.list() == []
            with pytest.raises(LogError):
                await Lease(lambda: node, replace(HASTY, node_id=8), ttl_ms=2000).wanted("forged")

    server = Server(tmp_path / "s", jetstream(tmp_path / "s") + confined(NODE_MAY_PUBLISH))
    with running(server):
        asyncio.run(scenario())
