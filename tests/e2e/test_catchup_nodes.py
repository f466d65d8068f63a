"""Nodes whose database is not what the cluster last knew of them: new, used alone before, restored, cloned, away for
longer than deletes are remembered. Applications write all the while, on every node that has a database."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harmonylite.db.database import ReplicaSettings
from harmonylite.db.reconcile import FORGOTTEN
from harmonylite.db.replica import Replica
from tests.e2e.cluster import Cluster, Node, eventually, hub_and_leaves, merged
from tests.e2e.snapshots import (
    MORE_THAN_THE_STREAM_MB,
    SCHEMA,
    NatsPlace,
    Place,
    churn,
    delete,
    every_write_counts,
    lose_database,
    nothing_lost,
    reasons,
    save,
    small_store,
    wait_caught_up,
    write,
    writers_of,
)
from tests.e2e.writers import WRITE, Write, now_ms, writing

DAY_MS = 86_400_000
# Numbers that no writer has got to before it is started again, or before its card is copied.
LATER = 1_000_000


def hub_and_leaf(tmp_path: Path, place: Place) -> tuple[Cluster, Node, Node]:
    """The log holds little."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=place.settings)
    hub, leaf = small_store(cluster)
    return cluster, hub, leaf


@pytest.mark.parametrize("place", ["nats"], indirect=True)
def test_a_new_node_without_a_file_gets_the_whole_database(tmp_path: Path, place: Place) -> None:
    """Schema, rows from before the log's beginning, rows from before the installation; it writes at once."""
    cluster, hub, leaf = hub_and_leaf(tmp_path, place)
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


@pytest.mark.slow
def test_a_new_node_joins_a_cluster_that_never_rests(tmp_path: Path, place: Place) -> None:
    """Nobody has taken a snapshot: it asks for one. Its application writes from the moment that there is a file."""
    cluster, hub, leaf = hub_and_leaf(tmp_path, place)
    leaf.db.unlink()
    writers = writers_of([hub, leaf])
    with cluster:
        hub.start()
        eventually(hub.settled, 20, "the hub works alone")
        with writing(writers[:1]):
            churn(hub, MORE_THAN_THE_STREAM_MB)
            leaf.start()
            eventually(leaf.db.exists, 60, "the file is there")
            with writing(writers[1:]):
                eventually(leaf.connected, 30, "it replicates")
                time.sleep(2)
        nothing_lost(cluster, writers)
        assert not list(leaf.folder.glob(".app.db*")), "files are left over"


@pytest.mark.slow
def test_a_node_with_rows_of_its_own(tmp_path: Path, place: Place) -> None:
    """It was used alone before: its rows, which no trigger has seen, and the cluster's become one.

    Those count as written before all others: where the cluster has the same key, its row stays.
    """
    cluster, hub, leaf = hub_and_leaf(tmp_path, place)
    hub_writer, leaf_writer = writers_of([hub, leaf])
    with leaf.open_db() as connection:
        connection.executemany(WRITE, [(f"own-{number}", 2, number, "x") for number in range(500)])
        connection.execute(WRITE, ("both", 2, 1000, "the same key on both sides"))
    with cluster:
        hub.start()
        eventually(hub.settled, 20, "the hub works alone")
        both = write(hub, "both", 1)
        with writing([hub_writer]):
            churn(hub, MORE_THAN_THE_STREAM_MB)
            leaf.start()
            eventually(leaf.status, 20, "it sees what its application does from now on")
            with writing([leaf_writer]):
                wait_caught_up(leaf)
        eventually(lambda: hub.execute("SELECT count(*) FROM item WHERE id LIKE 'own-%'") == [(500,)], 60)
        # The ledger knows of versions, these rows have none: gone, on both nodes, they are no part of it.
        assert leaf.execute("SELECT count(*) FROM item WHERE id LIKE 'own-%'") == [(500,)]
        own = [delete(leaf, f"own-{number}", LATER + number) for number in range(500)]
        nothing_lost(cluster, [hub_writer, leaf_writer], [both, *own])
        assert hub.execute("SELECT node FROM item WHERE id = 'both'") == [(1,)]


@pytest.mark.slow
def test_a_database_restored_from_an_old_backup(tmp_path: Path, place: Place) -> None:
    """What it had written and published since the backup comes back; so does what others deleted: as deleted.

    Every write counts but those that only the lost card had: made after the last that the daemon published.
    """
    cluster, hub, leaf = hub_and_leaf(tmp_path, place)
    hub_writer, leaf_writer = writers_of([hub, leaf])
    by_hand: list[Write] = []
    with cluster:
        cluster.start()
        with writing([hub_writer]):
            with writing([leaf_writer]):
                by_hand += [write(leaf, "from before", 1), write(leaf, "deleted since", 2)]
                eventually(lambda: hub.execute("SELECT 1 FROM item WHERE id = 'deleted since'"), 20, "published")
                backup = tmp_path / "backup.db"
                with contextlib.closing(sqlite3.connect(backup)) as target, leaf.open_db() as source:
                    source.backup(target)
                by_hand += [write(leaf, "after the backup", 3), write(leaf, "from before", 4, "edited")]
                by_hand += [delete(hub, "deleted since", 1)]
                time.sleep(2)
            eventually(leaf.settled, 30, "all of it is published")
            leaf.stop()
            published = leaf_writer.writes()
            leaf_writer.first = LATER
            with writing([leaf_writer]):
                time.sleep(0.5)
            on_the_card = set(leaf_writer.writes()) - set(published)
            assert on_the_card
            lose_database(leaf)
            backup.rename(leaf.db)
            leaf_writer.first = 2 * LATER
            with writing([leaf_writer]):
                churn(hub, MORE_THAN_THE_STREAM_MB)
                begun = len(leaf.log_text())
                leaf.start()
                wait_caught_up(leaf, begun=begun)
        counted = [each for each in leaf_writer.writes() if each not in on_the_card]
        every_write_counts(cluster, [*by_hand, *hub_writer.writes(), *counted])
        assert hub.execute("SELECT payload FROM item WHERE id = 'from before'") == [("edited",)]
        assert hub.execute("SELECT id FROM item WHERE id IN ('after the backup', 'deleted since')") == [
            ("after the backup",)
        ]


@pytest.mark.slow
def test_a_card_that_was_cloned(tmp_path: Path, place: Place) -> None:
    """Two devices with one node id: both say so; with an id of its own the copy is a node like any other.

    Both applications had their commits: every write of either counts, also while two had the one id.
    """
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=place.settings)
    hub, leaf = cluster.nodes.values()
    hub_writer, leaf_writer = writers_of([hub, leaf])
    with cluster:
        cluster.start()
        with writing([hub_writer]):
            with writing([leaf_writer]):
                time.sleep(1)
            eventually(leaf.settled, 20, "what the card holds is published")
            leaf.stop()
            clone = cluster.add(3, leaf.settings)
            clone.db.unlink()
            shutil.copy(leaf.db, clone.db)
            clone.configure(merged(clone.settings, {"": {"node_id": 2}}))
            [clone_writer] = writers_of([clone])
            clone_writer.node, clone_writer.first, leaf_writer.first = 2, 2 * LATER, LATER
            with writing([leaf_writer]):
                leaf.start()
                with writing([clone_writer]):
                    clone.start()
                    eventually(lambda: "its own" in reasons(leaf) + reasons(clone), 40, "one of them says so")
                    time.sleep(2)
                # Else the last writes of the application that took itself for node 2 become node 3's.
                eventually(lambda: not clone.execute("SELECT 1 FROM __harmonylite__item_change_log"), 20, "absorbed")
                clone.stop()
                clone.configure({**clone.settings, "": {"node_id": 3}})
                clone_writer.node, clone_writer.first = 3, 3 * LATER
                with writing([clone_writer]):
                    clone.start()
                    eventually(clone.connected, 30, "connected")
                    time.sleep(2)
        nothing_lost(cluster, [hub_writer, leaf_writer, clone_writer])
        if isinstance(place, NatsPlace):  # half a minute, wherever snapshots are
            eventually(lambda: all((node.status() or {})["status"] == "healthy" for node in (hub, leaf, clone)), 60)


@pytest.mark.slow
def test_a_node_that_was_away_for_longer_than_deletes_are_remembered(tmp_path: Path, place: Place) -> None:
    """What the others deleted meanwhile, and have forgotten, is deleted here, too, and kept in the conflict log. What
    was written while away counts, even of a row that is long gone elsewhere."""
    cluster, hub, leaf = hub_and_leaf(tmp_path, place)
    hub_writer, leaf_writer = writers_of([hub, leaf])
    with cluster:
        cluster.start()
        old = [write(hub, f"old-{number}", number + 1) for number in range(20)]
        cluster.wait_settled()
        for node in (leaf, hub):
            node.stop()
            make_older(node, days=100)
        hub.start()
        eventually(hub.connected, 20, "the hub is back")
        for number in range(10):
            hub.execute("DELETE FROM item WHERE id = ?", f"old-{number}")
        eventually(hub.settled, 20, "the deletes are published")
        hub.stop()
        forget_deletes(hub, days=95)
        was_in_step(leaf, days=100)
        hub.start()
        eventually(hub.connected, 20, "the hub is back")
        with writing([hub_writer, leaf_writer]):
            by_hand = [write(leaf, "old-3", 1, "edited while away"), write(leaf, "old-13", 1, "edited while away")]
            churn(hub, MORE_THAN_THE_STREAM_MB)
            save(hub)
            begun = len(leaf.log_text())
            leaf.start()
            wait_caught_up(leaf, begun=begun)
        # Of those that were deleted only what was edited here is left.
        ago = 100 * DAY_MS
        by_hand += [replace(each, begun_ms=each.begun_ms - ago, done_ms=each.done_ms - ago) for each in old[10:]]
        nothing_lost(cluster, [hub_writer, leaf_writer], by_hand)
        kept = leaf.execute("SELECT count(*) FROM __harmonylite__conflict WHERE reason = ?", FORGOTTEN)
        assert kept == [(9,)]


def make_older(node: Node, *, days: int) -> None:
    """The rows of a node that is stopped, as if they had been written so long ago."""
    with node.open_db() as connection:
        connection.execute("UPDATE __harmonylite__item_version SET ts = ts - ?", (days * DAY_MS,))


def was_in_step(node: Node, *, days: int) -> None:
    """A node that is stopped, as if it had read nothing for so long."""
    with node.open_db() as connection:
        connection.execute(
            "UPDATE __harmonylite__meta SET value = value - ? WHERE name = 'synced_at_ms'", (days * DAY_MS,)
        )
        connection.execute("UPDATE __harmonylite__position SET stored_ns = stored_ns - ?", (days * DAY_MS * 1_000_000,))


def forget_deletes(node: Node, *, days: int) -> None:
    """A node that is stopped, as if its deletes had been made so long ago: beyond the 90 days that they are kept. The
    daemon forgets them an hour after its start."""
    with node.open_db() as connection:
        settled = "UPDATE __harmonylite__item_version SET settled_ms = ? WHERE deleted"
        assert connection.execute(settled, (now_ms() - days * DAY_MS,)).rowcount == 10
    replica = Replica(node.db, ReplicaSettings(node.node_id))
    replica.open()
    assert replica.prune_tombstones(now_ms()) == 10
    replica.close()


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
