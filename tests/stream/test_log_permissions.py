"""One node with the fewest permissions it can work with; an administrator makes the streams."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from harmonylite.model import Position
from harmonylite.stream.consumer import Consumer
from harmonylite.stream.lineage import same_log
from harmonylite.stream.log import (
    StreamMissing,
    StreamUnavailable,
    stored_time_ns,
    stream_state,
)
from harmonylite.stream.provision import ensure_streams
from harmonylite.stream.publisher import Publisher, PublishFailed
from harmonylite.stream.registry import NodeEntry, Registry
from tests.documented import node_may_publish
from tests.stream.logfixture import (
    SETTINGS,
    START,
    STREAM,
    Server,
    client,
    confined,
    consumer_names,
    jetstream,
    payload,
    read_numbers,
    running,
)

# A refusal is no answer at all.
HASTY = replace(SETTINGS, api_timeout_s=0.5)
NODE_MAY_PUBLISH = node_may_publish("harmonylite-change-log", STREAM, "changes-nodes", "changes-alive", "API.INFO")


def test_a_node_without_the_permission_to_create(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            client(server.url, user="admin", password="a") as admin,
            client(server.url, user="node7", password="n", inbox_prefix="_INBOX_7") as node,
        ):
            registry = Registry(node, HASTY)
            with pytest.raises(StreamMissing, match=r"could not create it .* administrator"):
                await ensure_streams(node, HASTY)
            with pytest.raises(StreamMissing, match="administrator"):
                await registry.ensure_bucket()
            await ensure_streams(admin, HASTY)
            await Registry(admin, HASTY).ensure_bucket()

            (state,) = await ensure_streams(node, replace(HASTY, max_bytes=1 << 30, update_existing=True))
            assert (state.name, state.last_seq) == (STREAM, 0)
            publisher = Publisher(node, HASTY, timeout_s=0.5)
            await publisher.publish(1, payload(1), 0)
            await publisher.publish(2, payload(2, size=3_000_000), 0)
            reader = Consumer(node, HASTY, STREAM, START)
            assert await read_numbers(reader, 2) == [1, 2]
            await reader.close()
            assert await consumer_names(admin) == []
            state = await stream_state(node, HASTY, STREAM)
            stored_ns = await stored_time_ns(node, HASTY, state, 1)
            assert stored_ns is not None
            assert (await same_log(node, HASTY, state, Position(STREAM, state.created, 1, stored_ns))).intact
            await registry.ensure_bucket()
            await registry.announce(NodeEntry(7, "abc"))
            assert [entry.node_id for entry in await registry.nodes()] == [7]

            forged = Publisher(node, replace(HASTY, node_id=8), timeout_s=0.5)
            with pytest.raises(PublishFailed, match="no acknowledgement"):
                await forged.publish(1, payload(1, 8), 0)
            with pytest.raises(StreamUnavailable):
                await registry.announce(NodeEntry(8, "abc"))
            assert (await stream_state(admin, HASTY, STREAM)).last_seq == state.last_seq

    server = Server(tmp_path / "s", jetstream(tmp_path / "s") + confined(NODE_MAY_PUBLISH))
    with running(server):
        asyncio.run(scenario())


def test_a_node_without_the_bucket_in_memory_stores_every_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its permissions are from before there was one."""

    async def scenario() -> None:
        async with (
            client(server.url, user="admin", password="a") as admin,
            client(server.url, user="node7", password="n", inbox_prefix="_INBOX_7") as node,
        ):
            there, registry = Registry(admin, HASTY), Registry(node, HASTY)
            await there.ensure_bucket()
            await there.announce(NodeEntry(8, "def"))
            for pending in range(3):
                await registry.ensure_bucket()
                await registry.announce(NodeEntry(7, "abc", pending_rows=pending))
            (seven, eight) = await registry.nodes()
            assert (seven.pending_rows, seven.alive, eight.alive) == (2, True, True)
            assert [(one.node_id, one.alive) for one in await there.nodes()] == [(7, True), (8, True)]
            await registry.sign_off(NodeEntry(7, "abc"))
            assert [one.stopped for one in await there.nodes()] == [True, False]

    server = Server(
        tmp_path / "s",
        jetstream(tmp_path / "s") + confined([one for one in NODE_MAY_PUBLISH if "changes-alive" not in one]),
    )
    with running(server), caplog.at_level("WARNING", "harmonylite.stream.registry"):
        asyncio.run(scenario())
    assert [record.message for record in caplog.records] == [
        "no bucket in memory; each announcement is written to the server's disk"
    ]
