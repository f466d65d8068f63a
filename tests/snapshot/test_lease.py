"""One node takes snapshots, and hears which nodes need one."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import nats.errors
import pytest
from nats.aio.client import Client

from harmonylite.stream.lease import Lease, LeaseLost, SnapshotRequest
from harmonylite.stream.log import LogSettings, StreamMissing, StreamUnavailable, api_request
from tests.snapshot.support import cluster, leader_of
from tests.stream.logfixture import SETTINGS, TOPOLOGIES, Place, Server, client, running, single_server, topology
from tests.stream.support import eventually_does

TTL_MS = 1000
LONG_MS = 30_000  # where nothing is to expire
EIGHT = replace(SETTINGS, node_id=8)


def lease(connection: Client, settings: LogSettings = SETTINGS, *, ttl_ms: int = LONG_MS, run: str = "") -> Lease:
    return Lease(lambda: connection, settings, ttl_ms=ttl_ms, run=run or f"run-{settings.node_id}")


async def until_acquired(contender: Lease, timeout_s: float = 20.0) -> float:
    """Try until it is got; how long that took, seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not await contender.acquire():
        assert loop.time() - began < timeout_s, "the lease did not become free"
        await asyncio.sleep(0.05)
    return loop.time() - began


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_exactly_one_of_many_gets_the_lease(tmp_path: Path, name: str) -> None:
    async def scenario(place: Place) -> None:
        async with client(place.url) as one, client(place.url) as two:
            nodes = [replace(place.settings, node_id=node) for node in range(1, 13)]
            contenders = [lease(one if node.node_id % 2 else two, node) for node in nodes]
            await eventually_does(contenders[0].ensure_bucket)
            for _ in range(5):
                won = await asyncio.gather(*(contender.acquire() for contender in contenders))
                assert won.count(True) == 1
                winner = contenders[won.index(True)]
                assert [contender.held for contender in contenders] == won
                assert await contenders[0].holder() == nodes[won.index(True)].node_id
                assert await winner.acquire()  # it is ours: renewed
                await winner.renew()
                await winner.release()
                assert not winner.held
                assert await contenders[0].holder() is None

    with topology(name, tmp_path) as place:
        asyncio.run(scenario(place))


def test_the_lease_of_a_dead_holder_expires(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as at_eight:
            eight = lease(at_eight, EIGHT, ttl_ms=TTL_MS)
            async with client(server.url) as at_seven:
                seven = lease(at_seven, ttl_ms=TTL_MS)
                assert await seven.acquire()
                assert not await eight.acquire()
            # seven is gone, without a word
            took_s = await until_acquired(eight)
            assert took_s > TTL_MS / 2000
            assert await eight.holder() == 8
            assert not seven.held

    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def test_a_renewed_lease_stays(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            seven, eight = lease(connection, ttl_ms=1000), lease(connection, EIGHT, ttl_ms=1000)
            assert await seven.acquire()
            loop = asyncio.get_running_loop()
            until = loop.time() + 2.5
            while loop.time() < until:
                await asyncio.sleep(seven.ttl_s / 5)
                await seven.renew()
                assert seven.held
                assert not await eight.acquire()

    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def test_who_slept_through_its_ttl_knows_that_it_lost_the_lease(tmp_path: Path) -> None:
    async def scenario() -> None:
        now = 1000.0
        async with client(server.url) as connection:
            seven = Lease(lambda: connection, SETTINGS, ttl_ms=2 * TTL_MS, run="r7", clock=lambda: now)
            eight = lease(connection, EIGHT, ttl_ms=2 * TTL_MS)
            assert await seven.acquire()
            now += 2 * TTL_MS / 1000 - 0.1
            assert seven.held
            now += 0.2
            assert not seven.held  # without asking anybody
            await until_acquired(eight)
            with pytest.raises(LeaseLost):
                await seven.renew()
            with pytest.raises(LeaseLost):
                await seven.renew()
            assert not await seven.acquire()
            await seven.release()
            assert await eight.holder() == 8
            await eight.renew()

    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def test_a_late_release_does_not_take_it_from_the_next_holder(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            seven, eight = lease(connection, ttl_ms=TTL_MS), lease(connection, EIGHT, ttl_ms=TTL_MS)
            assert await seven.acquire()
            await until_acquired(eight)
            await seven.release()
            assert await eight.holder() == 8

    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def test_the_same_node_in_another_process_does_not_share_the_lease(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            assert await lease(connection, run="first").acquire()
            assert not await lease(connection, run="second").acquire()

    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def test_a_renewal_whose_answer_was_lost_is_still_ours(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            seven, shadow = lease(connection), lease(connection)
            assert await seven.acquire()
            assert await shadow.acquire()  # what a stored request without an answer leaves: our word, a newer revision
            await seven.renew()
            assert seven.held
            assert await shadow.acquire()
            await seven.release()
            assert await seven.holder() is None

    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def test_requests_are_seen_renewed_and_withdrawn(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            seven, eight = lease(connection), lease(connection, EIGHT)
            assert await eight.requests() == []
            await seven.wanted("new node")
            await eight.wanted("the log is trimmed", newer_than="20251124T074500Z-7-1a2b3c4d")
            first, second = await seven.requests()
            assert (first.node_id, first.reason, first.newer_than) == (7, "new node", "")
            assert second == SnapshotRequest(
                8, "the log is trimmed", "20251124T074500Z-7-1a2b3c4d", stored_ms=second.stored_ms
            )
            assert second.stored_ms > 1_700_000_000_000
            await seven.wanted("new node, still")
            assert [request.reason for request in await seven.requests()] == ["new node, still", "the log is trimmed"]
            await seven.withdraw()
            await seven.withdraw()
            assert [request.node_id for request in await seven.requests()] == [8]
            await connection.publish("$KV.harmonylite-changes-lease.wanted.9", b"nonsense")
            await connection.publish("$KV.harmonylite-changes-lease.wanted.10", b"[7]")
            await connection.flush()
            assert [request.node_id for request in await seven.requests()] == [8]

    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def test_a_request_that_is_not_renewed_expires(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            seven = lease(connection, ttl_ms=TTL_MS)
            await seven.wanted("new node")
            deadline = asyncio.get_running_loop().time() + 15
            while await seven.requests():
                assert asyncio.get_running_loop().time() < deadline, "the request does not expire"
                await asyncio.sleep(0.05)

    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def test_a_lost_bucket_is_made_anew(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            seven = lease(connection)
            assert await seven.acquire()
            await api_request(connection, SETTINGS, "STREAM.DELETE.KV_harmonylite-changes-lease")
            with pytest.raises(StreamMissing):
                await seven.acquire()
            assert await seven.acquire()
            assert await seven.requests() == []

    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def test_the_ttl_of_an_existing_bucket_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with client(server.url) as connection:
            await lease(connection, ttl_ms=TTL_MS).ensure_bucket()
            longer = lease(connection, ttl_ms=60_000)
            with caplog.at_level(logging.WARNING):
                await longer.ensure_bucket()
            assert longer.ttl_s == TTL_MS / 1000
            assert "another TTL" in caplog.text
            updating = lease(connection, replace(SETTINGS, update_existing=True), ttl_ms=60_000)
            await updating.ensure_bucket()
            assert updating.ttl_s == 60
            again = lease(connection, ttl_ms=TTL_MS)
            await again.ensure_bucket()
            assert again.ttl_s == 60

    with single_server(tmp_path / "server") as server:
        asyncio.run(scenario())


def test_without_a_connection_everything_says_so_at_once(tmp_path: Path) -> None:
    def none() -> Client:
        raise nats.errors.ConnectionClosedError

    async def scenario() -> None:
        alone = Lease(none, SETTINGS, ttl_ms=TTL_MS)
        for call in (alone.acquire, alone.holder, alone.requests, alone.withdraw, lambda: alone.wanted("x")):
            with pytest.raises(StreamUnavailable):
                await call()
        await alone.release()
        with pytest.raises(LeaseLost):
            await alone.renew()

    asyncio.run(scenario())


@pytest.mark.slow
def test_the_lease_survives_the_loss_of_the_leader_of_its_bucket(tmp_path: Path) -> None:
    settings = replace(SETTINGS, replicas=3, api_timeout_s=1.0)

    async def leader(connection: Client) -> str:
        info = await api_request(connection, settings, "STREAM.INFO.KV_harmonylite-changes-lease")
        return str(info["cluster"]["leader"])

    async def scenario(servers: list[Server]) -> None:
        urls = [server.url for server in servers]
        async with client(urls) as one, client(urls) as two:  # type: ignore[arg-type]
            seven = lease(one, settings, ttl_ms=20_000)
            eight = lease(two, replace(settings, node_id=8), ttl_ms=20_000)
            await eventually_does(seven.acquire, 60)
            assert seven.held
            name = str(await eventually_does(lambda: leader(one), 30))
            led = leader_of(servers, name)
            led.kill()
            await eventually_does(seven.renew, 30)  # retried, as its holder does every third of the TTL
            assert seven.held
            assert await eventually_does(eight.acquire, 30) is False
            led.start()
            await eventually_does(seven.renew, 30)
            await seven.release()
            assert await eventually_does(eight.acquire, 30) is True

    servers = cluster(tmp_path)
    with running(*servers):
        asyncio.run(scenario(servers))
