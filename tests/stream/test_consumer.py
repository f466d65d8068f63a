"""Reading a stream: in order, every group once, never past a gap, whatever happens to server and consumer."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from nats.aio.client import Client

from harmonylite import wire
from harmonylite.model import Delivery, Position, ReceivedGroup, Undecodable
from harmonylite.stream.consumer import Consumer
from harmonylite.stream.log import (
    LogSettings,
    stored_time_ns,
    stream_state,
)
from harmonylite.stream.provision import ensure_streams
from harmonylite.stream.publisher import Publisher
from harmonylite.stream.pull import DEFAULT_MAX_MESSAGES
from tests.stream.logfixture import (
    SETTINGS,
    START,
    STREAM,
    TOPOLOGIES,
    Place,
    client,
    consumer_names,
    eventually_ensured,
    numbers,
    payload,
    read_numbers,
    single_server,
    store,
    subject,
    topology,
    whole,
)

READER = replace(SETTINGS, node_id=9)


def parts_of(number: int, publisher: int, count: int) -> list[bytes]:
    """One group, cut into `count` messages."""
    content = payload(number, publisher, size=500)
    room = wire.HEADER_BYTES - (-len(content) // count)
    parts = wire.split(content, publisher=publisher, number=number, max_ts=0, max_bytes=room)
    assert len(parts) == count
    return parts


async def time_at(connection: Client, sequence: int, settings: LogSettings = SETTINGS) -> int:
    state = await stream_state(connection, settings, STREAM)
    return await stored_time_ns(connection, settings, state, sequence) or 0


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_groups_arrive_in_order_with_their_position(tmp_path: Path, name: str) -> None:
    async def scenario(place: Place) -> None:
        async with client(place.url) as sending, client(place.url) as reading:
            await eventually_ensured(sending, place.settings)
            publisher = Publisher(sending, place.settings)
            reader = Consumer(reading, replace(place.settings, node_id=9), STREAM, START)
            assert await reader.read(wait_s=0.2) == Delivery(reader.position)
            state = await stream_state(sending, place.settings, STREAM)
            assert reader.position == Position(STREAM, state.created, 0, 0)
            contents = [payload(number, size=size) for number, size in enumerate((1, 20_000_000, 10, 100_000))]
            await asyncio.gather(*(publisher.publish(number, data, 0) for number, data in enumerate(contents)))
            received: list[ReceivedGroup] = []
            while len(received) < 4:
                received += (await reader.read(wait_s=5)).groups
            assert [wire.encode_group(one.group, compress=False) for one in received] == contents
            last = (await stream_state(sending, place.settings, STREAM)).last_seq
            stored_ns = await time_at(sending, last, place.settings)
            assert reader.position == Position(STREAM, state.created, last, stored_ns)
            assert (received[-1].sequence, received[-1].stored_ms) == (last, stored_ns // 1_000_000)
            # A new reader goes on where this one was.
            await publisher.publish(4, payload(4), 0)
            resumed = Consumer(reading, place.settings, STREAM, reader.position)
            assert await read_numbers(resumed, 1) == [4]
            await resumed.close()
            await reader.close()
            assert await consumer_names(sending, place.settings) == []

    with topology(name, tmp_path) as place:
        asyncio.run(scenario(place))


def test_many_small_messages_come_in_few_reads_and_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            publisher = Publisher(connection, SETTINGS)
            data = payload(1)
            await asyncio.gather(*(publisher.publish(number, data, 0) for number in range(1000)))
            reader = Consumer(connection, READER, STREAM, START)
            started, reads, sizes = time.monotonic(), 0, 0
            while reader.position.sequence < 1000:
                delivery = await reader.read(max_messages=100, wait_s=5)
                sizes = max(sizes, len(delivery.groups) + len(delivery.undecodable))
                reads += 1
            assert sizes <= 100
            assert reads < 200
            assert time.monotonic() - started < 3  # it does not wait for more when there is something
            # By bytes: the message that reaches the bound is the last one.
            again = Consumer(connection, READER, STREAM, START)
            await again.read(max_messages=1, wait_s=5)
            await asyncio.sleep(0.2)
            assert (await again.read(max_messages=100, max_bytes=1, wait_s=5)).position.sequence == 2
            await reader.close()
            await again.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_position_stays_before_an_open_group(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            first, second, third = parts_of(50, 8, 3)
            for publisher, data in ((7, whole(1)), (8, first), (7, whole(2)), (8, second), (7, whole(3))):
                await store(connection, publisher, data)
            reader = Consumer(connection, READER, STREAM, START)
            assert await read_numbers(reader, 3) == [1, 2, 3]
            open_at = reader.position
            assert (open_at.sequence, open_at.stored_ns) == (1, await time_at(connection, 1))
            await store(connection, 8, third)
            delivery = await reader.read(wait_s=5)
            assert numbers(delivery) == [50]
            assert (delivery.groups[0].sequence, delivery.position.sequence) == (6, 6)
            assert delivery.position.stored_ns == await time_at(connection, 6)
            # After a crash in between, what lies between the parts comes again.
            resumed = Consumer(connection, READER, STREAM, open_at)
            assert await read_numbers(resumed, 3) == [2, 3, 50]
            assert resumed.position == reader.position
            await reader.close()
            await resumed.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_two_open_groups_and_one_that_is_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            reader = Consumer(connection, READER, STREAM, START)
            seven, eight = parts_of(70, 7, 2), parts_of(80, 8, 2)
            positions = []
            for publisher, data in ((7, seven[0]), (8, eight[0]), (7, whole(71)), (9, whole(1, 9)), (8, eight[1])):
                sequence = await store(connection, publisher, data)
                await reader.read(wait_s=0.2)
                positions.append((sequence, reader.position.sequence, reader.position.stored_ns))
            # 71 tells that 70 never ends; then only 80 holds the position, until it is complete.
            assert [at[:2] for at in positions] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 5)]
            assert [at[2] for at in positions] == [await time_at(connection, at[1]) if at[1] else 0 for at in positions]
            await reader.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_undecodable_messages_are_delivered_and_passed(tmp_path: Path, name: str) -> None:
    async def scenario(place: Place) -> None:
        settings = place.settings
        async with client(place.url) as connection:
            await eventually_ensured(connection, settings)
            broken = wire.split(b"no group", publisher=7, number=2, max_ts=0, max_bytes=1000)[0]
            damaged = parts_of(3, 7, 2)
            damaged[1] = damaged[1][:-1] + bytes([damaged[1][-1] ^ 1])
            wrong_number = wire.split(payload(5), publisher=7, number=6, max_ts=0, max_bytes=1000)[0]
            for publisher, data in (
                *((7, b"hello"), (7, whole(1)), (7, broken), (7, damaged[0]), (7, damaged[1])),
                *((7, whole(4, 8)), (7, b""), (7, wrong_number), (7, whole(7))),
            ):
                await store(connection, publisher, data)
            reader = Consumer(connection, settings, STREAM, START)
            good: list[int] = []
            bad: list[Undecodable] = []
            while reader.position.sequence < 9:
                delivery = await reader.read(wait_s=5)
                good += numbers(delivery)
                bad += delivery.undecodable
            assert good == [1, 7]
            assert [message.sequence for message in bad] == [1, 3, 5, 6, 7, 8]
            assert (bad[0].data, bad[1].data) == (b"hello", b"no group")
            assert "may not publish on" in bad[3].error
            assert [message.sequence for message in bad if message.unread] == [3], "that may be a format to come"
            assert bad[1].unread is not None
            assert (bad[1].unread.publisher, bad[1].unread.joined) == (7, True)
            await reader.close()

    with topology(name, tmp_path) as place:
        asyncio.run(scenario(place))


def test_messages_with_a_header_of_a_later_version_are_told_from_foreign_ones(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            later = bytearray(whole(1))
            later[2] = 2
            await store(connection, 7, bytes(later))
            await connection.jetstream().publish(f"{SETTINGS.subject_prefix}.1.x7", bytes(later))
            await store(connection, 7, b"hello")
            await store(connection, 7, whole(2))
            reader = Consumer(connection, SETTINGS, STREAM, START)
            bad: list[Undecodable] = []
            while reader.position.sequence < 4:
                bad += (await reader.read(wait_s=5)).undecodable
            assert [(message.sequence, message.unread is not None) for message in bad] == [
                (1, True),
                (2, False),
                (3, False),
            ]
            assert bad[0].data == later
            assert bad[0].unread is not None
            assert (bad[0].unread.publisher, bad[0].unread.joined) == (7, False)
            assert bad[0].unread.stored_ms == await time_at(connection, 1) // 1_000_000
            await reader.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_own_messages_are_passed_without_being_decoded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            publisher = Publisher(connection, SETTINGS)
            now_ms = int(time.time() * 1000)
            await publisher.publish(1, payload(1), now_ms)
            await publisher.publish(2, payload(2, size=2_000_000), now_ms)
            await publisher.publish(3, payload(3), now_ms + 3_600_000)  # its receivers clamp it, so must we
            await store(connection, 8, whole(4, 8))
            await publisher.publish(5, payload(5), now_ms + 30_000)
            reader = Consumer(connection, SETTINGS, STREAM, START, is_own=publisher.is_own, tolerance_ms=60_000)
            assert await read_numbers(reader, 2) == [3, 4]
            while reader.position.sequence < 6:
                assert numbers(await reader.read(wait_s=5)) == []
            assert reader.position.stored_ns == await time_at(connection, 6)
            # Another process of the same node, started from a backup perhaps, needs them all.
            other = Consumer(connection, SETTINGS, STREAM, START, is_own=Publisher(connection, SETTINGS).is_own)
            assert await read_numbers(other, 5) == [1, 2, 3, 4, 5]
            # So does another node, whatever it is told.
            third = Consumer(connection, READER, STREAM, START, is_own=publisher.is_own, tolerance_ms=60_000)
            assert await read_numbers(third, 5) == [1, 2, 3, 4, 5]
            for consumer in (reader, other, third):
                await consumer.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_an_own_group_that_was_given_up_does_not_hold_the_position(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            publisher = Publisher(connection, SETTINGS)
            reader = Consumer(connection, SETTINGS, STREAM, START, is_own=publisher.is_own, tolerance_ms=60_000)
            await store(connection, 7, parts_of(1, 7, 2)[0])
            await reader.read(wait_s=0.3)
            assert reader.position.sequence == 0
            await publisher.publish(2, payload(2), 0)
            await publisher.publish(3, payload(3), 0)
            while reader.position.sequence < 3:
                await reader.read(wait_s=5)
            await reader.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_every_group_arrives_although_few_open_ones_fit_into_memory(tmp_path: Path) -> None:
    """Five publishers at a time, and memory for two of their groups; one of them goes on before the others end."""

    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            await store(connection, 1, whole(1, 1))
            cut = {publisher: parts_of(publisher * 10, publisher, 4) for publisher in range(1, 6)}
            for index in range(4):
                for publisher in range(1, 6):
                    await store(connection, publisher, cut[publisher][index])
                    if index == 3:
                        await store(connection, publisher, whole(publisher * 10 + 1, publisher))
            # Nobody ends this one: at last the position stays before it.
            await store(connection, 6, parts_of(60, 6, 4)[0])
            reader = Consumer(connection, READER, STREAM, START, joiner=partial(wire.Joiner, max_open_bytes=2300))
            found: list[int] = []
            positions = [0]
            deadline = time.monotonic() + 30
            while reader.position.sequence < 26:
                assert time.monotonic() < deadline, f"the position stays at {positions[-1]}"
                delivery = await reader.read(max_messages=7, wait_s=5)
                assert delivery.undecodable == ()
                found += numbers(delivery)
                positions.append(delivery.position.sequence)
                assert delivery.position.stored_ns == (await time_at(connection, positions[-1]) if positions[-1] else 0)
            assert set(found) == {1, *range(10, 60, 10), *range(11, 61, 10)}
            assert positions == sorted(positions)
            assert found.count(1) == 1
            assert len(found) > 11  # some came again, while another one was read again
            # The next reader starts where this one ended, and is none the worse for it.
            await store(connection, 6, whole(61, 6))
            assert await read_numbers(reader, 1) == [61]
            resumed = Consumer(connection, READER, STREAM, reader.position)
            await store(connection, 6, whole(62, 6))
            assert await read_numbers(resumed, 1) == [62]
            await reader.close()
            await resumed.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_what_arrived_is_bounded_however_little_is_read_at_a_time(tmp_path: Path) -> None:
    """A slow database reads a message at a time: the next ones wait in the stream, not in memory."""

    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            for number in range(2_000):
                await connection.publish(subject(8), whole(number, 8))
            await connection.flush()
            reader = Consumer(connection, SETTINGS, STREAM, START)
            found, most = 0, 0
            while found < 2_000:
                delivery = await reader.read(max_messages=3, wait_s=5)
                found += len(delivery.groups)
                assert len(delivery.groups) <= 3
                assert reader.taken[0] == len(delivery.groups)
                await asyncio.sleep(0)
                assert reader._session is not None
                most = max(most, len(reader._session._received))
            assert found == 2_000
            assert most <= 1.5 * DEFAULT_MAX_MESSAGES
            await reader.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())
