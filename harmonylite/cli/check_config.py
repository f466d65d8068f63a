"""`check-config`: validate the configuration and print what is in force."""

from __future__ import annotations

import argparse
from dataclasses import replace

from harmonylite import config as configuration
from harmonylite.cli.command import Command, add_json, load_config, print_json, warn
from harmonylite.config import Config, ConfigError, Problem
from harmonylite.config.rules import is_credential
from harmonylite.stream.credentials import SettingsError
from harmonylite.stream.server_config import ASSUMED_VERSION, plan_server
from harmonylite.stream.server_settings import ServerSettings


def run(arguments: argparse.Namespace) -> int:
    if arguments.json:
        return _run_json(arguments)
    config, notes = _checked(arguments)
    for note in notes:
        warn(f"note: {note}")
    print(f"# {config.file}: no mistakes; in force:")
    print(configuration.describe(config))
    return 0


def _run_json(arguments: argparse.Namespace) -> int:
    try:
        config, notes = _checked(arguments)
    except ConfigError as error:
        print_json({"valid": False, "problems": [_as_json(problem) for problem in error.problems]})
        return 2
    print_json(
        {
            "valid": True,
            "file": str(config.file),
            "notes": [_as_json(note) for note in notes],
            "config": configuration.describe_data(config),
        }
    )
    return 0


def _checked(arguments: argparse.Namespace) -> tuple[Config, tuple[Problem, ...]]:
    """The configuration, and all that is remarkable about it. Raises ConfigError."""
    config = load_config(arguments)
    return config, (*config.notes, *configuration.remarks_here(config), *_server_remarks(config))


def _server_remarks(config: Config) -> tuple[Problem, ...]:
    """What the bundled server would say of its part. Raises ConfigError where the daemon would not start."""
    nats = config.nats
    if config.external or any(map(is_credential, (nats.seed_file, nats.server_config))):
        return ()
    settings = ServerSettings.from_config(config)
    if settings.user_name and not settings.user_password:
        # Perhaps the service has it from systemd; that it may be missing is among the notes.
        settings = replace(settings, user_password="-")
    try:
        plan = plan_server(settings, ASSUMED_VERSION, max_store=settings.max_store)
    except SettingsError as error:
        problem = Problem("", str(error), config.file)
        if isinstance(error.__context__, PermissionError):  # the daemon's user may read it
            return (problem,)
        raise ConfigError((problem,)) from None
    return tuple(Problem("", text, config.file) for text in plan.warnings)


def _as_json(problem: Problem) -> dict[str, object]:
    return {
        "key": problem.key,
        "message": problem.message,
        "file": str(problem.file) if problem.file else None,
        "line": problem.line,
    }


COMMAND = Command(
    name="check-config",
    summary="validate the configuration and print what is in force",
    description=(
        "Read the configuration, name every mistake in it with its line, and print what is in force.\n"
        "Secrets are masked. Exit code 2 when there are mistakes."
    ),
    examples=("harmonylite check-config --config /etc/harmonylite/config.toml", "harmonylite check-config --json"),
    add_arguments=add_json,
    run=run,
)
