"""Nodes that start without a network, lose it, or have one that only looks alive (I1, I3, I5, I9).

HARMONYLITE_CUT_S: how long a cut lasts, in seconds; short unless told otherwise.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonylite.stream.log import parse_time_ns
from tests.e2e.cluster import Node, eventually, hub_and_leaves
from tests.e2e.notify import NotifySocket
from tests.e2e.proxy import Link, Proxy
from tests.e2e.writers import SCHEMA, WRITE, WriterProcess, verify, writing

CUT_S = float(os.environ.get("HARMONYLITE_CUT_S", "20"))

NEWEST_OF_HUB = "SELECT max(sequence) FROM item WHERE node = 1"

Cut = Callable[[Node, Proxy, bool], None]
"""Cuts (True) or heals the link between the hub and a leaf's proxy."""


def _pull_the_cable(hub: Node, link: Proxy, cut: bool) -> None:
    link.set(Link.CUT if cut else Link.PASS)


def _swallow(hub: Node, link: Proxy, cut: bool) -> None:
    link.set(Link.SWALLOW if cut else Link.PASS)


def _freeze_the_hub(hub: Node, link: Proxy, cut: bool) -> None:
    """Daemon and server: the kernel still acknowledges what is sent to them."""
    for send in (hub.signal, hub.signal_server):
        send(signal.SIGSTOP if cut else signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.timeout(600 + CUT_S)
@pytest.mark.parametrize("cut", [_pull_the_cable, _swallow, _freeze_the_hub])
def test_a_cut_loses_nothing(tmp_path: Path, cut: Cut) -> None:
    """Everybody goes on writing; afterwards all nodes have everything."""
    cluster, links = hub_and_leaves(tmp_path, SCHEMA, proxied=True)
    with cluster:
        hub, leaf, _ = cluster.start().nodes.values()
        writers = [WriterProcess(node.db, node.node_id, node.node_id) for node in cluster.nodes.values()]
        with writing(writers):
            time.sleep(2)
            cut(hub, links[0], True)
            time.sleep(2)  # what was under way has arrived
            before = leaf.execute(NEWEST_OF_HUB)
            time.sleep(CUT_S - 2)
            behind = leaf.execute(NEWEST_OF_HUB)
            assert behind <= before, "the link was not cut"
            assert leaf.execute("SELECT count(*) FROM item WHERE node = 2") > [(50,)], "the leaf's application waited"
            cut(hub, links[0], False)
            healed = time.monotonic()
            eventually(lambda: leaf.execute(NEWEST_OF_HUB) > before, 60, "news of the hub")
            noticed = time.monotonic() - healed
            time.sleep(2)
        settled = cluster.wait_settled()
        verdict = verify(cluster.databases(), [write for writer in writers for write in writer.writes()])
        print(
            f"{cut.__name__}, {CUT_S:g} s: first news {noticed:.1f} s after it healed,"
            f" settled {settled:.1f} s after the last write; {verdict}"
        )
        assert not verdict.lost, "\n".join(verdict.lost[:20])
        assert not verdict.alien
        assert verdict.late_ms < 1_000


@pytest.mark.slow
def test_a_node_is_ready_without_any_network(tmp_path: Path) -> None:
    """I1, I9: READY, local work and an honest status at once; all of it arrives when the network comes."""
    cluster, links = hub_and_leaves(tmp_path, SCHEMA, proxied=True)
    hub, leaf, other = cluster.nodes.values()
    for link in links:
        link.set(Link.CUT)
    with cluster, NotifySocket(tmp_path / "notify") as notify:
        leaf.environment = {"NOTIFY_SOCKET": str(notify.path)}
        begun = time.monotonic()
        leaf.start()
        eventually(lambda: "READY=1" in notify.received(), 10, "READY")
        ready = time.monotonic() - begun
        for number in range(200):
            leaf.execute(WRITE, f"early-{number}", 2, number, "")
        eventually(lambda: (leaf.status() or {}).get("pending_rows") == 200, 10, "200 pending rows in the status")
        assert (leaf.status() or {})["status"] == "degraded"
        hub.start()
        other.start()
        for link in links:
            link.set(Link.PASS)
        settled = cluster.wait_settled()
        assert other.execute("SELECT count(*) FROM item") == [(200,)]
        print(f"READY after {ready:.1f} s; settled {settled:.1f} s after the network came")


@pytest.mark.slow
@pytest.mark.parametrize("from_the_start", [False, True])
def test_a_leaf_whose_hub_is_gone_says_so(tmp_path: Path, from_the_start: bool) -> None:
    """The leaf's own server answers, but nothing can be stored: to an operator that node is offline, and since when."""
    cluster, (link, *_) = hub_and_leaves(tmp_path, SCHEMA, 1, proxied=True)
    with cluster:
        hub, leaf = cluster.nodes.values()
        if from_the_start:
            link.set(Link.CUT)
            leaf.start()
        else:
            cluster.start()
            eventually(lambda: "caught up" in leaf.log_text(), 20, "the leaf replicates")
            link.set(Link.CUT)
        hub_gone = time.time()
        eventually(lambda: "connected to NATS" in leaf.log_text(), 10, "the leaf reaches its own server")
        leaf.execute(WRITE, "row", 2, 1, "")
        eventually(lambda: (leaf.status() or {}).get("status") == "degraded", 20, "the leaf is degraded")
        status = leaf.status()
        assert status is not None
        assert not status["nats_connected"], status
        assert status["offline_since"], status
        assert abs(parse_time_ns(status["offline_since"]) / 1e9 - hub_gone) < 20
        assert status["pending_rows"] == 1
        assert status["reasons"], status
        link.set(Link.PASS)
        if from_the_start:
            hub.start()
        eventually(lambda: (leaf.status() or {}).get("status") == "healthy", 30, "the leaf is healthy again")


@pytest.mark.slow
def test_a_stale_edit_from_an_offline_node_does_not_win(tmp_path: Path) -> None:
    """I5: what counts is when a row was written, not when its node came back."""
    cluster, (link, *_) = hub_and_leaves(tmp_path, SCHEMA, 1, proxied=True)
    with cluster:
        hub, leaf = cluster.start().nodes.values()
        hub.execute(WRITE, "row", 1, 1, "first")
        cluster.wait_settled()
        link.set(Link.CUT)
        eventually(lambda: "connection" in str((leaf.status() or {}).get("nats_error")), 30, "the leaf is offline")
        leaf.execute(WRITE, "row", 2, 2, "stale")
        time.sleep(2.0)  # the distance between the two writes, by the clock
        hub.execute(WRITE, "row", 1, 3, "newer")
        time.sleep(1.0)
        link.set(Link.PASS)
        eventually(lambda: leaf.execute("SELECT payload FROM item") != [("stale",)], 60, "the newer edit arrived")
        cluster.wait_settled()
        assert leaf.execute("SELECT payload FROM item") == [("newer",)]


@pytest.mark.slow
def test_a_stale_edit_made_while_the_server_hung_does_not_win(tmp_path: Path) -> None:
    """I5, where the change log is absorbed only after the server's time is known."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    with cluster:
        hub, leaf = cluster.start().nodes.values()
        hub.execute(WRITE, "row", 1, 1, "first")
        cluster.wait_settled()
        leaf.signal_server(signal.SIGSTOP)
        eventually(lambda: not leaf.connected(), 30, "the leaf noticed")
        leaf.execute(WRITE, "row", 2, 2, "stale")
        time.sleep(2.0)  # the distance between the two writes, by the clock
        hub.execute(WRITE, "row", 1, 3, "newer")
        time.sleep(2.0)
        leaf.signal_server(signal.SIGCONT)
        eventually(leaf.connected, 30, "the leaf is back")
        cluster.wait_settled()
        assert leaf.execute("SELECT payload FROM item") == [("newer",)]
