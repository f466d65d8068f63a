"""`harmonylite COMMAND`: arguments, dispatch, exit codes, one line per mistake."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from harmonylite.cli import (
    check_config,
    cleanup,
    conflicts,
    demo,
    doctor,
    legacy,
    parked,
    run,
    setup,
    snapshot,
    status,
    version,
)
from harmonylite.cli.command import Command, Failure, WrongUsage, warn
from harmonylite.config import ConfigError
from harmonylite.db.inspect import DatabaseUnreadable
from harmonylite.observe.control import ControlError

OK, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

COMMANDS: tuple[Command, ...] = (
    run.COMMAND,
    status.COMMAND,
    check_config.COMMAND,
    cleanup.COMMAND,
    conflicts.COMMAND,
    parked.COMMAND,
    setup.COMMAND,
    snapshot.COMMAND,
    doctor.COMMAND,
    demo.COMMAND,
    version.COMMAND,
)

# Known from the Go implementation's flags, and made by no command of this version.
NOT_YET = {
    "schema": "the schema report is not available in this version",
}


def entry() -> NoReturn:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code. Nothing that goes wrong inside leaves here as an exception."""
    try:
        code = _run(legacy.modern(arguments))
        if sys.stdout is not None:  # closed by whoever called
            sys.stdout.flush()
        return code
    except (_UsageError, WrongUsage) as error:
        warn(str(error))
        return WRONG_USAGE
    except ConfigError as error:
        for problem in error.problems:
            warn(str(problem))
        return WRONG_USAGE
    except (Failure, DatabaseUnreadable, ControlError) as error:
        warn(str(error))
        return FAILED
    except PermissionError as error:
        what = error.filename if isinstance(error.filename, str) else "a file"
        warn(f"{what}: {error.strerror or 'permission denied'}; ask as root, or as the user that the daemon runs as")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has what it wanted (`| head`). Python would complain once more when it flushes at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        if os.environ.get("HARMONYLITE_DEBUG") == "1":
            traceback.print_exc()
        else:
            text = " ".join(str(error).split()) or "no further text"
            kind = type(error).__name__
            if isinstance(error, OSError) and error.strerror:
                kind, text = str(error.filename or "reading or writing"), error.strerror
            warn(f"{kind}: {text} (HARMONYLITE_DEBUG=1 shows where)")
        return FAILED


def _run(arguments: list[str]) -> int:
    parser = build_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return WRONG_USAGE
    if arguments[0] == "help":
        arguments = [*arguments[1:2], "--help"]
    _check_command(arguments)
    try:
        parsed, unknown = parser.parse_known_args(arguments)
    except SystemExit as done:  # --help
        return int(done.code or 0)
    if unknown:
        raise _UsageError(_unknown_arguments(parsed.parser, unknown))
    if hasattr(parsed, "pprof"):
        warn("-pprof is accepted and has no effect")
    command: Command = parsed.command
    return command.run(parsed)


class _UsageError(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    """One line about wrong usage instead of argparse's two or more."""

    example = ""

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required") and self.example:
            choices = next((action.choices for action in self._get_positional_actions() if action.choices), None)
            missing = f"one of {', '.join(choices)}" if choices else message.rpartition(": ")[2]
            raise _UsageError(f"{self.prog.split()[-1]} needs {missing}, for example: {self.example}")
        raise _UsageError(f"{message}; see '{self.prog} --help'")


def _unknown_arguments(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    near = get_close_matches(unknown[0].partition("=")[0], parser._option_string_actions, 1)
    hint = f"did you mean {near[0]}?" if near else f"see '{parser.prog} --help'"
    return f"unrecognized arguments: {' '.join(unknown)}; {hint}"


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Options stand before or after the command."""
    parser = _Parser(
        prog="harmonylite",
        description="Leaderless SQLite replication through NATS JetStream.",
        epilog=_examples(
            (
                "harmonylite check-config --config /etc/harmonylite/config.toml",
                "harmonylite run --config /etc/harmonylite/config.toml",
                "harmonylite status",
            )
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_common(parser)
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for command in COMMANDS:
        below = choices.add_parser(
            command.name,
            help=command.summary,
            description=command.description or command.summary[:1].upper() + command.summary[1:] + ".",
            epilog=_examples(command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        _add_common(below)
        command.add_arguments(below)
        below.example = command.examples[0]
        below.set_defaults(command=command, parser=below)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every command. SUPPRESS: what stands before the command is not undone by a default after it."""
    nothing = argparse.SUPPRESS
    parser.add_argument("--config", type=Path, metavar="FILE", default=nothing, help="the configuration file")
    over = parser.add_argument_group("instead of what the configuration file says")
    over.add_argument("--node-id", type=int, metavar="N", default=nothing, help="node_id")
    over.add_argument("--cluster-addr", metavar="ADDR", default=nothing, help="nats.cluster_addr")
    over.add_argument("--cluster-peers", metavar="URL,URL", default=nothing, help="nats.cluster_peers")
    over.add_argument("--leaf-servers", metavar="URL,URL", default=nothing, help="nats.leaf_servers")
    parser.add_argument("--pprof", default=nothing, help=nothing)


def _examples(lines: Sequence[str]) -> str:
    return "\n".join(("examples:", *(f"  {line}" for line in lines)))


def _check_command(arguments: Sequence[str]) -> None:
    """Say something better than argparse of a command that does not exist, or not yet."""
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    known = [command.name for command in COMMANDS]
    if named is None or named in known:
        return
    if named in NOT_YET:
        raise Failure(NOT_YET[named])
    near = get_close_matches(named, known, 1)
    raise _UsageError(
        f"unknown command {named!r}; " + (f"did you mean {near[0]}?" if near else "see 'harmonylite --help'")
    )
