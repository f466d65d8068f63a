"""How large a stream may become: who knows decides, and nobody takes a bound away."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from harmonylite.stream.log import stream_state
from harmonylite.stream.provision import STREAMS_SHARE, ensure_streams
from tests.stream.logfixture import (
    SETTINGS,
    STREAM,
    Server,
    client,
    eventually_ensured,
    hub_and_leaf,
    jetstream,
    running,
    single_server,
)

MB = 1 << 20
LEAF = replace(SETTINGS, domain="hub")


def test_the_server_s_own_node_bounds_what_a_leaf_has_made(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(hub.url) as at_hub, client(leaf.url) as at_leaf:
            await eventually_ensured(at_leaf, LEAF)
            assert (await stream_state(at_leaf, LEAF, STREAM)).max_bytes is None
            (bounded,) = await ensure_streams(at_hub, replace(SETTINGS, max_bytes=50 * MB, owns_store=True))
            assert bounded.max_bytes == 50 * MB
            (seen,) = await ensure_streams(at_leaf, replace(LEAF, update_existing=True))
            assert seen.max_bytes == 50 * MB

    with hub_and_leaf(tmp_path) as (hub, leaf):
        asyncio.run(scenario())


@pytest.mark.parametrize(
    ("owns_store", "wanted", "found"),
    [
        (True, 80 * MB, 80 * MB),
        (True, 20 * MB, 20 * MB),
        (True, 52 * MB, 50 * MB),
        (True, 47 * MB, 50 * MB),
        (False, 80 * MB, 50 * MB),
        (False, 20 * MB, 50 * MB),
    ],
)
def test_a_bound_that_is_there_changes_with_the_store_it_is_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, owns_store: bool, wanted: int, found: int
) -> None:
    """Not with every change of the free space; and not by one server of a cluster, each of which has its own."""

    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, replace(SETTINGS, max_bytes=50 * MB))
            (state,) = await ensure_streams(connection, replace(SETTINGS, max_bytes=wanted, owns_store=owns_store))
            assert state.max_bytes == found

    with single_server(tmp_path / "s") as server, caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    assert ("stream updated" in caplog.text) == (found != 50 * MB)


def test_the_account_s_limit_bounds_what_nobody_else_does(tmp_path: Path) -> None:
    users = "users: [ { user: app, password: secret } ], jetstream: { max_file: 100MB, max_mem: 1MB }"
    server = Server(tmp_path / "s", f"{jetstream(tmp_path / 's')}\naccounts {{ APP: {{ {users} }} }}")

    async def scenario() -> None:
        async with client(server.url.replace("//", "//app:secret@")) as connection:
            states = await ensure_streams(connection, replace(SETTINGS, shards=2))
            assert [state.max_bytes for state in states] == [int(100 * MB * STREAMS_SHARE / 2)] * 2

    with running(server):
        asyncio.run(scenario())


def test_a_stream_is_bounded_by_bytes_alone(tmp_path: Path) -> None:
    """Not by `max_entries`, which makes a snapshot due: what nobody else has read yet would be discarded."""

    async def scenario() -> None:
        async with client(server.url) as connection:
            await ensure_streams(connection, replace(SETTINGS, max_bytes=50 * MB))
            config = (await connection.jetstream().stream_info(STREAM)).config
            assert (config.max_msgs, config.max_msgs_per_subject, config.max_age) == (-1, -1, 0)
            assert (config.retention, config.discard, config.max_bytes) == ("limits", "old", 50 * MB)

    with single_server(tmp_path / "s") as server:
        asyncio.run(scenario())
