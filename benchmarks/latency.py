"""From commit on one node to visible on the other, at a hundred commits a second.

The reader looks about five times a millisecond, which adds a tenth of one at the median. As the yardstick: a message
published to JetStream and pulled by another client, over the same server in the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nats
import nats.errors

from benchmarks.figures import Aim, Figure, Setting, percentile
from benchmarks.nodes import Pair, cpu_seconds, shared_server
from benchmarks.workload import INSERT, INTEGER_KEY, connect, reading_bytes

RATE = 100
LOOK_S = 0.0002

STREAM, SUBJECT = "BENCHMARK", "benchmark.row"


def run(setting: Setting) -> Iterator[Figure]:
    commits = RATE * setting.choose(20, 2)
    with shared_server(setting.folder / "latency", INTEGER_KEY.create("readings")) as pair:
        before = asyncio.run(round_trips(pair.url, commits // 4))
        nodes = {"writing": pair.first.pid, "receiving": pair.second.pid}
        used = {name: cpu_seconds(pid) for name, pid in nodes.items()}
        delays = [1000 * each for each in commit_to_visible(pair, commits)]
        used = {name: 1000 * (cpu_seconds(pid) - used[name]) / commits for name, pid in nodes.items()}
        after = asyncio.run(round_trips(pair.url, commits // 4))
    median = statistics.median(delays)
    bare = 1000 * statistics.median([*before, *after])
    yield Figure("p50", median, "ms", Aim(5.0), f"{commits} commits, {RATE} a second")
    yield Figure("p95", percentile(delays, 0.95), "ms")
    yield Figure("p99", percentile(delays, 0.99), "ms", Aim(20.0))
    yield Figure("largest", max(delays), "ms")
    yield Figure("bare JetStream publish and pull, p50", bare, "ms")
    yield Figure("commit to visible as a multiple of it", median / bare, "x")
    for name, milliseconds in used.items():
        yield Figure(f"processor time of the {name} node's daemon", milliseconds, "ms a commit")


def commit_to_visible(pair: Pair, commits: int) -> list[float]:
    """Seconds from the return of each COMMIT on the first node until the second node's reader sees the row."""
    readings = INTEGER_KEY.readings(1, commits)
    committed = [0.0] * (commits + 1)
    watcher = _Watcher(pair.second.db, commits)
    watcher.start()
    with contextlib.closing(connect(pair.first.db)) as application:
        sql = INSERT.format(name="readings")
        started = time.perf_counter()
        for number, reading in enumerate(readings, start=1):
            time.sleep(max(0.0, started + number / RATE - time.perf_counter()))
            application.execute(sql, reading)
            committed[number] = time.perf_counter()
    watcher.join(60.0)
    if watcher.is_alive():
        raise TimeoutError("not all rows arrived within a minute")
    # A reader can see a row before the writer's COMMIT has returned to it.
    return [max(0.0, watcher.seen[number] - committed[number]) for number in range(1, commits + 1)]


class _Watcher(threading.Thread):
    """Notes when each row becomes visible; the rows are written, and arrive, in the order of their ids."""

    def __init__(self, path: Path, last: int) -> None:
        super().__init__(daemon=True)
        self.seen = [0.0] * (last + 1)
        self._path = path

    def run(self) -> None:
        known, last = 0, len(self.seen) - 1
        with contextlib.closing(connect(self._path)) as reader:
            while known < last:
                newest = _newest(reader)
                now = time.perf_counter()
                for number in range(known + 1, newest + 1):
                    self.seen[number] = now
                known = newest
                time.sleep(LOOK_S)


def _newest(reader: sqlite3.Connection) -> int:
    return int(reader.execute("SELECT coalesce(max(id), 0) FROM readings").fetchone()[0])


async def round_trips(url: str, messages: int) -> list[float]:
    """Seconds from publishing a message until a pull consumer of another client has it, RATE messages a second."""
    writer, reader = await nats.connect(url), await nats.connect(url)
    payload = bytes(sum(map(reading_bytes, INTEGER_KEY.readings(1, 1))))
    try:
        stream = writer.jetstream()
        await stream.add_stream(name=STREAM, subjects=[SUBJECT])
        pulling = await reader.jetstream().pull_subscribe_bind(
            (await stream.add_consumer(STREAM, durable_name="reader", ack_policy="none")).name, STREAM
        )
        sent: list[float] = []
        got: list[float] = []

        async def receive() -> None:
            while len(got) < messages:
                with contextlib.suppress(nats.errors.TimeoutError):
                    fetched = await pulling.fetch(1, timeout=5)
                    got.extend(time.perf_counter() for _ in fetched)

        receiving = asyncio.create_task(receive())
        started = time.perf_counter()
        for number in range(messages):
            await asyncio.sleep(max(0.0, started + number / RATE - time.perf_counter()))
            sent.append(time.perf_counter())
            await stream.publish(SUBJECT, payload)
        await asyncio.wait_for(receiving, 30.0)
        await stream.delete_stream(STREAM)
    finally:
        await writer.close()
        await reader.close()
    return [there - here for here, there in zip(sent, got, strict=True)]
