"""Who may take a snapshot, and who needs one: a key-value bucket beside the log, whose keys expire.

The key `leader` is written only on top of what was read, so of two nodes that want it one gets it. Its holder trusts
it for one TTL from before its last renewal, by its own monotonic clock: the server's expires later than that.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harmonylite.stream.bucket import ClientProvider, Entry, ExpiringBucket, KeyTaken
from harmonylite.stream.log import LogError, LogSettings

__all__ = ["ClientProvider", "Lease", "LeaseLost", "SnapshotRequest"]

log = logging.getLogger(__name__)

_LEADER = "leader"
# One process is one run, over all its connections.
_PROCESS_RUN = uuid.uuid4().hex


class LeaseLost(LogError):  # noqa: N818 - what happened
    """Another node holds the lease, or it expired."""


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """A node that needs a snapshot.

    newer_than: the id of the newest one it saw and cannot use, empty if none; stored_ms: server time of its last
    word, milliseconds since 1970.
    """

    node_id: int
    reason: str
    newer_than: str
    stored_ms: int


class Lease:
    """The lease of the node that takes snapshots. A bucket per log: `<stream_prefix>-lease`.

    All methods raise StreamUnavailable, StreamMissing or ApiError.
    """

    def __init__(
        self,
        provider: ClientProvider,
        settings: LogSettings,
        *,
        ttl_ms: int,
        run: str = _PROCESS_RUN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """provider: the present client, such as `lambda: connection.client`; ttl_ms: `[snapshot] leader_ttl`."""
        self._node_id = settings.node_id
        self._run = run
        self._clock = clock
        self._bucket = ExpiringBucket(provider, settings, f"{settings.stream_prefix}-lease", ttl_s=ttl_ms / 1000)
        self._revision: int | None = None
        self._until = 0.0

    @property
    def held(self) -> bool:
        """Is the lease certainly ours now (by our own clock, counted from before its last renewal)?"""
        return self._revision is not None and self._clock() < self._until

    @property
    def ttl_s(self) -> float:
        """How long it lasts after each renewal: what the bucket says. Renew every third of it."""
        return self._bucket.ttl_s

    async def ensure_bucket(self) -> None:
        """Make the bucket if it is missing; the other methods do it by themselves."""
        await self._bucket.ensure()

    async def acquire(self) -> bool:
        """Take the lease, or renew it if it is ours; False: another node holds it."""
        entry = await self._bucket.get(_LEADER)
        if entry is not None and entry.data and not self._is_ours(entry):
            self._revision = None
            return False
        # Ours may also be what a request wrote whose answer was lost.
        if await self._write(0 if entry is None else entry.revision):
            return True
        self._revision = None
        return False

    async def renew(self) -> None:
        """Keep it. Raises LeaseLost if it is not ours any more."""
        if self._revision is None:
            raise LeaseLost("the lease for taking snapshots is not held")
        if await self._write(self._revision):
            return
        # Another node's word, ours from a renewal whose answer was lost, or none: it expired.
        entry = await self._bucket.get(_LEADER)
        if entry is None or not self._is_ours(entry) or not await self._write(entry.revision):
            self._revision = None
            raise LeaseLost("the lease for taking snapshots was lost: it expired, or another node took it")

    async def release(self) -> None:
        """Give it up, so that another may have it at once; nothing happens if it is not ours."""
        revision, self._revision = self._revision, None
        if revision is None:
            return
        try:
            await self._bucket.delete(_LEADER, revision)
        except KeyTaken:
            entry = await self._bucket.get(_LEADER)
            if entry is not None and self._is_ours(entry):
                await self._bucket.delete(_LEADER, entry.revision)

    async def holder(self) -> int | None:
        """The node id that holds it now."""
        entry = await self._bucket.get(_LEADER)
        fields = {} if entry is None else _fields(entry)
        return int(fields["node_id"]) if "node_id" in fields else None

    async def wanted(self, reason: str, newer_than: str = "") -> None:
        """Say that this node needs a snapshot; it expires with the TTL, so say it again every third of it."""
        word = {"node_id": self._node_id, "reason": reason, "newer_than": newer_than}
        await self._bucket.put(f"wanted.{self._node_id}", json.dumps(word).encode())

    async def withdraw(self) -> None:
        """This node needs none any more."""
        key = f"wanted.{self._node_id}"
        entry = await self._bucket.get(key)
        if entry is not None and entry.data:
            await self._bucket.delete(key)

    async def requests(self) -> list[SnapshotRequest]:
        """Who needs a snapshot now, by node id."""
        found: list[SnapshotRequest] = []
        for key in await self._bucket.keys("wanted.*"):
            entry = await self._bucket.get(key)
            fields = {} if entry is None else _fields(entry)
            if entry is not None and "node_id" in fields:
                reason, newer_than = str(fields.get("reason", "")), str(fields.get("newer_than", ""))
                found.append(SnapshotRequest(int(fields["node_id"]), reason, newer_than, entry.stored_ms))
        return sorted(found, key=lambda request: request.node_id)

    async def _write(self, revision: int) -> bool:
        """Write the key on top of `revision`; False if its last message is another one."""
        begun = self._clock()
        word = json.dumps({"node_id": self._node_id, "run": self._run}).encode()
        try:
            self._revision = await self._bucket.put(_LEADER, word, revision)
        except KeyTaken:
            return False
        self._until = begun + self._bucket.ttl_s
        return True

    def _is_ours(self, entry: Entry) -> bool:
        fields = _fields(entry)
        return fields.get("node_id") == self._node_id and fields.get("run") == self._run


def _fields(entry: Entry) -> dict[str, Any]:
    """What a message says; nothing if it was deleted or cannot be read."""
    try:
        fields = json.loads(entry.data)
    except ValueError:
        return {}
    if not isinstance(fields, dict) or not isinstance(fields.get("node_id"), int):
        return {}
    return fields
