"""Snapshots and this node's database: copied, merged, marked, each in steps that the application hardly feels."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection
from functools import partial
from pathlib import Path

import apsw

from harmonylite.db import unversioned
from harmonylite.db.copy import (
    CopyCancelledError,
    CopyInfo,
    DamagedCopyError,
    DamagedDatabaseError,
    check_copy,
    remove_database,
    start_copy,
)
from harmonylite.db.marking import Marking
from harmonylite.db.merge import Merger, MergeReport, Work
from harmonylite.engine import Engine
from harmonylite.model import Position
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.workfiles import Progress, SnapshotFailed, stoppable

# A copy needs a moment without unabsorbed changes: so many tries, so far apart.
COPY_TRIES, COPY_PAUSE_S = 20, 0.5


async def copy_database(engine: Engine, target: Path, progress: Progress) -> CopyInfo:
    """Write a consistent copy of the database to `target`, the application running, and check it: page by page,
    damage would be copied, and stored with a digest that fits. Nothing of it is left when cancelled.

    Raises SnapshotFailed if the application never pauses or the database is damaged, apsw.Error.
    """
    replica, clock = engine.replica, engine.time
    for _ in range(COPY_TRIES):
        try:
            copy = await engine.write(lambda: start_copy(replica, target, clock.bound_ms(), clock.correction))
        except (apsw.CorruptError, apsw.NotADBError) as error:
            raise SnapshotFailed(str(DamagedDatabaseError(replica.path, error))) from None
        if copy is not None:
            break
        await asyncio.sleep(COPY_PAUSE_S)
    else:
        raise SnapshotFailed("the application commits without a pause: no moment was found for a copy")
    copied, checked = _halves(progress)
    try:
        info = await stoppable(lambda stop: copy.run(copied, stop.is_set))
        # Not the database itself: a view of it that is held for long keeps its write-ahead log growing.
        await stoppable(lambda stop: _check(target, checked, stop))
        return info
    except CopyCancelledError:
        raise asyncio.CancelledError from None
    except DamagedCopyError as error:
        raise SnapshotFailed(str(DamagedDatabaseError(engine.replica.path, error.detail))) from None
    finally:
        copy.close()


def _check(copy: Path, progress: Progress, stop: threading.Event) -> None:
    try:
        check_copy(copy, progress, stop.is_set)
    except BaseException:
        remove_database(copy)
        raise


def _halves(progress: Progress) -> tuple[Progress, Progress]:
    """For two steps that take about the same time."""
    return (
        lambda done, total: progress(done, 2 * total),
        lambda done, total: progress(total + done, 2 * total),
    )


async def merge_snapshot(
    engine: Engine,
    snapshot: Path,
    manifest: Manifest,
    progress: Progress,
    *,
    in_step: bool = False,
    reads_on: bool = False,
    lost: bool = False,
) -> MergeReport:
    """Take over what a snapshot has newer, mark for publication what it lacks, and set the positions. in_step,
    reads_on and lost: see Merger.

    Cancelled or killed anywhere, it is simply done again. Raises DamagedCopyError, DamagedDatabaseError.
    """
    clock = engine.time
    now_ms = clock.server.now_ms()
    merger = Merger(
        engine.replica,
        snapshot,
        manifest.positions,
        manifest.tombstones_since_ms,
        # The server's clock may have been ahead when it was taken.
        created_ms=manifest.created_ms if now_ms is None else min(manifest.created_ms, now_ms),
        in_step=in_step,
        reads_on=reads_on,
        lost=lost,
    )

    def write(work: Work) -> None:
        merger.write(work, clock.bound_ms(), clock.correction)

    try:
        await engine.write(merger.open)
        while (work := await stoppable(lambda stop: merger.find(stop.is_set))) is not None:
            if not work.empty:
                await engine.write_gently(partial(write, work))
            progress(merger.progress.done, merger.progress.total)
        report = await engine.write(lambda: merger.finish(clock.bound_ms(), clock.correction))
        await set_joined(engine)
        return report
    finally:
        # A job that nobody waits for any more may still be running on the writer's thread: close behind it.
        await engine.write(merger.close)


async def publish_again(engine: Engine, position: Position, progress: Progress) -> None:
    """Everything here is pending again, whoever wrote it, at the versions it has; reading goes on at `position` once
    all of it is marked."""
    await mark_all(engine, progress)
    await engine.move_position(position)


async def mark_all(engine: Engine, progress: Progress) -> None:
    """As `publish_again`, reading going on where it is."""
    marking = Marking(engine.replica)
    while await engine.write_gently(marking.step):
        progress(marking.looked_at, 0)


async def is_joined(engine: Engine) -> bool:
    """Whether this database has been part of a snapshot."""
    return await engine.write(lambda: unversioned.is_joined(engine.replica))


async def set_joined(engine: Engine) -> None:
    """This database was merged with a snapshot, or is one."""
    await engine.write(lambda: unversioned.set_joined(engine.replica))


async def taken_here(engine: Engine) -> frozenset[str]:
    """See `unversioned.taken`."""
    return await engine.write(lambda: unversioned.taken(engine.replica))


async def note_taken(engine: Engine, ids: Collection[str]) -> None:
    """See `unversioned.taken`."""
    await engine.write(lambda: unversioned.note_taken(engine.replica, ids))


async def leaves_out(engine: Engine) -> bool:
    """Whether a snapshot of this node is of no use to some other nodes, because it leaves out a table of theirs."""
    return await engine.write(engine.replica.leaves_out)


async def has_unversioned(engine: Engine, database: Path | None = None) -> bool:
    """Whether there are rows without a version in this node's database, or in a copy of it."""
    schema, path = engine.replica.known_schema, database or engine.replica.path
    return schema is not None and await stoppable(lambda stop: unversioned.exist(path, schema, stop.is_set))
