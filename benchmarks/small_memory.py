"""How little memory a device needs: `python -m benchmarks.small_memory` (root: it makes cgroups of its own).

A leaf's daemon and its server run in one cgroup with a hard limit, as under MemoryMax=, while the application writes a
burst on the leaf and another one comes from the hub. What counts: everything arrives, nothing is killed, and how long
it takes. Page cache counts too, but the kernel takes it back; `peak` near the limit is no bad sign, `killed` is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.nodes import Node, free_port, memory
from benchmarks.script import FOLDER, begin, keep
from benchmarks.workload import INSERT, INTEGER_KEY, connect, in_bulk, wait_for

_TABLE = "readings"
_TOP = Path("/sys/fs/cgroup")


class Group:
    """A cgroup with a memory limit, of version 2 or 1."""

    def __init__(self, limit_mb: int) -> None:
        self._unified = (_TOP / "cgroup.controllers").exists()
        top = _TOP if self._unified else _TOP / "memory"
        self._folder = top / f"harmonylite-bench-{os.getpid()}"
        self._limit = limit_mb << 20

    def __enter__(self) -> Group:
        self._folder.mkdir()
        if self._unified:
            (self._folder / "memory.max").write_text(str(self._limit))
            (self._folder / "memory.swap.max").write_text("0")
        else:
            (self._folder / "memory.limit_in_bytes").write_text(str(self._limit))
        return self

    def __exit__(self, *_: object) -> None:
        wait_for(self._removed, "the cgroup is empty", 10, 0.05)

    def _removed(self) -> bool:
        with contextlib.suppress(OSError):
            self._folder.rmdir()
        return not self._folder.exists()

    @property
    def procs(self) -> Path:
        return self._folder / "cgroup.procs"

    def peak_mb(self) -> float:
        name = "memory.peak" if self._unified else "memory.max_usage_in_bytes"
        return int((self._folder / name).read_text()) / (1 << 20)

    def killed(self) -> int:
        """Processes that the kernel ended for want of memory."""
        name = "memory.events" if self._unified else "memory.oom_control"
        lines = dict(line.split() for line in (self._folder / name).read_text().splitlines())
        return int(lines["oom_kill"])


class LimitedNode(Node):
    """A node whose daemon starts inside a cgroup, and so all that it starts."""

    def __init__(self, folder: Path, node_id: int, nats: Mapping[str, object], group: Group) -> None:
        super().__init__(folder, node_id, nats)
        self._group = group

    def _spawn(self, command: list[str], environment: Mapping[str, str]) -> None:
        join = f'echo $$ >{self._group.procs}; exec "$@"'
        # As in the packaged unit.
        super()._spawn(["sh", "-c", join, "sh", *command], {"MALLOC_ARENA_MAX": "2", **environment})


@dataclass(frozen=True, slots=True)
class Result:
    """limit_mb: of daemon and server together; seconds: until all rows were at both ends; rss in MB afterwards."""

    limit_mb: int
    rows: int
    seconds: float
    peak_mb: float
    killed: int
    daemon_rss: float
    server_rss: float


def measure(folder: Path, limit_mb: int, rows: int) -> Result:
    port = free_port()
    hub = Node(folder / "hub", 1, {"leaf_listen": f"127.0.0.1:{port}"})
    with Group(limit_mb) as group:
        leaf = LimitedNode(folder / "leaf", 2, {"leaf_servers": [f"nats-leaf://127.0.0.1:{port}"]}, group)
        with contextlib.ExitStack() as stack:
            for node in (hub, leaf):
                node.execute(INTEGER_KEY.create(_TABLE))
                stack.enter_context(node)
            connections = [stack.enter_context(contextlib.closing(connect(node.db))) for node in (hub, leaf)]
            started = time.monotonic()
            for number, connection in enumerate(connections):
                in_bulk(connection, INSERT.format(name=_TABLE), INTEGER_KEY.readings(number * rows, rows))
            count = f"SELECT count(*) FROM {_TABLE}"
            wait_for(
                lambda: leaf.ended or all(one.execute(count).fetchone()[0] == 2 * rows for one in connections),
                f"all rows with {limit_mb} MB",
                every_s=0.1,
            )
            if leaf.ended:
                raise RuntimeError(f"the daemon was ended, {group.killed()} killed for want of memory")
            taken = time.monotonic() - started
            leaf.wait_quiet()
            sizes = memory(leaf.pid), memory(leaf.server_pid())
            return Result(limit_mb, 2 * rows, taken, group.peak_mb(), group.killed(), sizes[0].rss, sizes[1].rss)


def run(limits: list[int], rows: int) -> Iterator[Result]:
    for limit in limits:
        with tempfile.TemporaryDirectory(prefix="harmonylite-memory-", dir=FOLDER) as folder:
            yield measure(Path(folder), limit, rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_memory", description=__doc__)
    parser.add_argument("--limits", type=int, nargs="+", default=[256, 128, 96, 80, 64], metavar="MB")
    parser.add_argument("--rounds", type=int, default=3, help="with each limit (3)")
    parser.add_argument("--rows", type=int, default=100_000, help="on either side (100,000)")
    arguments = begin(parser, root_because="it makes cgroups")
    found: list[Result] = []
    for limit in (limit for limit in arguments.limits for _ in range(arguments.rounds)):
        try:
            [result] = run([limit], arguments.rows)
        except (TimeoutError, RuntimeError) as error:
            print(f"{limit:>4} MB: did not work: {str(error).splitlines()[0]}", flush=True)
            continue
        found.append(result)
        print(
            f"{limit:>4} MB: {result.rows:,} rows in {result.seconds:.1f} s, peak {result.peak_mb:.0f} MB,"
            f" {result.killed} killed; then daemon {result.daemon_rss:.0f} MB, server {result.server_rss:.0f} MB",
            flush=True,
        )
    keep(found, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
