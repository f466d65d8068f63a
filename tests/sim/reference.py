"""Last writer wins, plainly: dictionaries and `max`. What the engine does is checked against this.

Nothing here reads the engine's code or its decisions beyond what a node's tables show; times are milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from harmonylite.model import UNVERSIONED, Group, ReceivedGroup, TableChanges, Version
from tests.sim.tables import TABLES, Key, RowState, Table, cell, row_key

# The floor is written with the server's time once an hour.
FLOOR_DELAY_MS = 3_600_000

# One row of one table, wherever it is stored.
Place = tuple[str, Key]


class Violation(AssertionError):  # noqa: N818
    """The engine broke a property; the text names it and says what was seen."""


@dataclass(frozen=True)
class RowWrite:
    """What one committed transaction of an application did to one row: a fact, seen on the application's side.

    before, after: the row in the transaction's first and last view of it, None: absent. true_ms: by the
    server's clock; logged_ms: by the clock of the node.
    """

    number: int
    node: int
    place: Place
    before: RowState | None
    after: RowState | None
    true_ms: int
    logged_ms: int


@dataclass(frozen=True)
class Change:
    """One row of a group (its sequence number): with the version it claims, and the one that counts."""

    group: int
    place: Place
    claimed: Version
    effective: Version
    row: RowState | None


@dataclass(frozen=True)
class Observed:
    """A node's database as it is. versions: with the mark that the row is deleted; logged: rows that were written or
    deleted and are not absorbed; log_rows: how many entries the change logs hold.
    """

    rows: Mapping[Place, RowState]
    versions: Mapping[Place, tuple[Version, bool]]
    logged: frozenset[Place]
    log_rows: int
    sequences: Mapping[str, int]


def changes_of(received: ReceivedGroup, tolerance_ms: int) -> Iterator[Change]:
    """The changes of a group with their effective versions: min(ts, the stream's own time + tolerance)."""
    latest = received.stored_ms + tolerance_ms
    for changes in received.group.tables:
        for place, version, row in rows_of(changes):
            yield Change(received.sequence, place, version, version._replace(ts=min(version.ts, latest)), row)


def rows_of(changes: TableChanges) -> Iterator[tuple[Place, Version, RowState | None]]:
    """Place, version and row (None: deleted) of each change of a table."""
    table = TABLES[changes.table]
    for row, stamp in zip(changes.rows, changes.row_stamps, strict=True):
        cells = {name: cell(value) for name, value in zip(changes.columns, row, strict=True)}
        key = row_key(table, [cells[name] for name in table.key])
        yield (table.name, key), Version(*stamp[:3]), tuple(cells[name] for name in table.columns)
    for key_values, stamp in zip(changes.deleted, changes.deleted_stamps, strict=True):
        named = dict(zip(changes.key, map(cell, key_values), strict=True))
        yield (table.name, row_key(table, [named[n] for n in table.key])), Version(*stamp[:3]), None


def last_writer_wins(log: Iterable[ReceivedGroup], tolerance_ms: int) -> dict[Place, tuple[Version, RowState | None]]:
    """What every node must hold after all of `log`, in any order: per row the change with the highest version."""
    best: dict[Place, tuple[Version, RowState | None]] = {}
    for received in log:
        for change in changes_of(received, tolerance_ms):
            known = best.get(change.place)
            if known is None or change.effective > known[0]:
                best[change.place] = (change.effective, change.row)
    return best


def honest_outcome(writes: Iterable[RowWrite]) -> dict[Place, RowState | None]:
    """The outcome where all clocks were right: per row the latest write, of equal times the higher node's."""
    best: dict[Place, RowWrite] = {}
    for write in writes:
        known = best.get(write.place)
        if known is None or (write.logged_ms, write.node, write.number) > (
            known.logged_ms,
            known.node,
            known.number,
        ):
            best[write.place] = write
    return {place: write.after for place, write in best.items()}


@dataclass
class _Dirty:
    """Writes of a row that are logged and not known to be absorbed, with the least time that they may claim."""

    newest_ms: int


@dataclass
class ReferenceNode:
    """One node as the rules say it must be: followed step by step, compared with what its database holds.

    The time that absorbing gives to a write is the engine's choice within bounds; everything else is exact for
    tables without secondary unique indexes, and bounded for the others.
    """

    node: int
    tolerance_ms: int
    listens_only: bool = False
    versions: dict[Place, tuple[Version, bool]] = field(default_factory=dict)
    rows: dict[Place, RowState] = field(default_factory=dict)
    dirty: dict[Place, _Dirty] = field(default_factory=dict)
    # Each time it absorbs, a write may replace what it has absorbed before.
    absorbs: int = 1
    newest_own_ms: int = 0
    newest_server_ms: int = 0
    floor_ms: int = 0
    contents: dict[tuple[Place, Version], RowState | None] = field(default_factory=dict)
    # Every write made here with the latest time that it may claim (the real floor is somewhere between floor_ms and the
    # server's time): also of versions that only one transaction ever saw.
    claims: list[tuple[Place, int, RowState | None]] = field(default_factory=list)

    def tried(self, logged_ms: int) -> None:
        """The application committed: also a statement that wrote nothing (OR IGNORE) leaves a time in the log."""
        self.newest_own_ms = max(self.newest_own_ms, logged_ms)

    def wrote(self, write: RowWrite) -> None:
        """The application of this node committed `write`."""
        self.newest_own_ms = max(self.newest_own_ms, write.logged_ms)
        claims = max(write.logged_ms, self.floor_ms)
        replaced, _ = self.versions.get(write.place, (UNVERSIONED, False))
        self.claims.append((write.place, max(claims, self.newest_server_ms, replaced.ts + 1), write.after))
        if TABLES[write.place[0]].unique and write.before is None:
            self.dirty.pop(write.place, None)  # if it was evicted that left no trace, or a guess: it is there again
        known = self.dirty.setdefault(write.place, _Dirty(claims))
        known.newest_ms = max(known.newest_ms, claims)
        if write.after is None:
            self.rows.pop(write.place, None)
        else:
            self.rows[write.place] = write.after

    def heard_server_time(self, server_ms: int) -> None:
        """The node was told what the server's clock shows."""
        self.newest_server_ms = max(self.newest_server_ms, server_ms)

    def took_server_time(self, server_ms: int) -> None:
        """That took effect: the floor follows the server's time, with a delay, and is bounded by it."""
        own = min(self.floor_ms, server_ms + self.tolerance_ms)
        self.floor_ms = max(own, server_ms - FLOOR_DELAY_MS)

    def follow(self, seen: Observed, delivered: Iterable[Change], now_ms: int, *, may_clamp: bool = False) -> None:
        """An engine call ended, in which `delivered` took effect (none, if it was not an apply that committed).

        may_clamp: it was one that lowers versions of own pending writes to the server's time. A row that is in a
        log now was written after the call had absorbed. Raises Violation.
        """
        arrived: dict[Place, list[Change]] = {}
        for change in delivered:
            arrived.setdefault(change.place, []).append(change)
        places = {*self.versions, *self.rows, *self.dirty, *arrived, *seen.versions, *seen.rows}
        latest = now_ms + self.tolerance_ms
        absorbed = [
            dirty.newest_ms
            for place, dirty in self.dirty.items()
            if place not in seen.logged and not self._unnoticed(place, seen)
        ]
        for place in sorted(places, key=repr):
            self._follow_row(place, seen, arrived.get(place, []), now_ms, may_clamp)
        self._check_burials(seen, arrived)
        for place, (version, _) in seen.versions.items():
            if place not in seen.logged:
                self.contents.setdefault((place, version), seen.rows.get(place))
        if absorbed and not may_clamp:
            self.floor_ms = max(self.floor_ms, min(max(absorbed), latest))
        self.versions = dict(seen.versions)
        self.rows = dict(seen.rows)
        self.dirty = {
            place: dirty for place, dirty in self.dirty.items() if place in seen.logged or self._unnoticed(place, seen)
        }

    def sends(self, group: Group, now_ms: int) -> None:
        """The node publishes `group`: each row must be what it was when its version was given. Raises Violation.

        A version that the receivers will bound is left out: nobody will hold it.
        """
        for changes in group.tables:
            for place, version, row in rows_of(changes):
                known = self.contents.get((place, version), row)
                if known != row and version.ts <= now_ms + self.tolerance_ms:
                    raise Violation(f"{place}: {row} is published as {version}, which is {known}")

    def _check_burials(self, seen: Observed, arrived: Mapping[Place, list[Change]]) -> None:
        """A row that loses a clash here loses it to a row that stands here afterwards: no good row dies.

        Where several groups arrived at once, a winner may itself have been replaced by the next group.
        """
        if self.listens_only or seen.logged or len({c.group for each in arrived.values() for c in each}) != 1:
            return
        for place, (version, _) in seen.versions.items():
            incoming = {change.effective: change.row for change in arrived.get(place, ())}
            if version.rank == 0 or version in incoming or self.versions.get(place, (None,))[0] == version:
                continue
            buried = incoming.get(version._replace(rank=0), self.rows.get(place))
            table = TABLES[place[0]]
            rivals = [row for (name, key), row in seen.rows.items() if name == table.name and (name, key) != place]
            if buried is None or not any(table.clash(buried, rival) for rival in rivals):
                raise Violation(f"{place}: {buried} was buried as {version}, and no row here clashes with it")

    def forgot(self, seen: Observed) -> None:
        """Tombstones past their retention may be gone now, and nothing else."""
        for place, (version, deleted) in self.versions.items():
            if place not in seen.versions and not deleted:
                raise Violation(f"{place}: the version {version} of a row that is there was forgotten")
        self.versions = {place: known for place, known in self.versions.items() if place in seen.versions}
        self.follow(seen, (), 0)

    def _follow_row(self, place: Place, seen: Observed, arrived: list[Change], now_ms: int, may_clamp: bool) -> None:
        table = TABLES[place[0]]
        if self.listens_only and table.unique:
            return  # it parks clash losers until the cluster has decided
        before, _ = self.versions.get(place, (UNVERSIONED, False))
        after, deleted = seen.versions.get(place, (UNVERSIONED, False))
        row_before, row = self.rows.get(place), seen.rows.get(place)
        if place in seen.logged:
            if (after < before and not may_clamp) or row != row_before:
                raise Violation(f"{place}: {before} became {after}, row is {row}, should be {row_before}")
            return
        absorbed = place in self.dirty
        if absorbed and (self._unnoticed(place, seen) or (after == UNVERSIONED and row is None and table.untraced)):
            return  # what never had a version leaves none; whether all nodes agree is checked in the end
        if after != UNVERSIONED and deleted != (row is None):
            raise Violation(f"{place}: marked deleted={deleted}, the row is {row}")
        best = self._best(before, row_before, arrived, adopt=not absorbed)
        if not absorbed and arrived and before == after == best[0] == UNVERSIONED:
            # Rows from before the installation: the content decides, and all nodes must agree in the end.
            if row not in {row_before, *(change.row for change in arrived)} - {None}:
                raise Violation(f"{place}: {row_before} without a version became {row}")
            return
        if absorbed:
            own = self._own_bounds(place, before, now_ms, may_clamp)
            buried = table.unique and after.rank == 1
            set_back = may_clamp and before.node == self.node
            if after.node == self.node and (after.rank == 0 or buried) and (after > best[0] or set_back):
                self._check_own(place, after, own)
                expected_row = row_before
            elif best[0] < Version(own[0], self.node):
                raise Violation(
                    f"I5/I6 {place}: a write of node {self.node} (at least {own[0]}, over {before}) ended as {after}"
                )
            else:
                expected_row = self._expect(table, place, after, best)
        elif may_clamp and after.node == self.node == before.node and after.ts < before.ts:
            if after.ts < self.newest_server_ms:
                raise Violation(f"{place}: {before} was set back to {after}, below the server's time")
            expected_row = row_before
        else:
            expected_row = self._expect(table, place, after, best)
        if table.unique and after.rank == 1:
            expected_row = None
        if row != expected_row:
            raise Violation(f"{place}: version went from {before} to {after}, row is {row}, should be {expected_row}")

    @staticmethod
    def _unnoticed(place: Place, seen: Observed) -> bool:
        """Whether the row was removed and no trigger could tell: then it looks alive until the engine looks."""
        _, deleted = seen.versions.get(place, (UNVERSIONED, False))
        table = TABLES[place[0]]
        if place in seen.rows or deleted or not (table.untraced or table.silent):
            return False
        # It is noticed when the write that removed it is absorbed.
        return any(name == place[0] for name, _ in seen.logged)

    def _best(
        self, version: Version, row: RowState | None, arrived: list[Change], *, adopt: bool
    ) -> tuple[Version, RowState | None]:
        for change in arrived:
            own_message = adopt and change.claimed == version and change.effective < version
            if own_message or change.effective > version:
                version, row = change.effective, change.row
        return version, row

    def _expect(
        self, table: Table, place: Place, after: Version, best: tuple[Version, RowState | None]
    ) -> RowState | None:
        """Checks the version of a row whose winner is known; returns what the row must be."""
        version, row = best
        buried = table.unique and after == version._replace(rank=1)
        if after != version and not buried:
            raise Violation(f"I4/I5 {place}: version is {after}, the highest that arrived is {version}")
        return None if buried else row

    def _own_bounds(self, place: Place, before: Version, now_ms: int, may_clamp: bool) -> tuple[int, int]:
        """What an absorbed write of the row may claim: not before it was made, not after anything known here."""
        low = min(self.dirty[place].newest_ms, now_ms + self.tolerance_ms)
        if TABLES[place[0]].untraced and place not in self.rows:
            low = 0
        low = max(low, before.ts + 1)
        if may_clamp and before.node == self.node:
            low = min(low, self.newest_server_ms)
        # What one absorb has taken, the next one of the same call may find replaced.
        newest_ms = self.newest_own_ms + self.absorbs - 1
        high = max(newest_ms, self.newest_server_ms + self.tolerance_ms, before.ts + self.absorbs)
        return low, high

    def _check_own(self, place: Place, after: Version, bounds: tuple[int, int]) -> None:
        low, high = bounds
        if not low <= after.ts <= high:
            raise Violation(f"I5/I6 {place}: an own write got {after}, should be within {low}..{high}")
