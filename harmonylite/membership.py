"""This node in the cluster's registry: announced while it replicates, signed off when it stops."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from nats.aio.client import Client

from harmonylite import __version__, clock
from harmonylite.config import Config
from harmonylite.db.replica import Replica
from harmonylite.observe.control import ControlError
from harmonylite.observe.log import Repeated, rfc3339
from harmonylite.progress import Progress
from harmonylite.report import Reporter
from harmonylite.stream.log import LogError, LogSettings
from harmonylite.stream.registry import DuplicateNode, NodeEntry, Registry
from harmonylite.uplink import Uplink

log = logging.getLogger(__name__)

ANNOUNCE_S = 10.0
# What a stop may take to sign off; without it the entry counts as live for half a minute more.
SIGN_OFF_S = 1.0


class Membership:
    """One registry per connection: `join` for each."""

    def __init__(
        self, config: Config, replica: Replica, reporter: Reporter, progress: Progress, uplink: Uplink
    ) -> None:
        self._config = config
        self._replica = replica
        self._reporter = reporter
        self._progress = progress
        self._uplink = uplink
        self._registry: Registry | None = None
        self._trouble = Repeated(log, 600.0)

    def join(self, client: Client, settings: LogSettings) -> None:
        """From now on the registry is used over this connection."""
        self._registry = Registry(client, settings)

    async def announce(self) -> None:
        """For ever: tell the cluster about this node; a second live node with our id makes both say so."""
        registry = self._registry
        assert registry is not None, "join() first"
        while True:
            try:
                await registry.ensure_bucket()
                await registry.announce(self._entry())
                self._reporter.fault = None
            except DuplicateNode as error:
                self._reporter.fault = str(error)
                self._trouble.error("this node id is used twice", {"reason": str(error)})
            except LogError as error:
                log.debug("registry not reached", extra={"fields": {"error": str(error)}})
            await asyncio.sleep(ANNOUNCE_S)

    async def sign_off(self) -> None:
        """This node stops: whoever takes its id next, a cleaned-up database for instance, need not wait."""
        if self._registry is None or not self._uplink.connected:
            return
        try:
            await asyncio.wait_for(self._registry.sign_off(self._entry()), SIGN_OFF_S)
        except (LogError, asyncio.TimeoutError) as error:
            log.debug("not signed off", extra={"fields": {"error": str(error)}})

    async def nodes(self) -> list[dict[str, Any]]:
        """Every node of the cluster, as `status --cluster` shows it. Raises ControlError."""
        if self._registry is None or not self._uplink.connected:
            raise ControlError("this node is offline: the cluster cannot be asked")
        try:
            return [_entry_json(entry) for entry in await self._registry.nodes()]
        except LogError as error:
            raise ControlError(f"the cluster cannot be asked: {error}") from None

    def _entry(self) -> NodeEntry:
        schema = self._replica.known_schema  # None for a moment after a failed write
        return NodeEntry(
            node_id=self._config.node_id,
            instance_id=self._replica.instance_id,
            version=__version__,
            hostname=socket.gethostname(),
            schema=schema.fingerprint() if schema else "",
            pending_rows=self._reporter.current().pending_rows,
            position=dict(self._progress.positions),
            seen_ms=clock.wall_ms(),
        )


def _entry_json(entry: NodeEntry) -> dict[str, Any]:
    return {
        "node_id": entry.node_id,
        "status": "alive" if entry.alive else "stopped" if entry.stopped else "silent",
        "last_seen": rfc3339((entry.stored_ms or entry.seen_ms) / 1000),
        "version": entry.version,
        "hostname": entry.hostname,
        "pending_rows": entry.pending_rows,
        "schema": entry.schema,
        "position": dict(entry.position),
    }
