"""Which snapshot a node catches up from: the newest that is whole; none at all, and then it waits and says so.
Applications write all the while."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import nats
import pytest

from tests.e2e.cluster import QUICK, Cluster, Node, Settings, eventually, hub_and_leaves, merged
from tests.e2e.snapshots import (
    MORE_THAN_THE_STREAM_MB,
    SCHEMA,
    STREAM,
    Place,
    churn,
    lose_database,
    nothing_lost,
    reasons,
    save,
    shared_folder,
    small_store,
    wait_caught_up,
    write,
    writers_of,
)
from tests.e2e.writers import WRITE, writing
from tests.stream.support import bare_server, free_port

pytestmark = pytest.mark.slow

DAMAGES = [
    ("folder", "flip"), ("folder", "cut"), ("folder", "remove"),
    ("nats", "cut"), ("nats", "remove"),
    ("s3", "flip"), ("s3", "cut"), ("s3", "remove"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "damage"), DAMAGES, indirect=["place"])
def test_a_damaged_snapshot_is_passed_over_for_the_next_older_one(tmp_path: Path, place: Place, damage: str) -> None:
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=place.settings)
    hub, leaf = small_store(cluster)
    hub_writer, leaf_writer = writers_of([hub, leaf])
    with cluster:
        cluster.start()
        cluster.wait_settled()
        with writing([leaf_writer]):
            leaf.stop()
            with writing([hub_writer]):
                churn(hub, MORE_THAN_THE_STREAM_MB)
                older = save(hub)
                between = write(hub, "between", 1)
                newer = save(hub)
            place.damage(hub, newer, damage)
            hub.signal(signal.SIGSTOP)  # nobody takes another one
            begun = len(leaf.log_text())
            leaf.start()
            wait_caught_up(leaf, begun=begun)
            if damage == "flip":  # else its size may tell before anything is fetched
                assert f"another one is used id={newer}" in leaf.log_text()
            assert f"caught up from a snapshot id={older}" in leaf.log_text()
            hub.signal(signal.SIGCONT)
        nothing_lost(cluster, [hub_writer, leaf_writer], [between])


def beside_a_server(cluster: Cluster, port: int, place: Place, nodes: int) -> list[Node]:
    """Nodes of a NATS server that is nobody's: it stays when one of them goes."""
    more: Settings = merged({"nats": {"urls": [f"nats://127.0.0.1:{port}"], **QUICK}}, place.settings)
    return [cluster.add(number, more) for number in range(1, nodes + 1)]


async def make_stream(port: int, max_bytes: int) -> None:
    """As an administrator does."""
    client = await nats.connect(f"nats://127.0.0.1:{port}")
    await client.jetstream().add_stream(
        name=STREAM, subjects=["harmonylite-change-log.1.*"], max_bytes=max_bytes, allow_direct=True
    )
    await client.close()


def test_without_any_snapshot_a_node_waits_and_says_so(tmp_path: Path, place: Place) -> None:
    """It never goes on with a hole; what is written there meanwhile is kept. The one node that has everything is off,
    its application is not."""
    port = free_port()
    with Cluster(tmp_path, SCHEMA) as cluster:
        one, other = beside_a_server(cluster, port, place, 2)
        writers = writers_of([one, other])
        with bare_server(tmp_path / "nats", port=port):
            asyncio.run(make_stream(port, 2 << 20))
            cluster.start()
            first = write(one, "first", 1)
            cluster.wait_settled()
            with writing(writers):
                other.stop()
                churn(one, MORE_THAN_THE_STREAM_MB)
                one.stop()
                other.start()
                eventually(lambda: "waiting for a snapshot" in reasons(other), 30, "the status says what it waits for")
                time.sleep(5)
                assert (other.status() or {})["status"] == "degraded"
                assert other.execute("SELECT count(*) FROM bulk") == [(0,)], "it went on with a hole"
                one.start()
                wait_caught_up(other)
            nothing_lost(cluster, writers, [first])


def test_an_operator_declares_a_node_complete(tmp_path: Path, place: Place) -> None:
    """The only node that had everything is gone for good, and with it what nobody else had read: the operator's word
    is that this does not count. Everything that the others wrote does."""
    port = free_port()
    with Cluster(tmp_path, SCHEMA) as cluster:
        one, other, third = beside_a_server(cluster, port, place, 3)
        writers = writers_of([other, third])
        with bare_server(tmp_path / "nats", port=port):
            asyncio.run(make_stream(port, 2 << 20))
            cluster.start()
            first = write(one, "first", 1)
            cluster.wait_settled()
            with writing(writers):
                other.stop()
                third.stop()
                churn(one, MORE_THAN_THE_STREAM_MB)
                one.kill()
                del cluster.nodes[1]
                for node in (other, third):
                    node.start()
                for node in (other, third):
                    eventually(lambda node=node: "waiting for a snapshot" in reasons(node), 30, "waits")  # type: ignore[misc]
                save(other, force=True)
                eventually(lambda: not reasons(third), 60, "the third goes on")
            nothing_lost(cluster, writers, [first])


def test_a_damaged_card_is_told_from_a_damaged_snapshot(tmp_path: Path) -> None:
    """The node says so and leaves the cluster alone; without its database it becomes a new one."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=shared_folder(tmp_path))
    hub, leaf = small_store(cluster)
    with cluster:
        cluster.start()
        with hub.open_db() as connection:
            rows = [(f"item-{number}", 1, number, f"marker-{number} " * 40) for number in range(2000)]
            connection.executemany(WRITE, rows)
        cluster.wait_settled()
        leaf.stop()
        with leaf.open_db() as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        content = leaf.db.read_bytes()
        page = content.index(b"marker-1000 ") // 4096 * 4096
        with leaf.db.open("r+b") as file:
            file.seek(page)
            file.write(b"\xff" * 4096)
        churn(hub, MORE_THAN_THE_STREAM_MB)
        good = save(hub)
        begun = len(leaf.log_text())
        leaf.start()
        eventually(lambda: f"this node's database {leaf.db} is damaged" in reasons(leaf), 30, "it says so")
        assert (leaf.status() or {})["status"] == "unhealthy"
        time.sleep(5)
        text = leaf.log_text()[begun:]
        assert text.count("fetching a snapshot") == 1
        assert text.count("database is damaged; it cannot catch up") == 1
        assert "another one is used" not in text
        assert (hub.status() or {})["snapshot"]["id"] == good, "nobody took another one"
        leaf.stop()
        lose_database(leaf)
        leaf.start()
        eventually(leaf.db.exists, 30, "a new database")
        cluster.wait_settled(30)
        assert leaf.execute("SELECT count(*) FROM item") == [(2000,)]
        assert (leaf.status() or {})["status"] == "healthy"
