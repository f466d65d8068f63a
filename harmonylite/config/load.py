"""From a TOML file and the command line to a `Config`. All mistakes are found in one go, by key and line."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from harmonylite.config import identity
from harmonylite.config.consistency import contradictions, folders, remarks
from harmonylite.config.locate import lines_of_keys
from harmonylite.config.model import KEYS, TABLES, Config, Key, Problem
from harmonylite.config.rules import is_credential
from harmonylite.config.values import Secret

# Python 3.10 has no tomllib; tomli is the same module under its older name.
_toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

SEARCHED = (Path("/etc/harmonylite/config.toml"), Path("config.toml"))

# What the Go implementation's file may hold and what means nothing here.
_IGNORED_KEYS = {"seq_map_path": "is not needed: the position in the stream is kept in the database itself"}
_IGNORED_TABLES = {
    "snapshot.webdav": 'has no effect: snapshots go to "nats", "s3" or "file"',
    "snapshot.sftp": 'has no effect: snapshots go to "nats", "s3" or "file"',
}


class ConfigError(Exception):
    """The configuration has mistakes; `problems` lists all of them, `str()` is one line for each."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


def find(path: Path | None = None) -> Path:
    """The file to use: `path`, else the first of `SEARCHED` that exists; raises ConfigError if none does."""
    if path is not None:
        return path
    for candidate in SEARCHED:
        if candidate.exists():
            return candidate
    looked = " and ".join(str(candidate) for candidate in SEARCHED)
    raise ConfigError((Problem("", f"no configuration found (looked for {looked}); name one with --config FILE"),))


def load(path: Path | None, overrides: Mapping[str, object] | None = None) -> Config:
    """Read and check a configuration; raises ConfigError.

    path: the TOML file; None: everything comes from `overrides`, which maps dotted keys to values as the file
    would hold them and wins over the file.
    """
    reader = _Reader(path)
    if path is not None:
        reader.take_table(reader.parse(path), "")
    reader.take_overrides(overrides or {})
    return reader.result()


def remarks_here(config: Config) -> tuple[Problem, ...]:
    """What this machine lacks of the folders that a configuration names, as this user sees it. Raises ConfigError if
    its file cannot be read any more."""
    reader = _Reader(config.file)
    if config.file is not None:
        reader.parse(config.file)
    return tuple(reader.at(dotted, message) for dotted, message in folders(config))


class _Reader:
    """One run of `load`: the values accepted so far, and what was wrong with the others."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._lines: dict[str, int] = {}
        self._values: dict[str, Any] = {}
        self._problems: list[Problem] = []
        self._notes: list[Problem] = []

    def parse(self, file: Path) -> dict[str, Any]:
        try:
            # Editors on Windows put a byte order mark in front, which TOML does not allow.
            text = file.read_bytes().decode("utf-8-sig")
            data = cast(dict[str, Any], _toml.loads(text))
        except OSError as error:
            raise ConfigError((Problem("", f"cannot be read: {error.strerror}", file),)) from None
        except UnicodeDecodeError as error:
            raise ConfigError((Problem("", f"is not UTF-8 text (byte {error.start})", file),)) from None
        except ValueError as error:  # TOMLDecodeError
            place = re.search(r"\s*\(at (?:line (\d+), column \d+|end of document)\)", str(error))
            message = str(error).replace(place[0], "") if place else str(error)
            line = int(place[1]) if place and place[1] else None
            raise ConfigError((Problem("", f"is not valid TOML: {message}", file, line),)) from None
        self._lines = lines_of_keys(text)
        return data

    def take_table(self, data: Mapping[str, Any], table: str) -> None:
        for name, value in data.items():
            dotted = f"{table}.{name}" if table else name
            if dotted in TABLES:
                if isinstance(value, dict):
                    self.take_table(value, dotted)
                else:
                    self._problem(dotted, f"must be a table: [{dotted}]")
            elif dotted in KEYS:
                self._take_value(KEYS[dotted], value, self._file)
            elif dotted in _IGNORED_KEYS:
                self._notes.append(self.at(dotted, _IGNORED_KEYS[dotted]))
            elif dotted in _IGNORED_TABLES:
                self._notes.append(self.at(dotted, _IGNORED_TABLES[dotted]))
            else:
                self._problem(dotted, _unknown(dotted))

    def take_overrides(self, overrides: Mapping[str, object]) -> None:
        for dotted, value in overrides.items():
            if dotted in KEYS:
                self._take_value(KEYS[dotted], value, None)
            else:
                self._problems.append(Problem(dotted, _unknown(dotted)))

    def _take_value(self, key: Key, value: object, file: Path | None) -> None:
        try:
            self._values[key.name] = key.rule.read(value)
        except ValueError as error:
            if file is None:
                self._problems.append(Problem(key.name, f"{error} (on the command line)"))
            else:
                self._problem(key.name, str(error))

    def result(self) -> Config:
        self._read_secrets()
        from_machine = self._choose_node_id()
        if "db_path" not in self._values and not self._is_wrong("db_path"):
            self._problem("db_path", "is not set: it names the application's SQLite file")
        config = cast(Config, self._build(Config, ""))
        for dotted, message in contradictions(config):
            if not self._is_wrong(dotted):
                self._problem(dotted, message)
        if self._problems:
            self._problems.sort(key=lambda problem: problem.line or 0)
            raise ConfigError(tuple(self._problems))
        self._notes += [self.at(dotted, message) for dotted, message in remarks(config)]
        return dataclasses.replace(config, file=self._file, notes=tuple(self._notes), node_id_from_machine=from_machine)

    def _read_secrets(self) -> None:
        """A secret stands in its key, else in the file that KEY_file names, else in a systemd credential."""
        for key in KEYS.values():
            if key.rule.secret:
                named = self._values.get(f"{key.name}_file", "")
                if not self._values.get(key.name):
                    self._read_secret(key, named)
                elif named:
                    self._problem(key.name, f"and {key.name}_file are both set: keep one")

    def _read_secret(self, key: Key, named: str) -> None:
        source = Path(named) if named else _credential_file(key.credential)
        if source is None or is_credential(named):
            return
        try:
            secret = source.read_text("utf-8").rstrip("\r\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            self._problem(f"{key.name}_file", f"names {source}, which cannot be read: {reason}")
            return
        if not secret:
            self._problem(f"{key.name}_file", f"names {source}, which is empty")
        self._values[key.name] = Secret(secret)

    def _choose_node_id(self) -> bool:
        """Is the node id made from the machine's? If none is set, that is where it comes from."""
        if "node_id" in self._values or self._is_wrong("node_id"):
            return False
        try:
            instance, database = identity.instance_of(self._file), self._values.get("db_path", Path())
            self._values["node_id"] = identity.choose(identity.read_machine_id(), instance, database)
        except ValueError as error:
            self._problem("node_id", str(error))
        return True

    def _build(self, kind: type[Any], table: str) -> object:
        prefix = f"{table}." if table else ""
        given: dict[str, Any] = {}
        for field in dataclasses.fields(kind):
            dotted = prefix + field.name
            if dotted in TABLES:
                given[field.name] = self._build(TABLES[dotted].kind, dotted)
            elif dotted in self._values:
                given[field.name] = self._values[dotted]
        return kind(**given)

    def _is_wrong(self, dotted: str) -> bool:
        return any(problem.key == dotted for problem in self._problems)

    def _problem(self, dotted: str, message: str) -> None:
        self._problems.append(self.at(dotted, message))

    def at(self, dotted: str, message: str) -> Problem:
        """With the line of the key, or of the nearest table around it that the file names."""
        line = next((self._lines[name] for name in _itself_and_above(dotted) if name in self._lines), None)
        return Problem(dotted, message, self._file, line)


def _itself_and_above(dotted: str) -> Iterator[str]:
    while dotted:
        yield dotted
        dotted = dotted.rpartition(".")[0]


def _credential_file(name: str) -> Path | None:
    """systemd hands credentials (LoadCredential=) to a service as files of one directory."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    file = Path(folder, name) if folder and name else None
    return file if file is not None and file.exists() else None


def _unknown(dotted: str) -> str:
    """Why a key is not known: it stands in the wrong table, or is spelled wrong."""
    table, _, name = dotted.rpartition(".")
    homes = [key.table for key in KEYS.values() if key.short_name == name]
    if homes:
        places = " or ".join(
            f"in [{home}]" if home else "at the top of the file, before the first [table]" for home in homes
        )
        return f"is not a key; {name} belongs {places}"
    siblings = [known for known in (*KEYS, *TABLES) if known and known.rpartition(".")[0] == table]
    near = difflib.get_close_matches(dotted.lower(), siblings, 1, 0.7) or difflib.get_close_matches(
        dotted.lower(), [*KEYS, *filter(None, TABLES)], 1, 0.75
    )
    return f"is not a key; did you mean {near[0]}?" if near else "is not a key"
