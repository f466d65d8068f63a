"""The nodes that the cluster knows: two key-value buckets beside the log, one key per node in each.

What a node says every few seconds goes to a bucket in memory: stored, each word is a sync on the hub's card. The other
bucket is stored and lasts. A node writes it when it starts, when it stops, when something about it changes that an
operator asks for, and seldom otherwise: so a hub that restarts still knows the nodes that are away.
"""

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
from harmonylite.stream.log import LogError, LogSettings, StreamMissing, ask_time, stream_state

log = logging.getLogger(__name__)

# A node that announced itself this recently is alive.
LIVE_MS = 30_000
# The stored word of a node that goes on unchanged is at most that old: what a hub that restarted knows of a node that
# went away meanwhile.
STORED_EVERY_S = 900.0
# Where the bucket in memory cannot be had (permissions from before there was one), it is asked for that seldom.
_ASK_AGAIN_S = 600.0
# A bucket is small; the bound keeps one node from filling the hub.
MAX_VALUE_BYTES = 64 * 1024
# Whoever writes to both buckets does it within that time; the one in memory has the latest word.
_AT_ONCE_MS = 1000
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
    announced itself within LIVE_MS, by the server's clock.
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
    """The last message of a key. entry: None if it was deleted or cannot be read; run: the process that wrote it;
    stored_ms, age_ms: by the server's clock."""

    entry: NodeEntry | None
    run: str
    revision: int
    stored_ms: int
    age_ms: int

    def is_alive(self, patience_ms: int) -> bool:
        return self.entry is not None and not self.entry.stopped and self.age_ms < patience_ms


# One process is one run, over all its connections.
_PROCESS_RUN = uuid.uuid4().hex


class Registry:
    """Announces this node and lists all. Two buckets per log: `<stream_prefix>-nodes`, `<stream_prefix>-alive`."""

    def __init__(self, client: Client, settings: LogSettings, *, run: str = _PROCESS_RUN) -> None:
        prefix = settings.stream_prefix
        self._stored = _Keys(client, settings, f"{prefix}-nodes", "file", run)
        self._alive = _Keys(client, settings, f"{prefix}-alive", "memory", run)
        self._run = run
        self._in_memory = True  # the bucket in memory can be had, as far as known
        self._ask_at = 0.0  # monotonic: if not, it is not asked for before
        self._kept: tuple[str, ...] | None = None  # what the stored word says, if it is this process's
        self._kept_at = 0.0

    async def ensure_bucket(self) -> None:
        """Make the buckets if they are missing. Raises StreamUnavailable, ApiError, StreamMissing (this node may not).

        The one in memory may be missing: then every word is stored.
        """
        await self._stored.bucket.ensure()
        if time.monotonic() < self._ask_at:
            return
        try:
            await self._alive.bucket.ensure()
            self._in_memory, self._ask_at = True, 0.0
        except LogError as error:
            self._in_memory, self._ask_at = False, time.monotonic() + _ASK_AGAIN_S
            event = "no bucket in memory; each announcement is written to the server's disk"
            log.warning(event, extra={"fields": {"bucket": self._alive.bucket.stream, "reason": str(error)}})

    async def announce(self, entry: NodeEntry) -> None:
        """Write this node's entry; call it more often than every LIVE_MS, after `ensure_bucket`.

        The first announcement of a process takes the key over from an instance that is not alive, and from the same
        instance (a restart). After that nobody else may write it: so two copies of one device, with everything
        equal, notice each other. Raises DuplicateNode, StreamUnavailable, StreamMissing or ApiError.
        """
        if self._in_memory:
            await self._alive.announce(entry)
        if not self._in_memory or await self._is_due(entry):
            await self._stored.announce(entry)
            self._kept, self._kept_at = _essence(entry), time.monotonic()

    async def sign_off(self, entry: NodeEntry) -> None:
        """Say that this node stops, so that its id is free at once. Only over an announcement of this process: if that
        is not the key's last message, somebody else has the id, and nothing is written.

        Raises StreamUnavailable or ApiError.
        """
        self._kept = None
        await self._stored.sign_off(entry)
        await self._alive.sign_off(entry)

    async def nodes(self) -> list[NodeEntry]:
        """Every node that ever announced itself, by id. Raises StreamUnavailable, StreamMissing or ApiError."""
        newest = await self._stored.all()
        patience_ms = LIVE_MS
        try:
            alive = await self._alive.all() if self._in_memory else None
        except StreamMissing:
            alive = {}  # the hub has just restarted, or nodes of an earlier version are alone
        except LogError:
            alive = None
        if alive is None:
            # What is stored is all that can be seen, and it is written seldom.
            patience_ms += int(STORED_EVERY_S * 1000)
        for key, found in (alive or {}).items():
            if key not in newest or found.stored_ms > newest[key].stored_ms - _AT_ONCE_MS:
                newest[key] = found
        entries = [
            replace(found.entry, alive=found.is_alive(patience_ms))
            for found in newest.values()
            if found.entry is not None
        ]
        return sorted(entries, key=lambda entry: entry.node_id)

    async def _is_due(self, entry: NodeEntry) -> bool:
        """Is the stored word not ours, out of date or old? Asked once per connection: the link may come and go."""
        if self._kept is None:
            found = await self._stored.last(entry.node_id)
            if found is None or found.entry is None or found.run != self._run:
                return True
            self._stored.take_up(found)
            self._kept = _essence(found.entry)
            self._kept_at = time.monotonic() - found.age_ms / 1000
        return self._kept != _essence(entry) or time.monotonic() - self._kept_at >= STORED_EVERY_S


def _essence(entry: NodeEntry) -> tuple[str, ...]:
    """What is stored at once when it changes."""
    return entry.instance_id, entry.version, entry.hostname, entry.schema, str(entry.stopped)


class _Keys:
    """One bucket, with this process's own key in it. Methods raise as those of Registry."""

    def __init__(self, client: Client, settings: LogSettings, name: str, storage: str, run: str) -> None:
        self._client = client
        self._settings = settings
        config = {"storage": storage, "max_msg_size": MAX_VALUE_BYTES}
        self.bucket = Bucket(lambda: client, settings, name, config, what="registry")
        self._run = run
        self._held = False  # this process has announced itself
        self._revision: int | None = None  # of its last announcement, if that still is the key's last message

    async def announce(self, entry: NodeEntry) -> None:
        if self._revision is None:
            self._revision = await self._last_revision(entry)
        try:
            self._revision = await self._put(entry, self._revision)
        except KeyTaken:
            # Another instance, or an announcement of ours that was stored although it timed out.
            self._revision = None
            self._revision = await self._put(entry, await self._last_revision(entry))
        self._held = True

    def take_up(self, found: _Stored) -> None:
        """What this process has said over an earlier connection is its own word here, too."""
        self._revision, self._held = found.revision, True

    async def sign_off(self, entry: NodeEntry) -> None:
        if self._revision is None:
            return
        with contextlib.suppress(KeyTaken):
            await self._put(replace(entry, stopped=True), self._revision)
        self._revision, self._held = None, False

    async def all(self) -> dict[str, _Stored]:
        """The last message of every key."""
        now_ms = await self._now_ms()
        slots = asyncio.Semaphore(_PARALLEL)

        async def get(key: str) -> tuple[str, _Stored | None]:
            async with slots:
                return key, await self._get(key, now_ms)

        found = await asyncio.gather(*map(get, await self.bucket.keys("node.*")))
        return {key: stored for key, stored in found if stored is not None}

    async def last(self, node_id: int) -> _Stored | None:
        """The last message of a node's key."""
        return await self._get(_key(node_id), await self._now_ms())

    async def _last_revision(self, entry: NodeEntry) -> int:
        """The revision to write over, 0 for none. Raises DuplicateNode if it is another live instance's."""
        stored = await self.last(entry.node_id)
        if stored is None:
            return 0
        other = stored.entry
        if other is None or not stored.is_alive(LIVE_MS) or stored.run == self._run:
            return stored.revision
        if self._held or other.instance_id != entry.instance_id:
            raise DuplicateNode(entry.node_id, other.hostname, other.instance_id)
        return stored.revision

    async def _now_ms(self) -> int:
        """The server's clock; ours if it is from before 2.10 and this node may not ask it."""
        state = await stream_state(self._client, self._settings, self.bucket.stream)
        if state.server_ms is not None:
            return state.server_ms
        try:
            return (await ask_time(self._client, self._settings)).now_ms()
        except LogError as error:
            log.debug("the server's time is not known", extra={"fields": {"error": str(error)}})
            return int(time.time() * 1000)

    async def _get(self, key: str, now_ms: int) -> _Stored | None:
        found = await self.bucket.get(key)
        if found is None:
            return None
        age_ms = now_ms - found.stored_ms
        if not found.data:  # deleted by an operator
            return _Stored(None, "", found.revision, found.stored_ms, age_ms)
        try:
            fields: dict[str, Any] = json.loads(found.data)
            entry = _entry(fields, found.stored_ms)
            return _Stored(entry, str(fields["run"]), found.revision, found.stored_ms, age_ms)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("entry cannot be read, left out", extra={"fields": {"key": key, "error": repr(error)}})
            return _Stored(None, "", found.revision, found.stored_ms, age_ms)

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
        return await self.bucket.put(_key(entry.node_id), data, revision)


def _key(node_id: int) -> str:
    return f"node.{node_id}"


def _entry(fields: Mapping[str, Any], stored_ms: int) -> NodeEntry:
    """Raises ValueError, KeyError, TypeError or AttributeError if that is not an entry."""
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
        stopped=bool(fields.get("stopped", False)),
    )
