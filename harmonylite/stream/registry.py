"""The nodes that the cluster knows: a key-value bucket beside the log, one key per node."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nats.aio.client import Client

from harmonylite.stream.bucket import Bucket, KeyTaken
from harmonylite.stream.log import LogError, LogSettings, stream_state

log = logging.getLogger(__name__)

# A node that announced itself this recently is alive.
LIVE_MS = 30_000
# A bucket is small; the bound keeps one node from filling the hub.
MAX_VALUE_BYTES = 64 * 1024
# Requests under way at once when all nodes are listed.
_PARALLEL = 32


class DuplicateNode(LogError):  # noqa: N818 - what was found
    """Another live instance announces itself under this node id."""

    def __init__(self, node_id: int, hostname: str, instance_id: str) -> None:
        super().__init__(
            f"node id {node_id} is in use by another running instance, {instance_id} on {hostname}: "
            "give this device its own node_id (a cloned card keeps the old one)"
        )
        self.node_id = node_id
        self.hostname = hostname
        self.instance_id = instance_id


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """What a node says of itself.

    instance_id: of the database; it differs between two devices with one node id, unless one was copied from the
    other; schema: fingerprint; position: last sequence applied, by stream; seen_ms: the node's own clock when it
    said so; stored_ms: the server's, 0 before it is stored; stopped: it signed off since; alive: it did not, and
    announced itself within LIVE_MS, by the server's clock (by ours before server 2.10).
    """

    node_id: int
    instance_id: str
    version: str = ""
    hostname: str = ""
    schema: str = ""
    pending_rows: int = 0
    position: Mapping[str, int] = field(default_factory=dict)
    seen_ms: int = 0
    stored_ms: int = 0
    stopped: bool = False
    alive: bool = False


@dataclass(frozen=True, slots=True)
class _Stored:
    """The last message of a key. entry: None if it was deleted or cannot be read; run: the process that wrote it."""

    entry: NodeEntry | None
    run: str
    revision: int


# One process is one run, over all its connections.
_PROCESS_RUN = uuid.uuid4().hex


class Registry:
    """Announces this node and lists all. A bucket per log: `<stream_prefix>-nodes`."""

    def __init__(self, client: Client, settings: LogSettings, *, run: str = _PROCESS_RUN) -> None:
        self._client = client
        self._settings = settings
        config = {"storage": "file", "max_msg_size": MAX_VALUE_BYTES}
        name = f"{settings.stream_prefix}-nodes"
        self._bucket = Bucket(lambda: client, settings, name, config, what="registry")
        self._run = run
        self._held = False  # this process has announced itself
        self._revision: int | None = None  # of its last announcement, if that still is the key's last message

    async def ensure_bucket(self) -> None:
        """Make the bucket if it is missing. Raises StreamUnavailable, ApiError, StreamMissing (this node may not)."""
        await self._bucket.ensure()

    async def announce(self, entry: NodeEntry) -> None:
        """Write this node's entry; call it more often than every LIVE_MS.

        The first announcement of a process takes the key over from an instance that is not alive, and from the same
        instance (a restart). After that nobody else may write it: so two copies of one device, with everything
        equal, notice each other. Raises DuplicateNode, StreamUnavailable, StreamMissing or ApiError.
        """
        if self._revision is None:
            self._revision = await self._last_revision(entry)
        try:
            self._revision = await self._put(entry, self._revision)
        except KeyTaken:
            # Another instance, or an announcement of ours that was stored although it timed out.
            self._revision = None
            self._revision = await self._put(entry, await self._last_revision(entry))
        self._held = True

    async def sign_off(self, entry: NodeEntry) -> None:
        """Say that this node stops, so that its id is free at once. Only over an announcement of this process: if that
        is not the key's last message, somebody else has the id, and nothing is written.

        Raises StreamUnavailable or ApiError.
        """
        if self._revision is None:
            return
        with contextlib.suppress(KeyTaken):
            await self._put(replace(entry, stopped=True), self._revision)
        self._revision, self._held = None, False

    async def nodes(self) -> list[NodeEntry]:
        """Every node that ever announced itself, by id. Raises StreamUnavailable, StreamMissing or ApiError."""
        now_ms = await self._now_ms()
        keys = await self._bucket.keys("node.*")
        slots = asyncio.Semaphore(_PARALLEL)

        async def get(key: str) -> _Stored | None:
            async with slots:
                return await self._get(key, now_ms)

        found = await asyncio.gather(*map(get, keys))
        entries = [stored.entry for stored in found if stored is not None and stored.entry is not None]
        return sorted(entries, key=lambda entry: entry.node_id)

    async def _last_revision(self, entry: NodeEntry) -> int:
        """The revision to write over, 0 for none. Raises DuplicateNode if it is another live instance's."""
        stored = await self._get(_key(entry.node_id), await self._now_ms())
        if stored is None:
            return 0
        other = stored.entry
        if other is None or not other.alive or stored.run == self._run:
            return stored.revision
        if self._held or other.instance_id != entry.instance_id:
            raise DuplicateNode(entry.node_id, other.hostname, other.instance_id)
        return stored.revision

    async def _now_ms(self) -> int:
        """The server's clock; ours if the server does not say (before 2.10)."""
        state = await stream_state(self._client, self._settings, self._bucket.stream)
        return state.server_ms if state.server_ms is not None else int(time.time() * 1000)

    async def _get(self, key: str, now_ms: int) -> _Stored | None:
        found = await self._bucket.get(key)
        if found is None:
            return None
        if not found.data:  # deleted by an operator
            return _Stored(None, "", found.revision)
        try:
            fields: dict[str, Any] = json.loads(found.data)
            return _Stored(_entry(fields, found.stored_ms, now_ms), str(fields["run"]), found.revision)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("entry cannot be read, left out", extra={"fields": {"key": key, "error": repr(error)}})
            return _Stored(None, "", found.revision)

    async def _put(self, entry: NodeEntry, revision: int) -> int:
        """Write if the key's last message is `revision` (else KeyTaken); the new one. Raises as `sign_off`."""
        data = json.dumps(
            {
                "node_id": entry.node_id,
                "instance_id": entry.instance_id,
                "run": self._run,
                "version": entry.version,
                "hostname": entry.hostname,
                "schema": entry.schema,
                "pending_rows": entry.pending_rows,
                "position": dict(entry.position),
                "seen_ms": entry.seen_ms,
                "stopped": entry.stopped,
            }
        ).encode()
        return await self._bucket.put(_key(entry.node_id), data, revision)


def _key(node_id: int) -> str:
    return f"node.{node_id}"


def _entry(fields: Mapping[str, Any], stored_ms: int, now_ms: int) -> NodeEntry:
    """Raises ValueError, KeyError, TypeError or AttributeError if that is not an entry."""
    stopped = bool(fields.get("stopped", False))
    return NodeEntry(
        node_id=int(fields["node_id"]),
        instance_id=str(fields["instance_id"]),
        version=str(fields.get("version", "")),
        hostname=str(fields.get("hostname", "")),
        schema=str(fields.get("schema", "")),
        pending_rows=int(fields.get("pending_rows", 0)),
        position={str(stream): int(sequence) for stream, sequence in fields.get("position", {}).items()},
        seen_ms=int(fields.get("seen_ms", 0)),
        stored_ms=stored_ms,
        stopped=stopped,
        alive=not stopped and now_ms - stored_ms < LIVE_MS,
    )
