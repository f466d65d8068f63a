"""A hub that loses power before its disk had everything: the log's tail is gone, though it was acknowledged (I3).

JetStream says nothing of it, and gives the sequence numbers out again. The nodes have to notice.
"""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from harmonylite.observe.control import query
from harmonylite.stream.log import LogSettings, StreamState, api_request, stream_state
from tests.e2e.cluster import Node, eventually, hub_and_leaves
from tests.e2e.snapshots import Place, nothing_lost, save, writers_of
from tests.e2e.writers import SCHEMA, WRITE, writing
from tests.stream.logfixture import client


def lose_tail(hub: Node, size: int) -> None:
    """Kill the hub's daemon and server, and cut the newest block of the stream by `size` bytes."""
    hub.kill()
    while hub.signal_server(signal.SIGKILL):
        time.sleep(0.02)
    blocks = list(hub.store.glob("jetstream/$G/streams/harmonylite-changes-1/msgs/*.blk"))
    newest = max(blocks, key=lambda path: int(path.stem))
    with newest.open("r+b") as block:
        block.truncate(max(0, newest.stat().st_size - size))


@pytest.mark.slow
@pytest.mark.parametrize("link_lost", [False, True])
def test_the_last_acknowledged_row_comes_back(tmp_path: Path, link_lost: bool) -> None:
    """The smallest loss: one message, whose publisher had its acknowledgement. No other node has the row.

    link_lost: the publisher's connection to NATS breaks at the same time, while its daemon goes on.
    """
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA)
    with cluster:
        hub, leaf, other = cluster.start().nodes.values()
        leaf.execute(WRITE, "first", 2, 1, "")
        cluster.wait_settled()
        other.stop()
        hub.signal(signal.SIGSTOP)  # so that it does not read the row either; its server goes on
        leaf.execute(WRITE, "second", 2, 2, "")
        eventually(leaf.settled, 30, "the leaf has the acknowledgement")
        if link_lost:
            leaf.signal_server(signal.SIGKILL)
        lose_tail(hub, 8)
        hub.start()
        other.start()
        leaf.execute(WRITE, "third", 2, 3, "")  # takes the sequence of the lost one
        cluster.wait_settled()
        for node in (hub, leaf, other):
            assert node.execute("SELECT id FROM item ORDER BY sequence") == [("first",), ("second",), ("third",)]


def purge(hub: Node) -> tuple[int, int]:
    """The log drops all that it holds; (first, last) sequence of the stream."""
    where = query(hub.db, {"command": "snapshot-nats"})

    async def ask() -> StreamState:
        settings = LogSettings(node_id=1, domain=where["domain"])
        async with client(where["url"]) as connection:
            await api_request(connection, settings, f"STREAM.PURGE.{settings.own_stream}", {})
            return await stream_state(connection, settings, settings.own_stream)

    state = asyncio.run(ask())
    return state.first_seq, state.last_seq


@pytest.mark.slow
@pytest.mark.parametrize("tail_lost", [False, True])
def test_what_came_in_the_place_of_a_lost_tail_is_not_missed_when_it_is_discarded_too(
    tmp_path: Path, tail_lost: bool
) -> None:
    """The stream is empty then, and its next message the one after the last that the node had read. Without a loss that
    is a quiet log like any other: nobody needs a snapshot."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA)
    with cluster:
        hub, leaf, other = cluster.start().nodes.values()
        leaf.execute(WRITE, "first", 2, 1, "")
        cluster.wait_settled()
        if tail_lost:
            hub.signal(signal.SIGSTOP)  # it would publish the second row before the third
        leaf.execute(WRITE, "second", 2, 2, "")
        eventually(lambda: len(other.execute("SELECT id FROM item")) == 2 and leaf.settled(), 30, "other has both")
        other.stop()
        if tail_lost:
            lose_tail(hub, 8)
            leaf.execute(WRITE, "third", 2, 3, "")
            hub.start()
            eventually(lambda: len(hub.execute("SELECT id FROM item")) == 3 and leaf.settled(), 30, "the hub has all")
        assert purge(hub) == (3, 2), "else other has not stopped just there"
        noticed = other.log_text().count("the log does not continue")
        other.start()
        cluster.wait_settled()
        assert len(other.execute("SELECT id FROM item")) == (3 if tail_lost else 2)
        assert other.log_text().count("the log does not continue") == noticed + tail_lost


@pytest.mark.slow
def test_who_alone_has_written_after_a_purge_is_killed(tmp_path: Path) -> None:
    """It still knows that the log is the same: if it waited for a snapshot, too, nobody could take one."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA)
    with cluster:
        hub, leaf, other = cluster.start().nodes.values()
        hub.execute(WRITE, "first", 1, 1, "")
        cluster.wait_settled()
        leaf.stop()
        other.stop()
        assert purge(hub) == (2, 1)
        hub.stop()
        hub.start()
        eventually(hub.settled, 30, "the hub has seen that its log is empty")
        hub.execute(WRITE, "second", 1, 2, "")
        eventually(lambda: len(hub.execute("SELECT id FROM item")) == 2 and hub.settled(), 30, "it is published")
        hub.kill()
        for node in (hub, leaf, other):
            node.start()
        cluster.wait_settled()
        assert [len(node.execute("SELECT id FROM item")) for node in (hub, leaf, other)] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "share", "snapshot"),
    [("nats", 0.02, False), ("nats", 0.5, False), ("nats", 1.0, False), ("nats", 0.2, True), ("s3", 0.2, True)],
    indirect=["place"],
)
def test_nothing_is_lost_with_the_tail(tmp_path: Path, place: Place, share: float, snapshot: bool) -> None:
    """Writers on all nodes; `share` of the stream's newest block is gone.

    snapshot: there is one from before what is lost, and all go on from that.
    """
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, more=place.settings)
    nodes = list(cluster.nodes.values())
    writers = writers_of(nodes, pause_ms=10)

    def merged() -> list[int]:
        return [node.log_text().count("caught up from a snapshot") for node in nodes]

    with cluster:
        hub = cluster.start().nodes[1]
        with writing(writers):
            for times in (1, 2):
                if snapshot:
                    time.sleep(0.5)
                    save(hub)
                time.sleep(3)
                size = sum(path.stat().st_size for path in hub.store.glob("jetstream/$G/streams/*-1/msgs/*.blk"))
                lose_tail(hub, round(size * share))
                hub.start()
                eventually(lambda: all(node.connected() for node in nodes), 30, "all nodes are back")
                eventually(lambda: not snapshot or min(merged()) == times, 60, "all go on from the snapshot")  # noqa: B023
        nothing_lost(cluster, writers)
        noticed = [node.log_text().count("the log does not continue") for node in nodes]
        print(f"{share:.0%} of the block lost, twice; noticed {noticed}, from a snapshot {merged()}")
        assert any(noticed)
        assert any(merged()) == snapshot
