"""The Go implementation's command line: flags with one or two dashes, and no command.

https://pkg.go.dev/flag: `-flag`, `--flag`, `-flag=x`, and `-flag x` for flags that are not boolean.
"""

from __future__ import annotations

from collections.abc import Sequence

VALUE_FLAGS = ("config", "node-id", "cluster-addr", "cluster-peers", "leaf-servers", "pprof")
# Flags that stand for a command of ours.
COMMAND_FLAGS: dict[str, tuple[str, ...]] = {
    "version": ("version",),
    "cleanup": ("cleanup",),
    "save-snapshot": ("snapshot", "save"),
    "schema-status": ("schema", "status"),
    "schema-status-cluster": ("schema", "status", "--cluster"),
}
_FALSE = ("0", "f", "F", "false", "FALSE", "False")  # strconv.ParseBool


def modern(arguments: Sequence[str]) -> list[str]:
    """The same command line with a command and with `--flag=value`; what is not the Go implementation's stays.

    Without a command, the command is the first flag that stands for one, else `run`. An empty command line and one
    that asks for help stay as they are.
    """
    result: list[str] = []
    commands: list[tuple[str, ...]] = []
    has_command = asks_help = False
    left = list(arguments)
    while left:
        argument = left.pop(0)
        dashes = len(argument) - len(argument.lstrip("-"))
        name, equals, value = argument[dashes:].partition("=")
        if dashes in (1, 2) and name in VALUE_FLAGS:
            if not equals and left:
                value, equals = left.pop(0), "="
            result.append(f"--{name}{equals}{value}")
        elif dashes in (1, 2) and name in COMMAND_FLAGS and not has_command:
            if not equals or value not in _FALSE:
                commands.append(COMMAND_FLAGS[name])
        elif argument in ("-h", "-help", "--help"):
            asks_help = True
            result.append("--help")
        else:
            has_command = has_command or dashes == 0
            result.append(argument)
    if arguments and not has_command and not asks_help:
        result[:0] = commands[0] if commands else ("run",)
    return result
