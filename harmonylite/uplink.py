"""Whether this node reaches the streams: its connection to NATS and, on a leaf, the link from there to the hub.

A leaf's client is connected to the nats-server beside it, which answers although the hub is far away. Replication has
to know: after every cut it reads to the end again before it publishes.
"""

from __future__ import annotations

import asyncio
import time

from nats.aio.client import Client

from harmonylite.stream.client import Connection
from harmonylite.stream.server import ServerState
from harmonylite.stream.server_log import DUPLICATE_NODE
from harmonylite.tasks import run_together, wait_for

# Long after the last time that the hub said so; leaves dial again every second or so.
DUPLICATE_S = 30.0


class Uplink:
    """Made before the bundled server, which tells it of its link; `connection` is set once it exists."""

    connection: Connection

    def __init__(self, *, leaf: bool) -> None:
        self._leaf = leaf
        self._link_error: str | None = None
        self._link_lost: float | None = None
        self._duplicate_at: float | None = None
        self._changed = asyncio.Event()

    def server_changed(self, state: ServerState) -> None:
        """The bundled server has a new state (BundledServer's on_change)."""
        error = state.link_error if self._leaf else None
        if error == DUPLICATE_NODE:
            self._duplicate_at = time.monotonic()
        if (error is None) != (self._link_error is None):
            self._link_lost = None if error is None else time.time()
            self._changed.set()
            self._changed = asyncio.Event()
        self._link_error = error

    @property
    def connected(self) -> bool:
        """Can the streams be reached, as far as is known?"""
        return self.connection.connected and self._link_error is None

    @property
    def offline_since(self) -> float | None:
        """Seconds since 1970, None while connected."""
        if self.connection.offline_since is not None:
            return self.connection.offline_since
        return self._link_lost

    @property
    def last_error(self) -> str | None:
        """Why there is no connection; None once connected."""
        return self.connection.last_error or self._link_error

    @property
    def duplicate(self) -> str | None:
        """That another leaf has our name, as long as the two push each other off the hub."""
        if self._duplicate_at is None or time.monotonic() - self._duplicate_at > DUPLICATE_S:
            return None
        return DUPLICATE_NODE

    async def wait_connected(self) -> Client:
        """Wait, if need be for ever, until the streams can be reached; returns the client."""
        while True:
            changed = self._changed
            client = await self.connection.wait_connected()
            if self._link_error is None:
                return client
            await run_together(self.connection.wait_disconnected(), wait_for(changed))

    async def wait_disconnected(self) -> None:
        """Wait until they cannot be reached any more."""
        while self.connected:
            await run_together(self.connection.wait_disconnected(), wait_for(self._changed))

    async def wait_changed(self) -> None:
        """Wait until they can be reached and could not, or the other way round."""
        await (self.wait_disconnected() if self.connected else self.wait_connected())
