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
from harmonylite.tasks import run_together


class Uplink:
    """Made before the bundled server, which tells it of its link; `connection` is set once it exists."""

    connection: Connection

    def __init__(self, *, leaf: bool) -> None:
        self._leaf = leaf
        self._link_error: str | None = None
        self._link_lost: float | None = None
        self._changed = asyncio.Event()

    def server_changed(self, state: ServerState) -> None:
        """The bundled server has a new state (BundledServer's on_change)."""
        error = state.link_error if self._leaf else None
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

    async def wait_connected(self) -> Client:
        """Wait, if need be for ever, until the streams can be reached; returns the client."""
        while True:
            changed = self._changed
            client = await self.connection.wait_connected()
            if self._link_error is None:
                return client
            await run_together(self.connection.wait_disconnected(), _wait(changed))

    async def wait_disconnected(self) -> None:
        """Wait until they cannot be reached any more."""
        while self.connected:
            await run_together(self.connection.wait_disconnected(), _wait(self._changed))


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
