"""Publishing: parts, batches, order, failures, and what counts as an own message."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from nats.aio.client import Client

from harmonylite import wire
from harmonylite.stream import publisher as publisher_module
from harmonylite.stream.log import LogSettings, api_request, stream_state
from harmonylite.stream.provision import ensure_streams
from harmonylite.stream.publisher import (
    MAX_PART_BYTES,
    GroupTooLarge,
    GroupUnreadable,
    Published,
    Publisher,
    PublishFailed,
)
from tests.stream.logfixture import (
    SETTINGS,
    STREAM,
    TOPOLOGIES,
    Place,
    client,
    eventually_ensured,
    payload,
    single_server,
    subject,
    topology,
)
from tests.stream.support import eventually


async def stored(
    connection: Client, sequence: int, settings: LogSettings = SETTINGS
) -> tuple[wire.Part, dict[str, str]]:
    """The part that the stream holds, and its headers."""
    data = f'{{"seq": {sequence}}}'.encode()
    answer = await connection.request(f"{settings.api_prefix}.DIRECT.GET.{STREAM}", data, timeout=5)
    return wire.parse_part(answer.data), answer.headers or {}


async def joined(connection: Client, published: Published, settings: LogSettings = SETTINGS) -> bytes:
    parts = [(await stored(connection, sequence, settings))[0] for sequence in published.sequences]
    assert [part.index for part in parts] == list(range(len(parts)))
    return b"".join(part.body for part in parts)


async def without_batches(connection: Client) -> None:
    config = {"name": STREAM, "subjects": [SETTINGS.subjects(1)], "storage": "file", "allow_direct": True}
    await api_request(connection, SETTINGS, f"STREAM.CREATE.{STREAM}", config)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_one_message_and_many(tmp_path: Path, name: str) -> None:
    async def scenario(place: Place) -> None:
        async with client(place.url) as connection:
            await eventually_ensured(connection, place.settings)
            publisher = Publisher(connection, place.settings)
            small, large = payload(1), os.urandom(20_000_000)
            one = await publisher.publish(1, small, 1234)
            assert one == Published(STREAM, (1,), len(small) + wire.HEADER_BYTES)
            part, headers = await stored(connection, 1, place.settings)
            assert (part.publisher, part.number, part.max_ts, bytes(part.body)) == (7, 1, 1234, small)
            assert "Nats-Msg-Id" not in headers
            many = await publisher.publish(2, large, 1235)
            count = -(-len(large) // (MAX_PART_BYTES - 1024 - wire.HEADER_BYTES))
            assert many.sequences == tuple(range(2, 2 + count))
            assert many.stored_bytes == len(large) + count * wire.HEADER_BYTES
            assert await joined(connection, many, place.settings) == large
            _, headers = await stored(connection, 3, place.settings)
            assert ("Nats-Batch-Id" in headers) == (name != "old")
            state = await stream_state(connection, place.settings, STREAM)
            assert state.last_seq == 1 + count
            await publisher.close()

    with topology(name, tmp_path) as place:
        asyncio.run(scenario(place))


def test_many_groups_at_once_stay_in_the_order_of_the_calls(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await without_batches(connection)
            publisher = Publisher(connection, SETTINGS)
            sizes = [2_500_000 if number % 10 == 0 else 10 for number in range(60)]
            calls = [publisher.publish(number, os.urandom(size), 0) for number, size in enumerate(sizes)]
            published = await asyncio.gather(*calls)
            everything = [sequence for one in published for sequence in one.sequences]
            assert everything == list(range(1, len(everything) + 1))
            assert [len(one.sequences) for one in published] == [3 if size > 10 else 1 for size in sizes]
            await publisher.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


@pytest.mark.parametrize("atomic", [True, False])
def test_publishers_at_the_same_time(tmp_path: Path, atomic: bool) -> None:
    async def scenario() -> None:
        async with client(server.url) as one, client(server.url) as other:
            await (ensure_streams(one, SETTINGS) if atomic else without_batches(one))
            publishers = [Publisher(one, SETTINGS), Publisher(other, replace(SETTINGS, node_id=8))]
            contents = [[os.urandom(3_000_000) for _ in range(5)] for _ in publishers]
            published = await asyncio.gather(
                *(
                    publisher.publish(number, content, 0)
                    for publisher, own in zip(publishers, contents, strict=True)
                    for number, content in enumerate(own)
                )
            )
            for result, content in zip(published, [content for own in contents for content in own], strict=True):
                first, last = result.sequences[0], result.sequences[-1]
                if atomic:  # nothing of the other one in between
                    assert result.sequences == tuple(range(first, last + 1))
                assert await joined(one, result) == content

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_more_parts_than_a_batch_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            publisher = Publisher(connection, SETTINGS)
            for number, parts in ((1, 1000), (2, 1001)):
                content = os.urandom(parts * 16)
                published = await publisher.publish(number, content, 0)
                assert len(published.sequences) == parts
                assert await joined(connection, published) == content
                _, headers = await stored(connection, published.sequences[-1])
                assert headers.get("Nats-Batch-Commit") == ("1" if number == 1 else None)

    monkeypatch.setattr(publisher_module, "MAX_PART_BYTES", 1024 + wire.HEADER_BYTES + 16)
    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_batches_that_are_no_longer_allowed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            publisher = Publisher(connection, SETTINGS)
            await publisher.publish(1, os.urandom(3_000_000), 0)
            info = await api_request(connection, SETTINGS, f"STREAM.INFO.{STREAM}")
            config = {**info["config"], "allow_atomic": False}
            await api_request(connection, SETTINGS, f"STREAM.UPDATE.{STREAM}", config)
            content = os.urandom(3_000_000)
            with pytest.raises(PublishFailed, match=r"group 2 .*atomic"):
                await publisher.publish(2, content, 0)
            assert (await stream_state(connection, SETTINGS, STREAM)).last_seq == 3
            published = await publisher.publish(3, content, 0)
            assert await joined(connection, published) == content

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_what_the_stream_refuses(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            publisher = Publisher(connection, SETTINGS)
            with pytest.raises(PublishFailed, match=r"no stream takes harmonylite-change-log.1.7"):
                await publisher.publish(1, b"x", 0)
            with pytest.raises(PublishFailed, match="does not exist"):
                await publisher.publish(2, os.urandom(2_000_000), 0)
            config = {
                "name": STREAM,
                "subjects": [SETTINGS.subjects(1)],
                "discard": "new",
                "max_bytes": 4096,
                "allow_direct": True,
            }
            await api_request(connection, SETTINGS, f"STREAM.CREATE.{STREAM}", config)
            await publisher.publish(3, b"x", 0)
            with pytest.raises(PublishFailed, match=r"group 4 .*maximum bytes"):
                await publisher.publish(4, b"x" * 5000, 0)
            assert (await publisher.publish(5, b"x", 0)).sequences == (2,)

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_another_stream_that_takes_the_subject(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            config = {"name": "audit", "subjects": ["harmonylite-change-log.>"]}
            await api_request(connection, SETTINGS, "STREAM.CREATE.audit", config)
            with pytest.raises(PublishFailed, match="stream audit took"):
                await Publisher(connection, SETTINGS).publish(1, b"x", 0)

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_no_answer_and_no_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            hasty, patient = Publisher(connection, SETTINGS, timeout_s=0.3), Publisher(connection, SETTINGS)
            await hasty.publish(1, b"x", 0)
            await patient.publish(2, b"x", 0)
            server.freeze()
            waiting = asyncio.create_task(patient.publish(3, b"x", 0))
            with pytest.raises(PublishFailed, match="no acknowledgement"):
                await hasty.publish(4, b"x", 0)
            assert not waiting.done()
            patient.connection_lost()
            with pytest.raises(PublishFailed, match="connection was lost"):
                await waiting
            server.thaw()
            # Both are stored all the same, which the caller cannot know.
            assert (await patient.publish(5, b"x", 0)).sequences == (5,)
            assert [patient.is_own(STREAM, sequence, number) for sequence, number in ((3, 3), (5, 5))] == [False, True]
            server.kill()
            await eventually(lambda: not connection.is_connected)
            started = time.monotonic()
            with pytest.raises(PublishFailed, match="not connected"):
                await patient.publish(6, b"x", 0)
            assert time.monotonic() - started < 1

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_parts_that_readers_would_not_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The joiner drops a group whose parts are far apart; then the acknowledgements prove nothing."""

    async def scenario() -> None:
        async with client(server.url) as connection:
            await without_batches(connection)
            publisher = Publisher(connection, SETTINGS)
            assert publisher_module.MAX_SPAN_NS < wire.parts.DEFAULT_OPEN_LIMIT_MS * 1_000_000
            await publisher.publish(1, os.urandom(3_000_000), 0)
            monkeypatch.setattr(publisher_module, "MAX_SPAN_NS", 0)
            with pytest.raises(PublishFailed, match="too far apart"):
                await publisher.publish(2, os.urandom(3_000_000), 0)
            assert not publisher.is_own(STREAM, 4, 2)
            await publisher.publish(3, b"x", 0)

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_own_messages_are_known_by_sequence_and_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            publisher = Publisher(connection, SETTINGS)
            await connection.request(subject(8), b"another node's", timeout=5)
            published = await publisher.publish(5, os.urandom(2_000_000), 0)
            assert published.sequences == (2, 3)
            assert [publisher.is_own(STREAM, sequence, 5) for sequence in (1, 2, 3, 4)] == [False, True, True, False]
            assert not publisher.is_own(STREAM, 2, 6)  # a log that lost its tail gives 2 out again
            assert not publisher.is_own("another", 2, 5)
            await publisher.publish(6, b"x", 0)
            assert [publisher.is_own(STREAM, *own) for own in ((2, 5), (3, 5), (4, 6))] == [False, True, True]

    monkeypatch.setattr(publisher_module, "OWN_MESSAGES", 2)
    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_a_publish_that_is_cancelled_leaves_the_others_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            publisher = Publisher(connection, SETTINGS)
            calls = [asyncio.create_task(publisher.publish(n, os.urandom(1_500_000), 0)) for n in range(6)]
            await asyncio.sleep(0)
            calls[0].cancel()
            calls[3].cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(result) for n, result in enumerate(results) if n not in (0, 3)] == [Published] * 4
            assert [type(results[n]) for n in (0, 3)] == [asyncio.CancelledError] * 2
            await publisher.publish(9, b"x", 0)

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_a_group_that_the_stream_cannot_hold_is_not_sent(tmp_path: Path) -> None:
    """The server would acknowledge it and keep none of it; one just below the bound is kept as a whole."""
    bound = 4_000_000

    async def scenario() -> None:
        async with client(server.url) as connection:
            (made,) = await ensure_streams(connection, replace(SETTINGS, max_bytes=bound))
            assert made.max_bytes == bound
            publisher = Publisher(connection, SETTINGS)
            for size, number in ((bound, 1), (bound - 300, 2)):  # the second: with what is stored beside it
                with pytest.raises(GroupTooLarge) as refusal:
                    await publisher.publish(number, os.urandom(size), 0)
                assert refusal.value.limit == bound
                assert refusal.value.size > size
            assert (await stream_state(connection, SETTINGS, STREAM)).last_seq == 0
            content = os.urandom(bound - 2_000)
            kept = await publisher.publish(3, content, 0)
            assert await joined(connection, kept) == content
            assert not publisher.stream_seen(await stream_state(connection, SETTINGS, STREAM))
            (larger,) = await ensure_streams(connection, replace(SETTINGS, max_bytes=2 * bound, owns_store=True))
            assert publisher.stream_seen(larger)
            await publisher.publish(4, os.urandom(bound), 0)
            await publisher.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_a_group_that_no_node_would_take_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be acknowledged, and kept aside by every reader as one that cannot be read. What is sent is read."""
    limit = 3_000_000
    monkeypatch.setattr(publisher_module, "MAX_GROUP_BYTES", limit)

    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            publisher = Publisher(connection, SETTINGS)
            with pytest.raises(GroupUnreadable, match=r"a node takes 3000000 in one piece") as refusal:
                await publisher.publish(1, os.urandom(limit), 0)
            assert "smaller" in refusal.value.to_do
            assert (await stream_state(connection, SETTINGS, STREAM)).last_seq == 0
            kept = await publisher.publish(2, os.urandom(limit - 1_000), 0)
            joiner = wire.Joiner(max_open_bytes=limit)
            parts = [(await stored(connection, sequence))[0] for sequence in kept.sequences]
            assert [joiner.add(part, index, 0) is not None for index, part in enumerate(parts)] == [False, False, True]
            await publisher.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_one_message_is_measured_by_what_the_publisher_was_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            (made,) = await ensure_streams(connection, replace(SETTINGS, max_bytes=10_000))
            publisher = Publisher(connection, SETTINGS)
            publisher.stream_seen(made)
            await publisher.publish(1, os.urandom(9_000), 0)
            with pytest.raises(GroupTooLarge, match=r"holds 10000"):
                await publisher.publish(2, os.urandom(10_000), 0)
            await publisher.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


def test_an_acknowledgement_that_takes_long_is_told_before_it_is_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            publisher = Publisher(connection, SETTINGS, timeout_s=0.3)
            told: list[float] = []
            await publisher.publish(1, payload(1), 0, on_late=told.append)
            assert told == []
            server.freeze()
            publication = asyncio.create_task(publisher.publish(2, os.urandom(50_000), 0, on_late=told.append))
            await eventually(lambda: told, what="that it takes long")
            assert told == [0.3]
            assert not publication.done()
            server.thaw()
            assert (await publication).sequences == (2,)
            await publisher.close()

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())
