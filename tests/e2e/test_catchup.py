"""Away while the log went on without this node, or broke: what it missed comes from a snapshot, what it has is not
lost (I9), and all databases are the same at the end. Applications write all the while."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

import nats
import pytest

from tests.e2e.cluster import QUICK, Cluster, Node, Settings, eventually, hub_and_leaves, merged
from tests.e2e.proxy import Link
from tests.e2e.snapshots import SCHEMA, churn, save, wait_same
from tests.e2e.writers import WRITE, WriterProcess, verify, writing
from tests.stream.support import bare_server, free_port

STREAM = "harmonylite-changes-1"
# The stream gets 60 % of it, the snapshots 30 %.
STORE = 4 << 20
MORE_THAN_THE_STREAM_MB = 4.0


def small_store(cluster: Cluster) -> list[Node]:
    """The hub's stream holds little. All nodes, the hub first."""
    hub = cluster.nodes[1]
    hub.configure(merged(hub.settings, {"nats": {"max_store": STORE}}))
    return list(cluster.nodes.values())


def writers_of(nodes: Sequence[Node], pause_ms: float = 30) -> list[WriterProcess]:
    return [WriterProcess(node.db, node.node_id, seed=node.node_id, pause_ms=pause_ms) for node in nodes]


def nothing_lost(cluster: Cluster, writers: Sequence[WriterProcess], timeout_s: float = 90) -> None:
    """All nodes become identical, and every acknowledged write is there or beaten by a later one."""
    cluster.wait_settled(timeout_s)
    verdict = verify(cluster.databases(), [write for writer in writers for write in writer.writes()])
    print(verdict)
    assert not verdict.lost, "\n".join(verdict.lost[:20])
    assert not verdict.alien, "\n".join(verdict.alien[:20])


def shared_folder(tmp_path: Path) -> Settings:
    """The snapshots of all nodes in a folder, which the small store does not bound."""
    folder = tmp_path / "share"
    folder.mkdir()
    return {"snapshot": {"store": "file"}, "snapshot.file": {"path": str(folder)}}


def reasons(node: Node) -> str:
    return " ".join((node.status() or {"reasons": ()})["reasons"])


def lose_store(hub: Node) -> None:
    """Kill the hub and throw its streams away."""
    hub.kill()
    while hub.signal_server(signal.SIGKILL):
        time.sleep(0.02)
    shutil.rmtree(hub.store)


# -- the quick ones


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


def test_a_new_node_without_a_file_gets_the_whole_database(tmp_path: Path) -> None:
    """Schema, rows from before the log's beginning, rows from before the installation; it writes at once."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    hub, leaf = small_store(cluster)
    hub.execute(WRITE, "from before the installation", 1, 0, "")
    leaf.db.unlink()
    with cluster:
        hub.start()
        eventually(hub.settled, 20, "the hub works alone")
        hub.execute(WRITE, "from before the log's beginning", 1, 1, "")
        churn(hub, MORE_THAN_THE_STREAM_MB)
        save(hub)
        leaf.start()
        eventually(leaf.db.exists, 30, "the file is there")
        leaf.execute(WRITE, "of the new node", 2, 1, "")
        cluster.wait_settled(30)
        assert hub.execute("SELECT count(*) FROM item") == leaf.execute("SELECT count(*) FROM item") == [(3,)]
        assert not list(leaf.folder.glob(".app.db*")), "files are left over"


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
                eventually(lambda away=away: "caught up from a snapshot" in away.log_text(), 60, "caught up")  # type: ignore[misc]
                time.sleep(1)
        nothing_lost(cluster, writers)


@pytest.mark.slow
@pytest.mark.parametrize("snapshot_before", [False, True])
def test_a_stream_that_was_made_anew(tmp_path: Path, snapshot_before: bool) -> None:
    """Somebody removed it, while all nodes were up."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 2)
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
def test_a_hub_whose_streams_are_gone(tmp_path: Path) -> None:
    """The snapshots with them. One leaf is away at that time, and comes back much later."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 2)
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
def test_a_hub_that_was_installed_anew(tmp_path: Path) -> None:
    """A new card: no database, no streams. One leaf is up, another one comes back later."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 2)
    hub, leaf, other = cluster.nodes.values()
    writers = writers_of([leaf, other])
    with cluster:
        cluster.start()
        with writing(writers):
            time.sleep(2)
            other.stop()
            lose_store(hub)
            for path in hub.folder.glob("*app.db*"):
                path.unlink()
            hub.start()
            eventually(hub.db.exists, 60, "the hub has a database again")
            time.sleep(2)
            other.start()
            eventually(other.connected, 30, "back")
        nothing_lost(cluster, writers)


@pytest.mark.slow
def test_a_node_with_rows_of_its_own(tmp_path: Path) -> None:
    """It was used alone before: its rows, which no trigger has seen, and the cluster's become one."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    hub, leaf = small_store(cluster)
    writers = writers_of([hub])
    with leaf.open_db() as connection:
        connection.executemany(WRITE, [(f"own-{number}", 2, number, "x") for number in range(500)])
        connection.execute(WRITE, ("n1-1", 2, 1000, "the same key on both sides"))
    with cluster:
        hub.start()
        eventually(hub.settled, 20, "the hub works alone")
        with writing(writers):
            churn(hub, MORE_THAN_THE_STREAM_MB)
            leaf.start()
            eventually(lambda: "caught up from a snapshot" in leaf.log_text(), 60, "caught up")
        wait_same(cluster, 60)
        assert hub.execute("SELECT count(*) FROM item WHERE id LIKE 'own-%'") == [(500,)]
        assert hub.execute("SELECT node FROM item WHERE id = 'n1-1'") == [(1,)]


@pytest.mark.slow
def test_a_database_restored_from_an_old_backup(tmp_path: Path) -> None:
    """What it had written and published since the backup comes back; so does what others deleted: as deleted."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    hub, leaf = small_store(cluster)
    writers = writers_of([hub])
    with cluster:
        cluster.start()
        with writing(writers):
            leaf.execute(WRITE, "from before", 2, 1, "")
            leaf.execute(WRITE, "deleted since", 2, 2, "")
            cluster_has = ("from before", "deleted since")
            eventually(lambda: all(hub.execute("SELECT 1 FROM item WHERE id = ?", id) for id in cluster_has), 20)
            leaf.stop()
            backup = tmp_path / "backup.db"
            with contextlib.closing(sqlite3.connect(backup)) as target, leaf.open_db() as source:
                source.backup(target)
            leaf.start()
            leaf.execute(WRITE, "after the backup", 2, 3, "")
            leaf.execute(WRITE, "from before", 2, 4, "edited after the backup")
            hub.execute("DELETE FROM item WHERE id = 'deleted since'")
            eventually(lambda: hub.execute("SELECT 1 FROM item WHERE id = 'after the backup'"), 20, "published")
            leaf.stop()
            churn(hub, MORE_THAN_THE_STREAM_MB)
            for path in leaf.folder.glob("app.db*"):
                path.unlink()
            backup.rename(leaf.db)
            leaf.execute(WRITE, "after the restore", 2, 5, "")
            leaf.start()
            eventually(lambda: "caught up from a snapshot" in leaf.log_text(), 60, "caught up")
        wait_same(cluster, 60)
        found = hub.execute("SELECT id, payload FROM item WHERE node = 2 AND id NOT LIKE 'shared%' ORDER BY id")
        assert found == [
            ("after the backup", ""),
            ("after the restore", ""),
            ("from before", "edited after the backup"),
        ]


@pytest.mark.slow
def test_a_card_that_was_cloned(tmp_path: Path) -> None:
    """Two devices with one node id: both say so; with an id of its own the copy is a node like any other."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    hub, leaf = cluster.nodes.values()
    with cluster:
        cluster.start()
        leaf.execute(WRITE, "of the original", 2, 1, "")
        cluster.wait_settled()
        leaf.stop()
        clone = cluster.add(3, leaf.settings)
        clone.db.unlink()
        shutil.copy(leaf.db, clone.db)
        clone.configure(merged(clone.settings, {"": {"node_id": 2}}))
        leaf.start()
        clone.start()
        eventually(lambda: "its own" in reasons(leaf) + reasons(clone), 40, "one of them says so")
        leaf.execute(WRITE, "of the original, later", 2, 2, "")
        clone.execute(WRITE, "of the clone", 2, 2, "")
        clone.stop()
        clone.configure({**clone.settings, "": {"node_id": 3}})
        clone.start()
        cluster.wait_settled(60)
        assert hub.execute("SELECT count(*) FROM item") == [(3,)]
        eventually(lambda: all((node.status() or {})["status"] == "healthy" for node in (hub, leaf, clone)), 60)


# -- which snapshot


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_snapshot_is_passed_over_for_the_next_older_one(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "share"
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=shared_folder(tmp_path))
    hub, leaf = small_store(cluster)
    with cluster:
        cluster.start()
        cluster.wait_settled()
        leaf.stop()
        leaf.execute(WRITE, "while away", 2, 1, "")
        churn(hub, MORE_THAN_THE_STREAM_MB)
        older = save(hub)
        hub.execute(WRITE, "between", 1, 1, "")
        eventually(hub.settled, 10)
        newer = save(hub)
        hub.signal(signal.SIGSTOP)  # nobody takes another one
        [file] = [path for path in folder.glob(f"{newer}*") if path.suffix != ".json"]
        size = file.stat().st_size
        if damage == "flip":
            with file.open("r+b") as damaged:
                damaged.seek(size // 2)
                byte = damaged.read(1)
                damaged.seek(size // 2)
                damaged.write(bytes([byte[0] ^ 1]))
        elif damage == "cut":
            os.truncate(file, size // 2)
        else:
            file.unlink()
        leaf.start()
        eventually(lambda: "caught up from a snapshot" in leaf.log_text(), 60, "caught up")
        assert f"caught up from a snapshot id={older}" in leaf.log_text()
        hub.signal(signal.SIGCONT)
        cluster.wait_settled(30)
        assert hub.execute("SELECT count(*) FROM item") == [(2,)]


@pytest.mark.slow
def test_without_any_snapshot_a_node_waits_and_says_so(tmp_path: Path) -> None:
    """It never goes on with a hole; what is written there meanwhile is kept."""
    port = free_port()
    with Cluster(tmp_path, SCHEMA) as cluster:
        more = {"nats": {"urls": [f"nats://127.0.0.1:{port}"], **QUICK}}
        one, other = cluster.add(1, more), cluster.add(2, more)
        with bare_server(tmp_path / "nats", port=port):
            asyncio.run(make_stream(port, 2 << 20))
            cluster.start()
            one.execute(WRITE, "first", 1, 1, "")
            cluster.wait_settled()
            other.stop()
            churn(one, MORE_THAN_THE_STREAM_MB)
            one.stop()
            other.start()
            eventually(lambda: "waiting for a snapshot" in reasons(other), 30, "the status says what it waits for")
            other.execute(WRITE, "while waiting", 2, 1, "")
            time.sleep(5)
            assert (other.status() or {})["status"] == "degraded"
            assert other.execute("SELECT count(*) FROM bulk") == [(0,)], "it went on with a hole"
            one.start()
            cluster.wait_settled(60)
            assert one.execute("SELECT count(*) FROM item") == [(2,)]


@pytest.mark.slow
def test_an_operator_declares_a_node_complete(tmp_path: Path) -> None:
    """The only node that had everything is gone for good."""
    port = free_port()
    with Cluster(tmp_path, SCHEMA) as cluster:
        more = {"nats": {"urls": [f"nats://127.0.0.1:{port}"], **QUICK}}
        one, other, third = cluster.add(1, more), cluster.add(2, more), cluster.add(3, more)
        with bare_server(tmp_path / "nats", port=port):
            asyncio.run(make_stream(port, 2 << 20))
            cluster.start()
            one.execute(WRITE, "first", 1, 1, "")
            cluster.wait_settled()
            other.stop()
            third.stop()
            churn(one, MORE_THAN_THE_STREAM_MB)
            one.kill()
            del cluster.nodes[1]
            other.start()
            third.start()
            other.execute(WRITE, "of the second", 2, 1, "")
            third.execute(WRITE, "of the third", 3, 1, "")
            for node in (other, third):
                eventually(lambda node=node: "waiting for a snapshot" in reasons(node), 30, "waits")  # type: ignore[misc]
            save(other, force=True)
            cluster.wait_settled(60)
            assert third.execute("SELECT id FROM item ORDER BY id") == [
                ("first",), ("of the second",), ("of the third",),
            ]  # fmt: skip


async def make_stream(port: int, max_bytes: int) -> None:
    """As an administrator does."""
    client = await nats.connect(f"nats://127.0.0.1:{port}")
    await client.jetstream().add_stream(
        name=STREAM, subjects=["harmonylite-change-log.1.*"], max_bytes=max_bytes, allow_direct=True
    )
    await client.close()


@pytest.mark.slow
def test_rows_from_before_the_installation_reach_everybody(tmp_path: Path) -> None:
    """Both nodes had a life before: neither log nor trigger knows these rows, and nobody asks for a snapshot."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 2)
    hub, leaf, other = cluster.nodes.values()
    for node in (hub, leaf):
        with node.open_db() as connection:
            rows = [(f"of-{node.node_id}-{number}", node.node_id, number, "x") for number in range(300)]
            connection.executemany(WRITE, rows)
    with cluster:
        cluster.start()
        eventually(lambda: other.execute("SELECT count(*) FROM item") == [(600,)], 60, "all rows are on the third node")
        cluster.wait_settled(30)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_thirty_times_while_catching_up(tmp_path: Path) -> None:
    """At random moments of fetching, unpacking, merging, publishing; the application writes on. Files that a kill
    leaves are used again or removed."""
    kills, moments = 30, random.Random(3)
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=shared_folder(tmp_path))
    hub, leaf = small_store(cluster)
    writers = writers_of([hub, leaf])
    hit = {"before": 0, "fetching": 0, "merging": 0, "after": 0}
    with cluster:
        cluster.start()
        with writing(writers):
            leaf.kill()
            gap(hub)
            for _ in range(kills):
                begun = len(leaf.log_text())
                leaf.start()
                eventually(lambda begun=begun: "connected to NATS" in leaf.log_text()[begun:], 20, "connected")  # type: ignore[misc]
                time.sleep(moments.uniform(0.0, 0.8))
                leaf.kill()
                text = leaf.log_text()[begun:]
                over = "snapshot merged" in text or "caught up, publishing" in text
                merging = any(leaf.folder.glob(".*snapshot-*"))
                fetching = "fetching a snapshot" in text
                hit["after" if over else "merging" if merging else "fetching" if fetching else "before"] += 1
                if over:
                    gap(hub)
            leaf.start()
        nothing_lost(cluster, writers)
        print(f"killed: {hit}")
        assert hit["merging"] >= 5, hit
        eventually(lambda: not list(leaf.folder.glob(".app.db*")), 20, "no files are left over")


def gap(hub: Node) -> None:
    """Many rows are new, the stream has dropped what brought them, and there is a snapshot."""
    with hub.open_db() as connection:
        connection.execute("BEGIN IMMEDIATE")
        rows = ((1000 + number, os.urandom(40)) for number in range(40_000))
        connection.executemany("INSERT OR REPLACE INTO bulk VALUES (?, ?)", rows)
        connection.execute("COMMIT")
    churn(hub, MORE_THAN_THE_STREAM_MB)
    save(hub)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_over_a_link_that_breaks_again_and_again(tmp_path: Path) -> None:
    """The snapshot comes through the very link that is cut as soon as it begins to come: each time it goes on where it
    was, and arrives."""
    cluster, [link] = hub_and_leaves(tmp_path, SCHEMA, 1, proxied=True)
    hub, leaf = cluster.nodes.values()
    hub.configure(merged(hub.settings, {"nats": {"max_store": 48 << 20}}))
    writers = writers_of([hub, leaf])
    cuts = 0
    with cluster:
        cluster.start()
        cluster.wait_settled()
        leaf.stop()
        with writing(writers):
            with hub.open_db() as connection:
                rows = ((1000 + number, os.urandom(10_000)) for number in range(1000))
                connection.executemany("INSERT INTO bulk VALUES (?, ?)", rows)
            churn(hub, 45)
            save(hub)
            begun = len(leaf.log_text())

            def fetches() -> int:
                return leaf.log_text()[begun:].count("fetching a snapshot")

            def bridged() -> bool:
                return "caught up from a snapshot" in leaf.log_text()[begun:]

            leaf.start()
            for number in range(1, 6):
                eventually(lambda number=number: fetches() >= number or bridged(), 60, "it begins again")  # type: ignore[misc]
                if bridged():
                    break
                time.sleep(0.03)
                link.set(Link.CUT)
                cuts += 1
                eventually(lambda: not leaf.connected(), 20, "the leaf has noticed")
                link.set(Link.PASS)
            eventually(bridged, 60, "it arrives")
        nothing_lost(cluster, writers)
        print(f"{cuts} cuts")
        assert cuts


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_merge_over_a_link_that_is_cut_all_the_time(tmp_path: Path) -> None:
    """It takes longer than the link ever holds, and does not begin again."""
    cluster, [link] = hub_and_leaves(tmp_path, SCHEMA, 1, more=shared_folder(tmp_path), proxied=True)
    hub, leaf = small_store(cluster)
    writers = writers_of([hub, leaf])
    with cluster:
        cluster.start()
        cluster.wait_settled()
        leaf.stop()
        with hub.open_db() as connection:
            for first in range(1000, 301_000, 10_000):  # each fits into the stream
                connection.execute("BEGIN IMMEDIATE")
                rows = ((first + number, os.urandom(40)) for number in range(10_000))
                connection.executemany("INSERT INTO bulk VALUES (?, ?)", rows)
                connection.execute("COMMIT")
        churn(hub, MORE_THAN_THE_STREAM_MB)
        save(hub)
        begun = len(leaf.log_text())
        with writing(writers):
            leaf.start()
            merging = re.compile("merging snapshot [^,]*, ([0-9]+) %")
            percents: list[int] = []
            cuts = 0

            def bridged() -> bool:
                found = merging.search(reasons(leaf))
                percents.extend([int(found[1])] if found else [])
                return "caught up from a snapshot" in leaf.log_text()[begun:]

            eventually(lambda: bridged() or percents, 60, "it merges", pause_s=0.02)
            while not bridged():
                link.set(Link.CUT)
                cuts += 1
                eventually(lambda: bridged() or not leaf.connected(), 20, "the leaf has noticed", pause_s=0.05)
                link.set(Link.PASS)
                eventually(lambda: bridged() or leaf.connected(), 20, "the leaf is back", pause_s=0.05)
        nothing_lost(cluster, writers)
        print(f"{cuts} cuts, {percents}")
        assert cuts >= 2
        assert percents == sorted(percents), "it began again"
        assert hub.execute("SELECT count(*) FROM bulk") == leaf.execute("SELECT count(*) FROM bulk")


@pytest.mark.slow
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
        for path in leaf.folder.glob("app.db*"):
            path.unlink()
        leaf.start()
        eventually(leaf.db.exists, 30, "a new database")
        cluster.wait_settled(30)
        assert leaf.execute("SELECT count(*) FROM item") == [(2000,)]
        assert (leaf.status() or {})["status"] == "healthy"
