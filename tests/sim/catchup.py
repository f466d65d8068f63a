"""Catching up in the simulation: snapshots, taken by a node that has read everything and merged by one that the log
has left behind; logs that lost messages, filled again.

Every write transaction of a merge is followed by the reference as an apply is: what the snapshot says of a row counts
as a message that said it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import apsw

from harmonylite.db.copy import CopyInfo, adopt_copy, start_copy
from harmonylite.db.difference import DELETE, TAKE
from harmonylite.db.marking import Marking
from harmonylite.db.merge import Merger, Work
from harmonylite.db.replica import Replica
from harmonylite.db.unversioned import exist, is_joined, set_joined
from harmonylite.model import UNVERSIONED, Position, TableChanges, Version
from harmonylite.stream.lineage import goes_on_from_empty, note_emptied
from tests.sim.observe import conflicts_of, observe
from tests.sim.reference import Change, Observed, Place, Violation, changes_of, rows_of
from tests.sim.server import Server
from tests.sim.tables import TABLES, read_columns, row_key

if TYPE_CHECKING:
    from tests.sim.node import Node

# A merge for one stream may show a gap in another; more than this many are a loop.
MAX_BRIDGES = 10


@dataclass(frozen=True)
class Snapshot:
    """A copy in the store, with its manifest. unversioned: whether it has rows from before the installation."""

    path: Path
    info: CopyInfo
    created_ms: int
    unversioned: bool

    def position(self, stream: str) -> Position:
        return next(each for each in self.info.positions if each.stream == stream)

    def is_usable(self, server: Server, needed: Mapping[int, int]) -> bool:
        """Whether reading can go on after it; needed: what it has to contain of a stream, by shard."""
        positions = {each.stream: each for each in self.info.positions}
        for shard in range(len(server.streams)):
            position = positions.get(server.name(shard))
            if position is None or position.sequence < needed.get(shard, 0):
                return False
            if not server.lineage(shard, position).intact:
                return False
        return True


@contextlib.contextmanager
def _in_small_pieces() -> Iterator[None]:
    """Tables of a few rows are gone through in several pieces, as large ones are."""
    with (
        patch.multiple("harmonylite.db.merge", WINDOW_ROWS=3, FIRST_ROWS=2, LEAST_ROWS=2),
        patch.multiple("harmonylite.db.marking", MARK_ROWS=2),
    ):
        yield


def take(node: Node, path: Path) -> Snapshot | None:
    """None: this node may not take one now."""
    if node.listens_only or not at_the_end(node):
        return None
    node.call(lambda replica: replica.completeness.note_synced(node.world.server.now_ms))
    copy = node.call(start_copy, path, node.bound_ms())
    node.reference.absorbs = 2  # a commit may come in between, once: then it is done again
    node.follow()
    node.reference.absorbs = 1
    if copy is None:
        return None
    info = node.call(lambda _: copy.run())
    _check_copy(node, path)
    unversioned = exist(path, node.call(lambda replica: replica.schema))
    return None if info.parked else Snapshot(path, info, node.world.server.now_ms, unversioned)


def _check_copy(node: Node, path: Path) -> None:
    """No row of a snapshot is newer than its version."""
    seen = _look(node, path)
    for place, (version, _) in seen.versions.items():
        row = seen.rows.get(place)
        if node.reference.contents.get((place, version), row) != row:
            raise Violation(f"{place} is {row} in a snapshot, at {version}, which was given to another content")


def _look(node: Node, path: Path) -> Observed:
    with contextlib.closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as copy:
        return observe(copy, node.world.history.tables)


def merge(node: Node, snapshot: Snapshot, *, lost: bool = False) -> None:
    """The whole of it, one transaction after the other. Raises Crash where the node is killed."""
    node.news.begin()
    buried, transactions = _buried(node.observe()), len(node.transactions)
    with _in_small_pieces():
        _merge(node, snapshot, lost)
    if len(node.transactions) == transactions:  # else the application may have removed a row that won a clash
        _check_burials(node, snapshot, buried)


def _buried(seen: Observed) -> set[tuple[Place, Version]]:
    return {(place, version) for place, (version, _) in seen.versions.items() if version.rank}


def _check_burials(node: Node, snapshot: Snapshot, before: Container[tuple[Place, Version]]) -> None:
    """No good row dies: one of the snapshot's that lost a unique clash here lost it to a row that stands here now."""
    seen, there = node.observe(), _look(node, snapshot.path)
    for place, version in _buried(seen):
        row = there.rows.get(place)
        if (
            row is None
            or (place, version) in before
            or there.versions.get(place, (UNVERSIONED, False))[0] != version._replace(rank=0)
        ):
            continue
        table = TABLES[place[0]]
        if not any(table.clash(row, rival) for (name, _), rival in seen.rows.items() if name == table.name):
            raise Violation(f"{place}: {row} of a snapshot was buried, and no row here clashes with it")


def _merge(node: Node, snapshot: Snapshot, lost: bool) -> None:
    info = snapshot.info
    node.world.passed_over |= _passed_over(node, snapshot, lost)
    node.world.claimed |= _claimed(node, snapshot)
    if info.tombstones_since_ms:
        node.world.revived |= _revived(node, snapshot)
    positions = [Position(each.stream, each.created, each.sequence, each.stored_ns) for each in info.positions]
    since, created = info.tombstones_since_ms, snapshot.created_ms
    merger = node.call(lambda replica: Merger(replica, snapshot.path, positions, since, created_ms=created, lost=lost))
    node.call(lambda _: merger.open())
    while (work := node.call(lambda _, merger=merger: merger.find())) is not None:
        if not work.empty:
            _write(node, merger, work)
    report = node.call(lambda _: merger.finish(node.bound_ms()))
    node.call(lambda _: merger.close())
    node.follow()
    node.reference.newest_server_ms = max(node.reference.newest_server_ms, node.world.server.now_ms)
    if report.marked:
        node.republishes = True


def _revived(node: Node, snapshot: Snapshot) -> set[Place]:
    """Rows written here and not published, of which the snapshot knows nothing: that they were deleted later than that
    write is forgotten."""
    known = _look(node, snapshot.path)
    return {place for place in _waiting(node) if place not in known.versions and place not in known.rows}


def _claimed(node: Node, snapshot: Snapshot) -> set[Place]:
    """Rows of a time that the stream would have bounded."""
    latest = node.world.server.now_ms + node.world.tolerance_ms
    return {place for place, (version, *_) in _look(node, snapshot.path).versions.items() if version.ts > latest}


def _passed_over(node: Node, snapshot: Snapshot, lost: bool) -> set[Place]:
    """Rows of which this node will never see a version that was written over before the snapshot was taken."""
    known, server = _look(node, snapshot.path), node.world.server
    found = set()
    for shard, stream in enumerate(server.streams):
        before = 0 if lost else stored_position(node, shard)
        for received in stream[before : snapshot.position(server.name(shard)).sequence]:
            for change in changes_of(received, node.world.tolerance_ms):
                if known.versions.get(change.place, (UNVERSIONED,))[0] != change.effective:
                    found.add(change.place)
    return found


def _waiting(node: Node) -> set[Place]:
    """Rows that are logged, or pending."""
    tables = node.world.history.tables
    connection = node.application.connection
    pending = set(observe(connection, tables).logged)
    for name in tables:
        table = TABLES[name]
        published = "(SELECT value FROM __harmonylite__meta WHERE name = 'published_batch')"
        keys = [f"k{i}" for i in range(len(table.key))]
        where = f" WHERE batch > ifnull({published}, 0)"
        pending |= {
            (name, row_key(table, cells))
            for cells in read_columns(connection, f"__harmonylite__{name}_version", keys, where)
        }
    return pending


def _write(node: Node, merger: Merger, work: Work) -> None:
    changes = tuple(_changes(node, work))
    waiting = _waiting(node)
    try:
        node.call(lambda _: merger.write(work, node.bound_ms()))
    finally:
        if node.dead:  # all of it took effect, or nothing
            seen = node.observe()
            done = [each for each in changes if _took_effect(each, seen)]
            changes = tuple(done) if len(done) == len(changes) else ()
        _drop_forgotten(node, work, waiting)
        node.follow(changes)


def _took_effect(change: Change, seen: Observed) -> bool:
    if change.effective == UNVERSIONED and change.place not in seen.rows:
        return False
    return seen.versions.get(change.place, (UNVERSIONED,))[0] >= change.effective


def _changes(node: Node, work: Work) -> Iterable[Change]:
    if work.scan is None or work.scan.kind != TAKE:
        return
    table = work.scan.table
    for number, each in enumerate(work.found):
        gone, row = each.values is None, each.values
        said = TableChanges(
            table.name,
            table.key_names,
            work.scan.columns,
            rows=[] if row is None else [row],
            row_stamps=[] if row is None else [each.stamp],
            deleted=[each.key] if gone else [],
            deleted_stamps=[each.stamp] if gone else [],
        )
        for place, version, content in rows_of(said):
            yield Change(-number, place, version, version, content)


def _drop_forgotten(node: Node, work: Work, waiting: Container[Place]) -> None:
    """Rows that the snapshot's cluster has deleted and forgotten may go, into the conflict log, if nothing written here
    since waits to be published."""
    if work.scan is None or work.scan.kind != DELETE:
        return
    seen = node.observe()
    recorded = {(table, serial) for table, _, serial in conflicts_of(node.application.connection)}
    for place in _places(work):
        row = node.reference.rows.get(place)
        if row is None or place in seen.rows or place in seen.versions or place in node.reference.dirty:
            continue
        if place in waiting:
            raise Violation(f"I3: {place} was written here and never published; a merge deleted it")
        if (place[0], (row[TABLES[place[0]].columns.index("serial")][1],)) not in recorded:
            raise Violation(f"I10: {place} was deleted by a merge, and the conflict log does not have it")
        node.reference.rows.pop(place, None)
        node.reference.versions.pop(place, None)


def _places(work: Work) -> Sequence[Place]:
    assert work.scan is not None
    table = work.scan.table
    keys = TableChanges(
        table.name,
        table.key_names,
        table.key_names,
        deleted=[each.key for each in work.found],
        deleted_stamps=[each.stamp for each in work.found],
    )
    return [place for place, _, _ in rows_of(keys)]


def position_of(node: Node, shard: int) -> Position | None:
    """How far a stream was read, positions that were only noted included (engine.py)."""
    node.call(Replica.flush)
    return node.call(Replica.position, node.stream(shard))


def stored_position(node: Node, shard: int) -> int:
    """The last message that has taken effect."""
    position = position_of(node, shard)
    return position.sequence if position else 0


def at_the_end(node: Node) -> bool:
    """Whether it is online and has read everything there is."""
    streams = node.world.server.streams
    return node.online and all(node.cursors[shard] >= len(stream) for shard, stream in enumerate(streams))


def joined(node: Node) -> bool:
    """Whether it was ever in step with the others: before, rows that it brings are news; afterwards, forgotten ones."""
    if node.running:
        node.call(Replica.flush)
    query = "SELECT value FROM __harmonylite__meta WHERE name = 'synced_at_ms'"
    return any(value for (value,) in node.application.connection.execute(query))


def goes_on(node: Node, shard: int) -> bool:
    """Whether the log continues where the node stopped."""
    state = node.world.server.state(shard)
    position = position_of(node, shard) or Position(state.name, "", 0)
    if node.world.server.lineage(shard, position).intact:
        note_emptied(node.emptied, state, position)
        return True
    return node.emptied.get(state.name) == position and goes_on_from_empty(state, position)


def bridge(node: Node) -> bool:
    """Where the log does not go on, a snapshot takes the place of what is gone, or it is filled again (catchup.py of
    the daemon). False: that has to wait for another node."""
    server = node.world.server
    shards = range(len(server.streams))
    for _ in range(MAX_BRIDGES):
        shard = next((shard for shard in shards if not goes_on(node, shard)), None)
        if shard is None:
            break
        if not _bridge(node, shard):
            return False
    else:
        raise Violation(f"I3: node {node.id} has caught up {MAX_BRIDGES} times, and the log does not go on")
    for shard in shards:
        node.cursors[shard] = stored_position(node, shard)
        if not node.cursors[shard]:
            node.call(Replica.note_position, server.position(shard, 0))
    return True


def _bridge(node: Node, shard: int) -> bool:
    server, stream = node.world.server, node.stream(shard)
    position = position_of(node, shard) or Position(stream, "", 0)
    first = server.firsts[shard]
    lost = first <= position.sequence + 1 or (bool(position.created) and position.created != server.created[shard])
    needed = {} if lost else {shard: first - 1}
    snapshot = next((each for each in reversed(node.world.snapshots) if each.is_usable(server, needed)), None)
    if snapshot is not None:
        before = {each: position_of(node, each) for each in range(len(server.streams))}
        merge(node, snapshot, lost=lost)
        for each, known in before.items():
            if (
                known is not None
                and server.lineage(each, known).intact
                and stored_position(node, each) < known.sequence
            ):
                raise Violation(f"I3: node {node.id} had read {known}, and reads it again after a merge")
        if lost:
            node.call(Replica.move_position, snapshot.position(stream))
        return True
    if lost and _misses_nothing(node, shard, position):
        refill(node, shard)
        return True
    others = [other for other in node.world.living() if other is not node and other.running]
    return any(node.world.snapshot(other) for other in others)


def _misses_nothing(node: Node, shard: int, position: Position) -> bool:
    """Whether all that the log holds can be read: it begins with its first message, or with one that was stored before
    the one that this node had read last."""
    server = node.world.server
    first, last = server.firsts[shard], len(server.streams[shard])
    if first <= 1:
        return True
    if position.created != server.created[shard] or not position.stored_ns or first > min(position.sequence, last):
        return False
    if last >= position.sequence and server.position(shard, position.sequence).stored_ns <= position.stored_ns:
        return False
    return server.position(shard, first).stored_ns <= position.stored_ns


def refill(node: Node, shard: int) -> None:
    """Everything is marked to be published again, and the log is read from its beginning."""
    server = node.world.server
    position = Position(server.name(shard), server.created[shard], server.firsts[shard] - 1)
    node.republishes = True
    node.news.begin()
    with _in_small_pieces():
        marks = node.call(lambda replica: Marking(replica))
        while node.call(lambda _: marks.step()):
            pass
        node.call(lambda _: marks.finish(position))


def join(node: Node) -> bool:
    """Rows from before the installation reach the others (snapshot/join.py). Whether anything was done."""
    if not at_the_end(node) or node.call(is_joined):
        return False
    schema = node.call(lambda replica: replica.schema)
    has_some = exist(node.path, schema)
    world = node.world
    snapshot = next((each for each in reversed(world.snapshots) if each.is_usable(world.server, {})), None)
    if snapshot is None:
        if not has_some or not world.snapshot(node):
            return False
    elif has_some or snapshot.unversioned:
        merge(node, snapshot)
    node.call(set_joined)
    return True


def install(node: Node, snapshot: Snapshot) -> None:
    """The snapshot becomes the node's first database, as it does for a new node (snapshot/install.py)."""
    shutil.copyfile(snapshot.path, node.path)
    adopt_copy(node.path, node.id, latest_ms=snapshot.created_ms + node.world.tolerance_ms)
