"""Snapshots in a real S3 service, with real daemons: as the only store, and as what is left of a fleet."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Node, Settings, eventually, hub_and_leaves, merged
from tests.e2e.proxy import Link
from tests.e2e.snapshots import SCHEMA, churn, save
from tests.e2e.test_catchup import MORE_THAN_THE_STREAM_MB, lose_store, nothing_lost, reasons, small_store, writers_of
from tests.e2e.test_snapshot import fails, ids, succeeds
from tests.e2e.writers import WRITE, writing
from tests.snapshot.seaweed import BUCKET, Seaweed, seaweed_or_skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    yield from seaweed_or_skip(tmp_path_factory)


def bucket(s3: Seaweed, folder: str, *, port: int | None = None, **snapshot: object) -> Settings:
    return {
        "snapshot": snapshot,
        "snapshot.s3": {
            "endpoint": f"127.0.0.1:{port or s3.port}",
            "bucket": BUCKET,
            "path": folder,
            "access_key": "admin-key",
            "secret": "admin-secret",
        },
    }


def test_s3_as_the_only_store(tmp_path: Path, s3: Seaweed) -> None:
    """Away, beyond the log's beginning; S3 is out of reach at first, which the status says."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=bucket(s3, "only", store="s3"))
    hub, leaf = small_store(cluster)
    link = cluster.proxy(s3.port)
    writers = writers_of([hub, leaf])
    with cluster:
        cluster.start()
        with writing(writers):
            leaf.stop()
            churn(hub, MORE_THAN_THE_STREAM_MB)
            link.set(Link.CUT)
            leaf.configure(merged(leaf.settings, bucket(s3, "only", port=link.port, store="s3")))
            leaf.start()
            eventually(lambda: "waiting: " in reasons(leaf), 60, "the status says what it waits for")
            assert str(link.port) in reasons(leaf)
            link.set(Link.PASS)
            eventually(lambda: "caught up from a snapshot" in leaf.log_text(), 90, "caught up")
        nothing_lost(cluster, writers)
        assert any(key.endswith(".json") for key in s3.keys("only"))


def test_refused_credentials(tmp_path: Path, s3: Seaweed) -> None:
    """One clear line; replication goes on."""
    wrong = merged(bucket(s3, "refused", store="s3"), {"snapshot.s3": {"secret": "not-it"}})
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


def test_all_devices_are_gone_but_the_mirror_is_there(tmp_path: Path, s3: Seaweed) -> None:
    """The hub's NATS kept the snapshots, S3 the second copy: a new fleet begins with that."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=bucket(s3, "mirror", mirror="s3"))
    hub, leaf = cluster.nodes.values()
    with cluster:
        cluster.start()
        hub.execute(WRITE, "one", 1, 1, "x")
        leaf.execute(WRITE, "two", 2, 1, "x")
        cluster.wait_settled()
        taken = save(hub)
        eventually(lambda: f"{taken}.json" in s3.keys("mirror"), 60, "it is in the mirror")
        assert [each["id"] for each in listed(hub, "--mirror")] == ids(hub) == [taken]
        leaf.kill()
        lose_store(hub)
        for node in (hub, leaf):
            for path in node.folder.glob("*app.db*"):
                path.unlink()
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
