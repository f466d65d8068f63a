"""Catching up with a large database: what it takes, and what the applications feel of it meanwhile.

A hub with millions of rows whose messages the stream has dropped, and devices behind a link that counts bytes: a new
one without a file, the same one after it has missed many changes, and a new one with nothing but the schema. On the
hub and on each device an application writes a row every few milliseconds, in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import nats

from benchmarks.beside import Beside, Hold, Write, explain, read_holds
from benchmarks.figures import Aim, Figure, Setting, percentile
from benchmarks.link import CountedLink
from benchmarks.nodes import Node, free_port, memory
from benchmarks.workload import BULK_ROWS, INTEGER_KEY, SCATTER, connect, wait_for
from harmonylite.observe.control import ControlError, query

MEMORY_AIM, WRITE_AIM = Aim(80.0), Aim(50.0)

# What a gigabyte is: rows of about 160 bytes, each with its version.
GIGABYTE_ROWS = 5_000_000
STREAM = "harmonylite-changes-1"
# A minute without an answer is a failure; a gigabyte takes its time.
PATIENCE_S = 3600.0
# Filled in steps, each published before the next: else everything is one backlog.
FILL_ROWS = 100_000
SAMPLE_S = 0.2
ALONE_S = 5

_CREATE = (
    "CREATE TABLE measurement (id INTEGER PRIMARY KEY, device TEXT NOT NULL, taken_at INTEGER NOT NULL,"
    " value REAL NOT NULL, detail TEXT NOT NULL)"
)
_INSERT = "INSERT INTO measurement VALUES (?, ?, ?, ?, ?)"
_DETAIL = (
    '{{"sensor":"bme280-{sensor:02d}","humidity":{humidity},"pressure":{pressure},"battery_mv":{battery},'
    '"sequence":{number},"checksum":"{checksum:016x}"}}'
)


def run(setting: Setting) -> Iterator[Figure]:
    """The hub's snapshot, then each kind of device."""
    total = setting.choose(GIGABYTE_ROWS if setting.gigabyte else GIGABYTE_ROWS // 10, 20_000)
    missed = setting.choose(100_000, 2_000)
    with _Bench(setting.folder / "catchup") as bench:
        bench.fill(total)
        yield from bench.alone(setting.choose(ALONE_S, 1))
        yield from bench.snapshot()
        device, link = bench.device(2)
        yield from bench.catches_up("new, no file", device, link, "first database installed from a snapshot")
        device.stop()
        bench.change(missed, total)
        bench.drop_messages()
        bench.save()
        yield from bench.catches_up(f"missed {missed:,} changes", device, link, "caught up from a snapshot")
        device.stop()
        device, link = bench.device(3)
        for sql in _SCHEMA:
            device.execute(sql)
        yield from bench.catches_up("new, with the schema", device, link, "caught up from a snapshot")


_SCHEMA = (_CREATE, INTEGER_KEY.create("own"))


def measurements(first: int, count: int) -> Iterator[tuple[int, str, int, float, str]]:
    """Rows first..first+count-1, the same ones at every call."""
    for number in range(first, first + count):
        noise = number * SCATTER % 2**32
        detail = _DETAIL.format(
            sensor=noise % 40,
            humidity=noise % 1000 / 10,
            pressure=95_000 + noise % 10_000,
            battery=3_000 + noise % 1_200,
            number=number,
            checksum=noise * SCATTER,
        )
        yield number, f"greenhouse-{noise % 500:03d}", 1_767_225_600_000 + number * 250, 15 + noise % 200 / 10, detail


class _Bench:
    """The hub, its devices, and the links between them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._leaf_port, self._port = free_port(), free_port()
        self._hub = Node(
            folder / "hub",
            1,
            {
                "leaf_listen": f"127.0.0.1:{self._leaf_port}",
                "bind_address": f"127.0.0.1:{self._port}",
                "max_store": 32 << 30,
            },
        )
        with self._hub.config.open("a") as config:  # snapshots are taken when this benchmark says so
            config.write("[replication_log]\nmax_entries = 1000000000\n")
        self._stack = contextlib.ExitStack()
        self._next_own = 0

    def __enter__(self) -> _Bench:
        for sql in _SCHEMA:
            self._hub.execute(sql)
        self._stack.enter_context(self._hub)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    # -- preparing

    def fill(self, total: int) -> None:
        """The hub's application writes all rows, and all are published; then the hub starts afresh."""
        for first in range(0, total, FILL_ROWS):
            self._in_bulk(_INSERT, list(measurements(first, min(FILL_ROWS, total - first))))
            self._hub_idle()
        self.drop_messages()
        # What the burst left in its memory is not the snapshot's.
        self._hub.stop()
        self._hub.start()
        self._hub_idle()

    def change(self, count: int, total: int) -> None:
        """`count` rows all over the table: three of five are updated, one is deleted, and one is new."""
        keys = [number * (total // count) for number in range(count * 4 // 5)]
        self._in_bulk(
            "UPDATE measurement SET value = ?, taken_at = taken_at + ? WHERE id = ?",
            [(number % 50 + 0.5, 7, key) for number, key in enumerate(keys) if number % 4],
        )
        self._in_bulk("DELETE FROM measurement WHERE id = ?", [(key,) for key in keys[::4]])
        self._in_bulk(_INSERT, list(measurements(total, count // 5)))
        self._hub_idle()

    def _in_bulk(self, sql: str, rows: Sequence[Sequence[object]]) -> None:
        with contextlib.closing(connect(self._hub.db)) as application:
            for first in range(0, len(rows), BULK_ROWS):
                application.execute("BEGIN IMMEDIATE")
                application.executemany(sql, rows[first : first + BULK_ROWS])
                application.execute("COMMIT")

    def drop_messages(self) -> None:
        """The stream forgets all but its last message, as if it were full."""
        asyncio.run(self._purge())

    async def _purge(self) -> None:
        client = await nats.connect(f"nats://127.0.0.1:{self._port}")
        try:
            await client.jetstream().purge_stream(STREAM, keep=1)
        finally:
            await client.close()

    def _hub_idle(self) -> None:
        """Everything is absorbed, published and read back."""

        def idle() -> bool:
            status = _status(self._hub)
            return bool(status) and not status["pending_rows"] and not status["catching_up"] and _logged(self._hub) == 0

        wait_for(lambda: self._hub.ended or idle(), "the hub has published everything", PATIENCE_S, 0.1)
        if self._hub.ended:
            raise self._hub.failure("it ended")

    def device(self, number: int) -> tuple[Node, CountedLink]:
        """A leaf that does not run yet, with its link."""
        link = self._stack.enter_context(CountedLink(self._leaf_port))
        device = Node(
            self._folder / f"device-{number}", number, {"leaf_servers": [f"nats-leaf://127.0.0.1:{link.port}"]}
        )
        self._stack.callback(device.stop)
        return device, link

    def _beside(self, node: Node) -> Beside:
        """Each application writes rows of its own."""
        self._next_own += 1
        return Beside(node.db, "own", self._next_own * 10_000_000)

    # -- measuring

    def alone(self, seconds: int) -> Iterator[Figure]:
        """For comparison: the same application while nothing is caught up."""
        with self._beside(self._hub) as application:
            time.sleep(seconds)
        yield from _felt("nothing to catch up", application.writes, None)

    def save(self) -> dict[str, Any]:
        """Have the hub take a snapshot; what it says of it."""
        self._hub_idle()
        query(self._hub.db, {"command": "snapshot-save"})
        answer: dict[str, Any] = {}

        def done() -> bool:
            answer.update(query(self._hub.db, {"command": "snapshot-progress"}))
            return not answer["running"]

        wait_for(done, "the snapshot is taken", PATIENCE_S, 0.05)
        if "error" in answer:
            raise self._hub.failure(f"no snapshot: {answer['error']}")
        return dict(answer["snapshot"])

    def snapshot(self) -> Iterator[Figure]:
        """Taking and storing one, the hub's application at work."""
        with self._beside(self._hub) as application, _Watch(self._hub, _taking) as watch:
            time.sleep(1.0)
            began = time.monotonic()
            taken = self.save()
            ended = time.monotonic()
            time.sleep(1.0)
        size, stored = taken["size_bytes"], taken["stored_bytes"]
        yield Figure("snapshot: taken and stored", ended - began, "s", None, watch.steps())
        yield Figure("snapshot: database", size / 1e6, "MB", None, f"{stored / 1e6:,.0f} MB compressed")
        yield Figure("snapshot: peak memory of the daemon", watch.peak_mb, "MB RSS", MEMORY_AIM, watch.peaks())
        yield from _felt("snapshot", application.writes, watch)

    def catches_up(self, name: str, device: Node, link: CountedLink, told: str) -> Iterator[Figure]:
        """The device starts; it is done when its log says `told` and nothing is left to read."""
        log = device.folder / f"{device.name}.log"
        heard = log.stat().st_size if log.exists() else 0
        carried = link.bytes
        device.trace = device.folder / "holds.json"
        with self._beside(device) as application, Beside.control(self._folder / "control") as control:
            began = time.monotonic()
            device.start()
            with _Watch(device, _catching_up) as watch:

                def done() -> bool:
                    with log.open("rb") as file:
                        file.seek(heard)
                        said = told.encode() in file.read()
                    status = _status(device) if said else None
                    return bool(status and status["nats_connected"] and not status["catching_up"])

                wait_for(lambda: device.ended or done(), f"{name}: caught up", PATIENCE_S, 0.1)
            ended = time.monotonic()
            if device.ended:
                raise device.failure("it ended")
            carried = link.bytes - carried
            time.sleep(0.5)
        self._require_same(device)
        device.stop()
        yield Figure(f"{name}: caught up after", ended - began, "s", None, watch.steps())
        yield Figure(f"{name}: over the link", carried / 1e6, "MB")
        yield Figure(f"{name}: peak memory of the daemon", watch.peak_mb, "MB RSS", MEMORY_AIM, watch.peaks())
        yield from _felt(name, application.writes, watch, read_holds(device.trace))
        alone = [1000 * write.took_s for write in control.writes]
        yield Figure(f"{name}: the same without a daemon's lock", max(alone), "ms", None, f"{len(alone):,} writes")

    def _require_same(self, device: Node) -> None:
        """What was measured has happened: the device has all the rows of the hub."""
        sql = "SELECT count(*), sum(taken_at), sum(id * (taken_at % 1000)), total(value) FROM measurement"
        found = []
        for node in (self._hub, device):
            with contextlib.closing(connect(node.db)) as application:
                found.append(application.execute(sql).fetchone())
        if found[0] != found[1]:
            raise device.failure(f"not the rows of the hub: {found[1]} instead of {found[0]}")


def _felt(name: str, writes: Sequence[Write], watch: _Watch | None, holds: Sequence[Hold] = ()) -> Iterator[Figure]:
    """What the application felt, and while what; holds: why."""
    if not writes:
        raise RuntimeError(f"{name}: the application has written nothing")
    waits = [1000 * write.took_s for write in writes]
    slow = sorted((write for write in writes if 1000 * write.took_s > WRITE_AIM.limit), key=lambda write: -write.took_s)
    detail = f"{len(writes):,} writes, p99 {percentile(waits, 0.99):.1f} ms; {len(slow)} above {WRITE_AIM.limit:.0f} ms"
    if slow and watch is not None:
        longest = [f"{explain(write, holds)} {watch.step_at(write.at) or 'at rest'}" for write in slow[:5]]
        detail += f": {', '.join(longest)}"
    yield Figure(f"{name}: longest write of the application", max(waits), "ms", WRITE_AIM if watch else None, detail)


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    step: str
    rss_mb: float


class _Watch:
    """What the daemon says that it is doing, and how large it is meanwhile."""

    def __init__(self, node: Node, asking: Callable[[Node], str]) -> None:
        self._node = node
        self._asking = asking
        self._samples: list[_Sample] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak_mb = 0.0

    def __enter__(self) -> _Watch:
        # "5" sets the peak back to what is resident now (proc(5), /proc/PID/clear_refs).
        Path(f"/proc/{self._node.pid}/clear_refs").write_text("5")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        if not self._node.ended:
            self.peak_mb = _peak_mb(self._node.pid)

    def _run(self) -> None:
        while not self._ending.wait(SAMPLE_S):
            with contextlib.suppress(OSError):  # the daemon has ended: who waits for it says so
                self._samples.append(_Sample(time.monotonic(), self._asking(self._node), memory(self._node.pid).rss))

    def step_at(self, moment: float) -> str:
        """What was going on then."""
        before = [sample.step for sample in self._samples if sample.at <= moment]
        after = [sample.step for sample in self._samples if sample.at > moment]
        return next((step for step in (*after[:1], *before[-1:]) if step), "")

    def steps(self) -> str:
        """How long each step took."""
        times: dict[str, float] = {}
        for sample, following in zip(self._samples, self._samples[1:], strict=False):
            if sample.step:
                times[sample.step] = times.get(sample.step, 0.0) + following.at - sample.at
        return ", ".join(f"{step} {seconds:.1f} s" for step, seconds in times.items())

    def peaks(self) -> str:
        """How large the daemon was in each step, as far as sampled."""
        sizes: dict[str, float] = {}
        for sample in self._samples:
            sizes[sample.step or "at rest"] = max(sizes.get(sample.step or "at rest", 0.0), sample.rss_mb)
        return ", ".join(f"{step} {size:.0f} MB" for step, size in sizes.items())


def _peak_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "VmHWM":
            return int(rest.split()[0]) / 1024
    raise RuntimeError(f"/proc/{pid}/status knows no VmHWM")


def _status(node: Node) -> dict[str, Any]:
    """Empty while the daemon does not answer."""
    with contextlib.suppress(ControlError, OSError):
        return dict(query(node.db, {"command": "status"}, timeout=10.0))
    return {}


def _catching_up(node: Node) -> str:
    """The first word of what the status says about catching up: fetching, unpacking, merging, waiting."""
    return str(_status(node).get("catch_up") or "").partition(" ")[0]


def _taking(node: Node) -> str:
    """The same of taking a snapshot: copying, compressing, storing."""
    with contextlib.suppress(ControlError, OSError):
        step = query(node.db, {"command": "snapshot-progress"}, timeout=10.0).get("step")
        return str(step or "").partition(" ")[0].rstrip(",")
    return ""


def _logged(node: Node) -> int:
    """Changes that are not absorbed yet."""
    with contextlib.closing(sqlite3.connect(node.db, timeout=60)) as connection:
        tables = ("measurement", "own")
        counts = [f'(SELECT count(*) FROM "__harmonylite__{name}_change_log")' for name in tables]
        return int(connection.execute(f"SELECT {' + '.join(counts)}").fetchone()[0])
