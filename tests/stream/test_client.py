"""The connection: made whatever the order of events, made again, and clear about why there is none."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import nats.errors
import pytest

from harmonylite.stream.client import ClientSettings, Connection
from harmonylite.stream.endpoint import Endpoint, parse_endpoint
from tests.stream.support import (
    OLD_SERVER,
    bare_server,
    eventually,
    free_port,
    make_certificates,
    make_nkey,
    needs_old_server,
)


def to(*urls: str, **changes: object) -> ClientSettings:
    return ClientSettings(**{"node_id": 7, "urls": urls, "reconnect_wait_s": 0.1, **changes})  # type: ignore[arg-type]


@asynccontextmanager
async def opened(
    settings: ClientSettings, urls: Callable[[], Sequence[str]] | None = None
) -> AsyncIterator[Connection]:
    connection = Connection(settings, urls)
    await connection.start()
    try:
        yield connection
    finally:
        await connection.close()


async def connect(connection: Connection) -> None:
    await asyncio.wait_for(connection.wait_connected(), 20)


async def error_of(settings: ClientSettings) -> str:
    """What a connection says that cannot be made; it must still be trying."""
    async with opened(settings) as connection:
        await eventually(lambda: connection.last_error)
        assert not connection.connected and connection.server is None
        with pytest.raises(nats.errors.ConnectionClosedError):
            _ = connection.client
        assert connection.last_error and "\n" not in connection.last_error
        return connection.last_error


def test_connects_and_closes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        with bare_server(tmp_path) as (url, _):
            connection = Connection(to(url))
            assert not connection.connected and connection.offline_since is not None
            await connection.start()
            await connect(connection)
            assert connection.connected and connection.last_error is None and connection.offline_since is None
            assert connection.server == url.removeprefix("nats://")
            client = connection.client
            assert (await client.jetstream().account_info()).streams == 0
            assert client.new_inbox().startswith("_INBOX_7.")
            await connection.close()
            assert client.is_closed and not connection.connected and connection.offline_since is not None
            await connection.close()

    asyncio.run(run())
    # An ordinary stop is no trouble.
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_what_was_published_before_close_arrives(tmp_path: Path) -> None:
    async def run() -> None:
        with bare_server(tmp_path) as (url, _):
            async with opened(to(url)) as listener:
                await connect(listener)
                subscription = await listener.client.subscribe("x")
                await listener.client.flush()
                async with opened(to(url)) as sender:
                    await connect(sender)
                    for number in range(1000):
                        await sender.client.publish("x", str(number).encode())
                for number in range(1000):
                    assert (await subscription.next_msg(timeout=5)).data == str(number).encode()

    asyncio.run(run())


def test_starts_without_a_server_and_connects_when_it_comes(tmp_path: Path) -> None:
    async def run() -> None:
        port = free_port()
        async with opened(to(f"nats://127.0.0.1:{port}")) as connection:
            await eventually(lambda: connection.last_error == f"no server listens at 127.0.0.1:{port}")
            with bare_server(tmp_path, port=port):
                await connect(connection)
                assert connection.last_error is None

    asyncio.run(run())


def test_the_address_may_come_later_and_change(tmp_path: Path) -> None:
    async def run() -> None:
        urls: list[str] = []
        async with opened(to(bundled=True), lambda: tuple(urls)) as connection:
            await eventually(lambda: "does not listen yet" in (connection.last_error or ""))
            with bare_server(tmp_path / "one") as (url, _):
                urls[:] = [url]
                await connect(connection)
            with bare_server(tmp_path / "two") as (url, _):
                urls[:] = [url]
                await eventually(lambda: connection.server == url.removeprefix("nats://"))

    asyncio.run(run())


def test_listeners_hear_of_every_connect_and_loss_in_order(tmp_path: Path) -> None:
    async def run() -> None:
        port = free_port()
        heard: list[str] = []
        connection = Connection(to(f"nats://127.0.0.1:{port}"))

        async def broken() -> None:
            raise RuntimeError("a listener's mistake")

        async def up() -> None:
            assert connection.connected
            heard.append("up")

        async def down() -> None:
            assert not connection.connected
            heard.append("down")

        connection.on_connect(broken)
        connection.on_connect(up)
        connection.on_disconnect(down)
        await connection.start()
        for turn in range(1, 3):
            with bare_server(tmp_path, port=port):
                await eventually(lambda turn=turn: heard == ["up", "down"] * (turn - 1) + ["up"])
            await eventually(lambda turn=turn: heard == ["up", "down"] * turn)
            assert connection.last_error and connection.offline_since
        with bare_server(tmp_path, port=port):
            await eventually(lambda: len(heard) == 5)
            await connection.close()
        assert heard == ["up", "down", "up", "down", "up", "down"]

    asyncio.run(run())


def test_after_a_restart_the_client_is_a_new_one_and_works(tmp_path: Path) -> None:
    async def run() -> None:
        port = free_port()
        async with opened(to(f"nats://127.0.0.1:{port}")) as connection:
            with bare_server(tmp_path, port=port) as (_, server):
                await connect(connection)
                old = connection.client
                waiting = asyncio.create_task((await old.subscribe("x")).next_msg(timeout=30))
                server.send_signal(signal.SIGKILL)
                # A read that waits ends at once, not after its timeout, and is not mistaken for a cancellation.
                with pytest.raises(nats.errors.ConnectionClosedError):
                    await asyncio.wait_for(waiting, 5)
                await asyncio.wait_for(connection.wait_disconnected(), 5)
                with pytest.raises(nats.errors.ConnectionClosedError):
                    await old.publish("x", b"is not kept and sent later")
            with bare_server(tmp_path, port=port):
                await connect(connection)
                assert connection.client is not old
                await connection.client.jetstream().account_info()

    asyncio.run(run())


@pytest.mark.parametrize("unsent", [0, 8 << 20])
def test_a_server_that_no_longer_answers_is_noticed(tmp_path: Path, unsent: int) -> None:
    """Also with more written than the dead link's buffers take, where the library alone would wait for ever."""

    async def run() -> None:
        with bare_server(tmp_path, 'max_pending: 64MB\nwrite_deadline: "60s"') as (url, server):
            async with opened(to(url, ping_interval_s=0.2, pong_timeout_s=0.5)) as connection:
                await connect(connection)
                client = connection.client
                os.kill(server.pid, signal.SIGSTOP)
                writing = asyncio.create_task(_write(client, unsent))
                await asyncio.wait_for(connection.wait_disconnected(), 10)
                await eventually(lambda: not connection.connected and "did not answer" in (connection.last_error or ""))
                writing.cancel()
                await asyncio.wait([writing])
                os.kill(server.pid, signal.SIGCONT)
                await connect(connection)
                await connection.client.flush()

    asyncio.run(run())


async def _write(client: object, size: int) -> None:
    for _ in range(size >> 19):
        await client.publish("x", bytes(1 << 19))  # type: ignore[attr-defined]


def test_reasons(tmp_path: Path) -> None:
    async def run() -> None:
        certs = make_certificates(tmp_path / "certs")
        ours = {"ca_file": str(certs.ca), "cert_file": str(certs.client_cert), "key_file": str(certs.client_key)}
        others = make_certificates(tmp_path / "others")
        tls = f'cert_file: "{certs.server_cert}", key_file: "{certs.server_key}", ca_file: "{certs.ca}"'
        with bare_server(tmp_path / "a", "authorization { user: me, password: right }") as (url, _):
            assert "refuses the login: check" in await error_of(to(url, user_name="me", user_password="wrong"))
            assert "it wants a login, none is set" in await error_of(to(url))
            assert "refuses the login: check" in await error_of(to(url.replace("//", "//token@")))
            assert "no TLS" in await error_of(to(url, user_name="me", user_password="right", **ours))
        with bare_server(tmp_path / "b", f"tls {{ {tls}, verify: true }}") as (url, _):
            assert "set [nats] ca_file" in await error_of(to(url))
            assert "is not accepted (unable" in await error_of(to(url, ca_file=str(others.ca)))
            assert "wants a client certificate" in await error_of(to(url, ca_file=str(certs.ca)))
            strange = {"cert_file": str(others.client_cert), "key_file": str(others.client_key)}
            assert "does not accept our client certificate" in await error_of(to(url, ca_file=str(certs.ca), **strange))
            async with opened(to(url.replace("nats:", "tls:"), **ours)) as connection:
                await connect(connection)
            assert "cannot be used" in await error_of(to(url, ca_file=str(tmp_path / "none.pem")))
            mixed = {"ca_file": str(certs.ca), "cert_file": str(certs.client_cert), "key_file": str(others.client_key)}
            assert "with key_file" in await error_of(to(url, **mixed))
        assert "cannot be resolved" in await error_of(to("nats://no-such-host.invalid"))
        assert "no server listens at 127.0.0.1:1" in await error_of(to("127.0.0.1:1"))
        assert "without a host" in await error_of(to("nats://:4222"))

    asyncio.run(run())


def test_a_certificate_for_another_name(tmp_path: Path) -> None:
    """Refused, except from our own bundled server, which is reached through loopback whatever it is called."""

    async def run() -> None:
        certs = make_certificates(tmp_path / "certs", names="DNS:hub.example")
        tls = f'cert_file: "{certs.server_cert}", key_file: "{certs.server_key}", ca_file: "{certs.ca}"'
        ours = {"ca_file": str(certs.ca), "cert_file": str(certs.client_cert), "key_file": str(certs.client_key)}
        with bare_server(tmp_path / "server", f"tls {{ {tls}, verify: true }}") as (url, _):
            assert "is not accepted (IP address mismatch" in await error_of(to(url, **ours))
            async with opened(to(url, bundled=True, **ours)) as connection:
                await connect(connection)

    asyncio.run(run())


def test_a_stranger_on_the_port(tmp_path: Path) -> None:
    async def run() -> None:
        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-whatever\r\n")
            writer.close()

        stranger = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        port = stranger.sockets[0].getsockname()[1]
        assert "is it a NATS server?" in await error_of(to(f"127.0.0.1:{port}"))
        stranger.close()
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            assert f"{address} does not answer in time" == await error_of(to(address, connect_timeout_s=0.2))

    asyncio.run(run())


def test_every_way_to_log_in(tmp_path: Path) -> None:
    async def run() -> None:
        key = make_nkey(tmp_path)
        users = f'{{ user: "a b", password: "p@$: \\"x" }}, {{ nkey: {key.public_key} }}'
        with bare_server(tmp_path / "users", f"authorization {{ users: [ {users} ] }}") as (url, _):
            for settings in (
                to(url, user_name="a b", user_password='p@$: "x'),
                to(url.replace("//", "//a%20b:p%40%24%3A%20%22x@")),
                to(url, seed_file=str(key.seed_file)),
                to(url, seed_file=str(key.seed_file), user_name="a b", user_password="not needed"),
            ):
                async with opened(settings) as connection:
                    await connect(connection)
            assert "seed_file" in await error_of(to(url, seed_file=str(tmp_path / "missing")))
        with bare_server(tmp_path / "token", 'authorization { token: "s3/cret" }') as (url, _):
            async with opened(to(url.replace("//", "//s3%2Fcret@"))) as connection:
                await connect(connection)

    asyncio.run(run())


def test_goes_through_its_list_of_servers(tmp_path: Path) -> None:
    async def run() -> None:
        closed = f"nats://127.0.0.1:{free_port()}"
        locked_for = "authorization { user: a, password: b }"
        with bare_server(tmp_path / "a", locked_for) as (locked, _), bare_server(tmp_path / "b") as (good, _):
            async with opened(to(closed, locked, good)) as connection:
                await connect(connection)
                assert connection.server == good.removeprefix("nats://")

    asyncio.run(run())


def test_moves_to_another_server_of_the_cluster(tmp_path: Path) -> None:
    """Only one is configured, and with its cluster port at that; the others are learned from it."""

    async def run() -> None:
        routes = [free_port(), free_port()]
        config = [
            f'server_name: n{i}\ncluster {{ name: c\n listen: "127.0.0.1:{routes[i]}"\n'
            f' routes: [ "nats://127.0.0.1:{routes[1 - i]}" ]\n }}'
            for i in (0, 1)
        ]
        with (
            bare_server(tmp_path / "0", config[0]) as (first, server),
            bare_server(tmp_path / "1", config[1]) as (second, _),
        ):
            async with opened(to(f"nats://127.0.0.1:{routes[0]}")) as connection:
                await connect(connection)
                await eventually(lambda: len(connection.client.discovered_servers) >= 1)
                if connection.server == second.removeprefix("nats://"):
                    first, second = second, first
                    os.kill(_listener(first), signal.SIGKILL)
                else:
                    server.kill()
                await eventually(lambda: connection.server == second.removeprefix("nats://"))

    asyncio.run(run())


def _listener(url: str) -> int:
    from harmonylite.stream.server_log import port_owner

    owner = port_owner(int(url.rpartition(":")[2]))
    assert owner is not None
    return owner.pid


def test_a_refused_publish_is_told_and_the_connection_stays(tmp_path: Path) -> None:
    async def run() -> None:
        users = 'users: [ { user: a, password: b, permissions: { publish: "ok", subscribe: "_INBOX_7.>" } } ]'
        with bare_server(tmp_path, f"authorization {{ {users} }}") as (url, _):
            async with opened(to(url, user_name="a", user_password="b")) as connection:
                await connect(connection)
                await connection.client.publish("forbidden", b"x")
                await eventually(lambda: 'publish to "forbidden"' in (connection.last_error or "").lower())
                assert connection.connected

    asyncio.run(run())


def test_no_traceback_and_no_flood_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def run() -> None:
        port = free_port()
        async with opened(to(f"nats://127.0.0.1:{port}", reconnect_wait_s=0.02)) as connection:
            await eventually(lambda: connection.last_error)
            await asyncio.sleep(0.5)  # some twenty attempts
            for _ in range(2):
                with bare_server(tmp_path, port=port) as (_, server):
                    await connect(connection)
                    pending = asyncio.create_task(connection.client.request("nobody.answers", b"", timeout=0.5))
                    server.kill()
                    await asyncio.wait_for(connection.wait_disconnected(), 5)
                    await asyncio.wait([pending])
                    assert pending.exception()
        gc.collect()  # a task whose error nobody fetched complains when it is collected

    asyncio.run(run())
    assert not [record for record in caplog.records if record.exc_info]
    assert "Traceback" not in caplog.text
    refusals = [record for record in caplog.records if record.msg == "no connection to NATS"]
    assert 1 <= len(refusals) <= 4


def test_secrets_are_neither_shown_nor_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def run() -> None:
        with bare_server(tmp_path, "authorization { user: me, password: right }") as (url, _):
            secret = url.replace("//", "//me:topsecret@")
            assert "topsecret" not in await error_of(to(secret))
            assert "topsecret" not in await error_of(to(url, user_name="me", user_password="topsecret"))

    asyncio.run(run())
    assert "topsecret" not in caplog.text
    assert not any("topsecret" in str(getattr(record, "fields", "")) for record in caplog.records)
    assert "topsecret" not in repr(to("x", user_password="topsecret"))
    assert "topsecret" not in repr(parse_endpoint("nats://a:topsecret@h"))


def test_idle_costs_next_to_nothing(tmp_path: Path) -> None:
    async def run() -> float:
        with bare_server(tmp_path) as (url, _):
            async with opened(to(url)) as connection:
                await connect(connection)
                begun = time.process_time()
                await asyncio.sleep(5)
                return time.process_time() - begun

    assert asyncio.run(run()) < 0.05  # 1 % of a core


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("h", Endpoint("nats", "h", 4222)),
        ("tls://h:1/", Endpoint("tls", "h", 1)),
        ("nats://[::1]:5", Endpoint("nats", "::1", 5)),
        ("nats://u:p%40@h", Endpoint("nats", "h", 4222, user="u", password="p@")),
        ("nats://t%20k@h:3", Endpoint("nats", "h", 3, token="t k")),
        ("wss://h", Endpoint("wss", "h", None)),
    ],
)
def test_endpoints(url: str, expected: Endpoint) -> None:
    assert parse_endpoint(url) == expected
    assert parse_endpoint(parse_endpoint(url).url).address == expected.address


@needs_old_server
def test_the_oldest_server(tmp_path: Path) -> None:
    async def run() -> None:
        with bare_server(tmp_path, "authorization { user: a, password: b }", binary=OLD_SERVER) as (url, _):
            async with opened(to(url, user_name="a", user_password="b")) as connection:
                await connect(connection)
                assert connection.client.connected_server_version.major == 2
                js = connection.client.jetstream()
                await js.add_stream(name="s", subjects=["s"])
                assert (await js.publish("s", b"x")).seq == 1
            assert "refuses the login" in await error_of(to(url, user_name="a", user_password="x"))

    asyncio.run(run())
