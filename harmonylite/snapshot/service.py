"""Everything about snapshots in one daemon: who does what when, and what the operator asks and is told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import apsw
from nats.aio.client import Client

from harmonylite.catchup import CatchUp, Gap
from harmonylite.config import Config
from harmonylite.engine import Engine
from harmonylite.observe.control import ControlError
from harmonylite.observe.log import rfc3339
from harmonylite.observe.status import SnapshotInfo
from harmonylite.progress import Progress
from harmonylite.replication import Bridge
from harmonylite.snapshot.install import Installer
from harmonylite.snapshot.join import Joiner
from harmonylite.snapshot.keeper import SnapshotKeeper
from harmonylite.snapshot.link import Link
from harmonylite.snapshot.local import mark_all
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.mend import Mender
from harmonylite.snapshot.state import OFF, SnapshotState, describe
from harmonylite.snapshot.stores import open_store
from harmonylite.snapshot.stores.base import StoreError
from harmonylite.snapshot.workfiles import SnapshotFailed, WorkFiles
from harmonylite.stream.lease import Lease
from harmonylite.stream.log import LogError, LogSettings
from harmonylite.tasks import cancelled, run_together

log = logging.getLogger(__name__)


class SnapshotService:
    """wake: makes the publisher look for pending rows."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        progress: Progress,
        *,
        wake: Callable[[], None],
    ) -> None:
        self._config = config
        self._engine = engine
        self._progress = progress
        self._wake = wake
        self._enabled = config.snapshot.enabled
        self.state = SnapshotState(config.snapshot.store)
        self._files = WorkFiles(config.db_path)
        self.keeper = SnapshotKeeper(
            config.snapshot,
            config.replication_log.max_entries,
            engine,
            self._files,
            self.state,
            why_not=self._why_not,
            ends=lambda: progress.ends,
            leaf=not config.external and bool(config.nats.leaf_servers),
        )
        self._catch_up = CatchUp(engine, self._files, self.state)
        self._mender = Mender(engine, self._catch_up, self.state)
        self._joiner = Joiner(engine, self.keeper, self._catch_up)
        self._installer = Installer(config.db_path, config.node_id, self._files, self.state)
        self._link: Link | None = None
        self._saving: asyncio.Task[Manifest] | None = None
        engine.metrics.catch_up_progress.set_function(self.state.progress)

    def start(self) -> None:
        """Remove what a killed daemon left, except what catching up can use again."""
        try:
            self._files.tidy()
        except OSError as error:
            log.warning("leftovers cannot be removed", extra={"fields": {"reason": str(error)}})

    async def close(self) -> None:
        """End what was asked for and is not done."""
        await cancelled(self._saving)
        await self._catch_up.close()

    # -- one connection

    def _open(self, client: Client, settings: LogSettings) -> Link:
        return Link(
            client=client,
            settings=settings,
            store=open_store(self._config, lambda: client, settings, self._listed, self.keeper.now_ms),
            lease=Lease(lambda: client, settings, ttl_ms=self._config.snapshot.leader_ttl),
        )

    def _listed(self, from_mirror: bool) -> None:
        self.state.in_mirror = from_mirror

    async def serve(self, client: Client, settings: LogSettings) -> None:
        """Until cancelled: take snapshots when they are due, bridge gaps when the session asks for it."""
        if not self._enabled:
            await asyncio.Event().wait()
        link = self._link = self._open(client, settings)
        try:
            await run_together(self.keeper.run(link), self._joiner.run(link), self._mender.run(link))
        finally:
            self._link = None
            await link.store.close()

    def bridging(self, client: Client, settings: LogSettings) -> Bridge | None:
        """What a session calls for a gap; None without snapshots."""
        return partial(self._bridge, client, settings) if self._enabled else None

    async def _bridge(self, client: Client, settings: LogSettings, gap: Gap) -> bool:
        link = self._open(client, settings)
        try:
            return await self._catch_up.bridge(link, gap)
        finally:
            await link.store.close()

    async def install(self, client: Client, settings: LogSettings) -> None:
        """Make the first database of a new node, unless the application does; returns when it is there."""
        if not (self._enabled and self._config.replicate):
            await asyncio.Event().wait()
        link = self._link = self._open(client, settings)
        try:
            await self._installer.run(link)
        finally:
            self._link = None
            await link.store.close()

    async def may_read(self) -> None:
        """See CatchUp.may_read."""
        await self._catch_up.may_read()

    def caught_up(self) -> None:
        """All streams were read to their ends."""
        self._catch_up.caught_up()

    def _why_not(self) -> str | None:
        """Why this node's state is not complete, so that it may not be a snapshot."""
        config, progress = self._config, self._progress
        if not (config.publish and config.replicate):
            return "it does not both publish and replicate"
        if (incomplete := self._engine.replica.completeness.incomplete) is not None:
            return incomplete
        if self._catch_up.busy or progress.catching_up or not progress.publishing:
            return self.state.catching_up or "it has not read everything yet"
        return None

    async def save_before_sleep(self) -> None:
        """`sleep_timeout` promises a snapshot before the daemon ends; one that cannot be taken does not keep it up."""
        newest = self.state.newest
        known = {position.stream: position.sequence for position in newest.positions} if newest else {}
        if not self._enabled or all(known.get(name) == end for name, end in self._progress.ends.items()):
            return
        try:
            await self.keeper.save("before the daemon ends")
        except SnapshotFailed as error:
            log.info("no snapshot before the end", extra={"fields": {"reason": str(error)}})

    # -- the operator

    def info(self) -> SnapshotInfo | None:
        """The newest snapshot known, for `status`."""
        newest, age_s = self.state.newest, self.keeper.age_s() or 0.0
        if newest is None:
            return None
        taken_at = rfc3339(newest.created_ms / 1000)
        in_mirror = self.state.in_mirror
        store = self._config.snapshot.mirror if in_mirror else self.state.store
        return SnapshotInfo(taken_at, age_s, newest.node_id, newest.stored_size, store, newest.id, in_mirror)

    def concerns(self) -> list[str]:
        """What an operator should know, beside catching up."""
        state = self.state
        failure = f"no snapshot was taken: {state.failure}" if state.failure else None
        unanswered = f"the store of the snapshots cannot be asked: {state.unanswered}" if state.unanswered else None
        return [text for text in (unanswered, failure, state.trouble) if text]

    def handlers(self) -> dict[str, Any]:
        """Commands of the control socket."""
        return {
            "snapshot-save": self._on_save,
            "snapshot-progress": self._on_progress,
            "snapshot-nats": self._on_nats,
        }

    async def _on_save(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if not self._enabled:
            raise ControlError(OFF)
        if self._saving is not None and not self._saving.done():
            return {"started": False}
        force = bool(request.get("force"))
        if not self._config.db_path.exists():
            raise ControlError("there is no database yet, of which a snapshot could be taken")
        if self._link is None:
            opened = self._engine.replica.known_schema is not None
            raise ControlError(
                "this node is not connected to NATS: no snapshot can be stored now"
                if opened
                else "the database is not open yet: no snapshot can be taken now"
            )
        if not force and (reason := self._why_not()) is not None:
            raise ControlError(f"this node's state is not complete, so it takes no snapshot: {reason}")
        self._saving = asyncio.create_task(self._save(force))
        # Nobody may ask how it ended.
        self._saving.add_done_callback(lambda task: task.cancelled() or task.exception())
        return {"started": True}

    async def _save(self, force: bool) -> Manifest:
        if force:
            await self._declare_complete()
        return await self.keeper.save()

    async def _declare_complete(self) -> None:
        """What this node missed is given up: nobody has it. What it has is published again, so that all get it."""
        log.warning("snapshot save --force: this node's state is declared complete")
        if self._catch_up.bridging:
            self._catch_up.declare_complete()
        else:
            await mark_all(self._engine, self.state.catch_up("marking what is to be published again"))
            self.state.caught_up()
            self._wake()
        await self._engine.write(self._engine.replica.completeness.declare_complete)
        may_take_one = self._config.publish and self._config.replicate
        while may_take_one and (self._catch_up.busy or self._why_not() is not None):
            if self._catch_up.bridging:  # by a connection that had not found the gap yet
                self._catch_up.declare_complete()
            await asyncio.sleep(0.2)

    async def _on_progress(self, _: Mapping[str, Any]) -> dict[str, Any]:
        task = self._saving
        document: dict[str, Any] = {"running": task is not None and not task.done(), "step": self._step()}
        if task is None or not task.done():
            return document
        if task.cancelled():
            return {**document, "error": "it was interrupted: the connection to NATS was lost, or the daemon stops"}
        error = task.exception()
        if error is None:
            return {**document, "snapshot": describe(task.result())}
        if not isinstance(error, (SnapshotFailed, StoreError, LogError, OSError, apsw.Error)):
            log.error("a snapshot failed", extra={"fields": {"error": repr(error)}})
        return {**document, "error": str(error) or type(error).__name__}

    def _step(self) -> str | None:
        return self.state.taking or self.state.catching_up

    async def _on_nats(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Where a command of this node finds the store itself."""
        if self._link is None:
            raise ControlError("this node is not connected to NATS: the store cannot be asked")
        url = self._link.client.connected_url
        if url is None:
            raise ControlError("this node is not connected to NATS: the store cannot be asked")
        return {"url": f"nats://{url.netloc.rpartition('@')[2]}", "domain": self._link.settings.domain}
