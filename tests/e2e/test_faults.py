"""Writers that never stop, while daemons and servers are killed: nothing acknowledged is lost (I3, I4).

HARMONYLITE_KILLS and HARMONYLITE_SEED change how many kills there are and which.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, hub_and_leaves, three_servers
from tests.e2e.writers import SCHEMA, Verdict, WriterProcess, verify, writing

SEED = int(os.environ.get("HARMONYLITE_SEED", "0")) or random.randrange(1, 1 << 30)


def kills(default: int) -> int:
    return int(os.environ.get("HARMONYLITE_KILLS", default))


def kill_at_random(cluster: Cluster, count: int, dice: random.Random) -> tuple[int, int]:
    """Kill daemons and nats-servers with SIGKILL, `count` in all; returns how many of each. All daemons run again
    afterwards."""
    daemons = servers = 0
    down: dict[int, float] = {}
    while daemons + servers < count:
        time.sleep(dice.uniform(0.2, 3.0))
        node = dice.choice(list(cluster.nodes.values()))
        if dice.random() < 0.5:
            if node.running:
                node.kill()
                daemons += 1
                down[node.node_id] = time.monotonic() + dice.choice((0.0, 0.5, 3.0))
        elif node.signal_server(signal.SIGKILL):
            servers += 1
        for node_id, when in list(down.items()):
            if time.monotonic() >= when:
                cluster.nodes[node_id].start()
                del down[node_id]
    for node_id in down:
        cluster.nodes[node_id].start()
    return daemons, servers


def run_faults(cluster: Cluster, count: int) -> Verdict:
    dice = random.Random(SEED)
    nodes = list(cluster.nodes.values())
    writers = [WriterProcess(node.db, node.node_id, seed=SEED + node.node_id) for node in nodes]
    cluster.start()
    with writing(writers):
        daemons, servers = kill_at_random(cluster, count, dice)
    pending = [(node.status() or {}).get("pending_rows") for node in nodes]
    settled = cluster.wait_settled(150)
    verdict = verify(cluster.databases(), [write for writer in writers for write in writer.writes()])
    print(
        f"seed {SEED}: {daemons} daemons and {servers} nats-servers killed; pending when the writers stopped:"
        f" {pending}; settled after {settled:.1f} s; {verdict}"
    )
    assert daemons + servers >= count
    assert not any(writer.refused() for writer in writers)
    assert not verdict.lost, "\n".join(verdict.lost[:20])
    assert not verdict.alien, "\n".join(verdict.alien[:20])
    assert verdict.visible and verdict.beaten
    assert verdict.late_ms < 1_000
    return verdict


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_lost_with_hub_and_leaves(tmp_path: Path) -> None:
    """At least 100 kills in CI."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA)
    with cluster:
        run_faults(cluster, kills(100))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_lost_with_three_servers(tmp_path: Path) -> None:
    """Every server stores every change."""
    with three_servers(tmp_path, SCHEMA) as cluster:
        run_faults(cluster, max(25, kills(100) // 4))
