"""What a merge changes in the live database, each inside the caller's write transaction (docs/rules.md, Catching up).

What was found was read earlier, without a lock: a row that has another version by now is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harmonylite import wire
from harmonylite.db import left_out, resolve, sparse, versions
from harmonylite.db import rows as store
from harmonylite.db.capture import key_columns
from harmonylite.db.conflicts import Parked
from harmonylite.db.context import Context
from harmonylite.db.difference import Found, Scan
from harmonylite.db.rows import NO_VERSION, bound, identity, marker
from harmonylite.db.schema import Table
from harmonylite.db.sql import version_table
from harmonylite.model import UNVERSIONED, Group, Stamp, TableChanges, Version

if TYPE_CHECKING:
    from harmonylite.db.replica import Replica

# Reason in the conflict log.
FORGOTTEN = "deleted elsewhere so long ago that the cluster has forgotten it"


def take(replica: Replica, context: Context, scan: Scan, table: Table | None, found: Sequence[Found]) -> int:
    """Rows of the snapshot take effect by version, exactly as messages would. table: the one here, None if it is
    missing. Returns how many rows became pending here: those that the snapshot's node had not published yet, and own
    ones of the same version with a content that wins."""
    replica.take(Group(0, 0, _changes(replica, scan, table, found)), context)
    if table is None or not context.publish:
        return 0
    marked = 0
    for each in found:
        if each.pending or (each.twin and _differs(replica, scan, table, each)):
            marked += _mark(replica, context, table, each)
    return marked


def _changes(replica: Replica, scan: Scan, table: Table | None, found: Sequence[Found]) -> tuple[TableChanges, ...]:
    def here(each: Found) -> Version:
        local = store.find_version(replica.writer, table, each.key) if table is not None else None
        return local.version if local is not None and not local.deleted else UNVERSIONED

    whole = [each for each in found if not each.older]
    return (
        _rows(scan, scan.columns, [(each, each.stamp) for each in whole]),
        *(changes for each in found if each.older for changes in _in_steps(scan, each, here(each))),
    )


def _rows(scan: Scan, columns: Sequence[str], found: Sequence[tuple[Found, Stamp]]) -> TableChanges:
    positions = [scan.columns.index(name) for name in columns]
    whole = len(columns) == len(scan.columns)
    return TableChanges(
        table=scan.table.name,
        key=scan.table.key_names,
        columns=tuple(columns),
        rows=[
            each.values if whole else tuple(each.values[position] for position in positions)
            for each, _ in found
            if each.values is not None
        ],
        row_stamps=[stamp for each, stamp in found if each.values is not None],
        deleted=[each.key for each, _ in found if each.values is None],
        deleted_stamps=[stamp for each, stamp in found if each.values is None],
    )


def _in_steps(scan: Scan, each: Found, here: Version) -> Iterator[TableChanges]:
    """A row with columns older than itself (sparse.py), as the messages that made it so: whole at the oldest version,
    then without the columns that stayed behind. Of a version that the row has `here`, or had, only the columns that
    stayed at it are known: with newer ones it would look like another write."""
    for version in sorted(set(each.older.values())):
        versions = {name: each.older.get(name, each.version[:2]) for name in scan.columns}
        columns = [name for name in scan.columns if versions[name] >= version]
        if version <= here[:2]:
            columns = [name for name in columns if versions[name] == version or name in scan.table.key_names]
        # It has seen everything older: what it replaces is no conflict.
        yield _rows(scan, columns, [(each, Stamp(*version, 0, *version))])
    columns = [name for name in scan.columns if name not in each.older]
    yield _rows(scan, columns, [(each, each.stamp)])


def _differs(replica: Replica, scan: Scan, table: Table, each: Found) -> bool:
    """Whether the row here is another one than the snapshot's, after that had its chance."""
    here = store.read(replica.writer, table, each.key)
    if here is None or each.values is None:
        return (here is None) != (each.values is None)
    theirs = dict(zip(scan.columns, each.values, strict=True))
    shared = [(name, column.name) for name in theirs if (column := table.column(name)) is not None]
    # Packed: 1 is not 1.0, and text that is not UTF-8 no BLOB.
    return wire.pack([here[mine] for _, mine in shared]) != wire.pack([theirs[name] for name, _ in shared])


def mark(replica: Replica, context: Context, table: Table, found: Sequence[Found]) -> int:
    """They are to be published again, at the versions they have. Returns how many."""
    return sum(_mark(replica, context, table, each) for each in found)


def _mark(replica: Replica, context: Context, table: Table, each: Found) -> int:
    writer = replica.writer
    keys = ", ".join(map(marker, each.key))
    if each.version == UNVERSIONED:
        # Not a stamp: (0, 0) is what a row without a version has. The entry only carries the mark. Without a row it
        # would look like one that vanished, and be published as a deletion.
        if store.read(writer, table, each.key) is None:
            return 0
        writer.execute(
            f"INSERT INTO {version_table(table.name)} ({key_columns(table)}, ts, node, batch) VALUES ({keys}, 0, 0, ?)"
            f" ON CONFLICT ({key_columns(table)}) DO UPDATE SET batch = excluded.batch"
            f" WHERE ts = 0 AND rank = 0 AND (batch IS NULL OR batch <= ?)",
            (*bound(each.key), context.batch, context.published),
        )
    else:
        writer.execute(
            f"UPDATE {version_table(table.name)} SET batch = ?, settled_ms = NULL"
            f" WHERE ({key_columns(table)}) = ({keys}) AND (ts, node, rank) = (?, ?, ?)"
            " AND (batch IS NULL OR batch <= ?)",
            (context.batch, *bound(each.key), *each.version, context.published),
        )
    changed = writer.changes()
    if changed:
        context.batch_used = True
    return changed


def delete(replica: Replica, context: Context, table: Table, found: Sequence[Found]) -> int:
    """The cluster has deleted these and forgotten it: out, into the conflict log. Returns how many."""
    deleted = 0
    for each in found:
        local = store.find_version(replica.writer, table, each.key) or NO_VERSION
        pending = local.batch is not None and local.batch > context.published
        content = store.read(replica.writer, table, each.key)
        if local.version != each.version or pending or content is None:
            continue
        context.recorder.conflict(table.name, each.key, local.version, None, FORGOTTEN, content)
        store.delete(replica.writer, table, each.key)
        store.forget_version(replica.writer, table, each.key)
        if table.name in context.sparse_tables:
            sparse.forget(replica.writer, table.name, identity(table, each.key))
        deleted += 1
    if deleted:
        replica.unseen.deleted_without_trace(table.name)
    return deleted


def take_parked(replica: Replica, context: Context, parked: Sequence[Parked]) -> None:
    """Rows that wait at the snapshot's node: tried here, and waiting here too if they do not fit."""
    resolver = resolve.Resolver(replica.writer, context, versions.UNBOUNDED_MS)
    for each in parked:
        if replica.wants(each.table):
            resolver.apply(each.as_changes())
        else:
            left_out.add(replica.writer, [each.table])
