"""Nodes as real daemon processes, for tests: started, killed, frozen, cut off, and always cleaned up.

A `Cluster` owns one folder with one sub-folder per node (database, configuration, log, bundled server). Processes are
ended by their own ids: the daemons are children, a bundled server is found by the configuration file it runs with.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from types import TracebackType
from typing import Any

from harmonylite.observe.control import ControlError, query
from tests.e2e.proxy import Proxy
from tests.stream.support import free_port

Settings = Mapping[str, Mapping[str, object]]
"""A configuration file: table name ("" for the top) to its keys."""

START_S = 20.0
STOP_S = 15.0
LOG_TAIL_BYTES = 6_000


@dataclass
class Node:
    """One node. `settings`: besides db_path and node_id; `environment`: added to ours, for the daemon alone."""

    node_id: int
    folder: Path
    settings: Settings
    schema: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    db: Path = field(init=False)
    config: Path = field(init=False)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.db = self.folder / "app.db"
        self.config = self.folder / "config.toml"
        self.log = self.folder / "daemon.log"
        self.configure(self.settings)
        if self.schema and not self.db.exists():
            with contextlib.closing(sqlite3.connect(self.db)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(self.schema)

    def configure(self, settings: Settings) -> None:
        """Write the configuration; a running daemon does not notice."""
        self.settings = settings
        tables = {"": {"db_path": str(self.db), "node_id": self.node_id}, **settings}
        tables[""] = {"db_path": str(self.db), "node_id": self.node_id, **settings.get("", {})}
        self.config.write_text("\n".join(_toml(tables)) + "\n")

    # -- the daemon

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None, "never started"
        return self.process.pid

    def start(self) -> Node:
        """Start the daemon; returns at once."""
        assert not self.running, f"node {self.node_id} runs"
        with self.log.open("ab") as log:
            log.write(b"--- start\n")
            log.flush()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harmonylite", "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        return self

    def signal(self, number: Signals) -> None:
        """Send a signal to the daemon, if it runs."""
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(SIGKILL)
        if self.process is not None:
            self.process.wait()

    def stop(self, timeout_s: float = STOP_S) -> int:
        """SIGTERM; the exit code. Fails when the daemon does not end in time."""
        assert self.process is not None
        self.signal(SIGTERM)
        return self.process.wait(timeout_s)

    # -- its bundled server

    @property
    def server_config(self) -> Path:
        return self.folder / "nats" / f"harmonylite-node-{self.node_id}.conf"

    @property
    def store(self) -> Path:
        """The folder of the bundled server's streams."""
        return self.folder / "nats" / f"harmonylite-node-{self.node_id}"

    def server_pids(self) -> list[int]:
        """Processes that run this node's server, the launcher that becomes one included."""
        wanted = os.fsencode(self.server_config)
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted in (process / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found

    def signal_server(self, number: Signals) -> int:
        """Send a signal to the bundled server; returns how many processes got it."""
        sent = 0
        for pid in self.server_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                sent += 1
        return sent

    # -- questions

    def status(self) -> dict[str, Any] | None:
        """What `harmonylite status` would show; None while the daemon does not answer."""
        try:
            return query(self.db, {"command": "status"}, timeout=5.0)
        except ControlError:
            return None

    def connected(self) -> bool:
        status = self.status()
        return bool(status and status["nats_connected"] and status["db_connected"])

    def settled(self) -> bool:
        """Connected, nothing pending, everything applied that the streams were known to hold."""
        status = self.status()
        return bool(
            status
            and status["nats_connected"]
            and not status["pending_rows"]
            and not status["catching_up"]
            and status["positions"]
            and all(each["sequence"] >= (each["last_sequence"] or 0) for each in status["positions"])
        )

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @contextlib.contextmanager
    def open_db(self) -> Iterator[sqlite3.Connection]:
        """A connection as an application has it: autocommit, patient."""
        with contextlib.closing(sqlite3.connect(self.db, timeout=30, isolation_level=None)) as connection:
            yield connection

    def execute(self, sql: str, *bindings: object) -> list[tuple[Any, ...]]:
        """One statement of the application, committed; its rows."""
        with self.open_db() as connection:
            return connection.execute(sql, bindings).fetchall()


class Cluster:
    """Nodes in one folder. A context manager: on leaving, every process that it started is gone.

    When the block failed, the ends of all logs are printed.
    """

    def __init__(self, folder: Path, schema: str) -> None:
        self.folder = folder
        self.schema = schema
        self.nodes: dict[int, Node] = {}
        self._proxies: list[Proxy] = []
        self._others: list[subprocess.Popen[bytes]] = []

    # -- making it

    def add(self, node_id: int, settings: Settings | None = None, environment: Mapping[str, str] | None = None) -> Node:
        """A node, not started."""
        node = Node(node_id, self.folder / f"node{node_id}", settings or {}, self.schema, environment or {})
        self.nodes[node_id] = node
        return node

    def proxy(self, target_port: int) -> Proxy:
        """A link to a port of this machine that can be cut."""
        proxy = Proxy(target_port)
        self._proxies.append(proxy)
        return proxy

    def own(self, process: subprocess.Popen[bytes]) -> None:
        """Another process to end with the cluster."""
        self._others.append(process)

    def start(self) -> Cluster:
        """Start all nodes and wait until they replicate."""
        for node in self.nodes.values():
            if not node.running:
                node.start()
        eventually(lambda: all(node.connected() for node in self.nodes.values()), START_S, "all nodes connected")
        return self

    # -- leaving it

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                self.print_logs()
        finally:
            self.close()

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._others:
            if process.poll() is None:
                process.kill()
            process.wait()
        for node in self.nodes.values():
            node.kill()
        for node in self.nodes.values():
            deadline = time.monotonic() + 10
            while node.signal_server(SIGKILL) and time.monotonic() < deadline:
                time.sleep(0.02)
        for proxy in self._proxies:
            proxy.close()

    def print_logs(self) -> None:
        for node in self.nodes.values():
            print(f"---- node {node.node_id}: status {node.status()}")
            print(node.log_text()[-LOG_TAIL_BYTES:])

    # -- the state of all

    def settled(self) -> bool:
        """All nodes have published everything and hold the same rows at the same versions."""
        return all(node.settled() for node in self.nodes.values()) and self.converged()

    def databases(self) -> list[Path]:
        return [node.db for node in self.nodes.values()]

    def converged(self) -> bool:
        contents = [contents_of(node.db) for node in self.nodes.values()]
        return all(content == contents[0] for content in contents)

    def wait_settled(self, timeout_s: float = 60.0) -> float:
        """Wait for `settled`; the seconds it took."""
        begun = time.monotonic()
        eventually(self.settled, timeout_s, "all nodes settled and identical", pause_s=0.2)
        return time.monotonic() - begun


Contents = dict[str, list[tuple[Any, ...]]]


def contents_of(db: Path) -> Contents:
    """Every replicated table's rows in the order of their keys, and their versions (not what is local about them)."""
    with contextlib.closing(sqlite3.connect(db, timeout=30, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        names = [
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")
            if not name.startswith(("__harmonylite__", "sqlite_"))
        ]
        found: Contents = {}
        for name in names:
            found[name] = connection.execute(f'SELECT * FROM "{name}" ORDER BY 1, 2').fetchall()
            if version_columns := _version_columns(connection, name):
                columns = ", ".join(version_columns)
                # A version of (0, 0) says no more than none at all.
                known = f'FROM "__harmonylite__{name}_version" WHERE ts > 0 OR deleted'
                sql = f"SELECT {columns} {known} ORDER BY {columns}"
                found[f"{name}: versions"] = connection.execute(sql).fetchall()
        return found


def _version_columns(connection: sqlite3.Connection, table: str) -> list[str]:
    names = [row[1] for row in connection.execute(f'PRAGMA table_info("__harmonylite__{table}_version")')]
    return [
        name for name in names if name in ("ts", "node", "rank", "deleted") or (name[:1] == "k" and name[1:].isdigit())
    ]


# -- shapes


def hub_and_leaves(
    folder: Path, schema: str, leaves: int = 2, *, more: Settings | None = None, proxied: bool = False
) -> tuple[Cluster, list[Proxy]]:
    """Node 1 is the hub, nodes 2.. are leaves; with `proxied`, each leaf's link goes through a proxy of its own."""
    cluster = Cluster(folder, schema)
    port = free_port()
    hub = cluster.add(1, merged({"nats": {"leaf_listen": f"127.0.0.1:{port}", **QUICK}}, more))
    if proxied:
        # Otherwise the leaves learn the hub's own port from it, and go round a link that was cut.
        file = hub.folder / "hub.conf"
        file.write_text(f'leafnodes {{ listen: "127.0.0.1:{port}", no_advertise: true, compression: off }}\n')
        hub.configure(merged(hub.settings, {"nats": {"server_config": str(file)}}))
    proxies = []
    for node_id in range(2, leaves + 2):
        if proxied:
            proxies.append(cluster.proxy(port))
        link = proxies[-1].port if proxied else port
        cluster.add(node_id, merged({"nats": {"leaf_servers": [f"nats-leaf://127.0.0.1:{link}"], **QUICK}}, more))
    return cluster, proxies


def three_servers(folder: Path, schema: str, *, more: Settings | None = None) -> Cluster:
    """Three nodes whose servers form a cluster, each stream with three replicas."""
    cluster = Cluster(folder, schema)
    ports = [free_port() for _ in range(3)]
    peers = [f"nats://127.0.0.1:{port}" for port in ports]
    for node_id, port in enumerate(ports, start=1):
        nats = {"cluster_addr": f"127.0.0.1:{port}", "cluster_peers": peers, **QUICK}
        cluster.add(node_id, merged({"replication_log": {"replicas": 3}, "nats": nats}, more))
    return cluster


QUICK: Mapping[str, object] = {"reconnect_wait_seconds": 0.2}


def merged(one: Settings, other: Settings | None) -> Settings:
    """Both settings; where both name a key, `other` counts."""
    tables = dict(one)
    for name, keys in (other or {}).items():
        tables[name] = {**tables.get(name, {}), **keys}
    return tables


def _toml(tables: Settings) -> Iterator[str]:
    for name in sorted(tables):
        if name:
            yield f"[{name}]"
        for key, value in tables[name].items():
            yield f"{key} = {_toml_value(value)}"


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    return f'"{value}"'


# -- waiting


def eventually(condition: Callable[[], object], timeout_s: float = 20.0, what: str = "", pause_s: float = 0.05) -> None:
    """Wait until `condition()` is true; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        time.sleep(pause_s)


def process_gone(pids: Sequence[int]) -> bool:
    """Whether none of the processes runs any more (a zombie does not)."""
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return False
    return True
