"""Real nats-servers that can be killed and come back, and groups to send through them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.aio.client import Client

from harmonylite import wire
from harmonylite.model import Delivery, Group, Position, Stamp, TableChanges
from harmonylite.stream.consumer import Consumer
from harmonylite.stream.log import LogSettings, api_request
from harmonylite.stream.provision import ensure_streams
from tests.stream.support import OLD_SERVER, eventually_does, free_port, nats_server_binary

SETTINGS = LogSettings(node_id=7)
STREAM = SETTINGS.own_stream
START = Position(STREAM, "", 0)


class Server:
    """One nats-server process on one port; its files and its port stay over `kill` and `start`."""

    def __init__(self, folder: Path, config: str, *, binary: str | None = None) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.port = free_port()
        self._binary = binary or nats_server_binary()
        self._config = folder / "server.conf"
        self._config.write_text(f'listen: "127.0.0.1:{self.port}"\n{config}\n')
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it listens."""
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen([self._binary, "-c", self._config], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.02)

    def kill(self) -> None:
        """As a power cut does it, except that what was written stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Returns when every thread has stopped: the signal alone may let it answer once more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self._process.pid}/task")
        deadline = time.monotonic() + 20
        while any(task.read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.glob("*/stat")):
            assert time.monotonic() < deadline, "the server does not stop"
            time.sleep(0.01)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def confined(node_may_publish: Sequence[str]) -> str:
    """Of the configuration: `admin` (password a) may do everything, `node7` (password n) publish to these subjects."""
    return f"""
authorization {{
  users: [
    {{ user: admin, password: a }}
    {{ user: node7, password: n, permissions: {{
        publish: [ {", ".join(f'"{subject}"' for subject in node_may_publish)} ]
        subscribe: [ "_INBOX_7.>" ]
    }} }}
  ]
}}
"""


def jetstream(folder: Path) -> str:
    return f'jetstream {{ store_dir: "{folder / "store"}" }}'


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    try:
        for server in servers:
            server.start()
        yield
    finally:
        for server in reversed(servers):
            server.kill()


@contextlib.contextmanager
def single_server(folder: Path, *, binary: str | None = None) -> Iterator[Server]:
    server = Server(folder, jetstream(folder), binary=binary)
    with running(server):
        yield server


@contextlib.contextmanager
def hub_and_leaf(folder: Path) -> Iterator[tuple[Server, Server]]:
    """A hub with the JetStream domain `hub`, and a leaf without JetStream."""
    leaf_port = free_port()
    hub = Server(
        folder / "hub",
        f'server_name: hub\njetstream {{ store_dir: "{folder / "store"}", domain: hub }}\n'
        f'leafnodes {{ listen: "127.0.0.1:{leaf_port}" }}',
    )
    leaf = Server(
        folder / "leaf",
        f'server_name: leaf7\nleafnodes {{ reconnect: 1s\n  remotes: [ {{ url: "nats://127.0.0.1:{leaf_port}" }} ] }}',
    )
    with running(hub, leaf):
        yield hub, leaf


@dataclass(frozen=True)
class Place:
    """Where a test connects, and what it has to say there."""

    url: str
    settings: LogSettings = SETTINGS


TOPOLOGIES = (
    "server",
    "leaf",
    pytest.param("old", marks=pytest.mark.skipif(OLD_SERVER is None, reason="HARMONYLITE_OLD_NATS_SERVER")),
)


@contextlib.contextmanager
def topology(name: str, folder: Path) -> Iterator[Place]:
    """`server`: connected to the server with the streams; `leaf`: through one; `old`: as `server`, with 2.9."""
    if name == "leaf":
        with hub_and_leaf(folder / name) as (_, leaf):
            yield Place(leaf.url, replace(SETTINGS, domain="hub"))
    else:
        with single_server(folder / name, binary=OLD_SERVER if name == "old" else None) as server:
            yield Place(server.url)


@contextlib.asynccontextmanager
async def client(url: str, **options: Any) -> AsyncIterator[Client]:
    """A client that reconnects fast and says nothing."""

    async def silent(_: Exception) -> None:
        return

    defaults: dict[str, Any] = {
        "error_cb": silent,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.05,
        "connect_timeout": 2,
    }
    connected = await nats.connect(url, **{**defaults, **options})
    try:
        yield connected
    finally:
        await connected.close()


async def eventually_ensured(connection: Client, settings: LogSettings) -> None:
    """The streams, as soon as JetStream answers: a leaf may still be connecting."""
    await eventually_does(lambda: ensure_streams(connection, settings))


async def delete_message(connection: Client, sequence: int, settings: LogSettings = SETTINGS) -> None:
    await api_request(connection, settings, f"STREAM.MSG.DELETE.{STREAM}", {"seq": sequence})


async def consumer_names(connection: Client, settings: LogSettings = SETTINGS) -> list[str]:
    answer = await api_request(connection, settings, f"CONSUMER.NAMES.{STREAM}", {})
    return list(answer["consumers"] or ())


def group(number: int, publisher: int = 7, *, blob: bytes = b"x") -> Group:
    """A group of one row that says which it is."""
    changes = TableChanges(
        table="item",
        key=("id",),
        columns=("id", "content"),
        rows=((number, blob),),
        row_stamps=(Stamp(1000 + number, publisher, 0, 0, 0),),
    )
    return Group(publisher, number, (changes,))


def payload(number: int, publisher: int = 7, *, size: int = 1) -> bytes:
    """The encoded group; its row has `size` bytes that do not compress."""
    return wire.encode_group(group(number, publisher, blob=os.urandom(size)), compress=False)


def whole(number: int, publisher: int = 7, *, max_ts: int = 0) -> bytes:
    """One group as one message."""
    content = payload(number, publisher)
    (part,) = wire.split(content, publisher=publisher, number=number, max_ts=max_ts, max_bytes=10_000)
    return part


def subject(publisher: int, settings: LogSettings = SETTINGS) -> str:
    """Where `publisher` writes when there is one shard."""
    return f"{settings.subject_prefix}.1.{publisher}"


async def store(connection: Client, publisher: int, data: bytes) -> int:
    """Put one message into the stream, around the publisher; its sequence."""
    answer = await connection.request(subject(publisher), data, timeout=5)
    return int(json.loads(answer.data)["seq"])


def numbers(delivery: Delivery) -> list[int]:
    return [received.group.number for received in delivery.groups]


async def read_numbers(consumer: Consumer, count: int, timeout_s: float = 20.0) -> list[int]:
    """The numbers of the next `count` groups (or more, if the last read brought more)."""
    found: list[int] = []
    deadline = time.monotonic() + timeout_s
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {len(found)} of {count} groups came"
        found += numbers(await consumer.read(wait_s=1.0))
    return found
