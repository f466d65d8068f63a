"""Start, stop, reload: what a service manager does to a daemon, and what it must not leave behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, eventually, hub_and_leaves, process_gone
from tests.e2e.writers import SCHEMA, WRITE


def test_rows_travel_between_hub_and_leaf(tmp_path: Path) -> None:
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    with cluster:
        hub, leaf = cluster.start().nodes.values()
        hub.execute(WRITE, "from the hub", 1, 1, "a")
        leaf.execute(WRITE, "from the leaf", 2, 1, "b")
        cluster.wait_settled()
        leaf.execute("UPDATE item SET payload = 'edited' WHERE id = 'from the hub'")
        hub.execute("DELETE FROM item WHERE id = 'from the leaf'")
        eventually(lambda: hub.execute("SELECT id, payload FROM item") == [("from the hub", "edited")])
        cluster.wait_settled()


def test_sigterm_publishes_what_is_pending_and_leaves_nothing_behind(tmp_path: Path) -> None:
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    with cluster:
        hub, leaf = cluster.start().nodes.values()
        eventually(lambda: "caught up" in leaf.log_text(), 20, "the leaf replicates")
        with leaf.open_db() as connection:
            connection.execute("BEGIN")
            connection.executemany(WRITE, ((f"row-{number}", 2, number, "x" * 100) for number in range(5_000)))
            connection.execute("COMMIT")
        servers = leaf.server_pids()
        assert servers
        begun = time.monotonic()
        assert leaf.stop() == 0
        took = time.monotonic() - begun
        assert process_gone(servers)
        eventually(lambda: hub.execute("SELECT count(*) FROM item") == [(5_000,)], 20, "the hub has all rows")
        assert took < 6, f"{took:.1f} s"
        servers = hub.server_pids()
        assert hub.stop() == 0
        assert process_gone(servers)


def test_a_killed_daemon_leaves_no_server(tmp_path: Path) -> None:
    with Cluster(tmp_path, SCHEMA) as cluster:
        node = cluster.add(1)
        cluster.start()
        servers = node.server_pids()
        assert servers
        node.kill()
        eventually(lambda: process_gone(servers), 10, "the server has ended with its daemon")
        node.start()
        eventually(node.connected, 20, "the node is back")


def test_a_second_daemon_on_the_database_is_refused(tmp_path: Path) -> None:
    with Cluster(tmp_path, SCHEMA) as cluster:
        node = cluster.add(1)
        cluster.start()
        linked = tmp_path / "link.db"
        linked.symlink_to(node.db)
        other = tmp_path / "other.toml"
        other.write_text(f'db_path = "{linked}"\nnode_id = 2\n')
        for config in (node.config, other):
            second = subprocess.run(
                [sys.executable, "-m", "harmonylite", "run", "--config", str(config)],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            assert second.returncode == 1, second
            lines = (second.stdout + second.stderr).strip().splitlines()
            assert len(lines) == 1, lines
            assert "another daemon" in lines[0], lines
            assert str(node.pid) in lines[0], lines
        assert node.connected()


def test_sighup_reloads_logging_and_survives_a_wrong_file(tmp_path: Path) -> None:
    with Cluster(tmp_path, SCHEMA) as cluster:
        node = cluster.add(1)
        cluster.start()
        node.configure({"logging": {"format": "json"}})
        node.signal(signal.SIGHUP)
        eventually(lambda: '"configuration reloaded' in node.log_text(), 10, "a line in JSON")
        node.config.write_text("no such thing\n")
        node.signal(signal.SIGHUP)
        eventually(lambda: "configuration not reloaded" in node.log_text(), 10, "a line about the wrong file")
        assert node.connected()
        assert node.log_text().count("Traceback") == 0
        assert node.stop() == 0


@pytest.mark.slow
def test_sigterm_ends_in_time_when_nobody_takes_what_is_pending(tmp_path: Path) -> None:
    """The hub is frozen: five seconds of trying, then the end; the row is there at the next start."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    with cluster:
        hub, leaf = cluster.start().nodes.values()
        eventually(lambda: "caught up" in leaf.log_text(), 20, "the leaf replicates")
        hub.signal_server(signal.SIGSTOP)
        leaf.execute(WRITE, "row", 2, 1, "")
        servers = leaf.server_pids()
        begun = time.monotonic()
        assert leaf.stop(20) == 0
        took = time.monotonic() - begun
        assert process_gone(servers)
        print(f"ended after {took:.1f} s")
        assert took < 10
        hub.signal_server(signal.SIGCONT)
        leaf.start()
        eventually(lambda: hub.execute("SELECT id FROM item") == [("row",)], 30, "the row arrived after all")


@pytest.mark.slow
def test_a_daemon_that_starts_before_its_application(tmp_path: Path) -> None:
    """No database yet, then one without tables, then rows: replicated without a restart."""
    cluster, _ = hub_and_leaves(tmp_path, "", 1)
    with cluster:
        hub, leaf = cluster.nodes.values()
        hub.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT)")
        leaf.db.unlink(missing_ok=True)
        leaf.start()
        eventually(lambda: "there is no such file yet" in leaf.log_text(), 10, "a line that says what is missing")
        hub.start()
        eventually(lambda: "capture installed" in hub.log_text(), 10, "the hub captures")
        hub.execute("INSERT INTO item VALUES (1, 'early')")
        eventually(hub.settled, 20, "the hub has published")
        assert not leaf.db.exists(), "the application's file belongs to the application"
        leaf.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT)")
        eventually(lambda: (leaf.status() or {}).get("tables_tracked") == 1, 10, "the leaf's table is replicated")
        leaf.execute("INSERT INTO item VALUES (2, 'late')")
        cluster.wait_settled()
        assert hub.execute("SELECT * FROM item ORDER BY id") == [(1, "early"), (2, "late")]
