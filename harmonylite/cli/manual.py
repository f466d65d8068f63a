"""The man pages, made from the argument parser and from the configuration's keys, so that they stay true.

`python -m harmonylite.cli.manual FOLDER` writes them: harmonylite(1), one page per command, harmonylite-config(5).
The notation is man(7)'s.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from harmonylite import __version__
from harmonylite.cli.arguments import Argument, CommandLine, command_line
from harmonylite.cli.legacy import COMMAND_FLAGS, VALUE_FLAGS
from harmonylite.cli.main import build_parser
from harmonylite.config.describe import toml_value
from harmonylite.config.model import KEYS, TABLES, Key

_ABOUT = """\
HarmonyLite runs beside an application that keeps its data in a SQLite database. It logs the application's changes by \
triggers, publishes them through NATS JetStream and applies what other nodes have published, so that every copy of \
the database converges. Any node may write, and any may be offline for weeks. Of two concurrent writes to one row \
the later one wins; the other one is kept in a conflict log.

The configuration file names the database; see harmonylite-config(5). Options may stand before or after the command."""

_FILES = (
    ("/etc/harmonylite/config.toml", "the configuration, where --config names no other file"),
    ("/etc/harmonylite/NAME.toml", "the configuration of the service harmonylite@NAME"),
    ("/var/lib/harmonylite", "where the packaged configuration lets the bundled nats-server keep its streams"),
    ("/usr/lib/harmonylite/nats-server", "the bundled nats-server; else one on PATH"),
)
_SERVICES = """\
harmonylite.service runs the daemon for /etc/harmonylite/config.toml, harmonylite@NAME.service for \
/etc/harmonylite/NAME.toml. Both run as the user harmonylite and may write nowhere but in /var/lib/harmonylite: the \
folder of the database has to be allowed in a drop-in, and its group with it. harmonylite setup writes one, such as:"""
_DROP_IN = ("[Service]", "ReadWritePaths=/var/lib/myapp", "SupplementaryGroups=myapp")
_ENVIRONMENT = (
    ("HARMONYLITE_DEBUG", "with the value 1, an unexpected error shows where it happened"),
    ("HARMONYLITE_BOOT_ID", "what tells this boot from others, where /proc/sys is hidden; the services set it to %b"),
    ("CREDENTIALS_DIRECTORY", "where systemd puts credentials (LoadCredential=); see harmonylite-config(5)"),
    ("GOMEMLIMIT", "the nats-server's soft memory limit, in place of the one that HarmonyLite chooses"),
)
_EXIT = (
    ("0", "success"),
    ("1", "failure; one line on standard error says what, where and what to do"),
    ("2", "wrong usage or a wrong configuration"),
)
_CONFIG_ABOUT = """\
HarmonyLite reads one TOML file: the one that --config names, else /etc/harmonylite/config.toml, else config.toml in \
the working directory. Only db_path must be set. harmonylite check-config names every mistake by key and line, and \
prints what is in force. Relative paths start at the working directory of the process.

A size is a number of bytes, or a text with KB, MB, GB or TB behind it; these are powers of 1024."""
_CREDENTIALS = """\
A secret may stand in its key, in a file that the key with _file behind its name points to, or in a systemd \
credential; the first that is found counts. Paths may begin with ${CREDENTIALS_DIRECTORY}. Secrets are never printed \
or logged. The credentials are:"""
_SMALLEST = ('db_path = "/var/lib/myapp/app.db"', "", "[nats]", 'leaf_servers = ["nats-leaf://hub:7422"]')


def pages() -> dict[str, str]:
    """File name -> text of each man page."""
    top = command_line(build_parser())
    found = {"harmonylite.1": _program(top), "harmonylite-config.5": _configuration()}
    for command in top.below:
        found[f"harmonylite-{command.words[0]}.1"] = _command(command)
    return found


# -- pages


def _program(top: CommandLine) -> str:
    lines = [*_title("harmonylite", 1, top.description.rstrip("."))]
    lines += [".SH SYNOPSIS", rf"\fBharmonylite\fR \fICOMMAND\fR {_text('[options]')}"]
    lines += [".SH DESCRIPTION", *_paragraphs(_ABOUT), ".SH COMMANDS"]
    for command in top.below:
        lines += [".TP", rf"\fBharmonylite\-{_text(command.words[0])}\fR(1)", _text(_sentence(command.summary))]
    lines += [*_options(top.arguments), *_flags_of_go()]
    lines += [".SH SERVICES", *_paragraphs(_SERVICES), *_verbatim(_DROP_IN)]
    lines += [".SH FILES", *_definitions(_FILES), ".SH ENVIRONMENT", *_definitions(_ENVIRONMENT)]
    lines += [".SH EXIT STATUS", *_definitions(_EXIT), *_examples(top.examples)]
    lines += _see_also([f"harmonylite-{command.words[0]}(1)" for command in top.below] + ["harmonylite-config(5)"])
    return _joined(lines)


def _command(command: CommandLine) -> str:
    name = f"harmonylite-{command.words[0]}"
    lines = [*_title(name, 1, command.summary), ".SH SYNOPSIS"]
    parts = [part for part in command.walk() if not part.below]
    lines += [line for part in parts for line in (_synopsis(part), ".br")][:-1]
    lines += [".SH DESCRIPTION", *_paragraphs(command.description)]
    if command.below:
        lines.append(".SH SUBCOMMANDS")
    for part in command.walk():
        if part is not command:
            own = [argument for argument in part.arguments if argument not in command.arguments]
            lines += [f".SS {_text(' '.join(part.words))}", *_paragraphs(part.description), *_arguments(own)]
    lines += _options(command.arguments)
    lines += _examples([example for part in command.walk() for example in part.examples])
    return _joined([*lines, *_see_also(["harmonylite(1)", "harmonylite-config(5)"])])


def _configuration() -> str:
    lines = [*_title("harmonylite-config", 5, "the configuration file of HarmonyLite")]
    lines += [".SH SYNOPSIS", _text("/etc/harmonylite/config.toml")]
    lines += [".SH DESCRIPTION", *_paragraphs(_CONFIG_ABOUT), ".SH KEYS"]
    for table in TABLES.values():
        lines += [f".SS {_text(f'[{table.name}]' if table.name else 'Top of the file')}", _text(table.doc)]
        for key in KEYS.values():
            if key.table == table.name:
                lines += [".TP", rf"\fB{_text(key.short_name)}\fR", *_about(key)]
    secrets = [(key.credential, key.name) for key in KEYS.values() if key.credential]
    lines += [".SH SECRETS", *_paragraphs(_CREDENTIALS), *_definitions(secrets)]
    lines += [".SH EXAMPLE", "A device behind a hub:", *_verbatim(_SMALLEST)]
    lines += [".SH FILES", *_definitions(_FILES[:2])]
    return _joined([*lines, *_see_also(["harmonylite(1)", "harmonylite-check-config(1)", "harmonylite-doctor(1)"])])


def _about(key: Key) -> Iterator[str]:
    yield _text(_sentence(key.doc))
    default = toml_value(key.rule.show(key.default) if key.rule.show else key.default)
    required = key.name == "db_path"
    facts = [f"Allowed: {key.rule.says}."]
    facts.append("It must be set." if required else "" if key.name == "node_id" else f"Default: {default}.")
    if key.example:
        facts.append(f"Example: {toml_value(key.example) if required else key.example}")
    yield ".br"
    yield _text(" ".join(fact for fact in facts if fact))


# -- parts of pages


def _title(name: str, section: int, summary: str) -> Iterator[str]:
    """No date: it would differ from build to build."""
    yield f'.TH {name.upper()} {section} "" "HarmonyLite {__version__}" "HarmonyLite manual"'
    yield ".SH NAME"
    yield rf"{_text(name)} \- {_text(summary)}"


def _synopsis(command: CommandLine) -> str:
    words = _text(" ".join(("harmonylite", *command.words)))
    own = [argument.synopsis for argument in command.arguments if not argument.group and "--help" not in argument.flags]
    return rf"\fB{words}\fR {_text(' '.join(own))}".rstrip()


def _options(arguments: Iterable[Argument]) -> Iterator[str]:
    usual = [argument for argument in arguments if not argument.group]
    if usual:
        yield ".SH OPTIONS"
        yield from _arguments(usual)
    for group in dict.fromkeys(argument.group for argument in arguments if argument.group):
        yield f".SS {_text(_sentence(group, end=''))}"
        yield from _arguments(argument for argument in arguments if argument.group == group)


def _arguments(arguments: Iterable[Argument]) -> Iterator[str]:
    for argument in arguments:
        flags = ", ".join(rf"\fB{_text(flag)}\fR" for flag in argument.flags)
        value = rf"\fI{_text(argument.value)}\fR" if argument.value else ""
        yield ".TP"
        yield " ".join(part for part in (flags, value) if part)
        yield _text(_sentence(argument.help)) or r"\&"


def _flags_of_go() -> Iterator[str]:
    yield ".SH FLAGS OF THE GO IMPLEMENTATION"
    yield "They work with one dash or two; without a command, the command is run."
    for flag in VALUE_FLAGS:
        yield from (".TP", rf"\fB\-{_text(flag)}\fR \fIVALUE\fR")
        yield _text("Accepted without effect." if flag == "pprof" else f"The same as --{flag}.")
    for flag, words in COMMAND_FLAGS.items():
        yield from (".TP", rf"\fB\-{_text(flag)}\fR", _text(f"The same as harmonylite {' '.join(words)}."))


def _definitions(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    for term, text in pairs:
        yield from (".TP", rf"\fB{_text(term)}\fR", _text(_sentence(text)))


def _examples(lines: Iterable[str]) -> Iterator[str]:
    if lines := list(lines):
        yield ".SH EXAMPLES"
        yield from _verbatim(lines)


def _verbatim(lines: Iterable[str]) -> Iterator[str]:
    yield from (".RS 4", ".nf", *(_text(line) for line in lines), ".fi", ".RE")


def _see_also(pages: Iterable[str]) -> Iterator[str]:
    yield ".SH SEE ALSO"
    yield ",\n".join(re.sub(r"(.+)(\(\d\))", r"\\fB\1\\fR\2", _text(page)) for page in pages)


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(text.split("\n\n")):
        if number:
            yield ".PP"
        yield _text(" ".join(paragraph.split()))


def _sentence(text: str, end: str = ".") -> str:
    """With a capital, unless it begins with a name such as nats.domain, and a full stop."""
    first = text.split(" ", 1)[0]
    begun = text if re.search(r"[._/]", first) or first.startswith(("nats", "inotify")) else text[:1].upper() + text[1:]
    return begun + end if begun and not begun.endswith((".", end)) else begun


def _text(text: str) -> str:
    """Text in man(7)'s notation: backslashes, hyphens that are copied as such, and no line that is a command."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace("`", r"\(ga")
    escaped = escaped.replace("^", r"\(ha").replace("~", r"\(ti")
    return rf"\&{escaped}" if escaped.startswith(".") else escaped


def _joined(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    """Write every page into `folder`."""
    for name, text in pages().items():
        (folder / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
