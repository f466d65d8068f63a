"""What a node has read from the log is not published again: the mark of a row is dropped when a message has that
version, or a newer one.
"""

from __future__ import annotations

from collections.abc import Iterable

from harmonylite.model import UNVERSIONED, Group, Version
from tests.sim.reference import Change, Place, Violation, rows_of


class News:
    """Of one node. What it read is what messages said since rows may have been marked although the log had them."""

    def __init__(self) -> None:
        self._read: dict[Place, Version] = {}
        self._read_before: dict[Place, Version] = {}

    def begin(self) -> None:
        """The log is read from its beginning, or a snapshot is merged: rows may be marked again."""
        self._read = {}

    def read(self, changes: Iterable[Change]) -> None:
        """These took effect. What the stream has bounded is left out: of that the mark may stay."""
        for change in changes:
            if change.effective == change.claimed:
                self._read[change.place] = max(change.effective, self._read.get(change.place, UNVERSIONED))

    def collected(self) -> None:
        """Groups are collected now, to be sent later."""
        self._read_before = dict(self._read)

    def check(self, node_id: int, group: Group) -> None:
        """Before it is sent. Raises Violation."""
        for changes in group.tables:
            for place, version, _ in rows_of(changes):
                if self._read_before.get(place, UNVERSIONED) >= version > UNVERSIONED:
                    raise Violation(f"node {node_id} publishes {place} at {version}, which it has read from the log")
