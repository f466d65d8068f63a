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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmonylite.db.copy import remove_database
from harmonylite.engine import Engine
from harmonylite.model import Position
from harmonylite.observe.log import Repeated
from harmonylite.snapshot.choice import USELESS
from harmonylite.snapshot.keeper import FETCHING
from harmonylite.snapshot.link import Link
from harmonylite.snapshot.local import merge_snapshot, publish_again
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.state import SnapshotState
from harmonylite.snapshot.stores.base import StoreError
from harmonylite.snapshot.workfiles import NoRoom, WorkFiles, megabytes, unpack_download
from harmonylite.stream.log import LogError, StreamState
from harmonylite.tasks import run_together, wait_first

log = logging.getLogger(__name__)

# Between two looks for a snapshot, and after a store or a disk that refused.
LOOK_S, TROUBLE_S = 3.0, 10.0
# After so long without a snapshot an operator is told what can be done.
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Gap:
    """Where a stream does not go on. lost: acknowledged messages are gone from it, or it is another stream; needed:
    the last message that is missing here, as far as known."""

    stream: str
    reason: str
    lost: bool
    needed: int


class CatchUp:
    """One per daemon; bridges one gap at a time."""

    def __init__(self, engine: Engine, files: WorkFiles, state: SnapshotState) -> None:
        self._engine = engine
        self._files = files
        self._state = state
        self._lock = asyncio.Lock()
        self._bridging = 0
        self._declared = asyncio.Event()
        self._trouble = Repeated(log, 600.0)

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being merged, or waited for."""
        return self._lock.locked()

    @property
    def bridging(self) -> bool:
        """Whether that is because messages were missed."""
        return self._bridging > 0

    def declare_complete(self) -> None:
        """The operator's word that what is here is to count although messages were missed: waiting ends."""
        self._declared.set()

    def caught_up(self) -> None:
        """All streams were read to their ends."""
        self._declared.clear()
        if not self.busy:
            self._files.keep_only(None)

    async def bridge(self, link: Link, gap: Gap) -> bool:
        """Returns when reading can go on from the database's position. Whether the log has to be filled again, so
        that everybody publishes much at the same time.

        Raises LogError when the log cannot be asked; the next call goes on with what is there.
        """
        self._bridging += 1
        self._engine.metrics.catching_up.set(1)
        try:
            async with self._lock:
                try:
                    refilled = await self._bridge(link, gap)
                    await self._withdraw(link)
                    return refilled
                finally:
                    self._state.caught_up()
        finally:
            self._bridging -= 1
            self._engine.metrics.catching_up.set(int(self.bridging))

    async def merge_another(self, link: Link) -> bool:
        """Merge a snapshot although nothing is missing (see `snapshot.join`); False if there is none to use.

        Raises StoreError, LogError, NoRoom, OSError.
        """
        async with self._lock:
            try:
                gap = Gap("", "", lost=False, needed=0)
                manifest = await self._choose(link, gap, await link.store.list())
                if manifest is None:
                    return False
                await self._use(link, gap, manifest)
                await self._withdraw(link)
                return manifest.id not in self._state.refused
            finally:
                self._state.caught_up()

    @staticmethod
    async def _withdraw(link: Link) -> None:
        """Not when cancelled, which has to be quick: a request expires by itself."""
        with contextlib.suppress(LogError):
            await link.lease.withdraw()

    async def _bridge(self, link: Link, gap: Gap) -> bool:
        begun = time.monotonic()
        while not await self._is_bridged(link, gap):
            trouble = None
            try:
                manifests = await link.store.list()
                self._state.newest = manifests[0] if manifests else None
                if (manifest := await self._choose(link, gap, manifests)) is not None:
                    await self._use(link, gap, manifest)
                    continue
            except (StoreError, NoRoom, OSError) as error:
                trouble = str(error)
            state = (await link.states())[gap.stream]
            if self._declared.is_set() or (gap.lost and await self._misses_nothing(link, state)):
                await self._refill(gap, state)
                return True
            if trouble is not None:
                self._state.catching_up = f"waiting: {trouble}"
                self._trouble.warning("catching up waits", {"reason": trouble})
                await wait_first(self._declared, timeout_s=TROUBLE_S)
            else:
                await self._ask(link, gap, begun)
        return False

    async def _is_bridged(self, link: Link, gap: Gap) -> bool:
        """Whether the database's position is one to read on from: a snapshot for another stream may have moved it."""
        position = await self._engine.position(gap.stream)
        if position is None or position.sequence < gap.needed:
            return False
        state = (await link.states())[gap.stream]
        return await link.goes_on(state, position)

    # -- from a snapshot

    async def _choose(self, link: Link, gap: Gap, manifests: list[Manifest]) -> Manifest | None:
        """The newest snapshot to go on from; rather one that was fetched already, or in part."""
        here = self._files.downloads()
        known = [manifest for manifest in manifests if manifest.id not in self._state.refused]
        states = await link.states()
        # The sort is stable: newest first among equals.
        for manifest in sorted(known, key=lambda each: each.id not in here):
            reason = await link.why_unusable(manifest, states, {gap.stream: gap.needed})
            if reason is None:
                return manifest
            log.debug("snapshot is of no use", extra={"fields": {"id": manifest.id, "reason": reason}})
        return None

    async def _use(self, link: Link, gap: Gap, manifest: Manifest) -> None:
        """Fetch a snapshot and merge it. Raises StoreError, NoRoom or OSError when that has to wait."""
        try:
            await run_together(
                self._tell(link, manifest),
                self._fetch_and_merge(link, gap, manifest),
            )
        except USELESS as error:
            refuse(self._files, self._state, manifest, error)

    async def _tell(self, link: Link, manifest: Manifest) -> None:
        """Let those who remove old snapshots know that this one is being fetched."""
        while True:
            try:
                await link.lease.ensure_bucket()
                await link.lease.wanted(FETCHING + manifest.id, manifest.id)
                await asyncio.sleep(link.lease.ttl_s / 3)
            except LogError as error:
                log.debug("fetching not announced", extra={"fields": {"error": str(error)}})
                await asyncio.sleep(LOOK_S)

    async def _fetch_and_merge(self, link: Link, gap: Gap, manifest: Manifest) -> None:
        begun = time.monotonic()
        path = await fetch(link, self._files, self._state, manifest)
        states = await link.states()
        if (reason := await link.why_unusable(manifest, states, {gap.stream: gap.needed})) is not None:
            # It took so long that the stream has moved on; what was fetched is of no use to anybody.
            log.warning(
                "the stream has passed the snapshot that was fetched; a newer one is used",
                extra={"fields": {"id": manifest.id, "reason": reason}},
            )
            self._files.forget(manifest.id)
            return
        report = await merge_snapshot(
            self._engine, path, manifest, self._state.catch_up(f"merging snapshot {manifest.id}")
        )
        if gap.lost:
            # The log forgot what is after the snapshot, although the sequence numbers may be the same.
            [position] = [each for each in manifest.positions if each.stream == gap.stream]
            await self._engine.move_position(position)
        self._files.forget(manifest.id)
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

    async def _misses_nothing(self, link: Link, state: StreamState) -> bool:
        """Whether all that the log holds can be read: it begins with its first message, or with one that was stored
        before the one this node had read last (so that it has read all before it)."""
        if state.first_seq <= 1:
            return True
        position = await self._engine.position(state.name)
        if position is None or position.created != state.created or not position.stored_ns:
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
            {
                "stream": gap.stream,
                "reason": gap.reason,
            },
        )
        await wait_first(self._declared, timeout_s=min(LOOK_S, link.lease.ttl_s / 3))


async def fetch(link: Link, files: WorkFiles, state: SnapshotState, manifest: Manifest) -> Path:
    """The unpacked snapshot's path; goes on from what an earlier call left. Raises StoreError, NoRoom, OSError."""
    path = files.unpacked(manifest.id)
    if path.exists() and path.stat().st_size == manifest.size:
        return path
    files.keep_only(manifest.id)
    packed = files.download(manifest.id)
    files.check_room(manifest)
    log.info("fetching a snapshot", extra={"fields": {"id": manifest.id, "size": megabytes(manifest.stored_size)}})
    await link.store.download(manifest, packed, state.catch_up(f"fetching snapshot {manifest.id}"))
    await unpack_download(manifest, packed, path, state.catch_up(f"unpacking snapshot {manifest.id}"))
    remove_database(packed)
    return path


def refuse(files: WorkFiles, state: SnapshotState, manifest: Manifest, reason: Exception) -> None:
    """A snapshot turned out to be of no use: it is not tried again here."""
    state.refused.add(manifest.id)
    files.forget(manifest.id)
    log.error(
        "a snapshot is damaged or gone; another one is used",
        extra={"fields": {"id": manifest.id, "reason": str(reason)}},
    )
