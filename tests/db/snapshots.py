"""Copies of nodes, and merging them by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harmonylite.db.copy import CopyInfo, start_copy
from harmonylite.db.merge import Merger, MergeReport, Work
from tests.db.harness import Node


def copy_of(node: Node, name: str = "snapshot.db") -> tuple[Path, CopyInfo]:
    """A copy as a caught-up node takes it."""
    path = node.path.with_name(name)
    copy = start_copy(node.replica, path)
    assert copy is not None
    return path, copy.run()


def merger_of(node: Node, snapshot: tuple[Path, CopyInfo], *, lost: bool = False) -> Merger:
    path, info = snapshot
    merger = Merger(node.replica, path, info.positions, info.tombstones_since_ms, lost=lost)
    merger.open()
    return merger


def merge(
    node: Node,
    snapshot: tuple[Path, CopyInfo],
    before_write: Callable[[Work], None] = lambda work: None,
    after_write: Callable[[Work], None] = lambda work: None,
    *,
    lost: bool = False,
) -> MergeReport:
    """The whole merge; what the application does meanwhile comes before or after each write."""
    merger = merger_of(node, snapshot, lost=lost)
    try:
        while (work := merger.find()) is not None:
            if not work.empty:
                before_write(work)
                merger.write(work)
                after_write(work)
        return merger.finish()
    finally:
        merger.close()


def forget_before(node: Node, since_ms: int) -> None:
    """As if the node had forgotten its tombstones from before that time."""
    node.replica.judge(lambda _: node.replica.completeness.arrive((), synced_at_ms=0, tombstones_since_ms=since_ms))
