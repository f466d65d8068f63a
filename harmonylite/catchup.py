"""Catching up when the log does not go on where this node stopped: from a snapshot, or by filling the log again.

A *trimmed* log has dropped messages that this node never read: only a snapshot from after them helps, and until there
is one this node waits and says so; it never goes on with a hole. A *lost* log has forgotten messages that it had
acknowledged, or is another one: whatever this node has is published again at the versions it has, unless a snapshot
of the log as it is now tells what of it the others have already.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import apsw

from harmonylite import clock
from harmonylite.db.copy import DamagedCopyError, DamagedDatabaseError
from harmonylite.engine import Engine
from harmonylite.model import Position
from harmonylite.observe.log import Repeated, rfc3339
from harmonylite.snapshot.choice import USELESS, log_knows_since_ms
from harmonylite.snapshot.fetching import fetch, refuse
from harmonylite.snapshot.link import Link
from harmonylite.snapshot.listing import Listing
from harmonylite.snapshot.local import merge_snapshot, publish_again
from harmonylite.snapshot.manifest import Manifest, in_order
from harmonylite.snapshot.state import SnapshotState
from harmonylite.snapshot.stores.base import StoreError
from harmonylite.snapshot.workfiles import NoRoom, SnapshotFailed, WorkFiles
from harmonylite.stream.log import LogError, StreamState
from harmonylite.tasks import cancelled, wait_first

log = logging.getLogger(__name__)

# Between two looks for a snapshot, and after a store or a disk that refused.
LOOK_S, TROUBLE_S = 3.0, 10.0
# A database that is damaged does not mend itself: the pause after each try is twice as long, up to this.
DAMAGED_S = 600.0
# After so long without a snapshot an operator is told what can be done.
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Gap:
    """Where a stream does not go on. lost: acknowledged messages are gone from it, or it is another stream; needed:
    the last message that is missing here, as far as known; in_step: nothing is, there is no gap. stream: empty if no
    stream has one; missed: what else a snapshot has to contain, of streams as they were."""

    stream: str
    reason: str
    lost: bool
    needed: int
    in_step: bool = False
    missed: tuple[Position, ...] = ()

    def needs(self, states: Mapping[str, StreamState]) -> dict[str, int]:
        """What a snapshot has to contain of the streams as they are now."""
        still = {(state.name, state.created) for state in states.values()}
        missed = {each.stream: each.sequence for each in self.missed if (each.stream, each.created) in still}
        return {**missed, self.stream: self.needed}

    @property
    def reads_on(self) -> bool:
        """Whether the streams are read meanwhile, as there is no gap in them."""
        return not self.stream


class CatchUp:
    """One per daemon; bridges one gap at a time."""

    def __init__(self, engine: Engine, files: WorkFiles, state: SnapshotState) -> None:
        self._engine = engine
        self._files = files
        self._state = state
        self._lock = asyncio.Lock()
        self._merging: asyncio.Task[None] | None = None
        self._merging_for: Gap | None = None
        self._removing: asyncio.Task[None] | None = None
        self._bridging = 0
        self._declared = asyncio.Event()
        self._damaged_s = self._not_before = 0.0
        self._listing = Listing()
        self._trouble = Repeated(log, 600.0)

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being merged, or waited for."""
        return self._lock.locked() or self._merging is not None

    @property
    def bridging(self) -> bool:
        """Whether that is because messages were missed."""
        return self._bridging > 0 or self._merges_for_gap

    @property
    def _merges_for_gap(self) -> bool:
        return self._merging is not None and self._merging_for is not None and not self._merging_for.reads_on

    def declare_complete(self) -> None:
        """The operator's word that what is here is to count although messages were missed: waiting ends."""
        self._declared.set()

    def caught_up(self) -> None:
        """All streams were read to their ends."""
        self._declared.clear()
        if not self.busy and self._files.downloads():
            self._removing = asyncio.ensure_future(self._files.keep_only(None))

    async def may_read(self) -> None:
        """Returns when the streams may be read: not while the snapshot for an earlier connection's gap is merged. This
        connection may lead to another log, which that snapshot knows nothing of: what came from there would be taken
        for rows that everybody else has deleted."""
        while self._merges_for_gap and self._merging is not None:
            await asyncio.wait([self._merging])

    async def close(self) -> None:
        """End what goes on without a connection."""
        await cancelled(self._merging)
        await cancelled(self._removing)

    async def bridge(self, link: Link, gap: Gap) -> bool:
        """Returns when reading can go on from the database's position. Whether the log has to be filled again, so
        that everybody publishes much at the same time. Raises LogError when the log cannot be asked; the next call
        goes on with what is there."""
        self._bridging += 1
        self._engine.metrics.catching_up.set(1)
        try:
            async with self._lock:
                try:
                    refilled = await self._bridge(link, gap)
                    await self._withdraw(link)
                    return refilled
                finally:
                    self._told()
        finally:
            self._bridging -= 1
            self._engine.metrics.catching_up.set(int(self.bridging or self._merging is not None))

    async def merge_another(
        self, link: Link, *, in_step: bool = True, but: Collection[str] = (), missed: tuple[Position, ...] = ()
    ) -> bool:
        """Merge a snapshot although there is no gap (see `snapshot.join`); False if there is none to use. in_step,
        missed: as in Gap; but: ids of those that are of no use.

        Raises StoreError, LogError, SnapshotFailed, OSError.
        """
        async with self._lock:
            try:
                await self._merged()
                await self._sit_out_damage()
                gap = Gap("", "", lost=False, needed=0, in_step=in_step, missed=missed)
                listed = [each for each in self._ordered(await link.store.list()) if each.id not in but]
                if (manifest := await self._choose(link, gap, listed)) is None:
                    return False
                await self._use(link, gap, manifest)
                await self._withdraw(link)
                if self._state.damage:
                    raise SnapshotFailed(self._state.damage)
                return not self._state.is_refused(manifest)
            finally:
                self._told()

    def _told(self) -> None:
        if self._merging is None:  # else it goes on, and says how far it is
            self._state.caught_up()

    @staticmethod
    async def _withdraw(link: Link) -> None:
        """Not when cancelled, which has to be quick: a request expires by itself."""
        with contextlib.suppress(LogError):
            await link.lease.withdraw()

    async def _bridge(self, link: Link, gap: Gap) -> bool:
        begun = time.monotonic()
        while True:
            try:
                refilled = await self._try(link, gap, begun)
            except (apsw.CorruptError, apsw.NotADBError) as error:
                self._found_damage(DamagedDatabaseError(self._engine.replica.path, error))
                continue
            if refilled is not None:
                return refilled

    async def _try(self, link: Link, gap: Gap, begun: float) -> bool | None:
        """One look, one snapshot, or one short wait. As `bridge`; None: not bridged yet."""
        await self._merged()
        await self._sit_out_damage()
        if await self._is_bridged(link, gap):
            return False
        trouble = None
        try:
            manifests = self._ordered(await self._listing.manifests(link))
            self._state.newest = manifests[0] if manifests else None
            if (manifest := await self._choose(link, gap, manifests)) is not None:
                await self._use(link, gap, manifest)
                return None
        except (StoreError, NoRoom, OSError) as error:
            if isinstance(error, StoreError):
                self._listing.failed(error)
            trouble = str(error)
        state = (await link.states())[gap.stream]
        unknown = await self._why_not_complete(link, gap, state)
        if self._declared.is_set() or unknown is None:
            await self._refill(gap, state)
            return True
        if trouble is not None:
            self._state.catching_up = f"waiting: {trouble}"
            self._trouble.warning("catching up waits", {"reason": trouble})
            await wait_first(self._declared, timeout_s=TROUBLE_S)
        else:
            await self._ask(link, replace(gap, reason=unknown), begun)
        return None

    def _found_damage(self, error: DamagedDatabaseError) -> None:
        """Of this node's own database: no other snapshot would help, and nothing else does until somebody does it."""
        self._state.damage = str(error)
        self._trouble.error("this node's database is damaged; it cannot catch up", {"reason": str(error)})
        self._damaged_s = min(2 * self._damaged_s, DAMAGED_S) if self._damaged_s else TROUBLE_S
        self._not_before = time.monotonic() + self._damaged_s

    async def _sit_out_damage(self) -> None:
        while (left_s := self._not_before - time.monotonic()) > 0:
            self._state.catching_up = f"waiting: {self._state.damage}"
            await asyncio.sleep(left_s)

    async def _is_bridged(self, link: Link, gap: Gap) -> bool:
        """Whether the database's position is one to read on from: a snapshot for another stream may have moved it."""
        position = await self._engine.position(gap.stream)
        if position is None or position.sequence < gap.needed:
            return False
        state = (await link.states())[gap.stream]
        return await link.goes_on(state, position)

    # -- from a snapshot

    def _ordered(self, manifests: Sequence[Manifest]) -> list[Manifest]:
        """Newest first."""
        return in_order(manifests, self._now_ms() + self._engine.replica.tolerance_ms)

    def _now_ms(self) -> int:
        return self._engine.time.server.now_ms() or clock.wall_ms()

    async def _choose(self, link: Link, gap: Gap, manifests: list[Manifest]) -> Manifest | None:
        """The newest snapshot to go on from; rather one that was fetched already, or in part."""
        here = self._files.downloads()
        known = [manifest for manifest in manifests if not self._state.is_refused(manifest)]
        states = await link.states()
        # The sort is stable: newest first among equals.
        for manifest in sorted(known, key=lambda each: each.id not in here):
            reason = await link.why_unusable(manifest, states, gap.needs(states))
            if reason is None:
                return manifest
            log.debug("snapshot is of no use", extra={"fields": {"id": manifest.id, "reason": reason}})
        return None

    async def _use(self, link: Link, gap: Gap, manifest: Manifest) -> None:
        """Fetch a snapshot and merge it. Raises StoreError, NoRoom or OSError when that has to wait."""
        try:
            await self._fetch_and_merge(link, gap, manifest)
        except USELESS as error:
            await refuse(self._files, self._state, manifest, error)

    async def _fetch_and_merge(self, link: Link, gap: Gap, manifest: Manifest) -> None:
        begun = time.monotonic()
        path = await fetch(link, self._files, self._state, manifest)
        states = await link.states()
        if (reason := await link.why_unusable(manifest, states, gap.needs(states))) is not None:
            # It took so long that the stream has moved on; what was fetched is of no use to anybody.
            log.warning(
                "the stream has passed the snapshot that was fetched; a newer one is used",
                extra={"fields": {"id": manifest.id, "reason": reason}},
            )
            await self._files.forget(manifest.id)
            return
        self._merging_for = gap
        self._merging = asyncio.ensure_future(self._merge(gap, manifest, path, begun))
        self._merging.add_done_callback(self._end_merging)
        await self._merged()

    async def _merged(self) -> None:
        """Wait for a merge that is under way, if there is one."""
        if (merging := self._merging) is not None:
            await asyncio.wait([merging])
            merging.result()

    def _end_merging(self, merging: asyncio.Task[None]) -> None:
        self._merging = None
        self._state.caught_up()
        self._engine.metrics.catching_up.set(int(self.bridging))
        if not merging.cancelled() and (error := merging.exception()) is not None:
            # Whoever waits for it hears it, too, unless the connection was lost.
            log.debug("merging failed", extra={"fields": {"error": str(error)}})

    async def _merge(self, gap: Gap, manifest: Manifest, path: Path, begun: float) -> None:
        """It needs no connection, and goes on without one: over a link that drops every minute it would never end.
        The gap test of the next session tells whether the log still goes on after the snapshot."""
        telling = self._state.catch_up(f"merging snapshot {manifest.id}")
        try:
            report = await merge_snapshot(
                self._engine, path, manifest, telling, in_step=gap.in_step, reads_on=gap.reads_on, lost=gap.lost
            )
            if gap.lost:
                # The log forgot what is after the snapshot, although the sequence numbers may be the same.
                [position] = [each for each in manifest.positions if each.stream == gap.stream]
                await self._engine.move_position(position)
        except DamagedCopyError as error:
            await refuse(self._files, self._state, manifest, error)
            return
        except DamagedDatabaseError as error:
            self._found_damage(error)
            return
        self._state.damage, self._damaged_s = None, 0.0
        await self._files.forget(manifest.id)
        fields: dict[str, Any] = {
            "id": manifest.id,
            "written": report.written,
            "deleted": report.deleted,
            "to_publish": report.marked,
            "longest_lock_ms": round(report.longest_s * 1000),
            "seconds": round(time.monotonic() - begun, 1),
        }
        log.info("caught up from a snapshot", extra={"fields": fields})

    # -- without one

    async def _why_not_complete(self, link: Link, gap: Gap, state: StreamState) -> str | None:
        """What this node cannot know without a snapshot; None if it may go on without one."""
        if not gap.lost or not await self._misses_nothing(link, state):
            return gap.reason
        replica = self._engine.replica
        here = Position(state.name, state.created, 0)
        since_ms = log_knows_since_ms([here], replica.tombstone_retention_ms, self._now_ms())
        synced_ms = await self._engine.write(lambda: replica.completeness.synced_at_ms([here]))
        if synced_ms < since_ms:
            # What it published again might be rows that all the others have deleted, and forgotten that.
            when = f"it was last in step at {rfc3339(synced_ms / 1000)}" if synced_ms else "it was never in step"
            return f"{gap.reason}; this node was away for longer than deletes are remembered, {when}"
        return None

    async def _misses_nothing(self, link: Link, state: StreamState) -> bool:
        """Whether all that the log holds can be read: it begins with its first message, or with one that was stored
        before the one this node had read last (so that it has read all before it).

        After a power cut that lost the tail, the server's clock may begin in the past: then times say nothing, and new
        messages that were dropped again, unread, would be missed.
        """
        if state.first_seq <= 1:
            return True
        position = await self._engine.position(state.name)
        if position is None or position.created != state.created or not position.stored_ns:
            return False
        behind = state.server_ms is not None and state.server_ms * 1_000_000 < position.stored_ns
        if behind or state.first_seq > position.sequence:
            return False
        if state.last_seq >= position.sequence:  # that number was given out again
            again_ns = await link.stored_ns(state, position.sequence)
            if again_ns is None or again_ns <= position.stored_ns:
                return False
        first_ns = await link.stored_ns(state, state.first_seq)
        return first_ns is not None and first_ns <= position.stored_ns

    async def _refill(self, gap: Gap, state: StreamState) -> None:
        position = Position(gap.stream, state.created, max(0, state.first_seq - 1, 0 if gap.lost else gap.needed))
        declared = self._declared.is_set()
        log.error(
            "this node's state is declared complete by the operator; its rows are published again"
            if declared
            else "the log lost messages; what is here is published again, whoever wrote it",
            extra={"fields": {"stream": gap.stream, "reason": gap.reason, "read_from": position.sequence + 1}},
        )
        await publish_again(self._engine, position, self._state.catch_up("marking what is to be published again"))

    async def _ask(self, link: Link, gap: Gap, begun: float) -> None:
        """Ask the cluster for a snapshot, and wait a little."""
        newest = self._state.newest
        text = f"waiting for a snapshot, {gap.reason}"
        try:
            await link.lease.ensure_bucket()
            await link.lease.wanted(gap.reason, newest.id if newest is not None else "")
            text += "; the other nodes are asked for one"
        except LogError as error:
            text += f"; the other nodes cannot be asked: {error}"
        if time.monotonic() - begun > PATIENCE_S:
            text += (
                "; none of them has taken one: is a node up that has everything? If there is none any more,"
                " run `harmonylite snapshot save --force` on the node whose data is to count"
            )
        self._state.catching_up = text
        self._trouble.warning(
            "waiting for a snapshot; this node does not go on without what it missed",
            {"stream": gap.stream, "reason": gap.reason},
        )
        await wait_first(self._declared, timeout_s=min(LOOK_S, link.lease.ttl_s / 3))
