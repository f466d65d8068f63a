"""One node with the permissions that docs/configuration.md lists; others make the streams and buckets."""

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
from tests.documented import node_may_publish
from tests.e2e.cluster import Cluster, eventually
from tests.e2e.snapshots import SCHEMA, save
from tests.snapshot.support import MIB, snapshot
from tests.stream.logfixture import SETTINGS, Server, client, confined, jetstream, running

# A refusal is no answer at all.
HASTY = replace(SETTINGS, api_timeout_s=0.5)
STREAM = "harmonylite-snapshots"
LEASE = "harmonylite-changes-lease"


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

    server = Server(tmp_path / "s", jetstream(tmp_path / "s") + confined(node_may_publish(STREAM, LEASE)))
    with running(server):
        asyncio.run(scenario())


@pytest.mark.slow
def test_a_confined_daemon_does_everything_and_is_never_refused(tmp_path: Path) -> None:
    """Nothing is missing in the list: the server would log each refusal."""
    server = Server(tmp_path / "s", jetstream(tmp_path / "s") + confined(node_may_publish()))
    with running(server), Cluster(tmp_path, SCHEMA) as cluster:
        for node_id, user, password in ((1, "admin", "a"), (7, "node7", "n")):
            nats = {"urls": [server.url], "user_name": user, "user_password": password}
            cluster.add(node_id, {"nats": nats})
        free, bound = cluster.nodes.values()
        free.start()
        eventually(free.settled, what="the streams are made")
        save(free)  # makes the lease's bucket and the snapshots' stream
        cluster.start()
        for key, node in enumerate((free, bound)):
            node.execute("INSERT INTO bulk VALUES (?, x'00')", key)
        cluster.wait_settled()
        save(bound)
        newcomer = tmp_path / "node7" / "new.db"
        bound.stop()
        bound.db = newcomer
        bound.configure({**bound.settings, "": {"db_path": str(newcomer)}})
        bound.start()
        eventually(bound.settled, 60, "it has got its database from a snapshot")
        cluster.wait_settled()
        assert bound.stop() == 0
    refused = [line for line in (tmp_path / "s" / "server.log").read_text().splitlines() if "iolation" in line]
    assert refused == []


def test_the_server_logs_a_refusal(tmp_path: Path) -> None:
    """What the test above looks for."""

    async def scenario() -> None:
        async with client(server.url, user="node7", password="n", inbox_prefix="_INBOX_7") as node:
            with pytest.raises(StoreUnavailable):
                await ChunkStream(lambda: node, HASTY, STREAM, replicas=1, max_bytes=-1).exists()

    server = Server(tmp_path / "s", jetstream(tmp_path / "s") + confined(["nothing"]))
    with running(server):
        asyncio.run(scenario())
    assert "Publish Violation" in (tmp_path / "s" / "server.log").read_text()
