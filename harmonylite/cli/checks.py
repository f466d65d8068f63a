"""What `doctor` looks at on the machine: the database's place, the clock, ports."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harmonylite import clock
from harmonylite.cli import permissions
from harmonylite.cli.command import size
from harmonylite.config import Config, split_address
from harmonylite.config.model import KEYS, value_of
from harmonylite.db import inspect
from harmonylite.db.inspect import DatabaseUnreadable
from harmonylite.mounts import mount_of
from harmonylite.observe.control import holder_pid
from harmonylite.stream.server_log import port_owner

Level = Literal["ok", "warn", "fail"]

# WAL needs memory shared between all processes that have the database open, and locks that work
# (https://sqlite.org/wal.html#noshm): a network or host-shared file system gives neither.
_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "vboxsf", "fuse.sshfs", "fuse.glusterfs"}
)
_FAIL_FREE_BYTES = 20 << 20
_WARN_FREE_BYTES = 200 << 20
# A database may be large and its card slow: it is looked through for damage that long.
SOUNDNESS_S = 10.0
_DAMAGED = 'see "A card is corrupt" in docs/disaster-recovery.md'
# 2024-01-01: a clock before that was never set on this device.
_PLAUSIBLE_TIME_S = 1_704_067_200


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. advice: what to do about it, empty when nothing."""

    name: str
    level: Level
    text: str
    advice: str = ""


def config_file(config: Config) -> Iterator[Check]:
    """The file was read and is valid; are its notes worth a look, and can others read its secrets?"""
    yield Check("config", "ok", f"{config.file} has no mistakes")
    for note in config.notes:
        yield Check("config", "warn", f"{note.key} {note.message}", "harmonylite check-config shows where")
    inline = [key.name for key in KEYS.values() if key.rule.secret and _stands_in_file(config, key.name)]
    if inline and config.file is not None and config.file.stat().st_mode & stat.S_IROTH:
        yield Check(
            "config", "warn", f"every user can read {', '.join(inline)} in {config.file}", f"chmod o-r {config.file}"
        )


def _stands_in_file(config: Config, secret: str) -> bool:
    """Does the secret stand in the configuration file itself, rather than where `KEY_file` or systemd put it?"""
    from_systemd = bool(os.environ.get("CREDENTIALS_DIRECTORY"))
    return bool(value_of(config, secret)) and not value_of(config, f"{secret}_file") and not from_systemd


def user() -> Iterator[Check]:
    if os.geteuid() == 0:
        known = permissions.account(permissions.ACCOUNT) is not None
        as_daemon = f"sudo -u {permissions.ACCOUNT} harmonylite doctor" if known else "run this as the user it runs as"
        text = "root: it may open every file, whatever the daemon's user may"
        yield Check("user", "ok", text, f"to see what the daemon may: {as_daemon}")


def database_files(path: Path) -> Iterator[Check]:
    """May this user open the database and its companions for writing, and create the latter?"""
    folder = path.parent
    if not folder.is_dir():
        yield Check("database", "fail", f"{folder}: there is no such directory", "create it, or correct db_path")
        return
    if not path.exists():
        advice = "the application makes it; a node that joins others fetches a copy"
        yield Check("database", "warn", f"{path} does not exist", advice)
    for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        if file.exists() and not writable(file):
            yield Check("database", "fail", f"{file} is not writable by this user", _permission_advice(file))
        elif file == path and file.exists():
            yield Check("database", "ok", f"{path} may be read and written by this user")
    if writable(folder):
        yield Check("directory", "ok", f"{folder} is writable, as the -wal and -shm files need")
    else:
        advice = f"{_permission_advice(folder)}; the application's group and mode 2770 are a usual choice"
        yield Check("directory", "fail", f"{folder} is not writable by this user: WAL needs that", advice)


def writable(path: Path) -> bool:
    """By the permissions that this process has in effect."""
    needed = os.R_OK | os.W_OK | (os.X_OK if path.is_dir() else 0)
    return os.access(path, needed, effective_ids=os.access in os.supports_effective_ids)


def _permission_advice(path: Path) -> str:
    state = path.stat()
    return f"it belongs to user {state.st_uid}, group {state.st_gid}, mode {stat.S_IMODE(state.st_mode):o}"


def database_content(config: Config, *, running: bool) -> Iterator[Check]:
    """Journal mode, capture, and tables that cannot be replicated."""
    path = config.db_path
    if not path.exists():
        return
    try:
        health = inspect.health(path, config.tables.include, config.tables.exclude)
    except DatabaseUnreadable as error:
        advice = f"if it was one, {_DAMAGED}; else correct db_path" if error.damaged else "correct db_path"
        yield Check("database", "fail", str(error), advice)
        return
    if health.journal_mode == "wal":
        yield Check("journal", "ok", "the database is in WAL mode")
    else:
        yield Check("journal", "warn", f"journal mode is {health.journal_mode}", "the daemon switches it to WAL")
    yield _capture(config, health, running=running)
    for table in health.skipped:
        yield Check("tables", "warn", f"{table.table} is not replicated: {table.reason}")
    for table in health.unwritable:
        advice = "use what every SQLite has in its indexes, CHECKs and generated columns"
        yield Check("tables", "warn", f"{table.table}: {table.reason}", advice)
    if (incomplete := inspect.overview(path).incomplete) is not None:
        yield Check("complete", "warn", incomplete, "until then it takes no snapshot")


def database_soundness(path: Path) -> Iterator[Check]:
    """Is anything in the file damaged? Reads all of it, for SOUNDNESS_S at most."""
    if not path.exists():
        return
    try:
        found = inspect.soundness(path, SOUNDNESS_S)
    except DatabaseUnreadable:  # said by `database_content` already
        return
    if found.complaint is not None:
        yield Check("damage", "fail", f"{path} is damaged: {found.complaint}", _DAMAGED)
    elif found.looked_at == 1.0:
        yield Check("damage", "ok", f"none in the {size(found.size)} of the database")
    elif found.looked_at:
        text = f"none in the {found.looked_at:.0%} of {size(found.size)} that were read in {SOUNDNESS_S:.0f} s"
        yield Check("damage", "ok", text, f"sqlite3 {path} 'PRAGMA quick_check' reads all")
    else:
        text = f"not looked for: {size(found.size)} take too long"
        yield Check("damage", "ok", text, f"sqlite3 {path} 'PRAGMA quick_check' reads all")


def _capture(config: Config, health: inspect.Health, *, running: bool) -> Check:
    if not config.publish:
        return Check("capture", "ok", "not wanted: publish = false")
    if not health.tables:
        return Check("capture", "warn", "no table can be replicated", "create one with a primary key, or see [tables]")
    if not health.uncaptured:
        return Check("capture", "ok", f"installed on {len(health.tables)} of {len(health.tables)} tables")
    text = f"changes of {', '.join(health.uncaptured)} are not captured"
    if running:
        return Check("capture", "fail", text, "see the daemon's log")
    return Check("capture", "warn", text, "the daemon installs it when it starts")


def file_system(path: Path) -> Iterator[Check]:
    """Is the database on a local file system with room?"""
    folder = path.parent
    if not folder.is_dir():
        return
    kind, options = mount_of(folder)
    if kind in _NETWORK_FILE_SYSTEMS:
        yield Check(
            "file system", "fail", f"{folder} is on {kind}: SQLite's WAL does not work there", "move it to a local disk"
        )
    elif "ro" in options:
        yield Check("file system", "fail", f"{folder} is mounted read-only", "check the card: dmesg tells why")
    elif kind in ("tmpfs", "ramfs"):
        yield Check("file system", "warn", f"{folder} is in memory: all is lost at a reboot", "move it to a disk")
    else:
        yield Check("file system", "ok", f"{folder} is on {kind or 'an unknown file system'}")
    free = shutil.disk_usage(folder).free
    text = f"{free >> 20:,} MB free on {folder}"
    if free < _FAIL_FREE_BYTES:
        yield Check("disk", "fail", text, "make room: changes cannot be recorded on a full disk")
    elif free < _WARN_FREE_BYTES:
        yield Check("disk", "warn", text, "make room before the disk is full")
    else:
        yield Check("disk", "ok", text)


def clock_state() -> Iterator[Check]:
    if time.time() < _PLAUSIBLE_TIME_S:
        when = time.strftime("%Y-%m-%d", time.gmtime())
        yield Check("clock", "warn", f"the clock stands at {when}", "set it, or let NTP: timedatectl set-ntp true")
        return
    synchronized = clock.ntp_synchronized()
    if synchronized:
        yield Check("clock", "ok", "synchronised by NTP")
    elif synchronized is None:
        yield Check("clock", "warn", "it cannot be known whether NTP sets the clock", "timedatectl tells more")
    else:
        yield Check(
            "clock", "warn", "not synchronised: the last writer wins by time", "timedatectl set-ntp true, or chrony"
        )


def ports(config: Config, *, running: bool) -> Iterator[Check]:
    """Are the ports that the daemon wants free, or its own?"""
    wanted: list[tuple[str, str]] = []
    if config.health_check.enable:
        wanted.append(("health_check.bind", config.health_check.bind))
    if config.prometheus.enable:
        wanted.append(("prometheus.bind", config.prometheus.bind))
    if not config.external:
        names = ("bind_address", "cluster_addr", "leaf_listen")
        wanted += [(f"nats.{name}", value_of(config, f"nats.{name}")) for name in names]
    for key, text in wanted:
        if text and split_address(text, any_port=True).port:
            yield _port(key, text, daemon=holder_pid(config.db_path) if running else 0, running=running)


def _port(key: str, text: str, *, daemon: int, running: bool) -> Check:
    host, port = split_address(text)
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host or None, port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            # Listening tells what binding does not: with SO_REUSEADDR two sockets may bind until one listens.
            probe.listen(1)
    except socket.gaierror as error:
        return Check("ports", "fail", f"{key}: {host} is not a host name here: {error.strerror}", f"correct {key}")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            owner = port_owner(port)
            # Who cannot be seen (another user's process, another namespace) is taken for the daemon that runs.
            if running and (owner is None or daemon == 0 or daemon in (owner.pid, owner.parent)):
                return Check("ports", "ok", f"{key}: {text} is in use, by the daemon that runs")
            if owner is not None:
                return Check("ports", "fail", f"{key}: {text} is in use by {owner}", f"end that, or change {key}")
            return Check(
                "ports", "fail", f"{key}: {text} is in use by another program", f"ss -ltnp tells which, or change {key}"
            )
        return Check("ports", "fail", f"{key}: {text} cannot be used: {error.strerror}", f"correct {key}")
    return Check("ports", "ok", f"{key}: {text} is free")
