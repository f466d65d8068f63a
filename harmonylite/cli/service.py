"""What systemd lets the service do, for `doctor`: what `setup` writes, looked at from the other side."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from harmonylite.cli import permissions, setup
from harmonylite.cli.checks import Check
from harmonylite.cli.permissions import Account
from harmonylite.config import Config

_PROPERTIES = (
    "LoadState",
    "User",
    "SupplementaryGroups",
    "ProtectSystem",
    "ProtectHome",
    "ReadWritePaths",
    "BindPaths",
)
_TIMEOUT_S = 5.0


def checks(config: Config) -> Iterator[Check]:
    """May the unit that reads this configuration use its database? Nothing where there is no such unit."""
    unit = unit_of(config.file)
    shown = show(unit) if unit else {}
    if not unit or shown.get("LoadState") != "loaded":
        return
    again = _setup_command(config)
    daemon = permissions.account(shown.get("User") or "root")
    if daemon is None:
        yield Check("service", "fail", f"{unit} runs as {shown['User']}, whom this machine does not know", again)
        return
    closed = list(_closed(config.db_path.parent, unit, shown))
    for text in closed:
        yield Check("service", "fail", text, again)
    group = permissions.group_of(config.db_path, daemon)
    given = _gids(shown.get("SupplementaryGroups", ""))
    if not closed and daemon.uid != 0 and group.gid not in daemon.gids | given:
        closed.append(f"{unit} is not in the group {group.name}, to which the database belongs")
        yield Check("service", "fail", closed[-1], again)
    if not config.db_path.parent.is_dir():
        return
    daemon = Account(daemon.name, daemon.uid, daemon.gid, daemon.gids | given | {group.gid})
    found = list(permissions.missing(config.db_path, daemon, group))
    for one in found:
        yield Check("permissions", "fail", f"{one.path}: {one.text}", "; ".join(one.commands))
    if not closed and not found:
        yield Check("service", "ok", f"{unit} may use the database, as {daemon.name} and group {group.name}")


def unit_of(file: Path | None) -> str | None:
    """The unit that reads this file, None if it is none that a unit reads."""
    if file is None or file.absolute().parent != setup.CONFIG_DIRECTORY or file.suffix != ".toml":
        return None
    return "harmonylite.service" if file.stem == "config" else f"harmonylite@{file.stem}.service"


def show(unit: str) -> Mapping[str, str]:
    """Properties of a unit as systemd has them in force, by name; none where systemd does not answer."""
    try:
        done = subprocess.run(
            ["systemctl", "show", f"--property={','.join(_PROPERTIES)}", unit],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def _closed(folder: Path, unit: str, shown: Mapping[str, str]) -> Iterator[str]:
    """What of the confinement is in the way, in people's words."""
    bound = _covers(_paths(shown.get("BindPaths", "")), folder)
    hides = shown.get("ProtectHome", "no")
    if permissions.is_below(folder, permissions.HOMES) and hides in ("yes", "tmpfs") and not bound:
        yield f"{unit} does not see {folder} (ProtectHome={hides})"
    elif shown.get("ProtectSystem") == "strict":
        writable = (*_paths(shown.get("ReadWritePaths", "")), setup.STATE_DIRECTORY)
        if not _covers(writable, folder) and not bound:
            yield f"{unit} may not write in {folder} (ProtectSystem=strict, and no ReadWritePaths)"


def _paths(value: str) -> tuple[Path, ...]:
    """A list of paths as `systemctl show` prints it; a bound one as SOURCE:DESTINATION:OPTIONS, a `-` for "if any"."""
    try:
        words = shlex.split(value)
    except ValueError:
        words = value.split()
    # Older versions print no quotes: a path with spaces is also looked for as the value's whole.
    return tuple(Path(word.lstrip("-+").split(":")[0]) for word in (*words, value))


def _covers(paths: tuple[Path, ...], folder: Path) -> bool:
    return any(path.is_absolute() and folder.is_relative_to(path) for path in paths)


def _gids(names: str) -> frozenset[int]:
    groups = (permissions.named_group(name) for name in names.split())
    return frozenset(group.gid for group in groups if group is not None)


def _setup_command(config: Config) -> str:
    command = f"harmonylite setup --db {shlex.quote(str(config.db_path))}"
    if config.file is not None and config.file.stem != "config":
        command += f" --instance {config.file.stem}"
    return command
