"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import sqlite3
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import apsw

from harmonylite import __version__
from harmonylite.stream.server_process import find_binary


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    cores: int
    memory_mb: int
    architecture: str
    kernel: str
    file_system: str


@dataclass(frozen=True, slots=True)
class Versions:
    """sqlite_application: the SQLite through which the benchmark writes; sqlite_daemon: the daemon's."""

    harmonylite: str
    python: str
    sqlite_application: str
    sqlite_daemon: str
    apsw: str
    nats_py: str
    nats_server: str
    msgpack: str
    zstandard: str


def describe_machine(folder: Path) -> Machine:
    """This machine, and the file system that `folder` is on."""
    return Machine(
        cpu=_cpu(),
        cores=os.cpu_count() or 1,
        memory_mb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        architecture=platform.machine(),
        kernel=platform.release(),
        file_system=_file_system(folder),
    )


def describe_versions() -> Versions:
    server = subprocess.run([find_binary(), "--version"], capture_output=True, text=True, check=True).stdout
    return Versions(
        harmonylite=__version__,
        python=platform.python_version(),
        sqlite_application=sqlite3.sqlite_version,
        sqlite_daemon=apsw.sqlitelibversion(),
        apsw=apsw.apsw_version(),
        nats_py=version("nats-py"),
        nats_server=server.split()[-1].lstrip("v"),
        msgpack=version("msgpack"),
        zstandard=version("zstandard"),
    )


def _cpu() -> str:
    names = {"model name", "Model", "Hardware"}  # proc(5); ARM has no model name
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return platform.processor() or "unknown"


def _file_system(folder: Path) -> str:
    """Its type, by the longest mount point above the folder."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, found, *_ = line.split()
        if folder.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind
