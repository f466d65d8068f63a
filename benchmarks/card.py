"""What replication writes to a card: `python -m benchmarks.card` (root: it mounts two small file systems of its own).

A hub and a leaf, each on an ext4 of its own with the options of a Raspberry Pi. Bytes are counted twice: by the
processes (`write_bytes` in /proc/PID/io: pages that they made dirty) and by the block layer (sectors written to the
device, /sys/block/DEVICE/stat), which also has the journal of the file system. The difference to the same application
without HarmonyLite is what replication costs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.nodes import Node, free_port
from benchmarks.script import FOLDER, begin, keep
from benchmarks.workload import BULK_ROWS, INSERT, INTEGER_KEY, connect, in_bulk, reading_bytes, wait_for

_SECTOR = 512
_TABLE = "readings"


class Card:
    """A file system of its own on a loop device."""

    def __init__(self, folder: Path, name: str, size_mb: int = 512) -> None:
        self.folder = folder / name
        self._image = folder / f"{name}.img"
        self.folder.mkdir()
        with self._image.open("wb") as file:
            file.truncate(size_mb << 20)

    def __enter__(self) -> Card:
        # Without lazy initialisation, which would write for minutes after the first mount.
        options = "lazy_itable_init=0,lazy_journal_init=0"
        subprocess.run(["mkfs.ext4", "-q", "-E", options, str(self._image)], check=True)
        subprocess.run(["mount", "-o", "loop,noatime", str(self._image), str(self.folder)], check=True)
        listed = subprocess.run(
            ["findmnt", "-n", "-o", "SOURCE", str(self.folder)], check=True, capture_output=True, text=True
        )
        self._statistics = Path("/sys/block", Path(listed.stdout.strip()).name, "stat")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)
        self._image.unlink()

    def written(self) -> int:
        """Bytes that have reached the device, after all that is under way."""
        os.sync()
        return int(self._statistics.read_text().split()[6]) * _SECTOR


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes. device: by the block layer, of everybody; daemon, server: by the process itself."""

    device: int
    daemon: int = 0
    server: int = 0

    def __sub__(self, other: Written) -> Written:
        return Written(self.device - other.device, self.daemon - other.daemon, self.server - other.server)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result. rows: replicated meanwhile, 0 at rest."""

    what: str
    seconds: float
    rows: int
    hub: Written
    leaf: Written


def write_bytes(pid: int) -> int:
    """Bytes that a process caused to be written to a disk (proc(5), /proc/PID/io)."""
    lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(lines["write_bytes"]) - int(lines["cancelled_write_bytes"])


class Bench:
    """A hub and a leaf on a card each; `daemons`: whether HarmonyLite runs."""

    def __init__(self, hub: Card, leaf: Card, stack: contextlib.ExitStack, sync_interval: str, daemons: bool) -> None:
        port = free_port()
        self._cards = (hub, leaf)
        settings = {"leaf_listen": f"127.0.0.1:{port}", **({"sync_interval": sync_interval} if sync_interval else {})}
        self.nodes = (
            Node(hub.folder / "app", 1, settings),
            Node(leaf.folder / "app", 2, {"leaf_servers": [f"nats-leaf://127.0.0.1:{port}"]}),
        )
        self._daemons = daemons
        for node in self.nodes:
            with contextlib.closing(connect(node.db)) as application:
                application.execute(INTEGER_KEY.create(_TABLE))
            if daemons:
                stack.enter_context(node)
        self._readers = [stack.enter_context(contextlib.closing(connect(node.db))) for node in self.nodes]
        self._next = 0
        if daemons:
            self.wait(self.bulk(1))

    def written(self) -> tuple[Written, Written]:
        found = []
        for card, node in zip(self._cards, self.nodes, strict=True):
            device = card.written()
            own = (write_bytes(node.pid), write_bytes(node.server_pid())) if self._daemons else (0, 0)
            found.append(Written(device, *own))
        return found[0], found[1]

    def one_by_one(self, rows: int, pause_s: float) -> int:
        """The leaf's application: a row, a pause."""
        for reading in INTEGER_KEY.readings(self._next, rows):
            self._readers[1].execute(INSERT.format(name=_TABLE), reading)
            time.sleep(pause_s)
        self._next += rows
        return rows

    def bulk(self, rows: int) -> int:
        in_bulk(self._readers[1], INSERT.format(name=_TABLE), INTEGER_KEY.readings(self._next, rows))
        self._next += rows
        return rows

    def wait(self, _rows: int) -> None:
        """Until the hub has every row, and both daemons rest."""
        count = f"SELECT count(*) FROM {_TABLE}"
        if self._daemons:
            wait_for(lambda: self._readers[0].execute(count).fetchone()[0] == self._next, "all rows", every_s=0.05)
            for node in self.nodes:
                node.wait_quiet()


def rest(seconds: int) -> int:
    time.sleep(seconds)
    return 0


def measure(folder: Path, sync_interval: str, daemons: bool, rest_s: int, seconds: int, rate: float) -> Iterator[Row]:
    label = f"sync_interval {sync_interval or 'as it is'}" if daemons else "without HarmonyLite"
    with Card(folder, "hub") as hub, Card(folder, "leaf") as leaf, contextlib.ExitStack() as stack:
        bench = Bench(hub, leaf, stack, sync_interval, daemons)
        steps: tuple[tuple[str, Callable[[], int]], ...] = (
            ("at rest", lambda: rest(rest_s)),
            (f"{rate:g} rows/s, each a transaction", lambda: bench.one_by_one(int(rate * seconds), 1 / rate)),
            (f"50,000 rows, {BULK_ROWS} to a transaction", lambda: bench.bulk(50_000)),
        )
        for what, job in steps:
            before, started = bench.written(), time.monotonic()
            rows = job()
            bench.wait(rows)
            after = bench.written()
            taken = time.monotonic() - started
            yield Row(f"{label}: {what}", taken, rows, after[0] - before[0], after[1] - before[1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.card", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="of writing row by row (60)")
    parser.add_argument("--rest", type=int, default=240, help="seconds of rest (240)")
    parser.add_argument("--rate", type=float, default=5.0, help="rows a second (5)")
    parser.add_argument("--sync-interval", nargs="*", default=["", "2m"], help="of the hub's server ('' 2m)")
    arguments = begin(parser, root_because="it mounts file systems of its own")
    sizes = [reading_bytes(reading) for reading in INTEGER_KEY.readings(0, 1000)]
    print(f"a row has {sum(sizes) / len(sizes):.0f} bytes of its own\n")
    print(f"{'':<62}{'rows':>7}  {'leaf: device  daemon  server':>30}  {'hub: device  daemon  server':>30}")
    found: list[Row] = []
    runs = [("", False), *((interval, True) for interval in arguments.sync_interval)]
    with tempfile.TemporaryDirectory(prefix="harmonylite-card-", dir=FOLDER) as folder:
        for number, (interval, daemons) in enumerate(runs):
            below = Path(folder, str(number))
            below.mkdir()
            for row in measure(below, interval, daemons, arguments.rest, arguments.seconds, arguments.rate):
                found.append(row)
                print(f"{row.what:<62}{row.rows:>7}  {_told(row.leaf, row):>30}  {_told(row.hub, row):>30}", flush=True)
    keep(found, arguments)
    return 0


def _told(written: Written, row: Row) -> str:
    """Bytes per row, or per minute at rest."""
    per = row.rows or row.seconds / 60
    unit = "B/row" if row.rows else "B/min"
    return " ".join(f"{value / per:,.0f}" for value in (written.device, written.daemon, written.server)) + f" {unit}"


if __name__ == "__main__":
    sys.exit(main())
