"""`check-config`: validate the configuration and print what is in force."""

from __future__ import annotations

import argparse

from harmonylite import config as configuration
from harmonylite.cli.command import Command, add_json, load_config, print_json, warn
from harmonylite.config import ConfigError, Problem


def run(arguments: argparse.Namespace) -> int:
    if arguments.json:
        return _run_json(arguments)
    config = load_config(arguments)
    for note in config.notes:
        warn(f"note: {note}")
    print(f"# {config.file}: no mistakes; in force:")
    print(configuration.describe(config))
    return 0


def _run_json(arguments: argparse.Namespace) -> int:
    try:
        config = load_config(arguments)
    except ConfigError as error:
        print_json({"valid": False, "problems": [_as_json(problem) for problem in error.problems]})
        return 2
    print_json(
        {
            "valid": True,
            "file": str(config.file),
            "notes": [_as_json(note) for note in config.notes],
            "config": configuration.describe_data(config),
        }
    )
    return 0


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
