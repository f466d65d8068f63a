"""What a hub needs for its leaves: `python -m benchmarks.many_leaves`.

A hub and a growing number of leaves, all of them real daemons with their servers on this machine. At rest: the hub's
memory and processor time. Then every leaf writes a row a second for a while: the hub's processor time under that, and
how long the last row takes to reach the last leaf.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.nodes import Node, cpu_seconds, free_port, memory
from benchmarks.script import FOLDER, begin, keep
from benchmarks.workload import INSERT, INTEGER_KEY, connect, wait_for

_TABLE = "readings"
_COUNT = f"SELECT count(*) FROM {_TABLE}"


@dataclass(frozen=True, slots=True)
class Load:
    """Processor time in percent of a core, the hub's daemon and server."""

    daemon: float
    server: float


@dataclass(frozen=True, slots=True)
class Result:
    """memory in MB RSS, after the work; last_row_s: from the last commit until every node had everything."""

    leaves: int
    daemon_rss: float
    server_rss: float
    rest: Load
    writing: Load
    rows: int
    last_row_s: float


def measure(folder: Path, leaves: int, seconds: int) -> Result:
    port = free_port()
    hub = Node(folder / "hub", 1, {"leaf_listen": f"127.0.0.1:{port}"})
    there = {"leaf_servers": [f"nats-leaf://127.0.0.1:{port}"]}
    nodes = [hub, *(Node(folder / f"leaf{number}", 2 + number, there) for number in range(leaves))]
    with contextlib.ExitStack() as stack:
        for node in nodes:
            node.execute(INTEGER_KEY.create(_TABLE))
            stack.enter_context(node)
        connections = [stack.enter_context(contextlib.closing(connect(node.db))) for node in nodes]
        rows = 0

        def write() -> None:
            nonlocal rows
            for connection in connections[1:]:
                connection.execute(INSERT.format(name=_TABLE), INTEGER_KEY.readings(rows, 1)[0])
                rows += 1

        def everywhere() -> bool:
            return all(connection.execute(_COUNT).fetchone()[0] == rows for connection in connections)

        write()
        wait_for(everywhere, "the first rows everywhere", every_s=0.1)
        for node in nodes:
            node.wait_quiet()
        rest = _load(hub, seconds, lambda: None)
        writing = _load(hub, seconds, write)
        started = time.monotonic()
        wait_for(everywhere, "all rows everywhere", every_s=0.01)
        last = time.monotonic() - started
        sizes = memory(hub.pid).rss, memory(hub.server_pid()).rss
        return Result(leaves, *sizes, rest, writing, rows, last)


def _load(hub: Node, seconds: int, each_second: Callable[[], None]) -> Load:
    pids = (hub.pid, hub.server_pid())
    before, started = [cpu_seconds(pid) for pid in pids], time.monotonic()
    for second in range(seconds):
        each_second()
        time.sleep(max(0.0, started + second + 1 - time.monotonic()))
    taken = time.monotonic() - started
    daemon, server = (100 * (cpu_seconds(pid) - was) / taken for pid, was in zip(pids, before, strict=True))
    return Load(daemon, server)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_leaves", description=__doc__)
    parser.add_argument("--leaves", type=int, nargs="+", default=[1, 5, 10, 20], metavar="N")
    parser.add_argument("--seconds", type=int, default=20, help="of rest, and of writing (20)")
    arguments = begin(parser)
    found: list[Result] = []
    for leaves in arguments.leaves:
        with tempfile.TemporaryDirectory(prefix="harmonylite-leaves-", dir=FOLDER) as folder:
            result = measure(Path(folder), leaves, arguments.seconds)
        found.append(result)
        print(
            f"{leaves:>3} leaves: hub's daemon {result.daemon_rss:.0f} MB, server {result.server_rss:.0f} MB;"
            f" at rest {result.rest.daemon:.2f} + {result.rest.server:.2f} % of a core;"
            f" a row a second from each: {result.writing.daemon:.1f} + {result.writing.server:.1f} %,"
            f" the last row everywhere after {result.last_row_s * 1000:.0f} ms",
            flush=True,
        )
    keep(found, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
