"""How far a merge is: looking at a row costs little, writing one much, and how many differ is not known before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import apsw

from harmonylite.db.difference import DELETE, MARK, TAKE, Scan
from harmonylite.db.schema import Schema
from harmonylite.db.sql import integer, normal, quote, version_table

# To write a row takes about so many times as long as to compare one.
WRITE = 20
# Progress is told in so many parts of the whole.
PARTS = 10_000
# Rows without versions are counted one by one, up to so many: a daemon that ends does not wait for that.
MOST_COUNTED = 1_000_000

_PHASES = {TAKE: "comparing", DELETE: "deleting", MARK: "reconciling"}


@dataclass(frozen=True, slots=True)
class MergeProgress:
    """phase: "comparing", "deleting" or "reconciling"; table: the one that is looked at; done, total: how much of all
    phases is done, about. `done` never goes back, unless the schema changes."""

    phase: str = _PHASES[TAKE]
    table: str = ""
    done: int = 0
    total: int = 0


@dataclass(slots=True)
class _Part:
    """One scan. rows: that it will look at, about; writes: of those will be written at least, about."""

    rows: int = 0
    writes: int = 0
    looked: int = 0
    written: int = 0

    @property
    def cost(self) -> float:
        """As if the rest were like what was seen."""
        rows = max(self.rows, self.looked)
        alike = self.written / self.looked * rows if self.looked else 0.0
        return rows + WRITE * max(self.writes, self.written, alike)

    @property
    def done(self) -> int:
        return self.looked + WRITE * self.written

    def end(self) -> None:
        self.rows, self.writes = self.looked, self.written


class Estimate:
    """Of one merge's scans. mine: the schema here, which may lack tables of the snapshot."""

    def __init__(self, scans: Sequence[Scan], mine: Schema) -> None:
        self._scans = scans
        self._mine = mine
        self._parts = [_Part() for _ in scans]
        self._index = -1
        self._share = 0.0

    def count(self, connection: apsw.Connection) -> Iterator[None]:
        """In pieces: about how many rows there are, which is as many as have versions."""
        known: dict[str, tuple[int, int]] = {}
        for scan, part in zip(self._scans, self._parts, strict=True):
            name = normal(scan.table.name)
            if name not in known:
                known[name] = self._versions(connection, scan.table.name)
                yield
            theirs, mine = known[name]
            part.writes = max(0, _more(scan.kind, theirs, mine)) if scan.versioned else 0
            # What is taken over comes to what is here.
            part.rows = theirs if scan.kind == TAKE else max(theirs, mine)
            if scan.kind == TAKE and not scan.versioned and not theirs:
                limited = f"SELECT 1 FROM snap.{quote(scan.table.name)} LIMIT {MOST_COUNTED}"
                part.rows = integer(connection, f"SELECT count(*) FROM ({limited})")
                yield

    def _versions(self, connection: apsw.Connection, name: str) -> tuple[int, int]:
        """There and here."""
        there = integer(connection, f"SELECT count(*) FROM snap.{version_table(name)}")
        if self._mine.table(name) is None:
            return there, 0
        return there, integer(connection, f"SELECT count(*) FROM main.{version_table(name)}")

    def begin(self) -> None:
        """The next scan begins."""
        if self._index >= 0:
            self._parts[self._index].end()
        self._index += 1

    def after(self, looked: int, written: int) -> MergeProgress:
        """So many more rows were looked at, and so many will have been written."""
        scan, part = self._scans[self._index], self._parts[self._index]
        part.looked += looked
        part.written += written
        total = sum(each.cost for each in self._parts)
        done = sum(each.done for each in self._parts)
        self._share = max(self._share, min(1.0, done / total) if total else 0.0)
        return MergeProgress(_PHASES[scan.kind], scan.table.name, int(self._share * PARTS), PARTS)


def _more(kind: str, theirs: int, mine: int) -> int:
    """How many rows there are on the side that the other has to get them from, that it cannot have."""
    return {TAKE: theirs - mine, MARK: mine - theirs}.get(kind, 0)
