"""What a merge takes from the snapshot beside the rows that are newer there: rows that must take effect in the same
transaction, and which columns are older than their row."""

from __future__ import annotations

from collections.abc import Sequence

import apsw

from harmonylite.db import difference, tables
from harmonylite.db.difference import Found, Scan
from harmonylite.db.rivals import Rivals
from harmonylite.db.rows import identity
from harmonylite.db.schema import Schema, Table
from harmonylite.db.snapshot_file import SnapshotFile
from harmonylite.db.sparse import entries
from harmonylite.model import Row


class Together:
    """Reads on the connection that the snapshot is attached to. mine: the schema here; latest_ms: bounds what the
    snapshot's node had not published, as the stream would have (docs/rules.md, Clocks)."""

    def __init__(self, connection: apsw.Connection, theirs: SnapshotFile, mine: Schema, latest_ms: int) -> None:
        self._connection = connection
        self._theirs = theirs
        self._mine = mine
        self._latest_ms = latest_ms

    def completed(self, scan: Scan, found: Sequence[Found], chain: int) -> list[Found]:
        """A piece with what must take effect in the same transaction: the snapshot's state of rows that hold a unique
        value of one of these here, and not there. Else a value that wandered would look like a clash, and a good row
        die. chain: about so many more at most."""
        complete = list(found)
        mine = self._mine.table(scan.table.name)
        if mine is not None and mine.uniques and difference.comparable(scan.table, mine):
            rivals = Rivals(self._connection, scan.table, mine)
            keys = {identity(mine, each.key) for each in complete}
            todo = [each.key for each in complete if each.values is not None]
            # A long chain is cut: what is left of it is settled as clashes, one piece after the other.
            most = len(found) + chain
            while todo and len(complete) < most:
                for key in rivals.of(todo.pop()):
                    if identity(mine, key) in keys:
                        continue
                    keys.add(identity(mine, key))
                    if (rival := self._lookup(scan.table, mine, key)) is not None:
                        complete.append(rival)
                        if rival.values is not None:
                            todo.append(rival.key)
        return [self.with_older_columns(scan, self._bounded(each)) for each in complete]

    def _bounded(self, found: Found) -> Found:
        """What went through the stream was bounded there."""
        ts, _, _, base_ts, _ = found.stamp
        if not found.pending or ts <= self._latest_ms:
            return found
        return found._replace(stamp=found.stamp._replace(ts=min(ts, max(self._latest_ms, base_ts + 1))))

    def _lookup(self, theirs: Table, mine: Table, key: Row) -> Found | None:
        published = self._theirs.state.published_batch
        for scan in difference.taking(theirs, mine):
            if (found := scan.lookup(self._connection, key, published)) is not None:
                return found
        return None

    def with_older_columns(self, scan: Scan, found: Found) -> Found:
        """Which of a row's columns are older than it, as the snapshot knows."""
        if scan.table.name not in self._theirs.sparse or found.values is None:
            return found
        key = identity(scan.table, found.key)
        return found._replace(older=entries(self._connection, scan.table.name, key, table=f"snap.{tables.SPARSE}"))
