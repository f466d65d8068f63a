"""A node's database file is copied, and put back later, or is replaced by a snapshot: what was written since then has
to come back from the log or from a snapshot.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import apsw

from harmonylite.db.copy import remove_database
from tests.sim.catchup import Snapshot, install
from tests.sim.observe import conflicts_of, observe
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
    """The daemon and the application are stopped, the file is replaced, the application is started again."""
    _take_away(node)
    with contextlib.closing(apsw.Connection(str(saved.path))) as source:
        _copy(source, node.path)
    _go_on(node, copy.deepcopy(saved.reference))


def replace(node: Node, snapshot: Snapshot) -> None:
    """As `restore`, and the file is a snapshot."""
    _take_away(node)
    remove_database(node.path)
    install(node, snapshot)
    with contextlib.closing(apsw.Connection(str(node.path))) as connection:
        seen = observe(connection, node.world.history.tables)
    old = node.reference
    reference = ReferenceNode(old.node, old.tolerance_ms, old.listens_only)
    reference.versions, reference.rows = dict(seen.versions), dict(seen.rows)
    _go_on(node, reference)


def _take_away(node: Node) -> None:
    """What only the old file said of conflicts is kept for the checks."""
    node.stop()
    node.world.lost_conflicts += conflicts_of(node.application.connection)
    node.application.close()


def _go_on(node: Node, reference: ReferenceNode) -> None:
    now = node.reference
    reference.contents = {**now.contents, **reference.contents}
    reference.newest_own_ms = max(now.newest_own_ms, reference.newest_own_ms)
    reference.newest_server_ms = max(now.newest_server_ms, reference.newest_server_ms)
    node.reference = reference
    node.open_application()
    node.news.begin()
    node.world.server.now_ms += LATER_MS


def _copy(source: apsw.Connection, path: Path) -> None:
    remove_database(path)
    with contextlib.closing(apsw.Connection(str(path))) as target, target.backup("main", source, "main") as backup:
        backup.step()
