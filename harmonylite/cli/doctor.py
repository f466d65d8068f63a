"""`doctor`: looks at everything the daemon needs, and says what to do."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

from harmonylite.cli import checks, service
from harmonylite.cli.checks import Check
from harmonylite.cli.command import Command, add_json, load_config, print_json, print_line
from harmonylite.config import Config, ConfigError
from harmonylite.observe import control
from harmonylite.observe.control import ControlFailed, ControlUnavailable


def run(arguments: argparse.Namespace) -> int:
    found: list[Check] = []
    for check in _all_checks(arguments):
        found.append(check)
        if not arguments.json:
            _print(check)
    if arguments.json:
        print_json([{"check": one.name, "level": one.level, "text": one.text, "advice": one.advice} for one in found])
    return 1 if any(check.level == "fail" for check in found) else 0


def _print(check: Check) -> None:
    advice = f"; {check.advice}" if check.advice else ""
    print_line(f"{check.level:<4}  {check.name}: {check.text}{advice}")


def _all_checks(arguments: argparse.Namespace) -> Iterator[Check]:
    try:
        config = load_config(arguments)
    except ConfigError as error:
        for problem in error.problems:
            yield Check("config", "fail", str(problem))
        return
    # Only this command needs asyncio and NATS.
    from harmonylite.cli import nats_check, store_check

    yield from checks.config_file(config)
    yield from checks.user()
    daemon = _daemon(config)
    yield daemon
    running = daemon.level != "warn"
    yield from checks.database_files(config.db_path)
    yield from service.checks(config)
    yield from checks.database_content(config, running=running)
    yield from checks.database_soundness(config.db_path)
    yield from checks.file_system(config.db_path)
    yield from checks.clock_state()
    yield from nats_check.checks(config, running=running)
    yield from checks.ports(config, running=running)
    yield from store_check.checks(config)


def _daemon(config: Config) -> Check:
    """ok or fail: one runs; warn: none does."""
    try:
        status = control.query(config.db_path, {"command": "status"})
    except ControlUnavailable:
        return Check("daemon", "warn", "not running", _how_to_start(config))
    except ControlFailed as error:
        return Check("daemon", "fail", str(error), "see its log")
    reasons = "; ".join(str(reason) for reason in status.get("reasons", ()))
    text = f"running, {status.get('status')}" + (f": {reasons}" if reasons else "")
    return Check("daemon", "fail" if status.get("status") == "unhealthy" else "ok", text)


def _how_to_start(config: Config) -> str:
    """By systemd where it has a unit that reads this file; else by hand."""
    unit = service.unit_of(config.file)
    if unit is not None and service.show(unit).get("LoadState") == "loaded":
        return f"systemctl start {unit.removesuffix('.service')}"
    file = f" --config {shlex.quote(str(config.file))}" if config.file is not None else ""
    return f"harmonylite run{file}"


COMMAND = Command(
    name="doctor",
    summary="check files, database, disk, clock, NATS, ports and the snapshot store, and say what to do",
    description=(
        "Check everything that the daemon needs, one line each: ok, warn or fail, with what to do. Run it as the\n"
        "daemon's user to see what that user may. Exit code 1 when something fails."
    ),
    examples=("harmonylite doctor", "sudo -u harmonylite harmonylite doctor", "harmonylite doctor --json"),
    add_arguments=add_json,
    run=run,
)
