"""Which snapshots a node can go on from: those whose position the streams still continue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nats.aio.client import Client

from harmonylite.db.copy import DamagedCopyError
from harmonylite.model import Position
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores.base import CorruptSnapshot, SnapshotMissing
from harmonylite.stream.lineage import same_log
from harmonylite.stream.log import LogSettings, StreamState, parse_time_ns

# What is wrong with one snapshot, so that another is used.
USELESS = (CorruptSnapshot, SnapshotMissing, DamagedCopyError)


def log_knows_since_ms(positions: Iterable[Position], retention_ms: int, server_ms: int) -> int:
    """Who has read the log, but nothing else, may lack deletes from before that time (server's clock).

    A stream begins with what nodes still had when it was made, as they fill one again that was lost; and each forgets
    a delete `retention_ms` after the cluster had it. server_ms: now, as nothing is known of the future. A node that has
    kept more does not know that, as it may have begun with a snapshot or a log of others: its manifest says too late a
    time. That brings no delete back: who was away for longer keeps fewer rows, and has them in its conflict log.
    """
    created = [_created_ms(position) for position in positions]
    return max(0, min(max(created, default=0), server_ms) - retention_ms)


def _created_ms(position: Position) -> int:
    try:
        return parse_time_ns(position.created) // 1_000_000
    except ValueError:
        return 0  # nothing was read yet


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
