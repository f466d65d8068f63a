"""The node id of a machine that was not given one."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

# machine-id(5): the second is where D-Bus keeps it on systems without systemd.
MACHINE_ID_FILES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
# machine-id(5) asks applications to publish only a keyed hash of it.
_SALT = b"harmonylite node id\0"


def node_id_of(machine_id: str) -> int:
    """The same positive 63-bit number for the same machine id, never 0."""
    digest = hashlib.sha256(_SALT + machine_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1 or 1


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
