"""Start, stop, reload: what a service manager does to a daemon, and what it must not leave behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from harmonylite.observe.control import ControlError, query
from tests.e2e.cluster import Cluster, eventually, hub_and_leaves, process_gone
from tests.e2e.notify import NotifySocket
from tests.e2e.writers import SCHEMA, WRITE
from tests.stream.support import free_port


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


def test_a_database_that_was_cleaned_up_takes_its_node_id_at_once(tmp_path: Path) -> None:
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    with cluster:
        hub, leaf = cluster.start().nodes.values()

        def registered() -> str:
            try:
                nodes = query(hub.db, {"command": "cluster"})["nodes"]
            except ControlError:
                return ""
            return next((str(node["status"]) for node in nodes if node["node_id"] == 2), "")

        eventually(lambda: registered() == "alive", 20, "the leaf is announced")
        assert leaf.stop() == 0
        assert registered() == "stopped"
        command = [sys.executable, "-m", "harmonylite", "cleanup", "--all", "--force", "--config", str(leaf.config)]
        subprocess.run(command, check=True, timeout=30, capture_output=True)
        leaf.start()
        eventually(lambda: registered() == "alive", 20, "the leaf is announced again")
        eventually(leaf.settled, 20, "the leaf replicates")
        assert "used twice" not in leaf.log_text()


def test_ready_is_who_captures(tmp_path: Path) -> None:
    with Cluster(tmp_path, SCHEMA) as cluster, NotifySocket(tmp_path / "notify") as notify:
        node = cluster.add(1, environment={"NOTIFY_SOCKET": str(notify.path)})
        triggers = "SELECT count(*) FROM sqlite_schema WHERE type = 'trigger' AND name LIKE '__harmonylite__%'"
        with node.open_db() as application:
            application.execute("BEGIN EXCLUSIVE")
            node.start()
            eventually(lambda: any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in notify.received()))
            assert "READY=1" not in notify.received()
            application.execute("ROLLBACK")
        eventually(lambda: "READY=1" in notify.received(), 20, "ready")
        assert node.execute(triggers)[0][0] > 0
        assert notify.received().count("READY=1") == 1


def test_ready_is_also_who_waits_for_a_database(tmp_path: Path) -> None:
    with Cluster(tmp_path, "") as cluster, NotifySocket(tmp_path / "notify") as notify:
        node = cluster.add(1, environment={"NOTIFY_SOCKET": str(notify.path)})
        node.start()
        eventually(lambda: "READY=1" in notify.received(), 20, "ready")
        waiting = f"STATUS=waiting for the database {node.db}: there is no such file yet"
        assert waiting in notify.received()
        node.signal(signal.SIGHUP)
        eventually(lambda: notify.received().count("READY=1") == 2, 10, "reloaded")
        node.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT)")
        eventually(lambda: (node.status() or {}).get("tables_tracked") == 1, 10, "the table is captured")
        eventually(lambda: any("online" in line for line in notify.received()), 20, "the status says so")
        assert notify.received().count("READY=1") == 2


def test_a_database_of_a_newer_version_is_a_start_that_failed(tmp_path: Path) -> None:
    with Cluster(tmp_path, SCHEMA) as cluster, NotifySocket(tmp_path / "notify") as notify:
        node = cluster.add(1, environment={"NOTIFY_SOCKET": str(notify.path)})
        node.execute("CREATE TABLE __harmonylite__meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID")
        node.execute("INSERT INTO __harmonylite__meta VALUES ('format', 99)")
        node.start()
        assert node.process is not None
        assert node.process.wait(20) == 1
        assert "READY=1" not in notify.received()


def test_sighup_takes_over_limits_and_says_what_needs_a_restart(tmp_path: Path) -> None:
    with Cluster(tmp_path, SCHEMA) as cluster:
        node = cluster.add(1)
        cluster.start()
        eventually(node.settled, 20, "the node replicates")
        node.configure(
            {"": {"scan_max_changes": 7, "replicate": False}, "nats": {"user_name": "app", "user_password": "geheim"}}
        )
        node.signal(signal.SIGHUP)
        eventually(lambda: "configuration reloaded" in node.log_text(), 10, "a line about it")
        [line] = [line for line in node.log_text().splitlines() if "configuration reloaded" in line]
        assert "changed=scan_max_changes" in line
        assert "needs_restart=replicate,nats.user_name,nats.user_password" in line
        assert "geheim" not in node.log_text()
        with node.open_db() as application:
            application.execute("BEGIN")
            application.executemany(WRITE, ((f"row-{number}", 1, number, "") for number in range(21)))
            application.execute("COMMIT")
        eventually(node.settled, 20, "published")
        node.configure({"": {"sleep_timeout": 500, "scan_max_changes": 7}})
        node.signal(signal.SIGHUP)
        assert node.process is not None
        assert node.process.wait(20) == 0, "asleep after half a second without a change"


def test_rows_without_a_key_are_shown(tmp_path: Path) -> None:
    with Cluster(tmp_path, "CREATE TABLE item (id TEXT PRIMARY KEY, name TEXT)") as cluster:
        port = free_port()
        node = cluster.add(1, {"prometheus": {"enable": True, "bind": f"127.0.0.1:{port}"}})
        node.execute("INSERT INTO item VALUES (NULL, 'a'), (NULL, 'b'), ('c', 'c')")
        cluster.start()
        eventually(lambda: (node.status() or {}).get("unkeyed_rows") == 2, 20, "both rows are counted")
        status = node.status()
        assert status is not None
        assert status["status"] == "degraded"
        assert any(reason.startswith("2 rows not replicated: NULL") for reason in status["reasons"]), status
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert "harmonylite_unkeyed_rows 2.0" in answer.read().decode()


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
