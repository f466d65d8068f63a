"""`setup`: the configuration and the systemd drop-in for a database, and which permissions are missing."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harmonylite.cli import permissions
from harmonylite.cli.command import OVERRIDES, Command, Failure, print_line, warn
from harmonylite.cli.permissions import ACCOUNT, Account, Group, Missing
from harmonylite.cli.toml_edit import EditRefused, parse, with_values
from harmonylite.config import ConfigError, identity
from harmonylite.config.document import example
from harmonylite.config.load import load
from harmonylite.config.model import KEYS

CONFIG_DIRECTORY = identity.CONFIG_DIRECTORY
UNIT_DIRECTORY = Path("/etc/systemd/system")
STATE_DIRECTORY = Path("/var/lib/harmonylite")

# What may stand in a file's, a unit instance's (systemd.unit(5)) and a stream's name without escaping.
_INSTANCE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
# The names that two databases on one NATS must not share. An instance's are these with its own name at the end.
_SHARED_NAMES = ("nats.subject_prefix", "nats.stream_prefix", "snapshot.nats.bucket")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written for one database. instance: empty for the one that needs no name."""

    database: Path
    instance: str
    group: Group
    daemon: Account

    @property
    def unit(self) -> str:
        return f"harmonylite@{self.instance}.service" if self.instance else "harmonylite.service"

    @property
    def config_file(self) -> Path:
        return CONFIG_DIRECTORY / f"{self.instance or 'config'}.toml"

    @property
    def drop_in_file(self) -> Path:
        return UNIT_DIRECTORY / f"{self.unit}.d" / "database.conf"

    @property
    def store_dir(self) -> Path:
        """Where the bundled server keeps its streams: the service's own place, not the application's."""
        return STATE_DIRECTORY / self.instance


def run(arguments: argparse.Namespace) -> int:
    plan = _plan(arguments)
    text, changes = _configuration(plan, arguments)
    files = ((plan.config_file, text), (plan.drop_in_file, drop_in(plan)))
    for file, content in files:
        _put(file, content, show=arguments.dry_run and file == plan.drop_in_file, dry_run=arguments.dry_run)
    for change in changes:
        _tell("", change)
    if plan.instance:
        _tell("", f"subjects, streams and snapshots are named after {plan.instance}: the same name on every node")
    found = list(permissions.missing(plan.database, plan.daemon, plan.group))
    _report(found, plan)
    mistakes = () if arguments.dry_run else _mistakes(plan.config_file)
    for mistake in mistakes:
        warn(mistake)
    _tell("next", f"systemctl daemon-reload && systemctl enable {plan.unit} && systemctl restart {plan.unit}")
    return 1 if found or mistakes else 0


def _plan(arguments: argparse.Namespace) -> Plan:
    if hasattr(arguments, "config"):
        raise Failure(
            "setup writes /etc/harmonylite/config.toml, or NAME.toml with --instance NAME; leave out --config"
        )
    instance = arguments.instance or ""
    if instance and not _INSTANCE.fullmatch(instance):
        raise Failure(f"--instance {instance}: use letters, digits, _ and -")
    if instance == "config":
        raise Failure("--instance config: config.toml is the configuration of harmonylite.service; choose another name")
    try:
        database = Path(os.path.realpath(arguments.db.expanduser()))
    except RuntimeError:
        raise Failure(f"--db {arguments.db}: there is no such user; correct --db") from None
    if database.is_dir():
        raise Failure(f"{database} is a directory: name the database file in it")
    if not database.parent.is_dir():
        raise Failure(f"{database.parent}: there is no such directory; create it, or correct --db")
    if permissions.is_below(database, permissions.TEMPORARY):
        raise Failure(f"{database}: the service has a temporary directory of its own and loses it; move the database")
    daemon = permissions.account(ACCOUNT)
    if daemon is None:
        raise Failure(f"there is no user {ACCOUNT}; the package creates it: apt install --reinstall harmonylite")
    group = permissions.group_of(database, daemon)
    if arguments.group:
        named = permissions.named_group(arguments.group)
        if named is None:
            raise Failure(f"--group {arguments.group}: there is no such group; create it with groupadd")
        group = named
    if group.gid == 0:
        raise Failure("root's group would give the service far more than a database; name another with --group")
    daemon = Account(daemon.name, daemon.uid, daemon.gid, daemon.gids | {group.gid})
    return Plan(database, instance, group, daemon)


def _configuration(plan: Plan, arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """The text of the configuration, and a line for each value that it replaces."""
    file = plan.config_file
    exists = file.exists()
    try:
        before = file.read_bytes().decode("utf-8-sig") if exists else example()
        data = parse(before) if exists else {}
    except OSError as error:
        raise Failure(f"{file} cannot be read: {error.strerror}; run setup as root") from None
    except ValueError as error:
        raise Failure(f"{file} is not valid TOML: {error}; correct it first") from None
    values = _values(plan, data, arguments)
    try:
        text = with_values(before, values)
    except EditRefused as error:
        raise Failure(f"{file} {error}") from None
    return text, list(_replaced(data, values))


def _values(plan: Plan, data: dict[str, object], arguments: argparse.Namespace) -> dict[str, str]:
    """Dotted key -> value in TOML's notation, of everything that setup sets."""
    try:
        str(plan.database).encode()
    except UnicodeEncodeError:
        raise Failure(f"{plan.database}: the path is not UTF-8 text, which the configuration must be") from None
    values = {"db_path": _literal(str(plan.database))}
    # A store that is in use, or that somebody chose, stays where it is.
    if _at(data, "nats.store_dir") is None and not (plan.database.parent / "nats").exists():
        values["nats.store_dir"] = _literal(str(plan.store_dir))
    if plan.instance:
        for key in _SHARED_NAMES:
            if _at(data, key) is None:
                values[key] = _literal(f"{KEYS[key].default}-{plan.instance}")
        # What `run` would take; written down, it stays when the database or the file gets another name.
        if _at(data, "node_id") is None:
            with contextlib.suppress(ValueError):  # no machine id: `run` says that node_id must be set
                values["node_id"] = str(identity.choose(identity.read_machine_id(), plan.instance, plan.database))
    for flag, key in OVERRIDES.items():
        if hasattr(arguments, flag):
            given = getattr(arguments, flag)
            listed = key in ("nats.cluster_peers", "nats.leaf_servers")
            values[key] = _literal([item for item in given.split(",") if item] if listed else given)
    return values


def _replaced(data: dict[str, object], values: dict[str, str]) -> Iterator[str]:
    for key, value in values.items():
        old = _at(data, key)
        if old is not None and _literal(old) != value:
            yield f"{key} was {_literal(old)}, is now {value}"


def _at(data: dict[str, object], key: str) -> object:
    value: object = data
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _literal(value: object) -> str:
    """TOML's notation; that of JSON for texts, numbers and lists of them, but for DEL (https://toml.io, Strings)."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def drop_in(plan: Plan) -> str:
    """What the unit needs beyond what the package gives it: the database's directory and group."""
    folder = _unit_path(plan.database.parent)
    lines = ["# Made by `harmonylite setup`: run it again when the database moves."]
    if plan.database.parent.stat().st_dev != Path("/").stat().st_dev:
        lines += ["[Unit]", f"RequiresMountsFor={folder}"]
    lines += ["[Service]"]
    if permissions.is_below(plan.database, permissions.HOMES):
        # Nothing of the homes but this directory, whatever the modes of those above it.
        lines += ["ProtectHome=tmpfs", f"BindPaths={folder}"]
    lines += [f"ReadWritePaths={folder}"]
    if plan.group.gid != plan.daemon.gid:
        lines += [f"SupplementaryGroups={plan.group.name}"]
    return "\n".join(lines) + "\n"


def _unit_path(path: Path) -> str:
    """A path as systemd reads it in a list: quoted (systemd.syntax(7)), % doubled (systemd.unit(5), Specifiers)."""
    text = str(path)
    if any(ord(letter) < 32 for letter in text):
        raise Failure(f"{path}: systemd cannot name a directory with control characters; move the database")
    if ":" in text and permissions.is_below(path, permissions.HOMES):
        raise Failure(f"{path}: systemd cannot show the service a directory with a colon; move the database")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return escaped if re.fullmatch(r"[\w/.@+,-]+", escaped) else f'"{escaped}"'


def _put(file: Path, content: str, *, show: bool, dry_run: bool) -> None:
    """Write a file and say so; nothing when it already says this."""
    old = _present(file)
    if old == content:
        _tell("as it was", str(file))
    elif dry_run:
        _tell("would change" if old is not None else "would write", str(file))
    else:
        try:
            _write(file, content)
        except OSError as error:
            raise Failure(f"{error.filename or file} cannot be written: {error.strerror}; run setup as root") from None
        _tell("changed" if old is not None else "wrote", str(file))
    if show:
        for line in content.splitlines():
            _tell("", line)


def _present(file: Path) -> str | None:
    """What stands in a file, None if there is no such file."""
    try:
        return file.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Failure(f"{file} cannot be read: {error.strerror}; run setup as root") from None


def _write(file: Path, content: str) -> None:
    """All or nothing, with the mode and owner that the file had."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as temporary:
            temporary.write(content)
            temporary.flush()
            if file.exists():
                state = file.stat()
                os.fchmod(temporary.fileno(), state.st_mode & 0o7777)
                os.fchown(temporary.fileno(), state.st_uid, state.st_gid)
            else:
                os.fchmod(temporary.fileno(), 0o644)
            os.fsync(temporary.fileno())
        Path(name).replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _report(found: list[Missing], plan: Plan) -> None:
    for missing in found:
        _tell("missing", f"{missing.path}: {missing.text}")
        for command in missing.commands:
            _tell("", command)
    if not found:
        _tell("ok", f"{plan.daemon.name} may use {plan.database}, and shares it through the group {plan.group.name}")


def _mistakes(file: Path) -> tuple[str, ...]:
    try:
        load(file)
    except ConfigError as error:
        return tuple(str(problem) for problem in error.problems)
    return ()


def _tell(what: str, text: str) -> None:
    """A line whose first column says what the second is about."""
    print_line(f"{what:<13}{text}")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--db", type=Path, metavar="PATH", required=True, help="the application's SQLite database")
    parser.add_argument(
        "--instance", metavar="NAME", help="for harmonylite@NAME.service, a further database on this machine"
    )
    parser.add_argument(
        "--group", metavar="GROUP", help="what the application and the service share; else the directory's group"
    )
    parser.add_argument("--dry-run", action="store_true", help="write nothing, say what would be written")


COMMAND = Command(
    name="setup",
    summary="write configuration and systemd drop-in for a database, and say which permissions are missing",
    description=(
        "Write /etc/harmonylite/config.toml and a drop-in for harmonylite.service, so that the service may use the\n"
        "database where the application keeps it. What the configuration says otherwise stays. Then name every\n"
        "permission that is missing, with the commands that give it; nothing of the application is changed.\n"
        "Exit code 1 when something is missing."
    ),
    examples=(
        "harmonylite setup --db /var/lib/myapp/app.db",
        "harmonylite setup --db /home/pi/app/app.db --leaf-servers nats-leaf://hub:7422",
        "harmonylite setup --db /srv/shop/shop.db --instance shop --group shop --dry-run",
    ),
    add_arguments=_add_arguments,
    run=run,
)
