"""A store in a folder that misbehaves on demand, a lease without NATS, and streams that are what a test says."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import apsw

from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.engine import Engine
from harmonylite.model import Position
from harmonylite.observe.metrics import Metrics
from harmonylite.snapshot.link import Link
from harmonylite.snapshot.manifest import Manifest
from harmonylite.snapshot.stores.base import (
    CorruptSnapshot,
    Ids,
    Manifests,
    Progress,
    SnapshotMissing,
    StoreFull,
    beyond,
    no_progress,
)
from harmonylite.stream.lease import LeaseLost, SnapshotRequest
from harmonylite.stream.log import LogSettings, StreamState
from harmonylite.timekeeping import Timekeeper

STREAM = "harmonylite-changes-1"
CREATED = "2026-11-24T07:00:00Z"


def stream(first: int, last: int, created: str = CREATED) -> StreamState:
    return StreamState(STREAM, created, first, last, last - first + 1, 0, None, 0.0)


@dataclass
class Store:
    """room: bytes in all. on_transfer: called in the middle of an upload or a download. given_up: bytes of uploads
    that nobody goes on with, by id; lists: how often it was asked."""

    folder: Path
    room: int = 1 << 30
    manifests: list[Manifest] = field(default_factory=list)
    trouble: Exception | None = None
    on_transfer: Callable[[], None] = lambda: None
    downloads: list[str] = field(default_factory=list)
    torn: set[str] = field(default_factory=set)
    given_up: dict[str, int] = field(default_factory=dict)
    costly: bool = False
    lists: int = 0

    async def list(self) -> Manifests:
        self.lists += 1
        if self.trouble is not None:
            raise self.trouble
        return sorted(self.manifests, key=Manifest.sort_key, reverse=True)

    async def upload(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        self.on_transfer()
        self.torn.add(manifest.id)
        used = sum(each.stored_size for each in self.manifests) + sum(self.given_up.values())
        if used + manifest.stored_size > self.room:
            raise StoreFull("maximum bytes exceeded")
        shutil.copy(path, self.folder / manifest.id)
        self.manifests.append(manifest)
        self.torn.discard(manifest.id)

    async def download(self, manifest: Manifest, path: Path, progress: Progress = no_progress) -> None:
        self.downloads.append(manifest.id)
        self.on_transfer()
        if manifest not in self.manifests:
            raise SnapshotMissing("gone")
        if not (self.folder / manifest.id).exists():
            raise CorruptSnapshot("not what the manifest says")
        shutil.copy(self.folder / manifest.id, path)

    async def delete(self, snapshot_id: str) -> None:
        self.manifests = [each for each in self.manifests if each.id != snapshot_id]
        self.torn.discard(snapshot_id)

    async def prune(self, retain: int | None) -> Ids:
        gone = beyond(await self.list(), retain)
        for each in gone:
            await self.delete(each)
        gone += self.given_up
        self.given_up.clear()
        return gone

    async def mirror(self, folder: Path, progress: Progress = no_progress) -> Ids:
        return []

    async def close(self) -> None:
        pass


@dataclass
class Lease:
    ttl_s: float = 0.06
    lost: bool = False
    others: int | None = None
    asked: list[SnapshotRequest] = field(default_factory=list)
    own_wish: tuple[str, str] | None = None
    wishes: list[tuple[str, str]] = field(default_factory=list)
    held: bool = False

    async def ensure_bucket(self) -> None:
        pass

    async def acquire(self) -> bool:
        self.held = self.others is None
        return self.held

    async def renew(self) -> None:
        if self.lost:
            self.held = False
            raise LeaseLost("another node holds the lease")

    async def release(self) -> None:
        self.held = False

    async def holder(self) -> int | None:
        return self.others

    async def wanted(self, reason: str, newer_than: str = "") -> None:
        self.own_wish = (reason, newer_than)
        self.wishes.append(self.own_wish)

    async def withdraw(self) -> None:
        self.own_wish = None

    async def requests(self) -> list[SnapshotRequest]:
        return self.asked


class FakeLink(Link):
    """look: the stream as it is now; late_ns: so much later than in their sequence are its messages stored."""

    def __init__(self, store: Store, lease: Lease, look: Callable[[], StreamState], late_ns: int = 0) -> None:
        super().__init__(cast(Any, None), LogSettings(node_id=1), store, cast(Any, lease))
        object.__setattr__(self, "look", look)
        object.__setattr__(self, "late_ns", late_ns)

    __slots__ = ("late_ns", "look")
    look: Callable[[], StreamState]
    late_ns: int

    async def states(self) -> dict[str, StreamState]:
        return {STREAM: self.look()}

    async def goes_on(self, state: StreamState, position: Position) -> bool:
        return position.created == state.created and state.first_seq - 1 <= position.sequence <= state.last_seq

    async def why_unusable(
        self, manifest: Manifest, states: dict[str, StreamState], needed: dict[str, int] | None = None
    ) -> str | None:
        if not manifest.positions:
            return "it knows nothing of the stream"
        [position] = manifest.positions
        if position.sequence < (needed or {}).get(STREAM, 0):
            return "too old"
        return None if await self.goes_on(states[STREAM], position) else "another log"

    async def stored_ns(self, state: StreamState, sequence: int) -> int | None:
        return sequence * 1_000 + self.late_ns


@dataclass
class Node:
    """A real database with its engine. rows: what the application has written."""

    path: Path
    application: apsw.Connection
    engine: Engine

    def write(self, *keys: int, text: str = "x") -> None:
        for key in keys:
            self.application.execute("INSERT OR REPLACE INTO t VALUES (?, ?)", (key, text))

    def rows(self) -> dict[int, str]:
        return dict(cast(Any, self.application.execute("SELECT id, v FROM t")))

    async def at(self, sequence: int, created: str = CREATED) -> None:
        await self.engine.move_position(Position(STREAM, created, sequence, sequence * 1_000))

    async def position(self) -> int:
        found = await self.engine.position(STREAM)
        assert found is not None
        return found.sequence


@contextlib.asynccontextmanager
async def opened(folder: Path, node_id: int = 1) -> AsyncIterator[Node]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "app.db"
    application = apsw.Connection(str(path))
    application.setbusytimeout(5000)
    application.execute("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, v TEXT)")
    replica = Replica(path, ReplicaSettings(node_id=node_id, boot_id="boot"))
    engine = Engine(replica, Timekeeper(60_000), Metrics("h", "l"), compress=True)
    await engine.open()
    try:
        yield Node(path, application, engine)
    finally:
        await engine.close()
        application.close()


def renamed(manifest: Manifest, snapshot_id: str, **changes: Any) -> Manifest:
    """The same snapshot under another id, later by the second in it."""
    return replace(manifest, id=snapshot_id, **changes)
