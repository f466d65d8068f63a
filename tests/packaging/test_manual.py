"""The man pages name every command, option and key, and are correct man(7)."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from harmonylite import __version__
from harmonylite.cli import manual
from harmonylite.cli.arguments import command_line
from harmonylite.cli.legacy import COMMAND_FLAGS, VALUE_FLAGS
from harmonylite.cli.main import COMMANDS, build_parser
from harmonylite.config.model import KEYS, TABLES

PAGES = manual.pages()


def plain(page: str) -> str:
    """A page's text without its notation, one line per line of the source."""
    text = re.sub(r"\\f[BRI]", "", page).replace(r"\-", "-").replace(r"\&", "").replace(r"\e", "\\")
    return text.replace(r"\(aq", "'").replace(r"\(ga", "`").replace(r"\(ti", "~").replace(r"\(ha", "^")


def test_every_command_has_a_page_and_is_listed() -> None:
    assert set(PAGES) == {"harmonylite.1", "harmonylite-config.5"} | {f"harmonylite-{c.name}.1" for c in COMMANDS}
    listed = plain(PAGES["harmonylite.1"])
    for command in COMMANDS:
        assert f"harmonylite-{command.name}(1)" in listed


def test_every_option_of_every_command_is_on_its_page() -> None:
    for command in command_line(build_parser()).walk():
        page = plain(PAGES[f"harmonylite-{command.words[0]}.1" if command.words else "harmonylite.1"])
        for argument in command.arguments:
            term = " ".join(part for part in (", ".join(argument.flags), argument.value) if part)
            assert f".TP\n{term}\n" in page, (command.words, term)
        for line in command.examples:
            assert f"\n{line}\n" in page, (command.words, line)


def test_the_flags_of_the_go_implementation_are_named() -> None:
    page = plain(PAGES["harmonylite.1"])
    for flag in (*VALUE_FLAGS, *COMMAND_FLAGS):
        assert re.search(rf"^-{flag}( VALUE)?$", page, re.MULTILINE), flag


def test_hidden_options_stay_hidden() -> None:
    parser = argparse.ArgumentParser(prog="x")
    parser.add_argument("--secret", help=argparse.SUPPRESS)
    assert [argument.flags for argument in command_line(parser).arguments] == [("--help", "-h")]


def test_every_key_stands_under_its_table_with_its_rule() -> None:
    page = plain(PAGES["harmonylite-config.5"]).partition(".SH KEYS\n")[2].partition("\n.SH ")[0]
    for table in TABLES.values():
        title = f"[{table.name}]" if table.name else "Top of the file"
        section = page.partition(f".SS {title}\n")[2].partition("\n.SS ")[0]
        keys = [key for key in KEYS.values() if key.table == table.name]
        assert re.findall(r"^\.TP\n(\w+)$", section, re.MULTILINE) == [key.short_name for key in keys], title
        for key in keys:
            assert f"Allowed: {key.rule.says}." in section, key.name


def test_every_credential_is_named() -> None:
    page = plain(PAGES["harmonylite-config.5"])
    for key in KEYS.values():
        assert not key.credential or f".TP\n{key.credential}\n{key.name}." in page


def test_the_pages_are_the_version_s() -> None:
    assert all(f'"HarmonyLite {__version__}"' in text for text in PAGES.values())


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
def test_mandoc_finds_no_mistake(tmp_path: Path) -> None:
    manual.main(tmp_path)
    files = [str(file) for file in sorted(tmp_path.iterdir())]
    assert len(files) == len(PAGES)
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", *files], capture_output=True, text=True)
    # Pages without a date are the same in every build.
    found = [line for line in done.stdout.splitlines() if "missing date" not in line]
    assert found == []
