"""The bundled server as a process: every shape works, and nothing that ends it is final."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from nats.js.api import StreamConfig
from nats.js.client import JetStreamContext

from harmonylite.stream.client import ClientSettings, Connection
from harmonylite.stream.server import BundledServer, Pauses, ServerState
from harmonylite.stream.server_config import ServerSettings
from tests.disks import small_disk
from tests.stream.support import (
    FAST,
    OLD_SERVER,
    bundled,
    connected,
    eventually,
    eventually_does,
    free_port,
    make_certificates,
    make_nkey,
    needs_old_server,
    process_exists,
)

AWKWARD_PASSWORD = "a b\"c'd$HOME \\ {}[]#@:/%é\t!"


def node(folder: Path, node_id: int = 1, **changes: object) -> ServerSettings:
    return ServerSettings(node_id=node_id, data_dir=folder / f"node{node_id}", **changes)  # type: ignore[arg-type]


def login(settings: ServerSettings, **changes: object) -> ClientSettings:
    values = {
        "node_id": settings.node_id,
        "bundled": True,
        "reconnect_wait_s": 0.1,
        "user_name": settings.user_name,
        "user_password": settings.user_password,
        "seed_file": settings.seed_file,
        "ca_file": settings.ca_file,
        "cert_file": settings.cert_file,
        "key_file": settings.key_file,
        **changes,
    }
    return ClientSettings(**values)  # type: ignore[arg-type]


async def jetstream(server: BundledServer, connection: Connection) -> JetStreamContext:
    client = await asyncio.wait_for(connection.wait_connected(), 20)
    domain = server.plan.domain
    return client.jetstream(domain=domain, timeout=2) if domain else client.jetstream(timeout=2)


async def publish(server: BundledServer, connection: Connection, *, replicas: int = 1) -> int:
    """Make the stream if need be, store a message, return its sequence."""
    js = await jetstream(server, connection)
    config = StreamConfig(name="changes", subjects=["changes.*"], num_replicas=replicas)
    await eventually_does(lambda: js.add_stream(config))
    ack = await eventually_does(lambda: js.publish("changes.1", b"row"))
    return ack.seq  # type: ignore[attr-defined, no-any-return]


def test_alone(tmp_path: Path) -> None:
    async def run() -> None:
        states: list[ServerState] = []
        settings = node(tmp_path)
        server = BundledServer(settings, states.append, FAST)
        assert server.url is None
        await server.start()
        url = await asyncio.wait_for(server.wait_listening(), 20)
        assert url.startswith("nats://127.0.0.1:")
        pid = server.state.pid
        assert server.state == ServerState(running=True, pid=pid) and pid and process_exists(pid)
        assert Path(f"/proc/{pid}/environ").read_bytes().count(b"GOMEMLIMIT=32MiB\0") == 1
        async with connected(server) as connection:
            assert await publish(server, connection) == 1
        assert settings.own_file(".conf").stat().st_mode & 0o777 == 0o600
        await server.stop()
        assert not process_exists(pid) and server.url is None and not server.state.running
        assert states[-1] == server.state and any(state.running for state in states)
        assert not list(settings.data_dir.glob("*.ports"))

    asyncio.run(run())


def test_what_was_stored_is_there_after_a_restart(tmp_path: Path) -> None:
    async def run() -> None:
        for expected in (1, 2):
            async with bundled(node(tmp_path)) as server, connected(server) as connection:
                assert await publish(server, connection) == expected

    asyncio.run(run())


def test_leaf_reaches_the_hub(tmp_path: Path) -> None:
    async def run() -> None:
        port = free_port()
        leaf_settings = node(tmp_path, 2, leaf_servers=(f"nats-leaf://127.0.0.1:{port}",))
        async with (
            bundled(node(tmp_path, 1, leaf_listen=f"127.0.0.1:{port}")) as hub,
            connected(hub) as at_hub,
            bundled(leaf_settings) as leaf,
            connected(leaf) as at_leaf,
        ):
            assert await publish(hub, at_hub) == 1
            assert await publish(leaf, at_leaf) == 2
        assert not leaf_settings.store_dir.exists()

    asyncio.run(run())


def test_a_leaf_can_be_the_hub_of_further_leaves(tmp_path: Path) -> None:
    async def run() -> None:
        top, middle = free_port(), free_port()
        own = f"127.0.0.1:{middle}"
        async with (
            bundled(node(tmp_path, 1, leaf_listen=f"127.0.0.1:{top}")),
            bundled(node(tmp_path, 2, leaf_listen=own, leaf_servers=(f"127.0.0.1:{top}",))),
            bundled(node(tmp_path, 3, leaf_servers=(own,))) as leaf,
            connected(leaf) as at_leaf,
        ):
            assert await publish(leaf, at_leaf) == 1

    asyncio.run(run())


def test_leaf_starts_without_its_hub_and_says_why(tmp_path: Path) -> None:
    async def run() -> None:
        port = free_port()
        leaf_settings = node(tmp_path, 2, leaf_servers=(f"127.0.0.1:{port}",))
        async with bundled(leaf_settings) as leaf, connected(leaf) as at_leaf:
            await asyncio.wait_for(at_leaf.wait_connected(), 20)
            await eventually(lambda: "connection refused" in (leaf.state.link_error or ""))
            async with bundled(node(tmp_path, 1, leaf_listen=f"127.0.0.1:{port}")):
                assert await publish(leaf, at_leaf) == 1
                assert leaf.state.link_error is None and leaf.state.restarts == 0

    asyncio.run(run())


def test_leaf_with_a_wrong_password_says_so(tmp_path: Path) -> None:
    async def run() -> None:
        port = free_port()
        hub = node(tmp_path, 1, leaf_listen=f"127.0.0.1:{port}", user_name="u", user_password="right")
        leaf_settings = node(tmp_path, 2, leaf_servers=(f"127.0.0.1:{port}",), user_name="u", user_password="wrong")
        async with bundled(hub) as at_hub, bundled(leaf_settings) as leaf:
            await eventually(lambda: "refuses the login" in (leaf.state.link_error or ""))
            await eventually(lambda: leaf.state.running)
            assert at_hub.state.link_error is None

    asyncio.run(run())


def test_cluster_of_three_with_three_copies(tmp_path: Path) -> None:
    async def run() -> None:
        ports = [free_port() for _ in range(3)]
        peers = tuple(f"nats://127.0.0.1:{port}/" for port in ports)
        async with AsyncExitStack() as stack:
            servers, connections = [], []
            for number, port in enumerate(ports, 1):
                settings = node(
                    tmp_path,
                    number,
                    cluster_addr=f"127.0.0.1:{port}",
                    cluster_peers=peers,
                    replicas=3,
                    user_name="u",
                    user_password=AWKWARD_PASSWORD,
                )
                server = await stack.enter_async_context(bundled(settings))
                servers.append(server)
                connections.append(await stack.enter_async_context(connected(server, login(settings))))
            assert servers[0].plan.replicas_possible == 3
            assert await publish(servers[0], connections[0], replicas=3) == 1
            leader = servers[0].state.pid
            assert leader is not None
            os.kill(leader, signal.SIGKILL)
            assert await publish(servers[1], connections[1], replicas=3) >= 2
            await eventually(lambda: servers[0].state.restarts == 1 and servers[0].state.running)

    asyncio.run(run())


def test_a_password_with_every_kind_of_character(tmp_path: Path) -> None:
    async def run() -> None:
        port = free_port()
        user = {"user_name": "me & you", "user_password": AWKWARD_PASSWORD}
        hub_settings = node(tmp_path, 1, leaf_listen=f"127.0.0.1:{port}", **user)
        leaf_settings = node(tmp_path, 2, leaf_servers=(f"127.0.0.1:{port}",), **user)
        async with (
            bundled(hub_settings) as hub,
            bundled(leaf_settings) as leaf,
            connected(hub, login(hub_settings)) as at_hub,
            connected(leaf, login(leaf_settings)) as at_leaf,
        ):
            assert await publish(hub, at_hub) == 1
            assert await publish(leaf, at_leaf) == 2

    asyncio.run(run())


def test_nkeys_between_client_leaf_and_hub(tmp_path: Path) -> None:
    async def run() -> None:
        port = free_port()
        key, other = make_nkey(tmp_path), make_nkey(tmp_path, "other.nk")
        hub_settings = node(tmp_path, 1, leaf_listen=f"127.0.0.1:{port}", seed_file=str(key.seed_file))
        leaf_settings = node(tmp_path, 2, leaf_servers=(f"127.0.0.1:{port}",), seed_file=str(key.seed_file))
        async with (
            bundled(hub_settings) as hub,
            bundled(leaf_settings) as leaf,
            connected(leaf, login(leaf_settings)) as at_leaf,
            connected(hub, login(hub_settings, seed_file=str(other.seed_file))) as stranger,
        ):
            assert await publish(leaf, at_leaf) == 1
            await eventually(lambda: "refuses the login" in (stranger.last_error or ""))
            assert not stranger.connected

    asyncio.run(run())


def test_tls_with_client_certificates_between_all_of_them(tmp_path: Path) -> None:
    async def run() -> None:
        certs = make_certificates(tmp_path / "certs")
        port = free_port()
        files = {"ca_file": str(certs.ca), "cert_file": str(certs.server_cert), "key_file": str(certs.server_key)}
        hub_settings = node(tmp_path, 1, leaf_listen=f"127.0.0.1:{port}", **files)
        leaf_settings = node(tmp_path, 2, leaf_servers=(f"tls://127.0.0.1:{port}",), **files)
        nobody = node(tmp_path, 3, leaf_servers=(f"tls://127.0.0.1:{port}",), ca_file=str(certs.ca))
        async with (
            bundled(hub_settings) as hub,
            bundled(leaf_settings) as leaf,
            bundled(nobody) as without,
            connected(hub, login(hub_settings)) as at_hub,
            connected(leaf, login(leaf_settings)) as at_leaf,
            connected(hub, login(hub_settings, cert_file="", key_file="")) as stranger,
        ):
            assert await publish(hub, at_hub) == 1
            assert await publish(leaf, at_leaf) == 2
            await eventually(lambda: "client certificate" in (stranger.last_error or ""))
            await eventually(lambda: "client certificate" in (without.state.link_error or ""))
            assert not stranger.connected

    asyncio.run(run())


def test_killed_child_is_started_again(tmp_path: Path) -> None:
    async def run() -> None:
        async with bundled(node(tmp_path)) as server, connected(server) as connection:
            assert await publish(server, connection) == 1
            first = server.state.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await eventually(lambda: server.state.restarts == 1 and server.state.running)
            assert server.state.pid != first and server.state.last_error is None and server.state.failures == 1
            assert await publish(server, connection) == 2

    asyncio.run(run())


def test_a_frozen_child_is_killed_at_stop(tmp_path: Path) -> None:
    async def run() -> None:
        async with bundled(node(tmp_path), Pauses(stop=0.3)) as server:
            await asyncio.wait_for(server.wait_listening(), 20)
            pid = server.state.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
        assert not process_exists(pid)

    asyncio.run(run())


def test_restart_on_request_has_no_pause(tmp_path: Path) -> None:
    async def run() -> None:
        async with bundled(node(tmp_path), Pauses(first=30)) as server:
            await asyncio.wait_for(server.wait_listening(), 20)
            first = server.state.pid
            await server.restart("test")
            await asyncio.wait_for(server.wait_listening(), 20)
            assert server.state.running and server.state.pid != first
            assert server.state.failures == 0 and server.state.last_error is None

    asyncio.run(run())


DAEMON = """
import asyncio, sys
from pathlib import Path
from harmonylite.stream.server import BundledServer
from harmonylite.stream.server_config import ServerSettings

async def main():
    server = BundledServer(ServerSettings(node_id=1, data_dir=Path(sys.argv[1])))
    await server.start()
    await server.wait_listening()
    print(server.state.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process of its own that runs the server of `tmp_path`/node1, and the server's process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(tmp_path / "node1")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    try:
        yield process, pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        if process_exists(pid):
            os.kill(pid, signal.SIGKILL)


def test_no_child_survives_kill_9_of_the_daemon(daemon: tuple[subprocess.Popen[str], int]) -> None:
    process, pid = daemon
    process.kill()
    process.wait()
    asyncio.run(eventually(lambda: not process_exists(pid)))


def test_ctrl_c_does_not_reach_the_server(daemon: tuple[subprocess.Popen[str], int]) -> None:
    process, pid = daemon
    assert os.getsid(pid) != os.getsid(process.pid) and os.getpgid(pid) != os.getpgid(process.pid)


def test_a_frozen_leftover_is_ended(tmp_path: Path, daemon: tuple[subprocess.Popen[str], int]) -> None:
    process, pid = daemon
    os.kill(pid, signal.SIGSTOP)  # so the signal that the kernel sends at the daemon's death does not end it
    process.kill()
    process.wait()
    assert process_exists(pid)

    async def run() -> None:
        async with bundled(node(tmp_path)) as server, connected(server) as connection:
            assert await publish(server, connection) == 1
            assert not process_exists(pid)

    asyncio.run(run())


def test_a_second_daemon_leaves_the_first_alone(tmp_path: Path, daemon: tuple[subprocess.Popen[str], int]) -> None:
    process, pid = daemon

    async def run() -> None:
        async with bundled(node(tmp_path)) as server:
            await eventually(lambda: server.state.failures >= 2)
            assert f"another harmonylite daemon (process {process.pid})" in (server.state.last_error or "")
            assert process_exists(pid)
            process.kill()
            process.wait()
            await asyncio.wait_for(server.wait_listening(), 20)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("bind_address", {}),
        ("leaf_listen", {}),
        ("cluster_addr", {"cluster_peers": ("nats://127.0.0.1:1", "nats://127.0.0.1:2")}),
    ],
)
def test_port_in_use(tmp_path: Path, setting: str, changes: dict[str, object]) -> None:
    async def run() -> None:
        with socket.socket() as squatter:
            squatter.bind(("127.0.0.1", 0))
            squatter.listen()
            port = squatter.getsockname()[1]
            async with bundled(node(tmp_path, **{setting: f"127.0.0.1:{port}"}, **changes)) as server:
                await eventually(lambda: server.state.failures >= 2)
                error = server.state.last_error or ""
                assert f"port {port} ([nats] {setting}) is in use by process {os.getpid()} (" in error
                squatter.close()
                await asyncio.wait_for(server.wait_listening(), 20)
                assert server.state.last_error is None

    asyncio.run(run())


def test_missing_and_broken_binaries(tmp_path: Path) -> None:
    missing, wrong, plain, foreign = (tmp_path / name for name in ("missing", "wrong", "plain", "foreign"))
    wrong.write_text("#!/bin/sh\necho hello\n")
    wrong.chmod(0o755)
    plain.write_text("nothing")
    # An ELF header for a machine that is not this one.
    foreign.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xf3\x00\x01" + bytes(200))
    foreign.chmod(0o755)

    async def error_with(binary: Path) -> str:
        async with bundled(node(tmp_path, server_binary=str(binary))) as server:
            await eventually(lambda: server.state.failures >= 1)
            assert server.state.last_error and "\n" not in server.state.last_error
            return server.state.last_error

    assert f"there is no {missing} ([nats] server_binary)" in asyncio.run(error_with(missing))
    assert f"{wrong} does not work as a nats-server: hello" in asyncio.run(error_with(wrong))
    assert f"{plain} is not executable" in asyncio.run(error_with(plain))
    assert f"{foreign} is not a program for this machine" in asyncio.run(error_with(foreign))


def test_store_not_writable(tmp_path: Path) -> None:
    settings = node(tmp_path)
    settings.data_dir.mkdir()
    settings.store_dir.write_text("a file in the folder's place")

    async def run() -> None:
        async with bundled(settings) as server:
            await eventually(lambda: server.state.failures >= 1)
            assert f"{settings.store_dir} ([nats] store_dir) cannot be written" in (server.state.last_error or "")
            settings.store_dir.unlink()
            await asyncio.wait_for(server.wait_listening(), 20)

    asyncio.run(run())


def test_a_mistake_in_the_operators_file_is_named(tmp_path: Path) -> None:
    theirs = tmp_path / "own.conf"
    theirs.write_text("max_payloads: 2MB\n")

    async def run() -> None:
        async with bundled(node(tmp_path, server_config=str(theirs))) as server:
            await eventually(lambda: server.state.failures >= 1)
            error = server.state.last_error or ""
            assert "[nats] server_config" in error and f"{theirs}:1:" in error and '"max_payloads"' in error
            theirs.write_text("max_payload: 2MB\n")
            async with connected(server) as connection:
                assert (await asyncio.wait_for(connection.wait_connected(), 20)).max_payload == 2 << 20

    asyncio.run(run())


def test_a_damaged_store_is_reported(tmp_path: Path) -> None:
    settings = node(tmp_path)

    async def run() -> None:
        async with bundled(settings) as server, connected(server) as connection:
            await publish(server, connection)
        (settings.store_dir / "jetstream/$G/streams/changes/meta.inf").write_bytes(b"garbage")
        async with bundled(settings) as server:
            await asyncio.wait_for(server.wait_listening(), 20)
            await eventually(lambda: "metafile" in (server.state.storage_error or ""))

    asyncio.run(run())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "8m"):
        yield tmp_path / "disk"


async def fill(js: JetStreamContext) -> None:
    while True:
        await js.publish("changes.1", bytes(200_000), timeout=2)


def test_the_store_limit_is_below_the_disk(disk: Path) -> None:
    async def run() -> None:
        async with bundled(node(disk)) as server, connected(server) as connection:
            await publish(server, connection)
            js = await jetstream(server, connection)
            with pytest.raises(Exception, match="insufficient"):
                await fill(js)
            assert server.state.storage_error is None
            await js.purge_stream("changes")
            await eventually_does(lambda: js.publish("changes.1", b"again"))
            assert server.state.restarts == 0

    asyncio.run(run())


def test_a_full_disk_is_reported_and_survived(disk: Path) -> None:
    """Somebody else fills the disk: the stream dies, and lives again once there is room, without help."""

    async def run() -> None:
        async with bundled(node(disk)) as server, connected(server) as connection:
            await publish(server, connection)
            js = await jetstream(server, connection)
            hog = disk / "hog"
            with hog.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(1 << 16))
            with pytest.raises(Exception):  # noqa: B017 - a timeout or a refusal, as the server's version has it
                await fill(js)
            await eventually(lambda: "disk is full" in (server.state.storage_error or ""))
            assert server.state.restarts == 0
            hog.unlink()
            await eventually(lambda: server.state.restarts == 1 and server.state.running)
            assert await publish(server, connection) >= 2
            assert server.state.storage_error is None

    asyncio.run(run())


def test_log_lines_are_forwarded_with_their_level(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "harmonylite.stream")

    async def run() -> None:
        settings = node(tmp_path, user_name="u", user_password="secret-password")
        async with bundled(settings) as server, connected(server, login(settings, user_password="no")) as stranger:
            await eventually(lambda: stranger.last_error)
            await eventually(lambda: any("authentication error" in text for _, text in said()))

    def said() -> list[tuple[int, str]]:
        return [(r.levelno, r.fields["text"]) for r in caplog.records if r.msg == "nats-server reports"]  # type: ignore[attr-defined]

    asyncio.run(run())
    assert (logging.DEBUG, "Server is ready") in said()
    assert next(level for level, text in said() if "authentication error" in text) == logging.ERROR
    assert not any(level >= logging.WARNING and "Plaintext" in text for level, text in said())
    assert "secret-password" not in caplog.text
    assert not any(record.exc_info for record in caplog.records)


@needs_old_server
@pytest.mark.parametrize("old", ["hub and leaf", "leaf", "hub"])
def test_the_oldest_server_as_hub_and_leaf(tmp_path: Path, old: str) -> None:
    """With itself, and on armhf, where Debian's own server serves, with a newer one at the other end."""

    async def run() -> None:
        port = free_port()
        user = {"user_name": "u", "user_password": AWKWARD_PASSWORD}
        binaries = {place: OLD_SERVER if place in old else "" for place in ("hub", "leaf")}
        hub_settings = node(tmp_path, 1, leaf_listen=f"127.0.0.1:{port}", server_binary=binaries["hub"], **user)
        leaf_settings = node(tmp_path, 2, leaf_servers=(f"127.0.0.1:{port}",), server_binary=binaries["leaf"], **user)
        async with (
            bundled(hub_settings) as hub,
            bundled(leaf_settings) as leaf,
            connected(hub, login(hub_settings)) as at_hub,
            connected(leaf, login(leaf_settings)) as at_leaf,
        ):
            assert await publish(hub, at_hub) == 1
            assert await publish(leaf, at_leaf) == 2
            assert leaf.state.link_error is None

    asyncio.run(run())


def test_pauses_grow_and_stop_does_not_wait_for_them(tmp_path: Path) -> None:
    async def run() -> None:
        async with bundled(node(tmp_path, server_binary=str(tmp_path / "none")), Pauses(first=0.05)) as server:
            begun = time.monotonic()
            await eventually(lambda: server.state.failures >= 5)  # after 0.05 + 0.1 + 0.2 + 0.4 s
            assert time.monotonic() - begun > 0.7
            await eventually(lambda: server.state.failures >= 6)  # the next pause is 1.6 s
            begun = time.monotonic()
        assert time.monotonic() - begun < 1

    asyncio.run(run())
