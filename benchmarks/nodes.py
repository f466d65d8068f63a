"""Real daemons and servers as child processes, and what /proc says of them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmarks.workload import connect, wait_for
from harmonylite.stream.server_process import find_binary

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Memory:
    """Megabytes (2**20 bytes). pss: pages shared with other processes count in proportion."""

    rss: float
    pss: float


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, all its threads (proc(5): utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def memory(pid: int) -> Memory:
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        sizes[name] = int(rest.split()[0]) / 1024
    return Memory(sizes["Rss"], sizes["Pss"])


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - Path.glob fails when a process ends meanwhile
        with contextlib.suppress(OSError):
            if int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(name))
    return found


class _Process:
    """A child that is ended with the `with` block."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} does not run"
        return self._process.pid

    def _spawn(self, command: list[str], environment: Mapping[str, str]) -> None:
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def failure(self, what: str) -> RuntimeError:
        lines = (self.folder / f"{self.name}.log").read_text(errors="replace").splitlines()
        return RuntimeError("\n".join([f"{self.name}: {what}; its log ends with", *lines[-10:]]))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


class NatsServer(_Process):
    """One nats-server with JetStream and its own defaults, shared by nodes as an external server."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "nats-server")
        self.port = free_port()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def __enter__(self) -> NatsServer:
        store = self.folder / "jetstream"
        command = [str(find_binary()), "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(store)]
        self._spawn(command, {})
        wait_for(self._answers, "nats-server starts", START_TIMEOUT_S, 0.01)
        return self

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False


class Node(_Process):
    """One daemon with its database. nats: the keys of its [nats] section."""

    def __init__(self, folder: Path, node_id: int, nats: Mapping[str, object]) -> None:
        super().__init__(folder, f"node-{node_id}")
        self.db = folder / "app.db"
        self.config = folder / "config.toml"
        # Where the next daemon is to leave when it held the write lock; see `traced`.
        self.trace: Path | None = None
        # TOML writes text, numbers, true and lists as JSON does.
        lines = [f"db_path = {json.dumps(str(self.db))}", f"node_id = {node_id}", "[nats]"]
        self.config.write_text(
            "\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in nats.items()), ""])
        )

    def execute(self, sql: str) -> None:
        """As the application, over a connection of its own."""
        with contextlib.closing(connect(self.db)) as application:
            application.execute(sql)

    def start(self) -> float:
        """Start the daemon; returns the seconds until it said READY=1."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
            notified.bind("")  # unix(7), autobind: an abstract address, whatever the folder's length
            address = "@" + notified.getsockname()[1:].decode()
            notified.settimeout(START_TIMEOUT_S)
            started = time.perf_counter()
            program = ["harmonylite"] if self.trace is None else ["benchmarks.traced", str(self.trace)]
            command = [sys.executable, "-m", *program, "run", "--config", str(self.config)]
            self._spawn(command, {"NOTIFY_SOCKET": address})
            try:
                while b"READY=1" not in notified.recv(4096).split(b"\n"):
                    pass
            except TimeoutError:
                raise self.failure(f"not ready within {START_TIMEOUT_S:.0f} s") from None
            return time.perf_counter() - started

    def __enter__(self) -> Node:
        self.start()
        return self

    def server_pid(self) -> int:
        """The bundled nats-server of this daemon."""
        servers = [pid for pid in children(self.pid) if _command(pid).startswith("nats-server")]
        if len(servers) != 1:
            raise self.failure(f"{len(servers)} bundled servers, one was expected")
        return servers[0]

    def wait_quiet(self) -> None:
        """Until the daemon (with its server) is idle: whatever it had to do is done."""
        pids = [self.pid, *children(self.pid)]
        quiet = 0
        while quiet < 3:
            before = sum(map(cpu_seconds, pids))
            time.sleep(0.1)
            quiet = quiet + 1 if sum(map(cpu_seconds, pids)) - before <= 0.02 else 0


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two nodes that replicate to each other, and where JetStream is reached."""

    first: Node
    second: Node
    url: str


@contextlib.contextmanager
def shared_server(folder: Path, *schema: str) -> Iterator[Pair]:
    """Two nodes and one external nats-server: three processes. Ready when a row has gone both ways."""
    with NatsServer(folder) as server, contextlib.ExitStack() as nodes:
        nats = {"urls": [server.url]}
        pair = Pair(Node(folder / "a", 1, nats), Node(folder / "b", 2, nats), server.url)
        yield from _linked(pair, schema, nodes)


@contextlib.contextmanager
def hub_and_leaf(folder: Path, *schema: str) -> Iterator[Pair]:
    """A hub and a leaf with their bundled servers: four processes. Ready when a row has gone both ways."""
    port, leaf_port = free_port(), free_port()
    hub = Node(folder / "a", 1, {"leaf_listen": f"127.0.0.1:{leaf_port}", "bind_address": f"127.0.0.1:{port}"})
    leaf = Node(folder / "b", 2, {"leaf_servers": [f"nats-leaf://127.0.0.1:{leaf_port}"]})
    with contextlib.ExitStack() as nodes:
        yield from _linked(Pair(hub, leaf, f"nats://127.0.0.1:{port}"), schema, nodes)


def _linked(pair: Pair, schema: tuple[str, ...], nodes: contextlib.ExitStack) -> Iterator[Pair]:
    for node in (pair.first, pair.second):
        for sql in ("CREATE TABLE hello (id INTEGER PRIMARY KEY)", *schema):
            node.execute(sql)
        nodes.enter_context(node)
    for number, (writer, reader) in enumerate([(pair.first, pair.second), (pair.second, pair.first)], start=1):
        writer.execute(f"INSERT INTO hello VALUES ({number})")
        with contextlib.closing(connect(reader.db)) as looking:
            found = f"SELECT 1 FROM hello WHERE id = {number}"
            try:
                wait_for(lambda: writer.ended or looking.execute(found).fetchone(), "a row", START_TIMEOUT_S, 0.01)  # noqa: B023
            except TimeoutError:
                raise writer.failure(f"no row from here at {reader.name}") from None
            if writer.ended:
                raise writer.failure("it ended")
    yield pair
