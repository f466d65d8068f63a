"""`version`: of everything that matters for a bug report."""

from __future__ import annotations

import argparse
import platform

import apsw

from harmonylite import __version__
from harmonylite.cli.command import Command, add_json, load_config, print_json, print_pairs
from harmonylite.config import ConfigError
from harmonylite.stream.server_process import StartError, binary_version, find_binary


def run(arguments: argparse.Namespace) -> int:
    versions = {
        "harmonylite": __version__,
        "python": platform.python_version(),
        "sqlite": apsw.sqlitelibversion(),
        "apsw": apsw.apswversion(),
        "nats-server": _nats_server(arguments),
    }
    if arguments.json:
        print_json(versions)
    else:
        print_pairs((name, found or "not found") for name, found in versions.items())
    return 0


def _nats_server(arguments: argparse.Namespace) -> str | None:
    """The bundled server's version; the configuration is asked for its place only if there is a valid one."""
    try:
        configured = load_config(arguments).nats.server_binary
    except ConfigError:
        configured = ""
    try:
        return ".".join(str(part) for part in binary_version(find_binary(configured)))
    except StartError:
        return None


COMMAND = Command(
    name="version",
    summary="the versions of HarmonyLite, Python, SQLite and nats-server",
    examples=("harmonylite version", "harmonylite version --json"),
    add_arguments=add_json,
    run=run,
)
