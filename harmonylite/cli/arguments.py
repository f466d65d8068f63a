"""The command line as data, read from the argument parser: for the man pages and for completion in the shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_EXAMPLES = "examples:"


@dataclass(frozen=True, slots=True)
class Argument:
    """An option, or an argument by position (`flags` is empty then).

    value: what its value is called, empty if it takes none; choices: the values allowed, empty if any is; file: the
    value names a file or a folder; group: the heading it stands under, empty for the usual ones.
    """

    flags: tuple[str, ...]
    value: str
    help: str
    required: bool
    choices: tuple[str, ...]
    file: bool
    group: str

    @property
    def synopsis(self) -> str:
        """As it stands in a usage line."""
        plain = " ".join(part for part in (self.flags[0] if self.flags else "", self.value) if part)
        return plain if self.required else f"[{plain}]"


@dataclass(frozen=True, slots=True)
class CommandLine:
    """One command, or the program itself (`words` is empty then), with what it takes and the commands below it."""

    words: tuple[str, ...]
    summary: str
    description: str
    examples: tuple[str, ...]
    arguments: tuple[Argument, ...]
    below: tuple[CommandLine, ...]

    def walk(self) -> Iterator[CommandLine]:
        """This and everything below it, from the top down."""
        yield self
        for command in self.below:
            yield from command.walk()


def command_line(parser: argparse.ArgumentParser, words: tuple[str, ...] = (), summary: str = "") -> CommandLine:
    """What `parser` accepts. Options without a help text are hidden, as they are in `--help`."""
    arguments: list[Argument] = []
    below: list[CommandLine] = []
    usual = ("positional arguments", "options")
    for group in parser._action_groups:
        title = "" if group.title in usual else group.title or ""
        for action in group._group_actions:
            if isinstance(action, argparse._SubParsersAction):
                helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
                # An alias of a command is a further name of the same parser, without a help text of its own.
                below += [command_line(action.choices[name], (*words, name), text) for name, text in helps.items()]
            elif action.help != argparse.SUPPRESS:
                arguments.append(_argument(parser, action, title))
    epilog = parser.epilog or ""
    examples = epilog.removeprefix(_EXAMPLES).splitlines() if epilog.startswith(_EXAMPLES) else []
    return CommandLine(
        words,
        summary,
        parser.description or "",
        tuple(line.strip() for line in examples if line.strip()),
        tuple(arguments),
        tuple(below),
    )


def _argument(parser: argparse.ArgumentParser, action: argparse.Action, group: str) -> Argument:
    formatter = parser._get_formatter()
    choices = tuple(str(choice) for choice in action.choices or ())
    value = ""
    if action.nargs != 0:
        metavar = action.metavar[0] if isinstance(action.metavar, tuple) else action.metavar
        unnamed = action.dest.upper() if action.option_strings else action.dest
        value = metavar or "|".join(choices) or unnamed
    return Argument(
        flags=tuple(sorted(action.option_strings, key=len, reverse=True)),
        value=value,
        help=formatter._expand_help(action) if action.help else "",
        required=action.required,
        choices=choices,
        file=action.type is Path or value in ("FILE", "FOLDER", "DIR", "PATH"),
        group=group,
    )
