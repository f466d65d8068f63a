"""Which snapshots a node can go on from: those whose position the streams still continue."""

from __future__ import annotations

from collections.abc import Mapping

from nats.aio.client import Client

from harmonylite.db.copy import DamagedCopyError
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores.base import CorruptSnapshot, SnapshotMissing
from harmonylite.stream.log import LogSettings, StreamState, same_log

# What is wrong with one snapshot, so that another is used.
USELESS = (CorruptSnapshot, SnapshotMissing, DamagedCopyError)


async def why_unusable(
    client: Client,
    settings: LogSettings,
    manifest: Manifest,
    states: Mapping[str, StreamState],
    needed: Mapping[str, int],
) -> str | None:
    """Why reading cannot go on after a snapshot; None if it can.

    states: the streams as they are now; needed: the least sequence, by stream, that it has to contain. Raises
    StreamUnavailable or ApiError.
    """
    positions = {position.stream: position for position in manifest.positions}
    for name, state in states.items():
        position = positions.get(name)
        if position is None:
            return f"it knows nothing of stream {name}"
        if position.sequence < needed.get(name, 0):
            return f"it ends at {position.sequence} of stream {name}, {needed[name]} is needed"
        lineage = await same_log(client, settings, state, position)
        if not lineage.intact:
            return f"stream {name}: {lineage.reason}"
    return None
