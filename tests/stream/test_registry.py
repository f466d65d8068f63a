"""Nodes that announce themselves, and two that claim one id."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from nats.aio.client import Client

from harmonylite.stream import registry as registry_module
from harmonylite.stream.log import ApiError, StreamMissing, StreamUnavailable, api_request
from harmonylite.stream.provision import ensure_streams
from harmonylite.stream.registry import DuplicateNode, NodeEntry, Registry
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

BUCKET = "harmonylite-changes-nodes"
ALIVE = "harmonylite-changes-alive"
ENTRY = NodeEntry(
    node_id=7,
    instance_id="abc",
    version="1.2.3",
    hostname="pi-seven",
    schema="f00d",
    pending_rows=12,
    position={"harmonylite-changes-1": 345},
    seen_ms=1_700_000_000_000,
)


def stated(entry: NodeEntry) -> NodeEntry:
    """What the node said, without what the server knows."""
    return replace(entry, stored_ms=0, alive=False)


async def purge(connection: Client) -> None:
    for bucket in (BUCKET, ALIVE):
        await api_request(connection, SETTINGS, f"STREAM.PURGE.KV_{bucket}", {})


async def written(connection: Client, bucket: str) -> int:
    """How many messages a bucket has ever taken."""
    info = await api_request(connection, SETTINGS, f"STREAM.INFO.KV_{bucket}", None)
    return int(info["state"]["last_seq"])


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_nodes_announce_themselves_and_are_listed(tmp_path: Path, name: str) -> None:
    async def scenario(place: Place) -> None:
        async with client(place.url) as connection:
            registry = Registry(connection, place.settings)
            await eventually_does(registry.ensure_bucket)
            await registry.ensure_bucket()
            assert await registry.nodes() == []
            await registry.announce(ENTRY)
            others = [replace(ENTRY, node_id=node, instance_id=f"i{node}") for node in range(100, 150)]
            await asyncio.gather(*(Registry(connection, place.settings).announce(other) for other in others))
            changed = replace(ENTRY, pending_rows=0)
            await registry.announce(changed)
            await registry.announce(changed)
            nodes = await registry.nodes()
            assert [stated(node) for node in nodes] == [changed, *others]
            assert all(node.alive and node.stored_ms > 1_700_000_000_000 for node in nodes)

    with topology(name, tmp_path) as place:
        asyncio.run(scenario(place))


def test_the_hub_itself_uses_its_domain_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = replace(SETTINGS, domain="hub")
        async with client(hub.url) as at_hub, client(leaf.url) as at_leaf:
            here = Registry(at_hub, settings)
            await eventually_does(here.ensure_bucket)
            await here.announce(ENTRY)
            there = Registry(at_leaf, settings, run="other")
            await eventually_does(there.nodes)
            await there.announce(replace(ENTRY, node_id=8))
            assert [node.node_id for node in await here.nodes()] == [7, 8]

    with hub_and_leaf(tmp_path) as (hub, leaf):
        asyncio.run(scenario())


def test_a_live_duplicate_is_refused_and_a_dead_one_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            first = Registry(connection, SETTINGS, run="first")
            second = Registry(connection, SETTINGS, run="second")
            await first.ensure_bucket()
            await first.announce(ENTRY)
            intruder = replace(ENTRY, instance_id="xyz", hostname="pi-eight")
            for _ in range(2):
                with pytest.raises(DuplicateNode, match=r"node id 7 .* abc on pi-seven"):
                    await second.announce(intruder)
            await first.announce(ENTRY)  # undisturbed
            (node,) = await first.nodes()
            assert node.instance_id == "abc"
            monkeypatch.setattr(registry_module, "LIVE_MS", 0)
            assert [node.alive for node in await first.nodes()] == [False]
            await second.announce(intruder)
            (node,) = await first.nodes()
            assert stated(node) == intruder

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_copies_of_one_device_notice_each_other(tmp_path: Path) -> None:
    """With everything equal, a second process looks like a restart; what gives it away is that the first goes on."""

    async def scenario() -> None:
        async with client(server.url) as connection:
            original = Registry(connection, SETTINGS, run="original")
            copy = Registry(connection, SETTINGS, run="copy")
            await original.ensure_bucket()
            await original.announce(ENTRY)
            await copy.announce(ENTRY)
            for _ in range(2):
                with pytest.raises(DuplicateNode):
                    await original.announce(ENTRY)
            await copy.announce(ENTRY)

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_an_announcement_that_was_stored_without_an_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            registry = Registry(connection, SETTINGS)
            await registry.ensure_bucket()
            await registry.announce(ENTRY)
            # The same process, over another connection: what `registry` knows is out of date now.
            await Registry(connection, SETTINGS).announce(replace(ENTRY, pending_rows=1))
            await registry.announce(replace(ENTRY, pending_rows=2))
            (node,) = await registry.nodes()
            assert node.pending_rows == 2

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_entries_that_are_deleted_or_nonsense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            registry = Registry(connection, SETTINGS)
            await registry.ensure_bucket()
            await registry.announce(ENTRY)
            newer = {"node_id": 9, "instance_id": "n", "run": "r", "invented_later": [1]}
            for key, data in (
                ("node.7", b""),
                ("node.8", b"[1]"),
                ("node.9", json.dumps(newer).encode()),
                ("lease", b"{}"),
            ):
                for bucket in (BUCKET, ALIVE):
                    await connection.request(f"$KV.{bucket}.{key}", data, timeout=5)
            assert [stated(node) for node in await registry.nodes()] == [NodeEntry(9, "n")]
            assert [record.__dict__["fields"]["key"] for record in caplog.records] == ["node.8"] * 2  # in either
            await registry.announce(ENTRY)
            await Registry(connection, SETTINGS).announce(replace(ENTRY, node_id=8))
            assert [node.node_id for node in await registry.nodes()] == [7, 8, 9]
            await purge(connection)
            await registry.announce(ENTRY)
            assert [node.node_id for node in await registry.nodes()] == [7]

    with single_server(tmp_path / "s") as server, caplog.at_level(logging.WARNING, registry_module.__name__):
        asyncio.run(scenario())


def test_no_bucket_and_no_server(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            registry = Registry(connection, SETTINGS)
            for call in (registry.nodes(), registry.announce(ENTRY)):
                with pytest.raises(StreamMissing):
                    await call
            with pytest.raises(ApiError, match="replicas"):
                await Registry(connection, replace(SETTINGS, replicas=3)).ensure_bucket()
            await registry.ensure_bucket()
            await ensure_streams(connection, SETTINGS)
        with pytest.raises(StreamUnavailable, match="not connected"):
            await registry.announce(ENTRY)

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_a_node_that_signed_off_leaves_its_id_to_whoever_comes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            first, second = Registry(connection, SETTINGS, run="one"), Registry(connection, SETTINGS, run="two")
            await first.ensure_bucket()
            await first.sign_off(ENTRY)  # never announced: nothing to take back
            assert await first.nodes() == []
            await first.announce(ENTRY)
            await first.sign_off(ENTRY)
            (left,) = await second.nodes()
            assert (left.stopped, left.alive, left.instance_id) == (True, False, "abc")
            await second.announce(replace(ENTRY, instance_id="new"))
            (there,) = await second.nodes()
            assert (there.stopped, there.alive, there.instance_id) == (False, True, "new")
            await first.sign_off(ENTRY)
            with pytest.raises(DuplicateNode):
                await first.announce(ENTRY)
            assert [node.instance_id for node in await second.nodes()] == ["new"]

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_only_the_own_entry_is_signed_off(tmp_path: Path) -> None:
    """The id was taken over meanwhile, after a silence for instance: that node is not to be signed off."""

    async def scenario() -> None:
        async with client(server.url) as connection:
            first, second = Registry(connection, SETTINGS, run="one"), Registry(connection, SETTINGS, run="two")
            await first.ensure_bucket()
            await first.announce(ENTRY)
            await purge(connection)
            await second.announce(replace(ENTRY, instance_id="new"))
            await first.sign_off(ENTRY)
            (there,) = await second.nodes()
            assert (there.alive, there.instance_id) == (True, "new")

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_a_node_at_rest_writes_to_the_servers_disk_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection, client(server.url) as another:
            registry = Registry(connection, SETTINGS, run="one")
            await registry.ensure_bucket()
            for pending in range(5):
                await registry.announce(replace(ENTRY, pending_rows=pending))
            assert (await written(connection, BUCKET), await written(connection, ALIVE)) == (1, 5)
            (node,) = await registry.nodes()
            assert node.pending_rows == 4, "the latest word is the one in memory"
            # A link that comes and goes is no reason to write.
            again = Registry(another, SETTINGS, run="one")
            await again.announce(ENTRY)
            assert await written(connection, BUCKET) == 1
            # What an operator asks for is stored at once, the rest when its time has come.
            await again.announce(replace(ENTRY, schema="beef"))
            assert await written(connection, BUCKET) == 2
            monkeypatch.setattr(registry_module, "STORED_EVERY_S", 0.0)
            await again.announce(replace(ENTRY, schema="beef"))
            assert await written(connection, BUCKET) == 3
            monkeypatch.undo()
            # Another process says that it is here, and later that it goes.
            third = Registry(connection, SETTINGS, run="two")
            await third.announce(ENTRY)
            await third.announce(ENTRY)
            assert await written(connection, BUCKET) == 4
            await third.sign_off(ENTRY)
            assert await written(connection, BUCKET) == 5

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_a_server_that_restarts_still_knows_who_is_away(tmp_path: Path) -> None:
    """What is in memory is gone then: the nodes that are there make it anew."""

    async def scenario() -> None:
        async with client(server.url) as connection:
            registry = Registry(connection, SETTINGS, run="seven")
            await registry.ensure_bucket()
            await registry.announce(ENTRY)
            await Registry(connection, SETTINGS, run="eight").announce(replace(ENTRY, node_id=8))
            nine = Registry(connection, SETTINGS, run="nine")
            await nine.announce(replace(ENTRY, node_id=9))
            await nine.sign_off(replace(ENTRY, node_id=9))
            before = {node.node_id: node.stored_ms for node in await registry.nodes()}
            server.kill()
            server.start()
        async with client(server.url) as connection:
            registry = Registry(connection, SETTINGS, run="seven")
            await eventually_does(registry.nodes)
            assert [(node.node_id, node.stopped) for node in await registry.nodes()] == [
                (7, False),
                (8, False),
                (9, True),
            ]
            await registry.ensure_bucket()
            await registry.announce(replace(ENTRY, pending_rows=3))
            seven, eight, nine_away = await registry.nodes()
            assert (seven.alive, seven.pending_rows) == (True, 3)
            assert abs(eight.stored_ms - before[8]) < 5000 and nine_away.stopped
            # Two of one device: what is in memory tells, although the server has forgotten it once.
            with pytest.raises(DuplicateNode):
                await Registry(connection, SETTINGS, run="other").announce(replace(ENTRY, instance_id="xyz"))

    server = Server(tmp_path / "s", jetstream(tmp_path / "s"))
    with running(server):
        asyncio.run(scenario())


def test_a_node_of_an_earlier_version_is_seen_and_sees(tmp_path: Path) -> None:
    """It announces itself in the stored bucket alone, every few seconds."""

    async def announce_as_before(connection: Client, entry: NodeEntry) -> None:
        fields = {"node_id": entry.node_id, "instance_id": entry.instance_id, "run": "old", "version": "0.0.9"}
        await connection.request(f"$KV.{BUCKET}.node.{entry.node_id}", json.dumps(fields).encode(), timeout=5)

    async def scenario() -> None:
        async with client(server.url) as connection:
            registry = Registry(connection, SETTINGS)
            await api_request(
                connection,
                SETTINGS,
                f"STREAM.CREATE.KV_{BUCKET}",
                {"name": f"KV_{BUCKET}", "subjects": [f"$KV.{BUCKET}.>"], "storage": "file", "max_msgs_per_subject": 1},
            )
            await announce_as_before(connection, replace(ENTRY, node_id=8))
            assert [(node.node_id, node.alive) for node in await registry.nodes()] == [(8, True)]
            await registry.ensure_bucket()
            await registry.announce(ENTRY)
            assert [(node.node_id, node.alive) for node in await registry.nodes()] == [(7, True), (8, True)]
            with pytest.raises(DuplicateNode):
                await registry.announce(replace(ENTRY, node_id=8, instance_id="xyz"))

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())
