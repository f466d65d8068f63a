"""The configuration: frozen dataclasses whose attributes are named as the keys of the TOML file.

Each key stands here once, with its default, its rule and one line for people; loading, `check-config` and the
reference in docs/ are made from that. Durations are numbers in the unit that the key's line names.
"""

# ruff: noqa: RUF009 - the calls make dataclass fields
from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from harmonylite.config import rules
from harmonylite.config.rules import Rule
from harmonylite.config.values import Secret, one_line

T = TypeVar("T")

MAX_NODE_ID = 2**63 - 1
_UINT32 = 2**32 - 1
_NATS = ("nats", "tls", "ws", "wss")
_SUBJECT = r"(?!\$|_INBOX)[^\s.*>]+(\.[^\s.*>]+)*"
_STREAM = r"[^\s.*>/\\]+"
_WORD = r"[^\s<>]*"
_METRIC = r"([a-zA-Z_][a-zA-Z0-9_]*)?"


def _key(default: T, rule: Rule, doc: str, *, credential: str = "", example: str = "", live: bool = False) -> T:
    metadata = {"rule": rule, "doc": doc, "credential": credential, "example": example, "live": live}
    return dataclasses.field(default=default, metadata=metadata)


def _table(kind: type[T], doc: str) -> T:
    return dataclasses.field(default_factory=kind, metadata={"table": kind, "doc": doc})


def _secret(doc: str, credential: str) -> Secret:
    return _key(Secret(), rules.secret(), f"{doc} (or systemd credential {credential})", credential=credential)


def _secret_file(name: str) -> str:
    return _key("", rules.path(), f"file that holds {name}, instead of the key itself")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationLog:
    shards: int = _key(1, rules.integer(1, 64), "streams that the nodes are spread over; the same on every node")
    max_entries: int = _key(
        1024,
        rules.integer(1, 2**63 - 1, "messages"),
        "a snapshot is due after so many; the stream holds more",
    )
    replicas: int = _key(1, rules.integer(1, 5), "copies of each stream; above 1 needs a cluster of as many servers")
    compress: bool = _key(True, rules.boolean(), "compress changes with zstd before they are sent")
    update_existing: bool = _key(
        False, rules.boolean(), "change a stream that exists with other settings; else it is used as it is"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotNats:
    replicas: int = _key(1, rules.integer(1, 5), "copies of its stream")
    bucket: str = _key(
        "harmonylite-snapshots",
        rules.pattern(r"[A-Za-z0-9_-]*", "letters, digits, - and _"),
        "its stream; one of its own for each log",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotS3:
    endpoint: str = _key(
        "",
        rules.pattern(_WORD, "text without spaces"),
        "host[:port] of the S3 service; empty: AWS",
        example="s3.eu-central-1.amazonaws.com",
    )
    region: str = _key("", rules.text(), "region of the bucket; empty: the service's default")
    path: str = _key("", rules.text(), "folder inside the bucket")
    bucket: str = _key(
        "", rules.pattern(_WORD, "text without spaces"), "name of the bucket; needed when snapshots go to S3"
    )
    use_ssl: bool = _key(False, rules.boolean(), "https instead of http")
    access_key: Secret = _secret("access key id", "s3_access_key")
    access_key_file: str = _secret_file("access_key")
    secret: Secret = _secret("secret access key", "s3_secret")
    secret_file: str = _secret_file("secret")
    session_token: Secret = _secret("session token of temporary credentials", "s3_session_token")
    session_token_file: str = _secret_file("session_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFile:
    path: str = _key("", rules.path(), 'folder for snapshots; needed with store = "file"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    enabled: bool = _key(True, rules.boolean(), "take snapshots and restore from them")
    store: str = _key("nats", rules.choice("nats", "s3", "file"), "where snapshots are kept")
    mirror: str = _key("", rules.choice("", "s3"), "second store that gets a copy of each snapshot")
    interval: int = _key(0, rules.integer(0, _UINT32, "ms"), "time between snapshots; 0: only when the log has grown")
    leader_ttl: int = _key(
        30000,
        rules.integer(1000, 86_400_000, "ms"),
        "the lease of the node that takes snapshots ends after that",
    )
    retain: int = _key(5, rules.integer(1, 10_000), "snapshots that are kept; older ones are removed")
    nats: SnapshotNats = _table(SnapshotNats, "Snapshots in NATS, in a JetStream stream of their own.")
    s3: SnapshotS3 = _table(SnapshotS3, "Snapshots in S3 or a service that speaks it, such as MinIO.")
    file: SnapshotFile = _table(SnapshotFile, "Snapshots in a folder, for example a mounted share.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Nats:
    urls: tuple[str, ...] = _key(
        (),
        rules.servers(*_NATS),
        "external NATS servers; empty: the bundled server runs",
        example='["nats://hub:4222"]',
    )
    subject_prefix: str = _key(
        "harmonylite-change-log",
        rules.pattern(_SUBJECT, "a NATS subject without *, > and a $ in front"),
        "subjects of changes begin with it; the same on every node",
    )
    stream_prefix: str = _key(
        "harmonylite-changes",
        rules.pattern(_STREAM, "a name without dots, spaces, *, >, / and \\"),
        "stream names begin with it; the same on every node",
    )
    user_name: str = _key("", rules.text(), "user for password authentication")
    user_password: Secret = _secret("password of user_name", "nats_user_password")
    user_password_file: str = _secret_file("user_password")
    seed_file: str = _key("", rules.path(), "file with the nkey seed of this node")
    ca_file: str = _key("", rules.path(), "certificate authority that the server's certificate is checked against")
    cert_file: str = _key("", rules.path(), "client certificate for TLS; together with key_file")
    key_file: str = _key("", rules.path(), "private key of cert_file")
    connect_retries: int = _key(
        5,
        rules.integer(-1, 2**31 - 1),
        "accepted for the Go implementation's files, without effect: a node never gives up connecting",
    )
    reconnect_wait_seconds: float = _key(2.0, rules.number(0.01, 3600, "s"), "pause between two attempts to connect")
    bind_address: str = _key(
        "127.0.0.1:-1", rules.listen(any_port=True), "bundled server: where NATS clients may connect"
    )
    server_config: str = _key(
        "", rules.path(), "bundled server: a nats-server file that is included; what it sets stays"
    )
    server_binary: str = _key("", rules.path(), "bundled server: its program; empty: it is searched for")
    store_dir: str = _key("", rules.path(), "bundled server: folder of its streams; empty: nats beside the database")
    max_store: int = _key(
        0,
        rules.size(1 << 20, 1 << 50, zero="set below the free space"),
        "bundled server: how much disk its streams may take",
    )
    sync_interval: str = _key(
        "",
        rules.sync_interval(),
        'bundled server: how often it syncs to disk; empty: "always" where others rely on it, else "10s"',
    )
    cluster_addr: str = _key(
        "",
        rules.listen(optional=True),
        "bundled server: where the cluster's other servers connect",
        example="0.0.0.0:4248",
    )
    cluster_peers: tuple[str, ...] = _key(
        (),
        rules.servers("nats", "nats-route", "tls", commas=True),
        "bundled server: cluster addresses of the other servers",
        example='["nats://node2:4248", "nats://node3:4248"]',
    )
    leaf_listen: str = _key(
        "",
        rules.listen(optional=True),
        "bundled server as a hub: where leaves connect",
        example="0.0.0.0:7422",
    )
    leaf_servers: tuple[str, ...] = _key(
        (),
        rules.servers("nats-leaf", "nats", *_NATS[1:], commas=True),
        "bundled server as a leaf: the hub's leaf addresses",
        example='["nats-leaf://hub:7422"]',
    )
    domain: str = _key(
        "",
        rules.pattern(r"[^\s.*>/\\]*", "a name without dots, spaces, *, >, / and \\"),
        'JetStream domain, the same on the hub and its leaves; empty: "hub" on a hub and its leaves',
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prometheus:
    enable: bool = _key(False, rules.boolean(), "serve metrics at /metrics")
    bind: str = _key(":3010", rules.listen(), "where metrics are served")
    namespace: str = _key(
        "harmonylite", rules.pattern(_METRIC, "letters, digits and _"), "first part of every metric's name"
    )
    subsystem: str = _key("", rules.pattern(_METRIC, "letters, digits and _"), "second part of every metric's name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Logging:
    verbose: bool = _key(False, rules.boolean(), "log details too", live=True)
    format: str = _key("console", rules.choice("console", "json"), "how a line looks", live=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthCheck:
    enable: bool = _key(False, rules.boolean(), "serve the health check")
    bind: str = _key("0.0.0.0:8090", rules.listen(), "where it is served")
    path: str = _key("/health", rules.pattern(r"/[^\s?#]*", 'a path that begins with "/"'), "its path")
    detailed: bool = _key(True, rules.boolean(), "answer with details; else with the status alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    include: tuple[str, ...] = _key(
        ("*",), rules.globs(), "tables that are replicated; empty: all", example='["orders", "stock_*"]'
    )
    exclude: tuple[str, ...] = _key((), rules.globs(), "tables that are not, although include names them")


@dataclass(frozen=True, slots=True)
class Problem:
    """A mistake, or a remark. The message goes on from the key: "must be ...".

    key: dotted, empty if it is about the whole file; file: None on the command line; line: from 1.
    """

    key: str
    message: str
    file: Path | None = None
    line: int | None = None

    def __str__(self) -> str:
        where = "" if self.file is None else f"{self.file}: " if self.line is None else f"{self.file}:{self.line}: "
        return one_line(f"{where}{self.key} {self.message}" if self.key else f"{where}{self.message}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything in force. `notes`: what was accepted without effect; `file`: where it was read from."""

    db_path: Path = _key(
        Path(), rules.database_path(), "the application's SQLite database", example="/var/lib/myapp/app.db"
    )
    node_id: int = _key(
        0,
        rules.integer(1, MAX_NODE_ID),
        "unique in the cluster; left out: made from the machine id",
        example="1",
    )
    publish: bool = _key(True, rules.boolean(), "send this node's changes")
    replicate: bool = _key(True, rules.boolean(), "apply the other nodes' changes")
    scan_max_changes: int = _key(
        512, rules.integer(1, 1_000_000, "rows"), "about so many go into one message", live=True
    )
    cleanup_interval: int = _key(
        5000, rules.integer(100, _UINT32, "ms"), "pause between two rounds of housekeeping", live=True
    )
    sleep_timeout: int = _key(
        0,
        rules.integer(0, _UINT32, "ms"),
        "without activity for so long, take a snapshot and exit; 0: never",
        live=True,
    )
    polling_interval: int = _key(
        0,
        rules.integer(0, _UINT32, "ms"),
        "look for changes that often, where inotify does not work; 0: never",
        live=True,
    )
    tombstone_retention: float = _key(
        90.0,
        rules.number(1, 36500, "days"),
        "deletes are remembered so long; longer than a node is offline",
        live=True,
    )
    max_transaction_bytes: int = _key(
        64 << 20, rules.size(64 << 10, 128 << 20), "a larger transaction arrives in steps, which is logged", live=True
    )
    replication_log: ReplicationLog = _table(ReplicationLog, "The streams that hold the changes.")
    snapshot: Snapshot = _table(Snapshot, "Copies of the database from which new or late nodes catch up.")
    nats: Nats = _table(Nats, "The bundled NATS server, or the external one.")
    prometheus: Prometheus = _table(Prometheus, "Metrics for Prometheus.")
    logging: Logging = _table(Logging, "The log on standard output.")
    health_check: HealthCheck = _table(HealthCheck, "The HTTP health check.")
    tables: Tables = _table(Tables, "Which tables are replicated, as glob patterns.")

    file: Path | None = None
    notes: tuple[Problem, ...] = ()
    node_id_from_machine: bool = False

    @property
    def data_dir(self) -> Path:
        """The folder for what is not in the database: the bundled server's streams and configuration."""
        return Path(self.nats.store_dir).absolute() if self.nats.store_dir else self.db_path.parent / "nats"

    @property
    def external(self) -> bool:
        """Is NATS somebody else's, so that no bundled server runs?"""
        return bool(self.nats.urls)

    @property
    def node_name(self) -> str:
        """The name of this node and of its bundled server."""
        return f"harmonylite-node-{self.node_id}"


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the file. name: dotted; credential: the systemd credential that may hold it, or empty; live: SIGHUP
    takes over a new value."""

    name: str
    rule: Rule
    doc: str
    default: Any
    credential: str
    example: str
    live: bool

    @property
    def table(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def short_name(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the file. name: dotted, empty for the top; kind: its dataclass."""

    name: str
    kind: type[Any]
    doc: str


def _walk(kind: type[Any], name: str, doc: str) -> Iterator[Key | Table]:
    yield Table(name, kind, doc)
    below: list[tuple[type[Any], str, str]] = []
    for field in dataclasses.fields(kind):
        dotted = f"{name}.{field.name}" if name else field.name
        about = field.metadata
        if "table" in about:
            below.append((about["table"], dotted, about["doc"]))
        elif "rule" in about:
            texts = about["credential"], about["example"]
            yield Key(dotted, about["rule"], about["doc"], field.default, *texts, about["live"])
    for kind_below, dotted, doc_below in below:
        yield from _walk(kind_below, dotted, doc_below)


_ALL = tuple(_walk(Config, "", "What is replicated, and by whom."))
TABLES: dict[str, Table] = {item.name: item for item in _ALL if isinstance(item, Table)}
KEYS: dict[str, Key] = {item.name: item for item in _ALL if isinstance(item, Key)}


def value_of(config: Config, dotted: str) -> Any:
    """The value of a key such as `nats.urls`; raises AttributeError for anything else."""
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value
