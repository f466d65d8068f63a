"""Names, streams, and the gap test that tells whether a log is still the same."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client

from harmonylite.model import Position
from harmonylite.stream.lineage import compare_lineage, same_log
from harmonylite.stream.log import (
    ApiError,
    LogSettings,
    StreamMissing,
    StreamState,
    StreamUnavailable,
    api_request,
    parse_time_ns,
    shard_of,
    stored_time_ns,
    stream_state,
)
from harmonylite.stream.provision import ensure_streams
from tests.stream.logfixture import (
    SETTINGS,
    STREAM,
    TOPOLOGIES,
    client,
    delete_message,
    eventually_ensured,
    payload,
    single_server,
    store,
    subject,
    topology,
)

CREATED = "2026-11-24T03:58:43.339949584Z"
TIME_NS = 1_795_492_723_000_000_007


def test_names_of_a_shard() -> None:
    settings = LogSettings(node_id=7, shards=4)
    assert settings.streams == tuple(f"harmonylite-changes-{shard}" for shard in range(1, 5))
    assert settings.subjects(2) == "harmonylite-change-log.2.*"
    assert settings.own_subject == f"harmonylite-change-log.{settings.own_shard}.7"
    assert settings.own_stream == f"harmonylite-changes-{settings.own_shard}"
    assert settings.api_prefix == "$JS.API"
    assert replace(settings, domain="hub").api_prefix == "$JS.hub.API"


def test_shard_of_a_publisher_never_changes() -> None:
    # Nodes of different versions have to agree: these values are part of the format.
    assert [shard_of(node, 4) for node in (1, 2, 3, 7, 2**63 - 1)] == [4, 2, 4, 3, 3]


@given(st.integers(1, 2**63 - 1), st.integers(1, 64))
def test_shard_is_in_range(node: int, shards: int) -> None:
    assert 1 <= shard_of(node, shards) <= shards


@given(st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1)), st.integers(0, 999))
def test_times_keep_their_nanoseconds(moment: datetime, nanoseconds: int) -> None:
    text = f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond:06}{nanoseconds:03}".rstrip("0").rstrip(".") + "Z"
    whole_s = int(moment.replace(microsecond=0, tzinfo=timezone.utc).timestamp())
    assert parse_time_ns(text) == whole_s * 10**9 + moment.microsecond * 1000 + nanoseconds


def test_times_with_an_offset_and_nonsense() -> None:
    assert parse_time_ns("2026-11-24T05:28:43.5+01:30") == parse_time_ns("2026-11-24T03:58:43.5Z")
    with pytest.raises(ValueError, match="RFC 3339"):
        parse_time_ns("yesterday")


def state(first: int, last: int, *, created: str = CREATED, last_ns: int | None = None) -> StreamState:
    return StreamState(STREAM, created, first, last, last - first + 1, 0, None, 0.0, last_ns=last_ns)


def position(sequence: int, *, created: str = CREATED, stored_ns: int = TIME_NS) -> Position:
    return Position(STREAM, created, sequence, stored_ns)


@pytest.mark.parametrize(
    ("stream", "at", "found_ns", "reason"),
    [
        (state(1, 20), position(10), TIME_NS, ""),
        (state(1, 10), position(10), TIME_NS, ""),
        # Discarded just up to the position: another message may have been there when it was, after some that were lost.
        (state(11, 20, last_ns=TIME_NS), position(10), None, "not known"),
        (state(11, 10, last_ns=TIME_NS), position(10), None, ""),  # empty, and the last one was that
        (state(11, 10, last_ns=TIME_NS + 1), position(10), None, "another one"),
        (state(11, 10), position(10), None, "not known"),
        (state(11, 20), position(10, stored_ns=0), None, ""),  # put there, just before the first message
        (state(12, 20), position(10), None, "discarded"),
        (state(1, 9), position(10), None, "ends at 9"),
        (state(1, 20), position(10), TIME_NS + 1, "another one"),
        (state(1, 20), position(10), None, "missing"),
        (state(1, 20), position(10, stored_ns=0), None, ""),  # time not known
        (state(1, 20, created="2026-11-24T03:58:44Z"), position(10), TIME_NS, "created anew"),
        (state(1, 20, created="2026-11-24T04:58:43.339949584+01:00"), position(10), TIME_NS, ""),  # the same instant
        (state(0, 0), position(0, stored_ns=0), None, ""),
        (state(0, 0), Position(STREAM, "", 0), None, ""),
        (state(1, 5), Position(STREAM, "", 0), None, ""),
        (state(3, 5), Position(STREAM, "", 0), None, "discarded"),
        (state(0, 0), position(10), None, "ends at 0"),
        (state(21, 20, last_ns=TIME_NS), position(20), None, ""),  # purged, all of it was read
        (state(21, 20), position(10), None, "discarded"),
    ],
)
def test_gap_test(stream: StreamState, at: Position, found_ns: int | None, reason: str) -> None:
    lineage = compare_lineage(stream, at, found_ns)
    assert lineage.intact == (not reason)
    assert reason in lineage.reason


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_streams_are_made_once_and_described(tmp_path: Path, name: str) -> None:
    async def scenario() -> None:
        settings = replace(place.settings, shards=2, max_bytes=1 << 30)
        async with client(place.url) as one, client(place.url) as other:
            await eventually_ensured(one, replace(settings, shards=1))
            both = await asyncio.gather(ensure_streams(one, settings), ensure_streams(other, settings))
            assert [[found.created for found in states] for states in both] == [
                [found.created for found in both[0]] for _ in both
            ]
            assert [found.name for found in both[0]] == list(settings.streams)
            await one.request(f"{settings.subject_prefix}.2.9", b"hello", timeout=5)
            found = await stream_state(one, settings, settings.stream(2))
            assert (found.first_seq, found.last_seq, found.messages, found.direct) == (1, 1, 1, True)
            assert found.bytes > 5
            assert found.round_trip_ms > 0
            assert found.created == both[0][1].created
            assert found.atomic == (name != "old")
            if name == "old":
                assert found.server_ms is None
            else:
                stored_ns = await stored_time_ns(one, settings, found, 1)
                assert stored_ns is not None and found.server_ms is not None
                assert 0 <= found.server_ms - stored_ns // 1_000_000 < 10_000

    with topology(name, tmp_path) as place:
        asyncio.run(scenario())


def test_a_stream_that_differs_is_adopted_or_updated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            made = {"name": STREAM, "subjects": [SETTINGS.subjects(1)], "storage": "file", "max_bytes": 1 << 20}
            await api_request(connection, SETTINGS, f"STREAM.CREATE.{STREAM}", made)
            await store(connection, 7, b"kept")
            wanted = replace(SETTINGS, max_bytes=1 << 25)
            (adopted,) = await ensure_streams(connection, wanted)
            assert not adopted.atomic
            (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
            differences = record.__dict__["fields"]["differences"]
            assert differences["allow_direct"] is False
            assert "max_bytes" not in differences  # another machine's disk is no mistake
            (updated,) = await ensure_streams(connection, replace(wanted, update_existing=True))
            assert (updated.atomic, updated.direct, updated.last_seq) == (True, True, 1)
            caplog.clear()
            await ensure_streams(connection, wanted)
            assert not caplog.records

    with single_server(tmp_path / "s") as server, caplog.at_level(logging.INFO):
        asyncio.run(scenario())


def test_a_stream_the_server_cannot_make(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            with pytest.raises(ApiError, match="replicas"):
                await ensure_streams(connection, replace(SETTINGS, replicas=3))
            with pytest.raises(StreamMissing):
                await stream_state(connection, SETTINGS, STREAM)
        with pytest.raises(StreamUnavailable, match="not connected"):
            await stream_state(connection, SETTINGS, STREAM)

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())


async def stored_position(connection: Client, sequence: int, settings: LogSettings = SETTINGS) -> Position:
    found = await stream_state(connection, settings, STREAM)
    stored_ns = await stored_time_ns(connection, settings, found, sequence)
    assert stored_ns is not None
    return Position(STREAM, found.created, sequence, stored_ns)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_lineage_of_a_purged_and_of_a_recreated_stream(tmp_path: Path, name: str) -> None:
    async def scenario() -> None:
        settings = place.settings
        async with client(place.url) as connection:

            async def reason(at: Position) -> str:
                return (
                    await same_log(connection, settings, await stream_state(connection, settings, STREAM), at)
                ).reason

            await eventually_ensured(connection, settings)
            # A message of the largest size: its time has to be known without the message coming in base64.
            for size in (1, connection.max_payload - 1024, 1, 1, 1):
                await connection.request(subject(7), b"x" * size, timeout=5)
            third, fifth = (
                await stored_position(connection, 3, settings),
                await stored_position(connection, 5, settings),
            )
            second = await stored_position(connection, 2, settings)
            assert [await reason(at) for at in (second, third, fifth)] == ["", "", ""]
            assert "another one" in await reason(replace(third, stored_ns=third.stored_ns + 1))
            await delete_message(connection, 3, settings)
            assert "missing" in await reason(third)
            assert await reason(second) == ""
            await api_request(connection, settings, f"STREAM.PURGE.{STREAM}", {"seq": 5})
            assert "discarded" in await reason(third)
            await api_request(connection, settings, f"STREAM.PURGE.{STREAM}", {})
            assert await reason(fifth) == ""
            assert "discarded" in await reason(second)
            assert "another one" in await reason(replace(fifth, stored_ns=fifth.stored_ns + 1))
            await connection.request(subject(7), b"x", timeout=5)
            assert "not known" in await reason(fifth)
            assert await reason(replace(fifth, stored_ns=0)) == ""
            await api_request(connection, settings, f"STREAM.DELETE.{STREAM}")
            await ensure_streams(connection, settings)
            assert "created anew" in await reason(fifth)

    with topology(name, tmp_path) as place:
        asyncio.run(scenario())


def test_a_lost_tail_is_noticed_though_its_numbers_are_given_out_again(tmp_path: Path) -> None:
    async def fill() -> tuple[Position, Position]:
        async with client(server.url) as connection:
            await ensure_streams(connection, SETTINGS)
            for _ in range(100):
                await store(connection, 7, os.urandom(500))
            return await stored_position(connection, 10), await stored_position(connection, 90)

    async def compare(early: Position, late: Position) -> None:
        async with client(server.url) as connection:
            lost = await stream_state(connection, SETTINGS, STREAM)
            assert lost.created == early.created  # the server does not say that anything happened
            assert 10 < lost.last_seq < 90
            assert "ends at" in (await same_log(connection, SETTINGS, lost, late)).reason
            while await store(connection, 7, payload(1)) < 100:
                pass
            again = await stream_state(connection, SETTINGS, STREAM)
            assert (again.created, again.first_seq, again.last_seq) == (late.created, 1, 100)
            assert "another one" in (await same_log(connection, SETTINGS, again, late)).reason
            assert (await same_log(connection, SETTINGS, again, early)).intact

    with single_server(tmp_path / "s") as server:
        early, late = asyncio.run(fill())
        server.kill()
        (block,) = (server.folder / "store").rglob("*.blk")
        os.truncate(block, block.stat().st_size // 2)
        server.start()
        asyncio.run(compare(early, late))
