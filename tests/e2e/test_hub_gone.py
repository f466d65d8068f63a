"""A leaf whose hub goes and comes back: the unit's status line, the log, `/health` and the metrics say so at once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.cluster import eventually, hub_and_leaves
from tests.e2e.notify import NotifySocket
from tests.e2e.writers import SCHEMA
from tests.stream.support import free_port

# Longer than the test: nothing that is seen here comes from a round of housekeeping.
NEVER = {"": {"cleanup_interval": 3_600_000}}


def _get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        text: str = answer.read().decode()
    return text


@pytest.mark.slow
def test_everybody_is_told_when_the_hub_goes_and_when_it_is_back(tmp_path: Path) -> None:
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1, more=NEVER)
    hub, leaf = cluster.nodes.values()
    health_port, metrics_port = free_port(), free_port()
    leaf.configure(
        {
            **leaf.settings,
            "health_check": {"enable": True, "bind": f"127.0.0.1:{health_port}"},
            "prometheus": {"enable": True, "bind": f"127.0.0.1:{metrics_port}"},
        }
    )
    with cluster, NotifySocket(tmp_path / "notify") as notify:
        leaf.environment = {"NOTIFY_SOCKET": str(notify.path)}

        def status_line() -> str:
            return [line for line in notify.received() if line.startswith("STATUS=")][-1]

        def gauge() -> str:
            found = re.search(r"^harmonylite_nats_connected (\S+)$", _get(metrics_port, "/metrics"), re.MULTILINE)
            return found[1] if found else ""

        def doctor() -> tuple[str, str]:
            command = [sys.executable, "-m", "harmonylite", "doctor", "--json", "--config", str(leaf.config)]
            found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)
            [nats] = [check for check in found if check["check"] == "nats"]
            return nats["level"], nats["text"]

        cluster.start()
        eventually(lambda: status_line().startswith("STATUS=online"), 20, "the status line says online")
        assert gauge() == "1.0"
        eventually(lambda: doctor()[0] == "ok", 10, "doctor finds the hub's stream")
        assert "stream harmonylite-changes-1 holds" in doctor()[1]

        hub.stop()
        eventually(lambda: status_line().startswith("STATUS=offline since"), 20, "the status line says offline")
        eventually(lambda: "connection to the hub lost" in leaf.log_text(), 5, "the log says so")
        health = json.loads(_get(health_port, "/health"))
        assert (health["status"], health["nats_connected"]) == ("degraded", False)
        assert health["reasons"][0].startswith("offline since"), health
        assert gauge() == "0.0"
        assert doctor()[0] == "warn"
        assert leaf.log_text().count("connection to the hub lost") == 1

        before = leaf.log_text().count("INFO connected to the hub")
        hub.start()
        eventually(lambda: status_line().startswith("STATUS=online"), 30, "the status line says online again")
        eventually(lambda: leaf.log_text().count("INFO connected to the hub") == before + 1, 5, "the log says so")
        assert gauge() == "1.0"
        assert json.loads(_get(health_port, "/health"))["nats_connected"] is True
