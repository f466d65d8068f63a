"""Away while the log went on without this node, or broke: what it missed comes from a snapshot, what it has is not
lost (I9), and all databases are the same at the end. Applications write all the while."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import nats
import pytest

from tests.e2e.cluster import eventually, hub_and_leaves
from tests.e2e.snapshots import (
    MORE_THAN_THE_STREAM_MB,
    SCHEMA,
    STREAM,
    Place,
    churn,
    lose_database,
    lose_store,
    nothing_lost,
    save,
    small_store,
    wait_caught_up,
    writers_of,
)
from tests.e2e.writers import WRITE, writing


def test_a_node_that_was_away_too_long_catches_up_from_a_snapshot(tmp_path: Path) -> None:
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    hub, leaf = small_store(cluster)
    with cluster:
        cluster.start()
        hub.execute(WRITE, "both", 1, 1, "older")
        hub.execute(WRITE, "deleted meanwhile", 1, 2, "")
        cluster.wait_settled()
        leaf.stop()
        hub.execute("DELETE FROM item WHERE id = 'deleted meanwhile'")
        leaf.execute(WRITE, "written while away", 2, 1, "")
        leaf.execute(WRITE, "both", 2, 2, "newer")
        churn(hub, MORE_THAN_THE_STREAM_MB)
        save(hub)
        leaf.start()
        cluster.wait_settled(30)
        assert "caught up from a snapshot" in leaf.log_text()
        assert hub.execute("SELECT id, payload FROM item ORDER BY id") == [
            ("both", "newer"),
            ("written while away", ""),
        ]


# -- each kind of gap, applications writing all the while


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_trimmed(tmp_path: Path, shards: int) -> None:
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 2, more={"replication_log": {"shards": shards}})
    hub, leaf, other = small_store(cluster)
    writers = writers_of([hub, leaf, other])
    with cluster:
        cluster.start()
        with writing(writers):
            for away in (leaf, other):
                away.stop()
                churn(hub, MORE_THAN_THE_STREAM_MB)
                away.start()
                wait_caught_up(away)
                time.sleep(1)
        nothing_lost(cluster, writers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "snapshot_before"), [("nats", False), ("nats", True), ("s3", True)], indirect=["place"]
)
def test_a_stream_that_was_made_anew(tmp_path: Path, place: Place, snapshot_before: bool) -> None:
    """Somebody removed it, while all nodes were up."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 2, more=place.settings)
    nodes = list(cluster.nodes.values())
    writers = writers_of(nodes)

    async def remove() -> None:
        client = await nats.connect((nodes[0].status() or {})["nats_url"])
        await client.jetstream().delete_stream(STREAM)
        await client.close()

    with cluster:
        cluster.start()
        with writing(writers):
            time.sleep(2)
            if snapshot_before:
                save(nodes[0])
            asyncio.run(remove())
            eventually(lambda: all("does not continue" in node.log_text() for node in nodes), 30, "all have noticed")
            time.sleep(2)
        nothing_lost(cluster, writers)


@pytest.mark.slow
def test_a_hub_whose_streams_are_gone(tmp_path: Path, place: Place) -> None:
    """With those in NATS also the snapshots. One leaf is away at that time, and comes back much later."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 2, more=place.settings)
    hub, leaf, other = cluster.nodes.values()
    writers = writers_of([hub, leaf, other])
    with cluster:
        cluster.start()
        with writing(writers):
            time.sleep(2)
            save(hub)
            other.stop()
            lose_store(hub)
            hub.start()
            eventually(lambda: "does not continue" in leaf.log_text(), 30, "the leaf has noticed")
            time.sleep(2)
            other.start()
            eventually(lambda: "does not continue" in other.log_text(), 30, "the other leaf has noticed")
        nothing_lost(cluster, writers)


@pytest.mark.slow
def test_a_hub_that_was_installed_anew(tmp_path: Path, place: Place) -> None:
    """A new card: no database, no streams. One leaf is up, another one comes back later."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 2, more=place.settings)
    hub, leaf, other = cluster.nodes.values()
    writers = writers_of([leaf, other])
    with cluster:
        cluster.start()
        with writing(writers):
            time.sleep(2)
            other.stop()
            lose_store(hub)
            lose_database(hub)
            hub.start()
            eventually(hub.db.exists, 60, "the hub has a database again")
            time.sleep(2)
            other.start()
            eventually(other.connected, 30, "back")
        nothing_lost(cluster, writers)
