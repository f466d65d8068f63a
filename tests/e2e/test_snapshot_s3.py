"""Snapshots in a real S3 service, with real daemons: as the only store, and as what is left of a fleet."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import pytest

from tests.e2e.cluster import Node, eventually, hub_and_leaves, merged
from tests.e2e.proxy import Link
from tests.e2e.snapshots import (
    MORE_THAN_THE_STREAM_MB,
    SCHEMA,
    S3Place,
    churn,
    lose_database,
    lose_store,
    nothing_lost,
    reasons,
    save,
    small_store,
    wait_caught_up,
    writers_of,
)
from tests.e2e.test_snapshot import fails, ids, succeeds
from tests.e2e.writers import WRITE, writing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.parametrize("place", ["s3"], indirect=True),
]


def test_s3_as_the_only_store(tmp_path: Path, place: S3Place) -> None:
    """Away, beyond the log's beginning; S3 is out of reach at first, which the status says."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=place.settings)
    hub, leaf = small_store(cluster)
    link = cluster.proxy(place.service.port)
    writers = writers_of([hub, leaf])
    with cluster:
        cluster.start()
        with writing(writers):
            leaf.stop()
            churn(hub, MORE_THAN_THE_STREAM_MB)
            link.set(Link.CUT)
            leaf.configure(merged(leaf.settings, place.through(link.port)))
            leaf.start()
            eventually(lambda: "waiting: " in reasons(leaf), 60, "the status says what it waits for")
            assert str(link.port) in reasons(leaf)
            link.set(Link.PASS)
            wait_caught_up(leaf, 90)
        nothing_lost(cluster, writers)
        assert any(key.endswith(".json") for key in place.stored())


def test_refused_credentials(tmp_path: Path, place: S3Place) -> None:
    """One clear line; replication goes on."""
    wrong = merged(place.settings, {"snapshot.s3": {"secret": "not-it"}})
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=wrong)
    hub = cluster.nodes[1]
    with cluster:
        cluster.start()
        hub.execute(WRITE, "one", 1, 1, "")
        cluster.wait_settled()
        line = fails(hub, "snapshot", "save")
        assert "[snapshot.s3]" in line, line
        assert "not-it" not in hub.log_text()
        hub.execute(WRITE, "two", 1, 2, "")
        cluster.wait_settled()


def test_all_devices_are_gone_but_the_mirror_is_there(tmp_path: Path, place: S3Place) -> None:
    """The hub's NATS kept the snapshots, S3 the second copy: a new fleet begins with that."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=place.through(place.service.port, mirror="s3"))
    hub, leaf = cluster.nodes.values()
    with cluster:
        cluster.start()
        hub.execute(WRITE, "one", 1, 1, "x")
        leaf.execute(WRITE, "two", 2, 1, "x")
        cluster.wait_settled()
        taken = save(hub)
        eventually(lambda: f"{taken}.json" in place.stored(), 60, "it is in the mirror")
        assert [each["id"] for each in listed(hub, "--mirror")] == ids(hub) == [taken]
        leaf.kill()
        lose_store(hub)
        for node in (hub, leaf):
            lose_database(node)
        copy = tmp_path / "copy.db"
        succeeds(hub, "snapshot", "restore", "--to", str(copy))
        with contextlib.closing(sqlite3.connect(copy)) as plain:
            assert plain.execute("SELECT id FROM item ORDER BY id").fetchall() == [("one",), ("two",)]
        succeeds(hub, "snapshot", "restore", "--mirror")
        hub.start()
        leaf.start()
        eventually(leaf.db.exists, 60, "the leaf has a database")
        leaf.execute(WRITE, "three", 2, 2, "x")
        cluster.wait_settled(60)
        assert hub.execute("SELECT id FROM item ORDER BY id") == [("one",), ("three",), ("two",)]


def listed(node: Node, *options: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(succeeds(node, "snapshot", "list", "--json", *options))
    return found
