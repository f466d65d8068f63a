"""Snapshots as an operator sees them: taken on demand, by themselves, listed, written to files."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.cluster import Node, Settings, eventually, hub_and_leaves, merged
from tests.e2e.proxy import Link
from tests.e2e.snapshots import SCHEMA, churn, lose_store, save, shared_folder
from tests.e2e.writers import WRITE
from tests.stream.support import free_port


def harmonylite(node: Node, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harmonylite", *arguments, "--config", str(node.config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def succeeds(node: Node, *arguments: str) -> str:
    done = harmonylite(node, *arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def fails(node: Node, *arguments: str) -> str:
    """The one line that it says."""
    done = harmonylite(node, *arguments)
    assert (done.returncode, done.stdout) == (1, ""), done
    [line] = done.stderr.splitlines()
    return line


def ids(node: Node) -> list[str]:
    return [each["id"] for each in json.loads(succeeds(node, "snapshot", "list", "--json"))]


@pytest.mark.slow
def test_save_list_and_restore(tmp_path: Path) -> None:
    """A plain database comes out, which knows nothing of us; nothing is ever overwritten."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    hub, leaf = cluster.nodes.values()
    copy = tmp_path / "copy.db"
    assert "start it first" in fails(hub, "snapshot", "save")
    assert "start the daemon" in fails(hub, "snapshot", "list")
    with cluster:
        cluster.start()
        hub.execute(WRITE, "one", 1, 1, "x")
        cluster.wait_settled()
        assert succeeds(hub, "snapshot", "list") == "the store holds no snapshot yet\n"
        assert "holds no snapshot" in fails(leaf, "snapshot", "restore", "--to", str(copy))
        said = succeeds(hub, "snapshot", "save")
        [first] = ids(leaf)
        assert first in said
        hub.execute(WRITE, "two", 1, 2, "x")
        eventually(hub.settled, 10, "published")
        eventually(lambda: (hub.status() or {})["snapshot"]["id"] == first, 10, "status knows it")
        second = json.loads(succeeds(hub, "snapshot", "save", "--json"))["id"]
        assert ids(hub) == ids(leaf) == [second, first]

        assert str(copy) in succeeds(leaf, "snapshot", "restore", "--to", str(copy))
        assert "not overwritten" in fails(leaf, "snapshot", "restore", "--to", str(copy))
        assert "exists" in fails(leaf, "snapshot", "restore")
        with contextlib.closing(sqlite3.connect(copy)) as plain:
            assert plain.execute("SELECT id FROM item ORDER BY id").fetchall() == [("one",), ("two",)]
            assert plain.execute("SELECT name FROM sqlite_schema WHERE name LIKE '%harmonylite%'").fetchall() == []
            assert plain.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        copy.unlink()
        succeeds(hub, "snapshot", "restore", "--to", str(copy), "--id", first)
        with contextlib.closing(sqlite3.connect(copy)) as plain:
            assert plain.execute("SELECT id FROM item").fetchall() == [("one",)]
        other = str(tmp_path / "other.db")
        assert "holds no snapshot x" in fails(hub, "snapshot", "restore", "--id", "x", "--to", other)
        assert not list(tmp_path.glob(".copy.db*")), "files are left over"


@pytest.mark.slow
def test_the_flag_of_the_go_implementation(tmp_path: Path) -> None:
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 0)
    [hub] = cluster.nodes.values()
    with cluster:
        cluster.start()
        done = subprocess.run(
            [sys.executable, "-m", "harmonylite", "-config", str(hub.config), "-save-snapshot"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(ids(hub)) == 1


@pytest.mark.slow
def test_everything_is_gone_but_the_snapshots(tmp_path: Path) -> None:
    """All devices and the streams: one new device begins with what the folder holds, others join it."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=shared_folder(tmp_path))
    hub, leaf = cluster.nodes.values()
    with cluster:
        cluster.start()
        hub.execute(WRITE, "one", 1, 1, "x")
        leaf.execute(WRITE, "two", 2, 1, "x")
        cluster.wait_settled()
        save(hub)
        lose_store(hub)
        leaf.kill()
        for node in (hub, leaf):
            for path in node.folder.glob("*app.db*"):
                path.unlink()
        assert "the database of this node" in succeeds(hub, "snapshot", "restore")
        hub.start()
        leaf.start()
        eventually(leaf.db.exists, 60, "the leaf has a database")
        leaf.execute(WRITE, "three", 2, 2, "x")
        cluster.wait_settled(60)
        assert hub.execute("SELECT id FROM item ORDER BY id") == [("one",), ("three",), ("two",)]


@pytest.mark.slow
def test_taken_by_themselves_and_seen_by_the_operator(tmp_path: Path) -> None:
    """On an interval, as many as are to be kept; age and size in status, health and metrics."""
    ports = free_port(), free_port()
    more: Settings = {
        "snapshot": {"interval": 1000, "retain": 2},
        "health_check": {"enable": True, "bind": f"127.0.0.1:{ports[0]}"},
        "prometheus": {"enable": True, "bind": f"127.0.0.1:{ports[1]}"},
    }
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 0, more=more)
    [hub] = cluster.nodes.values()
    with cluster:
        cluster.start()
        taken: set[str] = set()
        number = 0

        def four() -> bool:
            nonlocal number
            number += 1
            hub.execute(WRITE, f"row-{number}", 1, number, "x")
            snapshot = (hub.status() or {}).get("snapshot")
            taken.update([snapshot["id"]] if snapshot else [])
            return len(taken) >= 4

        eventually(four, 60, "four were taken", pause_s=0.3)
        assert len(ids(hub)) <= 3, "two, and one that is just being added"
        health = json.load(urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/health"))
        assert health["snapshot"]["age_seconds"] < 30
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{ports[1]}/metrics").read().decode()
        values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
        assert float(values["harmonylite_snapshot_age_seconds"]) < 30
        assert float(values["harmonylite_snapshots_taken_total"]) >= 4
        assert float(values["harmonylite_snapshot_failures_total"]) == 0


@pytest.mark.slow
def test_a_daemon_that_falls_asleep_leaves_a_snapshot(tmp_path: Path) -> None:
    """`sleep_timeout`: only if something has changed since the last one."""
    more = merged(shared_folder(tmp_path), {"": {"sleep_timeout": 1500}})
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 0, more=more)
    [hub] = cluster.nodes.values()
    with cluster:
        hub.start()
        hub.execute(WRITE, "one", 1, 1, "x")
        eventually(lambda: not hub.running, 30, "it fell asleep")
        taken = ids(hub)
        assert len(taken) == 1
        hub.start()
        eventually(lambda: not hub.running, 30, "it fell asleep")
        assert ids(hub) == taken


@pytest.mark.slow
def test_one_that_does_not_fit_into_a_small_store(tmp_path: Path) -> None:
    """Refused with a clear line and counted; the log and replication go on as before."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    hub = cluster.nodes[1]
    hub.configure(merged(hub.settings, {"nats": {"max_store": 2 << 20}}))
    with cluster:
        cluster.start()
        with hub.open_db() as connection:
            connection.executemany("INSERT INTO bulk VALUES (?, ?)", ((n, os.urandom(10_000)) for n in range(100)))
        cluster.wait_settled()
        line = fails(hub, "snapshot", "save")
        assert "does not fit" in line
        assert "max_store" in line
        status = hub.status()
        assert status is not None
        assert status["status"] == "degraded"
        assert "does not fit" in " ".join(status["reasons"])
        churn(hub, 2)
        cluster.wait_settled()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_offline_growth_follows_the_rows_not_the_changes(tmp_path: Path) -> None:
    """I9: one row, written a million times while the link is down."""
    cluster, [link] = hub_and_leaves(tmp_path, SCHEMA, 1, proxied=True)
    hub, leaf = cluster.nodes.values()
    with cluster:
        cluster.start()
        leaf.execute(WRITE, "counter", 2, 0, "")
        cluster.wait_settled()
        link.set(Link.CUT)
        eventually(lambda: not leaf.connected(), 60, "offline")
        before = size_of(leaf)
        largest = 0
        with leaf.open_db() as connection:
            for number in range(1000):
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("UPDATE item SET sequence = sequence + 1 WHERE id = 'counter'")
                connection.executemany("UPDATE item SET sequence = sequence + 1 WHERE id = ?", [("counter",)] * 999)
                connection.execute("COMMIT")
                if number % 20 == 0:
                    largest = max(largest, size_of(leaf))
        eventually(lambda: (leaf.status() or {"pending_rows": 0})["pending_rows"] == 1, 60, "one row is pending")
        print(f"{before:,} bytes before, at most {largest:,}, {size_of(leaf):,} afterwards")
        assert leaf.execute("SELECT count(*) FROM __harmonylite__item_version") == [(1,)]
        link.set(Link.PASS)
        cluster.wait_settled(60)
        assert hub.execute("SELECT sequence FROM item") == [(1_000_000,)]
        assert (leaf.status() or {})["published_rows"] <= 3


def size_of(node: Node) -> int:
    return sum(path.stat().st_size for path in node.folder.glob("app.db*"))
