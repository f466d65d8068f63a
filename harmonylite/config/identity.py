"""The node id of a machine that was not given one, and those of further databases on it.

`harmonylite@NAME` reads /etc/harmonylite/NAME.toml. Made from the machine alone, the ids of all instances would be one,
and a hub lets the first of them in.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

# machine-id(5): the second is where D-Bus keeps it on systems without systemd.
MACHINE_ID_FILES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
# Where the units look for their configuration: config.toml, and one for each instance.
CONFIG_DIRECTORY = Path("/etc/harmonylite")
# machine-id(5) asks applications to publish only a keyed hash of it.
_SALT, _MACHINE_SALT = b"harmonylite node id\0", b"harmonylite machine\0"


def node_id_of(machine_id: str) -> int:
    """The same positive 63-bit number for the same machine id, never 0."""
    digest = hashlib.sha256(_SALT + machine_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1 or 1


def instance_of(file: Path | None) -> str:
    """The instance whose configuration this is; empty for every other file."""
    if file is None or file.suffix != ".toml" or file.absolute().parent != CONFIG_DIRECTORY:
        return ""
    return "" if file.stem == "config" else file.stem


def choose(machine_id: str, instance: str, database: Path) -> int:
    """The node id for a database. Instances of earlier versions had the machine's own: such a database keeps it. One
    that came from another machine, on a cloned card for instance, has another than this one's and gets a new one."""
    own = node_id_of(machine_id)
    if not instance or _recorded(database) == own:
        return own
    return node_id_of(f"{machine_id}/{instance}")


def _recorded(database: Path) -> int | None:
    """The node id that this database had when a daemon used it last; None if there is none or it cannot be read."""
    from harmonylite.db import inspect  # needs SQLite, which most configurations can be read without

    try:
        return inspect.node_id(database) if database.is_file() else None
    except (OSError, inspect.DatabaseUnreadable):
        return None


def read_machine_id(files: tuple[Path, ...] | None = None) -> str:
    """This machine's id, 32 hexadecimal digits; raises ValueError with a text for the operator."""
    for file in MACHINE_ID_FILES if files is None else files:
        try:
            text = file.read_text("ascii", "replace").strip()
        except OSError:
            continue
        # A golden image holds an empty file or "uninitialized" until its first boot.
        if re.fullmatch(r"[0-9a-f]{32}", text):
            return text
    raise ValueError("is not set, and this machine has no machine id (/etc/machine-id) to make one from: set node_id")


def machine_hash() -> str:
    """What tells this machine from others, in a database that may be handed around; empty if it has no machine id."""
    try:
        machine_id = read_machine_id()
    except ValueError:
        return ""
    return hashlib.sha256(_MACHINE_SALT + machine_id.encode()).hexdigest()[:32]
