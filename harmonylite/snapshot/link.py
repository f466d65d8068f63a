"""One connection to the cluster, as snapshots use it."""

from __future__ import annotations

from dataclasses import dataclass

from nats.aio.client import Client

from harmonylite.model import Position
from harmonylite.snapshot.choice import why_unusable
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores.base import SnapshotStore
from harmonylite.stream.lease import Lease
from harmonylite.stream.lineage import same_log
from harmonylite.stream.log import (
    LogError,
    LogSettings,
    StreamState,
    ask_time,
    stored_time_ns,
    stream_state,
)


@dataclass(frozen=True, slots=True)
class Link:
    """The client with the log's settings, the store, and the lease with the requests."""

    client: Client
    settings: LogSettings
    store: SnapshotStore
    lease: Lease

    async def states(self) -> dict[str, StreamState]:
        """Every stream as it is now, with the server's time where this node may know it.

        Raises StreamUnavailable, StreamMissing or ApiError.
        """
        states = {name: await stream_state(self.client, self.settings, name) for name in self.settings.streams}
        if all(state.server_ms is not None for state in states.values()):
            return states
        try:
            told = await ask_time(self.client, self.settings)
        except LogError:
            return states
        return {name: state.timed(told) for name, state in states.items()}

    async def why_unusable(
        self, manifest: Manifest, states: dict[str, StreamState], needed: dict[str, int] | None = None
    ) -> str | None:
        """See `choice.why_unusable`."""
        return await why_unusable(self.client, self.settings, manifest, states, needed or {})

    async def goes_on(self, state: StreamState, position: Position) -> bool:
        """Whether a stream goes on after a position. Raises StreamUnavailable or ApiError."""
        return (await same_log(self.client, self.settings, state, position)).intact

    async def stored_ns(self, state: StreamState, sequence: int) -> int | None:
        """See `stored_time_ns`."""
        return await stored_time_ns(self.client, self.settings, state, sequence)
