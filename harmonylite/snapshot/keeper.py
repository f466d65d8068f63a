"""Takes snapshots: one node at a time, when one is due, wanted or asked for; keeps as many as there is room for.

Life of one: lease -> copy beside the database -> compressed -> room made in the store -> uploaded, manifest last ->
older ones removed. Whatever fails, the files beside the database are removed, the reason is told, replication goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

import apsw

from harmonylite import __version__, clock
from harmonylite.config.model import Snapshot as SnapshotConfig
from harmonylite.engine import Engine
from harmonylite.observe.log import Repeated
from harmonylite.snapshot.choice import log_knows_since_ms
from harmonylite.snapshot.due import APART_S, FETCHING, BackOff, Due
from harmonylite.snapshot.link import Link
from harmonylite.snapshot.local import (
    copy_database,
    has_unversioned,
    is_joined,
    leaves_out,
    note_taken,
    set_joined,
    taken_here,
)
from harmonylite.snapshot.manifest import Manifest, in_order, new_id
from harmonylite.snapshot.mirroring import Mirroring
from harmonylite.snapshot.retention import make_room, prune
from harmonylite.snapshot.state import SnapshotState
from harmonylite.snapshot.stores.base import StoreError, StoreFull, StoreUnavailable
from harmonylite.snapshot.workfiles import (
    SnapshotFailed,
    WorkFiles,
    check_room,
    megabytes,
    pack,
    remove,
    stoppable,
)
from harmonylite.stream.lease import Lease, LeaseLost, SnapshotRequest
from harmonylite.stream.log import LogError
from harmonylite.tasks import run_together

log = logging.getLogger(__name__)

# Pause between two looks for requests; a leaf's questions travel over its link, and its hub usually answers first.
LOOK_S, LEAF_LOOK_S = 2.0, 30.0
# The store's list is asked for at least that often, for the age that operators watch; it is known after each change.
LIST_S = 600.0
# The longest pause between two tries to take one.
LONGEST_RETRY_S = 3600.0
# An upload that is interrupted is taken up again, after longer and longer pauses.
LONGEST_PAUSE_S = 60.0
# The copy and its compressed form lie beside the database at the same time.
ROOM_FACTOR = 1.6


class NotNow(SnapshotFailed):
    """This node may not take a snapshot at present; another may."""


class SnapshotKeeper:
    """One per daemon. `run` serves one connection; `save` may be called any time.

    why_not: why this node's state is not fit to be a snapshot (it is behind, rows are parked); None if it is.
    ends: the last sequence of each stream, as far as known. leaf: others should be asked before this node.
    """

    def __init__(
        self,
        config: SnapshotConfig,
        max_entries: int,
        engine: Engine,
        files: WorkFiles,
        state: SnapshotState,
        *,
        why_not: Callable[[], str | None],
        ends: Callable[[], dict[str, int]],
        leaf: bool,
    ) -> None:
        self._config = config
        self._engine = engine
        self._files = files
        self._state = state
        self.why_not = why_not
        self._ends = ends
        self._leaf = leaf
        self._mirror = Mirroring(bool(config.mirror), files, state, age_s=self.age_s, leaf=leaf)
        self._link: Link | None = None
        self._one_at_a_time = asyncio.Lock()
        self._listed_at: float | None = None
        self._asking, self._taking = BackOff(LIST_S), BackOff(LONGEST_RETRY_S)
        self._trouble = Repeated(log, 600.0)
        self._due = Due(config.interval, max_entries, engine.replica.tolerance_ms)
        engine.metrics.snapshot_age_seconds.set_function(self.age_s)

    def now_ms(self) -> int:
        """By the server's clock, if that is known."""
        return self._engine.time.server.now_ms() or clock.wall_ms()

    def age_s(self) -> float | None:
        """Age of the newest snapshot known, seconds by the server's clock; None without one, or if it is from the
        future."""
        return self._due.age_s(self._state.newest, self.now_ms())

    # -- the loop

    async def run(self, link: Link) -> None:
        """Until cancelled: take snapshots when they are due. Nothing that goes wrong here ends it."""
        self._link = link
        if not link.store.costly:
            self._asking.succeeded()  # it may have been the connection
        try:
            await run_together(self._keep(link), self._mirror.run(link))
        finally:
            self._link = None
            if not link.store.costly:
                self._state.unanswered = None

    async def _keep(self, link: Link) -> None:
        while True:
            try:
                await self._round(link)
            except (StoreError, SnapshotFailed, LogError, OSError, apsw.Error) as error:
                self._trouble.warning("snapshots cannot be looked after", {"reason": str(error)})
            except Exception as error:  # whatever it is, replication must not end with it
                self._trouble.error("a mistake in harmonylite: snapshots fail", {"error": repr(error)})
            await asyncio.sleep(LEAF_LOOK_S if self._leaf else LOOK_S)

    async def _round(self, link: Link) -> None:
        if self._asking.waits:
            return
        if self._state.unanswered or self._listed_at is None or time.monotonic() - self._listed_at > LIST_S:
            await self._list(link)
        if self._asking.waits or self._taking.waits or self.why_not() is not None:
            return
        requests = await self._requests(link)
        if self._why_due(await self._for_this_node(requests)) is None:
            return
        await self._list(link)  # somebody else may have taken one
        reason = self._why_due(await self._for_this_node(requests))
        if reason is not None and not self._asking.waits:
            await self._try(link, reason)

    async def _list(self, link: Link) -> None:
        """Ask the store what it has; if it does not say, again after longer and longer pauses."""
        try:
            await self.refresh(link)
        except StoreError:
            with contextlib.suppress(LogError):
                if self.why_not() is None and self._why_due(await self._requests(link)) is not None:
                    self._engine.metrics.snapshot_failures.inc(1)

    async def _requests(self, link: Link) -> list[SnapshotRequest]:
        await link.lease.ensure_bucket()
        own = link.settings.node_id
        return [request for request in await link.lease.requests() if request.node_id != own]

    async def _for_this_node(self, requests: list[SnapshotRequest]) -> list[SnapshotRequest]:
        """Without those of nodes that did not want the newest one either, if it may be for want of a table that this
        node leaves out, too: others go first."""
        newest, age_s = self._state.newest, self.age_s()
        if requests and newest is not None and (age_s or 0.0) < APART_S and await leaves_out(self._engine):
            return [request for request in requests if request.newer_than != newest.id]
        return requests

    def _why_due(self, requests: Sequence[SnapshotRequest]) -> str | None:
        return self._due.why(self._state.newest, self.now_ms(), self._ends(), requests)

    async def _try(self, link: Link, reason: str) -> None:
        try:
            await self._take(link, reason)
        except NotNow as error:
            log.debug("no snapshot taken", extra={"fields": {"reason": str(error)}})
        except (StoreError, SnapshotFailed, LogError, OSError, apsw.Error) as error:
            self._note_failure(error)

    def _note_failure(self, error: Exception) -> None:
        self._taking.failed()
        self._state.failure = str(error) or type(error).__name__
        self._engine.metrics.snapshot_failures.inc(1)
        self._trouble.warning("no snapshot was taken; replication goes on", {"reason": self._state.failure})

    @property
    def store_is_away(self) -> bool:
        """Whether it did not answer a short while ago."""
        return self._asking.waits

    async def refresh(self, link: Link) -> list[Manifest]:
        """Ask the store what it has. Raises StoreError, which `status` shows until it answers."""
        try:
            listed = await link.store.list()
        except StoreError as error:
            self._asking.failed()
            self._state.unanswered = str(error)
            self._trouble.warning("the store of the snapshots cannot be asked", {"reason": str(error)})
            raise
        self._answered()
        manifests = in_order(listed, self._due.latest_ms(self.now_ms()))
        newest = manifests[0] if manifests else None
        if newest is not None and self._state.newest is not None and newest.id > self._state.newest.id:
            self._state.failure = None  # another node could
        self._state.newest = newest
        return manifests

    def _answered(self) -> None:
        self._state.unanswered = None
        self._asking.succeeded()
        self._listed_at = time.monotonic()

    # -- on demand

    async def save(self, reason: str = "asked for") -> Manifest:
        """Take a snapshot now. Raises SnapshotFailed with the reason if that cannot be."""
        link = self._link
        if link is None:
            raise SnapshotFailed("this node is not connected to NATS")
        if (why_not := self.why_not()) is not None:
            raise SnapshotFailed(f"this node's state is not complete: {why_not}")
        try:
            return await self._take(link, reason)
        except NotNow:
            raise
        except (StoreError, LogError, SnapshotFailed, OSError, apsw.Error) as error:
            self._note_failure(error)
            raise SnapshotFailed(self._state.failure or "") from None

    async def to_merge(self, link: Link, manifests: Sequence[Manifest]) -> list[Manifest]:
        """The snapshots that this node could go on from, and that are not certain to hold nothing new for it, as they
        were copied from this very database: another node's rows from before the installation may be in them."""
        own = await taken_here(self._engine)
        states = await link.states()
        others = [each for each in manifests if each.id not in own]
        return [each for each in others if await link.why_unusable(each, states) is None]

    # -- taking one

    async def _take(self, link: Link, reason: str) -> Manifest:
        """Raises NotNow, SnapshotFailed, StoreError, LogError, OSError, apsw.Error."""
        if self._one_at_a_time.locked():
            raise NotNow("a snapshot is being taken already")
        async with self._one_at_a_time:
            if (incomplete := self._engine.replica.completeness.incomplete) is not None:
                raise NotNow(f"this node's state is not complete: {incomplete}")
            if parked := await self._engine.parked():
                raise NotNow(f"rows are parked here: {parked} (harmonylite parked says why)")
            await link.lease.ensure_bucket()
            if not await link.lease.acquire():
                raise NotNow(f"node {await link.lease.holder()} is taking one")
            log.info("taking a snapshot", extra={"fields": {"reason": reason}})
            begun = time.monotonic()
            taken: list[Manifest] = []
            try:
                await run_together(self._hold(link.lease), self._make(link, taken))
            except asyncio.CancelledError:
                # Quickly: the lease expires by itself. Over a link that does not hold, a copy each time wears the card.
                self._taking.failed()
                raise
            except BaseException:
                await self._release(link.lease)
                raise
            finally:
                self._state.taking = None
                await remove(self._files.copy, self._files.packed)
            await self._release(link.lease)
            manifest = taken[0]
            with contextlib.suppress(StoreError, LogError):  # else `join` finds out
                if not (await is_joined(self._engine) or await self.to_merge(link, await self.refresh(link))):
                    await set_joined(self._engine)
            self._engine.metrics.snapshots_taken.inc(1)
            self._state.failure = None
            self._taking.succeeded()
            fields = {
                "id": manifest.id,
                "size": megabytes(manifest.size),
                "stored": megabytes(manifest.stored_size),
                "seconds": round(time.monotonic() - begun, 1),
            }
            log.info("snapshot taken", extra={"fields": fields})
            return manifest

    @staticmethod
    async def _hold(lease: Lease) -> None:
        """Keep the lease; ends with LeaseLost, and with it what was being done under it."""
        trouble = 0
        while True:
            await asyncio.sleep(lease.ttl_s / 3)
            try:
                await lease.renew()
                trouble = 0
            except LeaseLost:
                raise
            except LogError:
                trouble += 1
                if not lease.held or trouble > 3:
                    raise LeaseLost("the lease could not be renewed in time: another node may take it") from None

    @staticmethod
    async def _release(lease: Lease) -> None:
        try:
            await lease.release()
        except LogError as error:
            log.debug("lease not given back, it runs out", extra={"fields": {"error": str(error)}})

    async def _make(self, link: Link, taken: list[Manifest]) -> None:
        engine, files, state = self._engine, self._files, self._state
        size = files.database_bytes()
        check_room(files.copy.parent, int(size * ROOM_FACTOR), "a snapshot")
        info = await copy_database(engine, files.copy, state.take("copying the database"))
        if info.incomplete is not None:  # a moment ago
            raise NotNow(f"this node's state is not complete: {info.incomplete}")
        if info.parked:
            raise NotNow(f"rows are parked here: {info.parked} (harmonylite parked says why)")
        if (reason := self.why_not()) is not None:  # the log broke meanwhile
            raise NotNow(reason)
        with_unversioned = await has_unversioned(engine, files.copy)
        compressing = state.take("compressing")
        packed = await stoppable(lambda stop: pack(files.copy, files.packed, stop, compressing))
        await remove(files.copy)
        server_ms = self.now_ms()
        manifest = Manifest(
            id=new_id(server_ms, link.settings.node_id),
            node_id=link.settings.node_id,
            version=__version__,
            created_ms=server_ms,
            positions=info.positions,
            schema=info.fingerprint,
            size=packed.size,
            stored_size=packed.stored_size,
            sha256=packed.sha256,
            tombstones_since_ms=max(
                info.tombstones_since_ms,
                log_knows_since_ms(info.positions, engine.replica.tombstone_retention_ms, server_ms),
            ),
            unversioned=with_unversioned,
        )
        in_use = await self._in_use(link)
        if not await is_joined(engine):
            listed = await link.store.list()
            known = await taken_here(engine) & {each.id for each in listed}
            await note_taken(engine, {*known, manifest.id})
            # The rows that this node lacks of them may be in nothing else: see `join`.
            in_use |= {each.id for each in await self.to_merge(link, listed)}
        await self._upload(link, manifest, in_use)
        taken.append(manifest)
        self._due.taken()
        self._state.newest, self._state.in_mirror = manifest, False
        self._answered()
        try:
            await prune(link.store, self._config.retain, in_use | {manifest.id}, self._due.latest_ms(server_ms))
        except StoreError as error:
            log.warning("old snapshots could not be removed", extra={"fields": {"reason": str(error)}})

    async def _in_use(self, link: Link) -> frozenset[str]:
        """Snapshots that somebody is fetching."""
        reasons = [request.reason for request in await self._requests(link)]
        return frozenset(reason.removeprefix(FETCHING) for reason in reasons if reason.startswith(FETCHING))

    async def _upload(self, link: Link, manifest: Manifest, in_use: frozenset[str]) -> None:
        """A store that does not answer for a moment is asked again: an upload goes on where it was."""

        async def unusable(other: Manifest) -> str | None:
            return await link.why_unusable(other, await link.states())

        pause = 1.0
        while True:
            try:
                await link.store.upload(manifest, self._files.packed, self._state.take(f"storing {manifest.id}"))
                return
            except StoreFull as full:
                await make_room(link.store, manifest, unusable, in_use, full, self._due.latest_ms(self.now_ms()))
                continue
            except StoreUnavailable as error:
                if pause > LONGEST_PAUSE_S:
                    raise
                log.info("storing the snapshot is interrupted", extra={"fields": {"reason": str(error)}})
            await asyncio.sleep(pause)
            pause *= 2
