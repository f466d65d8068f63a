"""A daemon ends when it is told to, at whatever moment of its start that comes."""

from __future__ import annotations

import random
import time
from pathlib import Path
from signal import SIGTERM

import pytest

from tests.e2e.cluster import Cluster, eventually
from tests.stream.support import free_port

ROUNDS = 25


@pytest.mark.slow
def test_stopped_at_any_moment(tmp_path: Path) -> None:
    """The session's first requests are under way then: none of them may swallow the stop."""
    chance = random.Random(5)
    leaf_port = free_port()
    with Cluster(tmp_path, "CREATE TABLE t (id INTEGER PRIMARY KEY, v);") as cluster:
        hub = cluster.add(1, {"nats": {"leaf_listen": f"127.0.0.1:{leaf_port}"}})
        leaf = cluster.add(2, {"nats": {"leaf_servers": [f"nats-leaf://127.0.0.1:{leaf_port}"]}})
        hub.start()
        eventually(hub.connected, 20, "the hub is up")
        for turn in range(ROUNDS):
            leaf.start()
            if turn % 2:
                eventually(leaf.connected, 20, "the leaf is connected")
                time.sleep(chance.uniform(0, 0.05))
            else:
                time.sleep(chance.uniform(0, 1.2))
            leaf.signal(SIGTERM)
            assert leaf.process is not None
            leaf.process.wait(12)
            assert not leaf.server_pids()
