"""A node's database file is copied, and put back later: what was written since then has to come back from the log or
from a snapshot.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import apsw

from harmonylite.db.copy import remove_database
from tests.sim.observe import conflicts_of
from tests.sim.reference import ReferenceNode

if TYPE_CHECKING:
    from tests.sim.node import Node

# A second later a node gives no version again that it gave after the backup, as long as its clock is right.
LATER_MS = 1_000


@dataclass(frozen=True)
class SavedNode:
    """The file, and what the reference knew of it."""

    path: Path
    reference: ReferenceNode


def save(node: Node, path: Path) -> SavedNode:
    """A copy of the file as it is, whatever the daemon is doing."""
    _copy(node.application.connection, path)
    return SavedNode(path, copy.deepcopy(node.reference))


def restore(node: Node, saved: SavedNode) -> None:
    """The daemon and the application are stopped, the file is replaced, the application is started again. What only the
    old file said of conflicts is kept for the checks."""
    node.stop()
    node.world.lost_conflicts += conflicts_of(node.application.connection)
    node.application.close()
    with contextlib.closing(apsw.Connection(str(saved.path))) as source:
        _copy(source, node.path)
    now = node.reference
    node.reference = copy.deepcopy(saved.reference)
    node.reference.contents = {**now.contents, **node.reference.contents}
    node.reference.newest_own_ms = max(now.newest_own_ms, node.reference.newest_own_ms)
    node.reference.newest_server_ms = max(now.newest_server_ms, node.reference.newest_server_ms)
    node.open_application()
    node.world.server.now_ms += LATER_MS


def _copy(source: apsw.Connection, path: Path) -> None:
    remove_database(path)
    with contextlib.closing(apsw.Connection(str(path))) as target, target.backup("main", source, "main") as backup:
        backup.step()
