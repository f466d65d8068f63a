"""What no single key can tell: settings that contradict each other, and settings without effect."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from harmonylite.config.model import KEYS, Config, Nats, value_of
from harmonylite.config.rules import is_credential
from harmonylite.config.values import split_address

# Files that are read when they are needed: the daemon starts without them, and does not connect.
_READ_LATER = ("seed_file", "ca_file", "cert_file", "key_file", "server_config", "server_binary")
_LOOPBACK = ("localhost", "127.", "[::1]")
# Milliseconds below which somebody may have meant seconds.
_TOO_SHORT_MS = {"snapshot.interval": 600_000, "sleep_timeout": 1000, "polling_interval": 10}
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


def _is_missing(path: Path) -> bool:
    # One behind a folder that is closed to this user may be there for the daemon's.
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file is called that
        return True
    except OSError:
        pass
    return False


def remarks(config: Config) -> Iterator[tuple[str, str]]:
    """(dotted key, message) for each setting that is accepted and does not do what one might expect of it."""
    for key in KEYS.values():
        value = value_of(config, key.name)
        if isinstance(value, str) and is_credential(value):
            yield key.name, "is not available here: this process was started without systemd credentials"
    yield from _files(config)
    yield from _secrets_without_partner(config)
    yield from _without_effect(config)
    s3_used = "s3" in _stores(config)
    s3 = config.snapshot.s3
    if s3_used and s3.endpoint and not s3.use_ssl and not s3.endpoint.startswith((*_LOOPBACK, "https://")):
        yield "snapshot.s3.use_ssl", "is off: snapshots travel unencrypted"
    for name, least in _TOO_SHORT_MS.items():
        if 0 < (value := value_of(config, name)) < least:
            yield name, f"is {value} milliseconds: for seconds write {value}000"


def _stores(config: Config) -> tuple[str, ...]:
    """Where snapshots go."""
    snapshot = config.snapshot
    return (snapshot.store, snapshot.mirror) if snapshot.enabled else ()


def _files(config: Config) -> Iterator[tuple[str, str]]:
    for name in _READ_LATER:
        path = getattr(config.nats, name)
        unused = config.external and name in _BUNDLED_ONLY
        if not path or unused or is_credential(path):
            continue
        if _is_missing(Path(path)):
            yield f"nats.{name}", f"names {path}, and there is no such file"
        elif Path(path).is_dir():
            yield f"nats.{name}", f"names {path}, which is a directory and not a file"


def folders(config: Config) -> Iterator[tuple[str, str]]:
    """(dotted key, message) for each folder that is not there, or not writable: no mistake, since whoever asks may be
    another user than the daemon's, or ask on another machine."""
    yield from _folder("db_path", config.db_path.parent, "its directory")
    if "file" in _stores(config) and config.snapshot.file.path:
        folder = Path(config.snapshot.file.path)
        # The store makes its folder, not what is above it: that may be a share that is not mounted.
        if _is_missing(folder):
            yield from _folder("snapshot.file.path", folder.parent, "the directory it is to be made in,")
        else:
            yield from _folder("snapshot.file.path", folder, "its directory")
    if config.nats.store_dir and not config.external and Path(config.nats.store_dir).is_file():
        yield "nats.store_dir", f"names {config.nats.store_dir}, which is a file and not a directory"


def _folder(key: str, folder: Path, what: str) -> Iterator[tuple[str, str]]:
    if _is_missing(folder):
        yield key, f"{what} {folder} does not exist on this machine: create it, or correct {key}"
    elif folder.exists() and not folder.is_dir():
        yield key, f"{what} {folder} is a file: correct {key}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield (
            key,
            f"{what} {folder} may not be written by the user who asks; the daemon's user must be able to"
            " (harmonylite doctor looks, run as that user)",
        )


def _secrets_without_partner(config: Config) -> Iterator[tuple[str, str]]:
    """No mistakes: only the service may see its systemd credentials."""
    nats, s3 = config.nats, config.snapshot.s3
    if nats.user_name and not nats.user_password and not nats.user_password_file:
        then = "" if config.external or nats.server_config else ", and `run` refuses that"
        yield "nats.user_name", f"is set and no password is{then}: {_how('nats.user_password')}"
    if "s3" not in _stores(config):
        return
    pairs = (("access_key", "secret"), ("secret", "access_key"), ("session_token", "access_key"))
    for one, other in pairs:
        if getattr(s3, one) and not getattr(s3, other) and not getattr(s3, f"{other}_file"):
            yield f"snapshot.s3.{one}", f"is set and snapshot.s3.{other} is not: {_how(f'snapshot.s3.{other}')}"


def _how(secret: str) -> str:
    return f"set {secret} or {secret}_file, unless systemd hands {KEYS[secret].credential} to the service"


def _without_effect(config: Config) -> Iterator[tuple[str, str]]:
    nats, snapshot, tables = config.nats, config.snapshot, config.tables
    if config.external:
        untouched = Nats()
        for name in _BUNDLED_ONLY:
            if getattr(nats, name) != getattr(untouched, name):
                yield f"nats.{name}", "has no effect: nats.urls is set, so no bundled server runs"
    elif not (nats.cluster_peers or nats.leaf_servers or nats.server_config):
        copies = {"replication_log.replicas": config.replication_log.replicas}
        if "nats" in _stores(config):
            copies["snapshot.nats.replicas"] = snapshot.nats.replicas
        for key, number in copies.items():
            if number > 1:
                yield key, f"cannot be met: {number} copies need a cluster (nats.cluster_peers)"
    if not config.publish and not config.replicate:
        yield "publish", "is false, and so is replicate: this node neither sends nor receives changes"
    if snapshot.file.path and snapshot.store != "file":
        yield "snapshot.file.path", f'has no effect: snapshot.store is "{snapshot.store}", not "file"'
    if snapshot.mirror and not snapshot.enabled:
        yield "snapshot.mirror", "has no effect: snapshot.enabled is false"
    if "*" in tables.exclude:
        yield "tables.exclude", 'holds "*", which is every table: nothing is replicated'
    for pattern in tables.include:
        if pattern in tables.exclude and pattern != "*":
            yield "tables.include", f'holds "{pattern}", which tables.exclude takes out again'
