"""Gaps, and servers, consumers and connections that go away while a stream is read."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from nats.aio.client import Client

from harmonylite.model import Delivery, Position
from harmonylite.stream import consumer as consumer_module
from harmonylite.stream import pull as pull_module
from harmonylite.stream.consumer import Consumer, GapFound
from harmonylite.stream.log import (
    LogSettings,
    StreamMissing,
    StreamUnavailable,
    api_request,
)
from harmonylite.stream.provision import ensure_streams
from harmonylite.stream.publisher import Publisher, PublishFailed
from tests.stream.logfixture import (
    SETTINGS,
    START,
    STREAM,
    Place,
    Server,
    client,
    consumer_names,
    delete_message,
    eventually_ensured,
    hub_and_leaf,
    numbers,
    payload,
    read_numbers,
    single_server,
    store,
    topology,
    whole,
)
from tests.stream.support import eventually, eventually_does

READER = replace(SETTINGS, node_id=9)


def test_a_deleted_message_is_a_gap(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            for number in range(1, 7):
                await store(connection, 7, whole(number))
            await delete_message(connection, 4)
            reader = Consumer(connection, READER, STREAM, START)
            assert await read_numbers(reader, 3) == [1, 2, 3]
            for _ in range(2):  # it stays a gap until somebody reconciles
                with pytest.raises(GapFound) as caught:
                    await reader.read(wait_s=5)
                assert (caught.value.expected, caught.value.found) == (4, 5)
            assert reader.position.sequence == 3
            await reader.close()
            beyond = Consumer(connection, READER, STREAM, replace(reader.position, sequence=4, stored_ns=0))
            assert await read_numbers(beyond, 2) == [5, 6]
            await beyond.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def hurry(monkeypatch: pytest.MonkeyPatch, heartbeat_s: float = 0.2) -> None:
    monkeypatch.setattr(pull_module, "HEARTBEAT_S", heartbeat_s)
    monkeypatch.setattr(pull_module, "SILENCE_S", 2.5 * heartbeat_s)


def test_deleted_messages_at_the_end_are_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            for number in range(1, 6):
                await store(connection, 7, whole(number))
            await delete_message(connection, 5)
            await delete_message(connection, 4)
            reader = Consumer(connection, READER, STREAM, START)
            assert await read_numbers(reader, 3) == [1, 2, 3]
            with pytest.raises(GapFound, match="up to 5 are missing"):
                await reader.read(wait_s=10)
            await reader.close()

    hurry(monkeypatch)
    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


@pytest.mark.parametrize(
    ("position", "reason", "found"),
    [
        (START, "1 to 3 were discarded", 4),
        (Position(STREAM, "", 9), "ends at 6", None),
        (Position(STREAM, "2026-01-01T00:00:00Z", 5), "created anew", None),
        (Position(STREAM, "", 5, 1), "another one", None),
    ],
)
def test_reading_does_not_begin_in_another_log(
    tmp_path: Path, position: Position, reason: str, found: int | None
) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            for number in range(1, 7):
                await store(connection, 7, whole(number))
            await api_request(connection, SETTINGS, f"STREAM.PURGE.{STREAM}", {"seq": 4})
            reader = Consumer(connection, READER, STREAM, position)
            with pytest.raises(GapFound, match=reason) as caught:
                await reader.read(wait_s=5)
            assert (caught.value.expected, caught.value.found) == (position.sequence + 1, found)
            assert await consumer_names(connection) == []

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_who_saw_a_stream_empty_knows_what_came_next(tmp_path: Path) -> None:
    """Of a message that is gone nothing tells whether it was the one that was read: a process that has seen that needs
    no snapshot when its connection was lost for a moment."""

    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            for number in (1, 2):
                await store(connection, 7, whole(number, 7))
            emptied: dict[str, Position] = {}
            first = Consumer(connection, READER, STREAM, START, emptied=emptied)
            assert await read_numbers(first, 2) == [1, 2]
            await first.close()
            assert emptied == {}
            await api_request(connection, SETTINGS, f"STREAM.PURGE.{STREAM}", {})
            again = Consumer(connection, READER, STREAM, first.position, emptied=emptied)
            assert (await again.read(wait_s=0)).groups == ()
            await again.close()
            assert emptied == {STREAM: first.position}
            await store(connection, 7, whole(3, 7))
            knows = Consumer(connection, READER, STREAM, first.position, emptied=emptied)
            assert await read_numbers(knows, 1) == [3]
            await knows.close()
            for state in ({}, {STREAM: replace(first.position, stored_ns=1)}):
                with pytest.raises(GapFound, match="not known") as gap:
                    await Consumer(connection, READER, STREAM, first.position, emptied=state).read(wait_s=5)
                assert gap.value.lost
            await api_request(connection, SETTINGS, f"STREAM.PURGE.{STREAM}", {})
            await store(connection, 7, whole(4, 7))
            with pytest.raises(GapFound, match="3 to 3 were discarded"):
                await Consumer(connection, READER, STREAM, first.position, emptied=emptied).read(wait_s=5)

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_no_stream_and_no_server(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            reader = Consumer(connection, READER, STREAM, START)
            with pytest.raises(StreamMissing):
                await reader.read(wait_s=5)
            await ensure_streams(connection, SETTINGS)
            assert await reader.read(wait_s=0.1) == Delivery(reader.position)
            server.kill()
            started = time.monotonic()
            with pytest.raises(StreamUnavailable):
                await reader.read(wait_s=1)
            assert 0.9 < time.monotonic() - started < 5
        started = time.monotonic()
        with pytest.raises(StreamUnavailable, match="not connected"):
            await reader.read(wait_s=30)
        assert time.monotonic() - started < 2  # a closed client does not come back
        await reader.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


@pytest.mark.parametrize("name", ["server", "leaf"])
def test_a_consumer_that_was_deleted_is_made_again(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(place: Place) -> None:
        async with client(place.url) as connection:
            await eventually_ensured(connection, place.settings)
            reader = Consumer(connection, place.settings, STREAM, START)
            for number in range(1, 6):
                await store(connection, 7, whole(number))
                assert await read_numbers(reader, 1) == [number]
                waiting = asyncio.create_task(reader.read(wait_s=30)) if number % 2 else None
                await asyncio.sleep(0.05)
                (consumer,) = await consumer_names(connection, place.settings)
                await api_request(connection, place.settings, f"CONSUMER.DELETE.{STREAM}.{consumer}")
                if waiting is not None:
                    await store(connection, 7, whole(number + 100))
                    assert numbers(await asyncio.wait_for(waiting, 10)) == [number + 100]
            await reader.close()

    hurry(monkeypatch)
    with topology(name, tmp_path) as place:
        asyncio.run(scenario(place))


def test_a_hub_that_goes_away_behind_a_leaf_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection to the leaf stays up, and nobody says that the consumer is gone: only its silence does."""

    async def scenario() -> None:
        settings = replace(SETTINGS, domain="hub")
        async with client(leaf.url) as connection, client(hub.url) as at_hub:
            await eventually_ensured(connection, settings)
            reader = Consumer(connection, settings, STREAM, START)
            await store(at_hub, 7, whole(1))
            assert await read_numbers(reader, 1) == [1]
            waiting = asyncio.create_task(reader.read(wait_s=60))
            hub.kill()
            hub.start()
            await eventually_does(lambda: store(at_hub, 7, whole(2)))
            assert numbers(await asyncio.wait_for(waiting, 20)) == [2]
            assert connection.stats["reconnects"] == 0
            await reader.close()

    hurry(monkeypatch)
    with hub_and_leaf(tmp_path) as (hub, leaf):
        asyncio.run(scenario())


def test_a_read_that_is_cancelled_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, started = consumer_module._decode, []

    def slow(joined: object) -> object:
        started.append(1)
        time.sleep(0.2)
        return decode(joined)  # type: ignore[arg-type]

    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            publisher = Publisher(connection, SETTINGS)
            for number in range(4):
                await publisher.publish(number, payload(number, size=100_000), 0)
            reader = Consumer(connection, READER, STREAM, START)
            waiting = asyncio.create_task(reader.read(wait_s=10))
            await eventually(lambda: started)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert reader.position.sequence == 0
            assert await read_numbers(reader, 4) == [0, 1, 2, 3]
            await reader.close()

    monkeypatch.setattr(consumer_module, "_decode", slow)
    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


async def publish_all(publisher: Publisher, count: int, acknowledged: dict[int, tuple[int, ...]]) -> None:
    """Publish until `count` groups are acknowledged; what failed goes again under a new number."""
    number = 0
    while len(acknowledged) < count:
        number += 1
        size = 2_500_000 if number % 50 == 0 else 200
        try:
            published = await publisher.publish(number, payload(number, size=size), 0)
            acknowledged[number] = published.sequences
        except PublishFailed:
            await asyncio.sleep(0.05)


async def read_all(reader: Consumer, until: set[int], found: list[tuple[int, int]]) -> None:
    while not until <= {number for _, number in found}:
        try:
            delivery = await reader.read(wait_s=5)
        except StreamUnavailable:
            continue
        assert not delivery.undecodable
        found += [(received.sequence, received.group.number) for received in delivery.groups]


def check_exactly_once(acknowledged: dict[int, tuple[int, ...]], found: list[tuple[int, int]]) -> None:
    sequences = [sequence for sequence, _ in found]
    assert sequences == sorted(set(sequences))
    read = {number: sequence for sequence, number in found}
    assert len(read) == len(found)
    # Groups that were not acknowledged may be there as well.
    assert {number: read.get(number) for number in acknowledged} == {
        number: own[-1] for number, own in acknowledged.items()
    }


async def survive(sending: Client, reading: Client, settings: LogSettings, broken: Server) -> None:
    await eventually_ensured(sending, settings)
    publisher = Publisher(sending, settings, timeout_s=1.0)
    reader = Consumer(reading, replace(settings, node_id=9), STREAM, START)
    acknowledged: dict[int, tuple[int, ...]] = {}
    found: list[tuple[int, int]] = []
    publishing = asyncio.create_task(publish_all(publisher, 400, acknowledged))
    while_publishing = asyncio.create_task(read_all(reader, {10**9}, found))
    for goal in (100, 250):
        await eventually(lambda goal=goal: len(acknowledged) >= goal, timeout_s=60)  # type: ignore[misc]
        assert not while_publishing.done()
        await asyncio.to_thread(broken.kill)
        publisher.connection_lost()
        await asyncio.sleep(0.3)
        await asyncio.to_thread(broken.start)
    await asyncio.wait_for(publishing, 60)
    while_publishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await while_publishing
    await asyncio.wait_for(read_all(reader, set(acknowledged), found), 60)
    check_exactly_once(acknowledged, found)
    late = Consumer(reading, settings, STREAM, START)
    again: list[tuple[int, int]] = []
    await asyncio.wait_for(read_all(late, set(acknowledged), again), 60)
    check_exactly_once(acknowledged, again)
    await reader.close()
    await late.close()
    await publisher.close()


def test_acknowledged_groups_survive_a_server_that_is_killed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as sending, client(server.url) as reading:
            await survive(sending, reading, SETTINGS, server)

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


@pytest.mark.slow
def test_acknowledged_groups_survive_a_hub_that_is_killed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(leaf.url) as sending, client(leaf.url) as reading:
            await survive(sending, reading, replace(SETTINGS, domain="hub"), hub)

    with hub_and_leaf(tmp_path) as (hub, leaf):
        asyncio.run(scenario())


def test_a_tail_that_is_lost_while_reading_is_a_gap(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            for number in range(1, 101):
                await store(connection, 7, whole(number))
            reader = Consumer(connection, READER, STREAM, START)
            assert await read_numbers(reader, 100) == list(range(1, 101))
            server.kill()
            (block,) = (server.folder / "store").rglob("*.blk")
            os.truncate(block, block.stat().st_size // 2)
            server.start()
            with pytest.raises(GapFound, match="ends at"):
                while True:
                    await reader.read(wait_s=10)
            assert reader.position.sequence == 100
            await reader.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())
