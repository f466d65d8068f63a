"""`cleanup`: remove our triggers and change logs from the database."""

from __future__ import annotations

import argparse
from pathlib import Path

import apsw

from harmonylite.cli.command import Command, Failure, add_json, counted, load_config, print_json
from harmonylite.db import inspect
from harmonylite.db.cleanup import CleanupRefused, cleanup
from harmonylite.observe import control
from harmonylite.observe.control import ControlFailed, ControlUnavailable


def run(arguments: argparse.Namespace) -> int:
    path = load_config(arguments).db_path
    if not path.exists():
        raise Failure(f"{path}: there is no such database, so nothing to clean up")
    _refuse_while_running(path)
    try:
        report = cleanup(path, everything=arguments.all, force=arguments.force)
    except CleanupRefused as refused:
        raise Failure(str(refused)) from None
    except (apsw.BusyError, apsw.LockedError):
        raise Failure(f"{path}: another program keeps the database locked; stop the application, try again") from None
    except (apsw.Error, OSError) as error:
        inspect.overview(path)  # says it better, if it cannot read the database either
        raise Failure(f"{path}: cannot be cleaned up: {error}") from None
    if arguments.json:
        print_json({"tables": report.tables, "absorbed": report.absorbed, "pending": report.pending})
        return 0
    what = "every table and trigger of ours" if arguments.all else "triggers and change logs"
    print(f"removed {what}: {counted(report.tables, 'table')} no longer captured")
    if report.absorbed:
        print(f"{counted(report.absorbed, 'logged change')} absorbed before that")
    if report.pending and arguments.all:
        print(f"{counted(report.pending, 'row')} that no other node has seen will not be published")
    elif report.pending:
        print(f"{counted(report.pending, 'row')} not published yet; the next start publishes them")
    return 0


def _refuse_while_running(path: Path) -> None:
    try:
        control.query(path, {"command": "status"})
    except ControlUnavailable:
        return
    except ControlFailed:
        pass  # it listens, so it runs
    raise Failure(f"{path}: the daemon runs on this database and would put everything back; stop it first")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="remove versions and positions too: every table of ours")
    parser.add_argument("--force", action="store_true", help="with --all: although there are unpublished rows")
    add_json(parser)


COMMAND = Command(
    name="cleanup",
    summary="remove our triggers and change logs from the database",
    description=(
        "Remove our triggers and change logs from the database, after absorbing what they hold. Versions and the\n"
        "position in the stream stay, so that a later start resumes. With --all nothing of ours stays. The daemon\n"
        "must be stopped."
    ),
    examples=("harmonylite cleanup", "harmonylite cleanup --all", "harmonylite cleanup --all --force"),
    add_arguments=_add_arguments,
    run=run,
)
