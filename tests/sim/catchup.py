"""Snapshots in the simulation: taken by a node that is caught up, merged by one that the log has left behind.

Every write transaction of a merge is followed by the reference as an apply is: what the snapshot says of a row counts
as a message that said it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import apsw

from harmonylite.db.copy import CopyInfo
from harmonylite.db.difference import DELETE, TAKE
from harmonylite.db.merge import Merger, Work
from harmonylite.db.replica import Replica
from harmonylite.model import UNVERSIONED, Position, TableChanges
from tests.sim.observe import observe
from tests.sim.reference import Change, Place, Violation, rows_of
from tests.sim.tables import TABLES, read_columns, row_key

if TYPE_CHECKING:
    from tests.sim.node import Node


@dataclass(frozen=True)
class Snapshot:
    """A copy in the store, with its manifest."""

    path: Path
    info: CopyInfo
    created_ms: int

    def follows(self, stream: str, first: int) -> bool:
        """Whether the stream, whose first message is number `first`, goes on where the snapshot ends."""
        sequence = next((each.sequence for each in self.info.positions if each.stream == stream), 0)
        return sequence + 1 >= first


def take(node: Node, path: Path) -> Snapshot | None:
    """None: this node may not take one now."""
    if not at_the_end(node):
        return None
    node.call(Replica.note_synced, node.world.server.now_ms)
    copy = node.call(Replica.start_copy, path, node.bound_ms())
    node.reference.absorbs = 2  # a commit may come in between, once: then it is done again
    node.follow()
    node.reference.absorbs = 1
    if copy is None:
        return None
    snapshot = Snapshot(path, node.call(lambda _: copy.run()), node.world.server.now_ms)
    return None if snapshot.info.parked else snapshot


def merge(node: Node, snapshot: Snapshot) -> None:
    """The whole of it, one transaction after the other. Raises Crash where the node is killed."""
    info = snapshot.info
    if info.tombstones_since_ms:
        node.world.revived |= _revived(node, snapshot)
    positions = [Position(each.stream, each.created, each.sequence, each.stored_ns) for each in info.positions]
    since, created = info.tombstones_since_ms, snapshot.created_ms
    merger = node.call(lambda replica: Merger(replica, snapshot.path, positions, since, created_ms=created))
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
    tables = node.world.history.tables
    copy = apsw.Connection(str(snapshot.path), flags=apsw.SQLITE_OPEN_READONLY)
    known = observe(copy, tables)
    copy.close()
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
    return {place for place in pending if place not in known.versions and place not in known.rows}


def _write(node: Node, merger: Merger, work: Work) -> None:
    changes = tuple(_changes(node, work))
    try:
        node.call(lambda _: merger.write(work, node.bound_ms()))
    finally:
        if node.dead:  # all of it took effect, or nothing
            seen = node.observe()
            done = [each for each in changes if _took_effect(each, seen.versions.get(each.place, (UNVERSIONED,))[0])]
            changes = tuple(done) if len(done) == len(changes) else ()
        _drop_forgotten(node, work)
        node.follow(changes)


def _took_effect(change: Change, version: tuple[int, ...]) -> bool:
    return version >= change.effective


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


def _drop_forgotten(node: Node, work: Work) -> None:
    """Rows that the snapshot's cluster has deleted and forgotten may go, if nothing was written here since."""
    if work.scan is None or work.scan.kind != DELETE:
        return
    seen = node.observe()
    for place in _places(work):
        if place not in seen.rows and place not in seen.versions and place not in node.reference.dirty:
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


def stored_position(node: Node, shard: int) -> int:
    """The last message that has taken effect."""
    position = node.call(Replica.position, node.stream(shard))
    return position.sequence if position else 0


def at_the_end(node: Node) -> bool:
    """Whether it is online and has read everything there is."""
    streams = node.world.server.streams
    return node.online and all(node.cursors[shard] >= len(stream) for shard, stream in enumerate(streams))


def joined(node: Node) -> bool:
    """Whether it was ever in step with the others: before, rows that it brings are news; afterwards, forgotten ones."""
    query = "SELECT value FROM __harmonylite__meta WHERE name = 'synced_at_ms'"
    return any(value for (value,) in node.application.connection.execute(query))


def bridge(node: Node) -> None:
    """Where the log no longer holds the next message, a snapshot takes the place of those that are gone."""
    firsts = list(enumerate(node.world.server.firsts))
    if all(node.cursors[shard] + 1 >= first for shard, first in firsts):
        return
    wanted = [(node.stream(shard), first) for shard, first in firsts]
    for snapshot in reversed(node.world.snapshots):
        if all(snapshot.follows(stream, first) for stream, first in wanted):
            merge(node, snapshot)
            break
    else:  # the log is only ever cut where a snapshot was taken
        raise Violation(f"no snapshot goes on to {wanted}")
    for shard, first in firsts:
        node.cursors[shard] = stored_position(node, shard)
        if node.cursors[shard] + 1 < first:
            raise Violation(f"I3: node {node.id} merged a snapshot and is still behind {first} in stream {shard + 1}")
