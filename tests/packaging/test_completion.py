"""Completion in bash offers what the parser accepts, everywhere."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harmonylite.cli import completion
from harmonylite.cli.arguments import command_line
from harmonylite.cli.main import build_parser

Parsers = Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]


def parsers(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Parsers:
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from parsers(below, (*words, name))


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "harmonylite"
    file.write_text(completion.script())
    return file


def complete(script: Path, *words: str, folder: Path | None = None) -> set[str]:
    """What bash offers for the last of `words`, split as bash splits a command line (at "=" too)."""
    program = """
        source "$1"; shift
        COMP_WORDS=(harmonylite "$@"); COMP_CWORD=$#
        _harmonylite && printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-u", "-c", program, "bash", str(script), *words],
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_every_parser_is_known_to_the_generators() -> None:
    known = {command.words for command in command_line(build_parser()).walk()}
    assert known == {words for words, _ in parsers(build_parser())}


@pytest.mark.parametrize(("words", "parser"), list(parsers(build_parser())), ids=lambda value: str(value)[:40])
def test_every_command_and_option_is_offered(
    script: Path, words: tuple[str, ...], parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    expected: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            expected |= set(action.choices)
        elif action.help != argparse.SUPPRESS:
            expected |= set(action.option_strings)
    options = {word for word in expected if word.startswith("-")}
    assert complete(script, *words, "-", folder=tmp_path) == options
    assert complete(script, *words, "--", folder=tmp_path) == {word for word in options if word.startswith("--")}
    for command in expected - options:
        assert command in complete(script, *words, command[:2], folder=tmp_path)


def test_files_are_offered_where_a_file_is_wanted(script: Path, tmp_path: Path) -> None:
    (tmp_path / "node2.toml").touch()
    for words in (("--config", "no"), ("run", "--config", "no"), ("run", "--config", "=", "no")):
        assert complete(script, *words, folder=tmp_path) == {"node2.toml"}
    assert complete(script, "--config", "=", folder=tmp_path) == {"node2.toml"}


def test_a_value_is_not_taken_for_a_command(script: Path) -> None:
    assert complete(script, "--config", "status", "cle") == {"cleanup"}
    assert complete(script, "--config", "=", "status", "cle") == {"cleanup"}
    assert "--force" in complete(script, "--node-id", "7", "cleanup", "--f")


def test_nothing_is_offered_for_a_value_that_only_the_user_knows(script: Path) -> None:
    assert complete(script, "run", "--node-id", "") == set()
