"""Trouble an operator can cause or meet: one clear line, the application undisturbed, and all well again afterwards."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import time
from pathlib import Path

import pytest

from tests.disks import fill, small_disk
from tests.e2e.cluster import QUICK, Cluster, Node, eventually, hub_and_leaves
from tests.e2e.writers import SCHEMA, WRITE
from tests.stream.support import bare_server, free_port, nats_server_binary

pytestmark = pytest.mark.slow


def write_rows(node: Node, count: int, size: int = 10, name: str = "row") -> None:
    """Rows that do not compress; the application is never refused or held up."""
    with node.open_db() as connection:
        for number in range(count):
            row = (f"{name}-{number}", node.node_id, number, os.urandom(size // 2).hex())
            connection.execute(WRITE, row)


def write_in_one(node: Node, count: int, size: int, name: str) -> None:
    """As `write_rows`, in one transaction."""
    with node.open_db() as connection:
        connection.execute("BEGIN")
        rows = ((f"{name}-{number}", node.node_id, number, os.urandom(size).hex()) for number in range(count))
        connection.executemany(WRITE, rows)
        connection.execute("COMMIT")


def lines_with(node: Node, text: str) -> list[str]:
    return [line for line in node.log_text().splitlines() if text in line]


def test_a_port_that_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupant, Cluster(tmp_path, SCHEMA) as cluster:
        port = occupant.getsockname()[1]
        hub = cluster.add(1, {"nats": {"leaf_listen": f"127.0.0.1:{port}", **QUICK}})
        leaf = cluster.add(2, {"nats": {"leaf_servers": [f"nats-leaf://127.0.0.1:{port}"], **QUICK}})
        hub.start()
        eventually(lambda: lines_with(hub, str(port)), 20, "a line that names the port")
        [line, *_] = lines_with(hub, str(port))
        assert "in use" in line, line
        write_rows(hub, 20)
        occupant.close()
        leaf.start()
        cluster.wait_settled(60)
        assert leaf.execute("SELECT count(*) FROM item") == [(20,)]


def test_a_server_program_that_is_missing(tmp_path: Path) -> None:
    with Cluster(tmp_path, SCHEMA) as cluster:
        binary = tmp_path / "nats-server"
        node = cluster.add(1, {"nats": {"server_binary": str(binary), **QUICK}})
        node.start()
        said = f"there is no {binary}"
        eventually(lambda: lines_with(node, said), 20, "a line that names the program")
        # What is written before is old when capture begins, and not pending.
        eventually(lambda: (node.status() or {}).get("cdc_installed"), 20, "capture is installed")
        write_rows(node, 20)
        eventually(lambda: (node.status() or {}).get("pending_rows") == 20, 10, "the rows wait")
        binary.symlink_to(nats_server_binary())
        cluster.wait_settled(60)


def test_a_store_that_is_full(tmp_path: Path) -> None:
    """An external server whose store has no room: the rows wait, and go out once it has some."""
    port = free_port()
    url = f"nats://127.0.0.1:{port}"
    folder = tmp_path / "nats"
    with Cluster(tmp_path, SCHEMA) as cluster:
        one, other = [cluster.add(number, {"nats": {"urls": [url], **QUICK}}) for number in (1, 2)]
        with bare_server(folder, "jetstream { max_file_store: 1MB }", port=port):
            cluster.start()
            write_rows(one, 1, name="small")
            cluster.wait_settled()
            # Piece by piece: nats-server 2.15 leaves an atomic batch that meets the limit unanswered.
            batches = 0
            while not lines_with(one, "insufficient"):
                batches += 1
                assert batches < 100, "no line that says what is full"
                write_rows(one, 50, 1000, name=f"large-{batches}")
                eventually(lambda: one.settled() or lines_with(one, "insufficient"), 20, "stored or refused")
            write_rows(one, 20, name="late")
            assert len(lines_with(one, "insufficient")) < 5, "one line now and then is enough"
            status = one.status()
            assert status is not None
            assert status["pending_rows"], status
            eventually(
                lambda: "insufficient" in " ".join((one.status() or {})["reasons"]), 20, "the status says it too"
            )
        with bare_server(folder, port=port):
            cluster.wait_settled(60)
            assert other.execute("SELECT count(*) FROM item") == [(1 + 50 * batches + 20,)]


@pytest.mark.parametrize("leaf_first", [False, True])
def test_a_hub_with_a_tiny_store(tmp_path: Path, leaf_first: bool) -> None:
    """The stream drops its oldest messages rather than refuse new ones; nodes that are up get every row.

    leaf_first: the hub's database is not there yet, so that a leaf makes the stream.
    """
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    with cluster:
        hub, leaf = cluster.nodes.values()
        hub.configure({"nats": {**hub.settings["nats"], "max_store": 1 << 20}})
        away = hub.db.rename(hub.folder / "away.db") if leaf_first else None
        hub.start()
        leaf.start()
        eventually(lambda: "caught up" in leaf.log_text(), 20, "the leaf replicates")
        if away:
            away.rename(hub.db)
        eventually(lambda: "caught up" in hub.log_text(), 20, "the hub replicates")
        for batch in range(20):
            for node in (leaf, hub):
                write_rows(node, 50, 4000, name=f"n{node.node_id}-{batch}")
            eventually(cluster.converged, 30, f"all rows of round {batch} everywhere")
        assert hub.execute("SELECT count(*) FROM item") == [(2000,)]


def held(node: Node) -> int:
    """Rows that are pending; -1: one is, or was a moment ago, that waits only to be sent."""
    status = node.status()
    if status is None or not status["db_connected"]:
        return -1
    log = node.execute("SELECT count(*) FROM __harmonylite__item_change_log")
    return status["pending_rows"] if log == [(0,)] else -1


def absorb_all(node: Node, pending: int) -> None:
    """A start absorbs what is in the log as a batch of its own; so many rows are pending afterwards."""
    node.start()
    eventually(lambda: held(node) == pending, 20, "everything is absorbed")
    node.stop()


def test_a_transaction_larger_than_the_stream(tmp_path: Path) -> None:
    """It cannot be kept by the stream; that is said, and everything else goes on."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    with cluster:
        hub, leaf = cluster.nodes.values()
        hub.configure({"nats": {**hub.settings["nats"], "max_store": 2 << 20}})
        cluster.start()
        eventually(lambda: "caught up" in leaf.log_text(), 20, "the leaf replicates")
        write_in_one(leaf, 250, 20_000, "huge")
        write_rows(leaf, 10, name="after")
        write_rows(hub, 10, name="of the hub")
        eventually(lambda: hub.execute("SELECT count(*) FROM item WHERE id LIKE 'after%'") == [(10,)], 30, "later rows")
        eventually(lambda: leaf.execute("SELECT count(*) FROM item WHERE node = 1") == [(10,)], 30, "the hub's rows")
        assert hub.execute("SELECT count(*) FROM item WHERE id LIKE 'huge%'") == [(0,)]
        assert "ERROR" in leaf.log_text()
        eventually(lambda: held(leaf) == 250, 20, "nothing else waits")
        assert (leaf.status() or {})["status"] == "degraded"
        noise = len(leaf.log_text().splitlines())
        time.sleep(10)
        assert len(leaf.log_text().splitlines()) < noise + 5, "it tries again and again"
        # A row of it that is written again takes nothing with it, and goes by itself.
        write_rows(leaf, 10, name="later")
        leaf.execute("UPDATE item SET sequence = 1000 WHERE id = 'huge-7'")
        eventually(lambda: hub.execute("SELECT sequence FROM item WHERE id = 'huge-7'") == [(1000,)], 30, "the row")
        eventually(lambda: held(leaf) == 249, 20, "that row does not wait any more")
        # Stopping does not wait for it, and what was behind it is not sent again.
        sent = (hub.status() or {})["positions"][0]["sequence"]
        begun = time.monotonic()
        assert leaf.stop() == 0
        assert time.monotonic() - begun < 4
        leaf.start()
        eventually(
            lambda: held(leaf) == 249 and "hold" in " ".join((leaf.status() or {})["reasons"]), 20, "it is told again"
        )
        write_rows(leaf, 1, name="last")
        eventually(lambda: hub.execute("SELECT count(*) FROM item WHERE id LIKE 'last%'") == [(1,)], 30, "the last row")
        assert (hub.status() or {})["positions"][0]["sequence"] == sent + 1
        # Nor does it keep the node awake.
        settings = leaf.settings
        leaf.configure({**settings, "": {"sleep_timeout": 500}})
        leaf.signal(signal.SIGHUP)
        eventually(lambda: not leaf.running, 20, "the leaf sleeps")
        leaf.configure(settings)
        leaf.start()
        # Once the stream holds more, it goes.
        hub.stop()
        hub.configure({"nats": {**hub.settings["nats"], "max_store": 64 << 20}})
        hub.start()
        cluster.wait_settled(60)
        assert hub.execute("SELECT count(*) FROM item WHERE id LIKE 'huge%'") == [(250,)]
        eventually(lambda: (leaf.status() or {})["status"] == "healthy", 20, "all is well")


def test_a_transaction_larger_than_the_stream_of_a_node_that_was_offline(tmp_path: Path) -> None:
    """The last change writes a row of it again: nothing in between is kept back with it."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    with cluster:
        hub, leaf = cluster.nodes.values()
        hub.configure({"nats": {**hub.settings["nats"], "max_store": 2 << 20}})
        absorb_all(leaf, 0)
        write_in_one(leaf, 250, 20_000, "huge")
        absorb_all(leaf, 250)
        write_rows(leaf, 20, name="small")
        absorb_all(leaf, 270)
        leaf.execute("UPDATE item SET sequence = 1000 WHERE id = 'huge-7'")
        absorb_all(leaf, 270)
        leaf.start()
        hub.start()
        eventually(lambda: held(leaf) == 249, 60, "all but the large one is published")
        assert hub.execute("SELECT count(*) FROM item WHERE id LIKE 'small%'") == [(20,)]
        assert hub.execute("SELECT id, sequence FROM item WHERE id LIKE 'huge%'") == [("huge-7", 1000)]
        assert len(lines_with(leaf, "published in smaller groups")) == 1


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """Of the node that receives: one line, the daemon stays up, and what waited arrives when there is room."""
    disk = tmp_path / "node2"
    with small_disk(disk, "16m"):
        cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
        with cluster:
            hub, leaf = cluster.start().nodes.values()
            write_rows(hub, 10, name="before")
            cluster.wait_settled()
            ballast = disk / "ballast"
            fill(ballast)
            write_rows(hub, 200, 20_000, name="big")
            eventually(lambda: lines_with(leaf, "cannot be written"), 20, "a line about the disk")
            with pytest.raises(sqlite3.OperationalError, match=r"full|disk I/O"):
                write_rows(leaf, 200, 20_000, name="local")
            assert leaf.running
            states = [leaf.status() for _ in range(10)]
            assert all(status and status["status"] != "healthy" for status in states), states[-1]
            assert len(lines_with(leaf, "cannot be written")) < 5, "one line now and then is enough"
            ballast.unlink()
            eventually(
                lambda: leaf.execute("SELECT count(*) FROM item WHERE id LIKE 'big%'") == [(200,)], 60, "all rows"
            )
            write_rows(leaf, 10, name="after")
            cluster.wait_settled()
            assert "Traceback" not in leaf.log_text()
            assert "SIGBUS" not in leaf.log_text()
            assert leaf.stop() == 0


def test_a_server_that_keeps_dying_does_not_disturb_the_application(tmp_path: Path) -> None:
    """Killed again and again: said once each time, counted, unhealthy after some; well again by itself."""
    with Cluster(tmp_path, SCHEMA) as cluster:
        node = cluster.add(1, {"nats": {**QUICK}})
        cluster.start()
        for number in range(3):
            eventually(lambda: node.signal_server(signal.SIGKILL), 30, "a server to kill")
            write_rows(node, 5, name=f"kill-{number}")
        eventually(lambda: (node.status() or {}).get("status") == "unhealthy", 20, "unhealthy")
        eventually(node.settled, 30, "the node works again")
        assert lines_with(node, "killed by signal 9")
