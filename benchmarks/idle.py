"""What a node costs while nothing happens, and how soon it is ready.

A hub and a leaf with their bundled servers; processor time and memory from /proc, daemon and server apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.figures import Aim, Figure, Setting, median_of
from benchmarks.nodes import NatsServer, Node, Pair, cpu_seconds, hub_and_leaf, memory
from benchmarks.workload import INSERT, INTEGER_KEY, connect, in_bulk

CPU_AIM, DAEMON_AIM, SERVER_AIM, READY_AIM = Aim(0.3), Aim(40.0), Aim(25.0), Aim(1.0)


def run(setting: Setting) -> Iterator[Figure]:
    yield from _start(setting)
    with hub_and_leaf(setting.folder / "idle", INTEGER_KEY.create("readings")) as pair:
        yield from _idle(pair, setting.choose(60, 3))
        rows = setting.choose(100_000, 2_000)
        yield from _after_work(pair, rows)


def _start(setting: Setting) -> Iterator[Figure]:
    rounds = setting.choose(7, 2)
    bundled = Node(setting.folder / "start-bundled", 1, {})
    bundled.execute(INTEGER_KEY.create("readings"))
    own = [_ready(bundled) for _ in range(rounds)]
    yield median_of("start to READY=1, bundled server", own, "s", READY_AIM)
    with NatsServer(setting.folder / "start-server") as server:
        external = Node(setting.folder / "start-external", 1, {"urls": [server.url]})
        external.execute(INTEGER_KEY.create("readings"))
        yield median_of("start to READY=1, external server", [_ready(external) for _ in range(rounds)], "s", READY_AIM)


def _ready(node: Node) -> float:
    taken = node.start()
    node.stop()
    return taken


def _processes(pair: Pair) -> dict[str, int]:
    found = {}
    for name, node in (("hub", pair.first), ("leaf", pair.second)):
        found[f"{name}'s daemon"] = node.pid
        found[f"{name}'s server"] = node.server_pid()
    return found


def _idle(pair: Pair, duration_s: int) -> Iterator[Figure]:
    for node in (pair.first, pair.second):
        node.wait_quiet()
    processes = _processes(pair)
    before = {name: cpu_seconds(pid) for name, pid in processes.items()}
    started = time.monotonic()
    time.sleep(duration_s)
    taken = time.monotonic() - started
    for name, pid in processes.items():
        share = 100 * (cpu_seconds(pid) - before[name]) / taken
        yield Figure(f"idle processor time, {name}", share, "% of a core", CPU_AIM, f"over {duration_s} s")
    for name, pid in processes.items():
        sizes = memory(pid)
        aim = DAEMON_AIM if "daemon" in name else SERVER_AIM
        yield Figure(f"idle memory, {name}", sizes.rss, "MB RSS", aim, f"PSS {sizes.pss:.1f} MB")


def _after_work(pair: Pair, rows: int) -> Iterator[Figure]:
    """Memory that work leaves behind."""
    application = connect(pair.second.db)
    in_bulk(application, INSERT.format(name="readings"), INTEGER_KEY.readings(0, rows))
    application.close()
    for node in (pair.second, pair.first, pair.second):
        node.wait_quiet()
    for name, pid in _processes(pair).items():
        sizes = memory(pid)
        yield Figure(
            f"memory after {rows:,} rows from the leaf, {name}", sizes.rss, "MB RSS", None, f"PSS {sizes.pss:.1f} MB"
        )
