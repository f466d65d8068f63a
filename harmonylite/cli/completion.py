"""Completion for bash, made from the argument parser.

`python -m harmonylite.cli.completion` prints it; packages install that as
/usr/share/bash-completion/completions/harmonylite.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable

from harmonylite.cli.arguments import Argument, CommandLine, command_line
from harmonylite.cli.main import build_parser

# COMP_WORDBREAKS holds "=": `--config=x` arrives as three words. A value may be named as a command is, so the words
# after options with values are passed over when the command is looked for.
_TEMPLATE = """\
# Completion for harmonylite. Made by python -m harmonylite.cli.completion.
_harmonylite() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}} command= word words= i
    if [[ $current == "=" ]]; then
        current=
    elif [[ $previous == "=" ]] && ((COMP_CWORD > 1)); then
        previous=${{COMP_WORDS[COMP_CWORD - 2]}}
    fi
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${{COMP_WORDS[i]}}
        case $word in
            {valued})
                [[ ${{COMP_WORDS[i + 1]}} == "=" ]] && ((i++))
                ((i++))
                continue
                ;;
        esac
        case "$command $word" in
{commands}
        esac
    done
    case $previous in
{values}
    esac
    case $command in
{words}
    esac
    if [[ $current != -* ]]; then
        case $command in
{files}
        esac
    fi
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}}
complete -F _harmonylite harmonylite
"""
_FILES = """\
compopt -o filenames 2>/dev/null
                mapfile -t COMPREPLY < <(compgen -f -- "$current")
                return"""


def script() -> str:
    """The completion script."""
    top = command_line(build_parser())
    commands = list(top.walk())
    options = _valued(commands)
    return _TEMPLATE.format(
        valued=" | ".join(sorted(options)),
        commands=_cases("            ", ((_path(command), f'command="{_path(command)}"') for command in commands[1:])),
        values=_cases("        ", ((flag, _value(option)) for flag, option in sorted(options.items()))),
        words=_cases(
            "        ",
            ((_path(command), f"words={shlex.quote(' '.join(_words(command)))}") for command in commands),
        ),
        files=_cases(
            "            ",
            ((_path(command), _FILES) for command in commands if any(map(_takes_file, command.arguments))),
        )
        or "            *) ;;",
    )


def _path(command: CommandLine) -> str:
    """How the script names a command: each word after a space."""
    return "".join(f" {word}" for word in command.words)


def _takes_file(argument: Argument) -> bool:
    return not argument.flags and argument.file


def _words(command: CommandLine) -> list[str]:
    """What may stand behind a command: the commands below it, its options, its fixed values."""
    found = [below.words[-1] for below in command.below]
    for argument in command.arguments:
        found += argument.flags or argument.choices
    return found


def _valued(commands: Iterable[CommandLine]) -> dict[str, Argument]:
    """Options that take a value. An option means the same wherever it stands, or this raises ValueError."""
    found: dict[str, Argument] = {}
    for command in commands:
        for argument in command.arguments:
            for flag in argument.flags if argument.value else ():
                known = found.setdefault(flag, argument)
                if (known.file, known.choices) != (argument.file, argument.choices):
                    raise ValueError(f"{flag} takes one kind of value here and another there")
    return found


def _value(option: Argument) -> str:
    if option.file:
        return _FILES
    if option.choices:
        return f'mapfile -t COMPREPLY < <(compgen -W {shlex.quote(" ".join(option.choices))} -- "$current"); return'
    return "return"


def _cases(indent: str, cases: Iterable[tuple[str, str]]) -> str:
    quote: Callable[[str], str] = shlex.quote
    return "\n".join(f"{indent}{quote(pattern)}) {action} ;;" for pattern, action in cases)


if __name__ == "__main__":
    sys.stdout.write(script())
