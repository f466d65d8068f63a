"""How many bytes of the stream a row takes, against the row's own size (`workload.reading_bytes`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import nats

from benchmarks.figures import Figure, Setting
from benchmarks.nodes import Pair, shared_server
from benchmarks.workload import BULK_ROWS, INSERT, INTEGER_KEY, Reading, connect, in_bulk, reading_bytes, wait_for

STREAMS = "harmonylite-changes"


@dataclass(frozen=True, slots=True)
class Stored:
    """What the change streams hold: messages, and bytes with subjects and headers, as the server counts them."""

    messages: int
    bytes: int


def run(setting: Setting) -> Iterator[Figure]:
    bulk, singles = setting.choose(100_000, 5_000), setting.choose(300, 20)
    with shared_server(setting.folder / "wire", INTEGER_KEY.create("readings")) as pair:
        sql = INSERT.format(name="readings")
        with contextlib.closing(connect(pair.first.db)) as application:
            readings = INTEGER_KEY.readings(0, bulk)
            before = _stored(pair)
            in_bulk(application, sql, readings)
            _wait_visible(pair, readings[-1])
            yield _figure(f"bulk, {BULK_ROWS} to a transaction", before, _stored(pair), readings)
            readings = INTEGER_KEY.readings(bulk, singles)
            before = _stored(pair)
            for reading in readings:
                application.execute(sql, reading)
                _wait_visible(pair, reading)
            yield _figure("single rows, one message each", before, _stored(pair), readings)


def _figure(name: str, before: Stored, after: Stored, readings: list[Reading]) -> Figure:
    own = sum(map(reading_bytes, readings)) / len(readings)
    stored = (after.bytes - before.bytes) / len(readings)
    messages = after.messages - before.messages
    detail = f"{stored / own:.2f} of the row's own {own:.1f}; {messages} messages for {len(readings):,} rows"
    return Figure(name, stored, "bytes/row", None, detail)


def _wait_visible(pair: Pair, reading: Reading) -> None:
    with contextlib.closing(connect(pair.second.db)) as reader:
        found = f"SELECT 1 FROM readings WHERE id = {reading[0]}"
        wait_for(lambda: reader.execute(found).fetchone(), "the row arrives", 60.0, 0.001)


def _stored(pair: Pair) -> Stored:
    return asyncio.run(_ask(pair.url))


async def _ask(url: str) -> Stored:
    client = await nats.connect(url)
    try:
        infos = await client.jetstream().streams_info()
    finally:
        await client.close()
    states = [info.state for info in infos if str(info.config.name).startswith(STREAMS)]
    return Stored(sum(state.messages for state in states), sum(state.bytes for state in states))
