"""What no single key can tell: settings that contradict each other, and settings without effect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harmonylite.config.model import KEYS, Config, Nats, value_of
from harmonylite.config.rules import is_credential
from harmonylite.config.values import split_address

# Files that are read when they are needed: the daemon starts without them, and does not connect.
_READ_LATER = ("seed_file", "ca_file", "cert_file", "key_file", "server_config")
_LOOPBACK = ("localhost", "127.", "[::1]")
# What only the bundled server reads.
_BUNDLED_ONLY = (
    "bind_address",
    "server_config",
    "server_binary",
    "store_dir",
    "max_store",
    "sync_interval",
    "cluster_addr",
    "cluster_peers",
    "leaf_listen",
    "leaf_servers",
)


def contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """(dotted key, message) for each setting that cannot work beside the others."""
    nats, snapshot = config.nats, config.snapshot
    if nats.user_password and not nats.user_name:
        yield "nats.user_password", "is set, but nats.user_name is not"
    if nats.cert_file and not nats.key_file:
        yield "nats.cert_file", "is set, but nats.key_file is not"
    if nats.key_file and not nats.cert_file:
        yield "nats.key_file", "is set, but nats.cert_file is not"
    if nats.cluster_peers and not nats.cluster_addr:
        yield (
            "nats.cluster_peers",
            "is set, but nats.cluster_addr (where this server listens for them) is not",
        )
    if snapshot.enabled and "s3" in (snapshot.store, snapshot.mirror) and not snapshot.s3.bucket:
        yield "snapshot.s3.bucket", "is not set, but snapshots are to go to S3"
    if snapshot.enabled and snapshot.store == "file" and not snapshot.file.path:
        yield "snapshot.file.path", 'is not set, but snapshot.store is "file"'
    if snapshot.mirror and snapshot.mirror == snapshot.store:
        yield "snapshot.mirror", "is the same as snapshot.store: a mirror is a second place"
    yield from _port_clashes(config)


def _port_clashes(config: Config) -> Iterator[tuple[str, str]]:
    listeners: list[tuple[str, str]] = []
    if config.prometheus.enable:
        listeners.append(("prometheus.bind", config.prometheus.bind))
    if config.health_check.enable:
        listeners.append(("health_check.bind", config.health_check.bind))
    if not config.external:
        listeners += [
            (f"nats.{name}", getattr(config.nats, name)) for name in ("bind_address", "cluster_addr", "leaf_listen")
        ]
    taken: dict[int, str] = {}
    for key, text in listeners:
        port = split_address(text, any_port=True).port if text else 0
        if port and port in taken:
            yield key, f"uses port {port}, which {taken[port]} uses too"
        elif port:
            taken[port] = key


def _is_missing(path: str) -> bool:
    # One behind a folder that is closed to this user may be there for the daemon's.
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file is called that
        return True
    except OSError:
        pass
    return False


def remarks(config: Config) -> Iterator[tuple[str, str]]:
    """(dotted key, message) for each setting that is accepted and does not do what one might expect of it."""
    nats, snapshot = config.nats, config.snapshot
    for key in KEYS.values():
        value = value_of(config, key.name)
        if isinstance(value, str) and is_credential(value):
            yield key.name, "is not available here: this process was started without systemd credentials"
    for name in _READ_LATER:
        path = getattr(nats, name)
        unused = config.external and name in _BUNDLED_ONLY
        if path and not unused and not is_credential(path) and _is_missing(path):
            yield f"nats.{name}", f"names {path}, and there is no such file"
    if config.external:
        untouched = Nats()
        for name in _BUNDLED_ONLY:
            if getattr(nats, name) != getattr(untouched, name):
                yield f"nats.{name}", "has no effect: nats.urls is set, so no bundled server runs"
    elif config.replication_log.replicas > 1 and not (nats.cluster_peers or nats.leaf_servers or nats.server_config):
        yield (
            "replication_log.replicas",
            f"cannot be met: {config.replication_log.replicas} copies need a cluster (nats.cluster_peers)",
        )
    s3_used = snapshot.enabled and "s3" in (snapshot.store, snapshot.mirror)
    if s3_used and snapshot.s3.endpoint and not snapshot.s3.use_ssl and not snapshot.s3.endpoint.startswith(_LOOPBACK):
        yield "snapshot.s3.use_ssl", "is off: snapshots travel unencrypted"
