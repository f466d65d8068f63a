"""`snapshot`: take one, list what the store has, write one to a file."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from harmonylite.cli.command import (
    Command,
    Failure,
    WrongUsage,
    add_json,
    load_config,
    print_json,
    print_line,
    size,
    warn,
)
from harmonylite.cli.screen import Screen
from harmonylite.config import Config
from harmonylite.observe import control
from harmonylite.observe.control import ControlUnavailable

POLL_S = 0.2


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments)
    if not config.snapshot.enabled:
        raise Failure("snapshots are switched off ([snapshot] enabled = false)")
    misplaced = {
        "--to": arguments.to is not None and arguments.action != "restore",
        "--id": arguments.id is not None and arguments.action != "restore",
        "--mirror": arguments.mirror and arguments.action == "save",
        "--force": arguments.force and arguments.action != "save",
    }
    for option, wrong in misplaced.items():
        if wrong:
            raise WrongUsage(f"snapshot {arguments.action} takes no {option}; see 'harmonylite snapshot --help'")
    if arguments.action == "save":
        return _save(arguments, config)
    # Only here stores, NATS and asyncio are needed.
    from harmonylite.cli import snapshot_store

    if arguments.action == "list":
        return snapshot_store.show(arguments, config)
    return snapshot_store.restore(arguments, config)


# -- save


def _save(arguments: argparse.Namespace, config: Config) -> int:
    with Screen() as screen:
        found = _wait_saved(config, arguments.force, screen)
    if arguments.json:
        print_json(found)
    else:
        print_line(f"snapshot {found['id']} taken, {size(found['stored_bytes'])} in store {config.snapshot.store!r}")
    return 0


def _wait_saved(config: Config, force: bool, screen: Screen) -> dict[str, Any]:
    try:
        started = control.query(config.db_path, {"command": "snapshot-save", "force": force})["started"]
    except ControlUnavailable:
        raise Failure(f"no daemon runs on {config.db_path}: snapshots are taken by it, start it first") from None
    if not started:
        warn("one is being taken already; waiting for that")
    while True:
        answer = control.query(config.db_path, {"command": "snapshot-progress"})
        if answer["running"]:
            screen.show(answer["step"] or "waiting")
            time.sleep(POLL_S)
        elif "error" in answer:
            raise Failure(f"no snapshot was taken: {answer['error']}")
        else:
            found: dict[str, Any] = answer["snapshot"]
            return found


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("save", "list", "restore"),
        help="take one now; list what the store has; write one to a file",
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help="restore: a plain database, without our tables")
    parser.add_argument("--id", metavar="ID", help="restore: this snapshot instead of the newest intact one")
    parser.add_argument("--mirror", action="store_true", help="list, restore: from the mirror")
    parser.add_argument(
        "--force",
        action="store_true",
        help="save: give up what this node missed, and publish what it has; see docs/disaster-recovery.md",
    )
    add_json(parser)


COMMAND = Command(
    name="snapshot",
    summary="take, list and restore snapshots of the database",
    description=(
        "Snapshots are whole copies of the database, from which new and late nodes catch up by themselves.\n"
        "`restore --to FILE` writes one as a plain database that any application can open; without --to it makes the\n"
        "database of this node, where there is none."
    ),
    examples=("harmonylite snapshot save", "harmonylite snapshot list", "harmonylite snapshot restore --to copy.db"),
    add_arguments=_add_arguments,
    run=run,
)
