"""One replica: its file, its application, its clock, and the engine that it feeds as the daemon would."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from harmonylite.db.held import HELD, is_held
from harmonylite.db.outbox import OutgoingGroup
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.model import Group, Position
from tests.sim import catchup, reading
from tests.sim.application import Application
from tests.sim.history import Operation, Write
from tests.sim.news import News
from tests.sim.observe import observe
from tests.sim.process import Crash, Process
from tests.sim.reference import (
    Change,
    Observed,
    ReferenceNode,
    RowWrite,
)

if TYPE_CHECKING:
    from tests.sim.world import World

# Longer than any history.
NEVER_MS = 10 * 365 * 86_400_000
# The daemon absorbs again when a write slipped in before the reader was pinned; so often at most in a row here.
COLLECT_ATTEMPTS = 5


class Node(Process):
    """`index` in the world, `id` in the cluster. `offset_ms`: what its clock shows minus the server's."""

    def __init__(self, world: World, index: int, node_id: int) -> None:
        super().__init__(world.folder / f"node-{index}.db")
        self.world = world
        self.index = index
        self.id = node_id
        history = world.history
        self.offset_ms = history.offsets[index] if history.offsets else 0
        self.listens_only = index >= history.nodes - history.listeners
        self.online = False
        self._knows_time = False
        # Rows were marked by a merge: their groups are no longer those of the transactions that wrote them.
        self.republishes = False
        # Groups read and not sent; where more come from; sent ones whose acknowledgement is under way;
        # acknowledged ones that did not come back yet.
        self._unsent: deque[OutgoingGroup] = deque()
        self._snapshot: Iterator[OutgoingGroup] | None = None
        self._unacknowledged: deque[tuple[OutgoingGroup, int]] = deque()
        self._unread: deque[tuple[OutgoingGroup, int]] = deque()
        self._after = 0
        # Whether held batches are to be tried.
        self._held_due = False
        self.news = News()
        # Of this process: see `stream.lineage.note_emptied`.
        self.emptied: dict[str, Position] = {}
        # Sequence numbers of own messages that were acknowledged in this session.
        self.own: set[int] = set()
        # The groups of each connection, in the order in which they were sent, whatever became of them.
        self.collected: list[list[Group]] = []
        self.transactions: list[list[RowWrite]] = []
        self.reference = ReferenceNode(node_id, world.tolerance_ms, self.listens_only)
        self.open_application()
        self.cursors: dict[int, int] = {}
        self._targets: list[int] = []

    def clock_ms(self) -> int:
        return self.world.server.now_ms + self.offset_ms

    # --- the application ---

    def open_application(self) -> None:
        self.application = Application(self.path, self.world.history.tables, self.clock_ms, self.world.next_serial)

    def prepare(self) -> None:
        """The schema and the first rows, before HarmonyLite is installed: their rows have no version."""
        self.application.create()
        self.seed(self.world.history.seed_rows)

    def seed(self, operations: Sequence[Operation]) -> None:
        """Rows from before the installation."""
        for effect in self.application.transaction(operations):
            self.world.record(0, 0, effect)
            if effect.after is not None:
                self.reference.rows[effect.place] = effect.after

    def write(self, step: Write) -> None:
        """A transaction of the application. Raises apsw.BusyError while the engine holds the lock."""
        if self.listens_only:
            return
        effects = self.application.transaction(step.operations, commit=step.commit)
        if step.commit:
            self.reference.tried(self.clock_ms())
        self.transactions.append([self.world.record(self.id, self.clock_ms(), effect) for effect in effects])
        for write in self.transactions[-1]:
            self.reference.wrote(write)

    # --- the daemon's life ---

    def start(self) -> None:
        if self._replica is not None:
            return
        settings = ReplicaSettings(
            node_id=self.id,
            publish=not self.listens_only,
            group_rows=self.world.history.group_rows,
            tolerance_ms=self.world.tolerance_ms,
            tombstone_retention_ms=self.world.history.retention_ms or NEVER_MS,
        )
        with self.engine():
            replica = Replica(self.path, settings, self.clock_ms)
            replica.open()
        self._replica = replica
        self.follow()

    def stop(self) -> None:
        if self._replica is not None:
            self.disconnect()
            self.call(Replica.flush)
            self.call(Replica.close)
            self._replica = None
            self._knows_time = False
            self.emptied.clear()
            self._connections.clear()
            self.follow()

    def bury(self) -> None:
        """What the kernel does for a killed process: its files are closed, open transactions are gone."""
        self.disconnect()
        self._knows_time = False
        self.emptied.clear()
        self.close_files()

    def remove(self) -> None:
        """The end of the world."""
        self.dead = False
        self._countdown = self._race = None
        self.bury()
        self.application.close()

    # --- the daemon's work, each as one step ---

    def learn_time(self) -> None:
        """The server's time, as the daemon asks for it while it is connected (an old server does not tell)."""
        if not self.world.history.time_known:
            return
        now = self.world.server.now_ms
        self._knows_time = True
        self.reference.heard_server_time(now)
        try:
            self.call(lambda replica: replica.times.server_time(now))
        finally:
            self.reference.follow(self.observe(), (), now, may_clamp=True)
        self.reference.took_server_time(now)

    def prune(self) -> None:
        """Forget old tombstones, as the daemon does every hour while it is connected."""
        if catchup.at_the_end(self):
            self.learn_time()
            self.call(Replica.prune_tombstones, self.world.server.now_ms)
            self.reference.forgot(self.observe())

    def connect(self) -> None:
        """Online; from now on the end of the streams, as it is now, must be consumed before publishing."""
        if self.online or self._replica is None:
            return
        self.online = self._held_due = True
        self.collected.append([])
        server = self.world.server
        self._targets = [len(stream) for stream in server.streams]
        self.learn_time()
        if not catchup.bridge(self):
            self.disconnect()

    def disconnect(self) -> None:
        """The connection is gone, and with it everything that was under way."""
        self.online = False
        self._unsent.clear()
        self._unacknowledged.clear()
        self._unread.clear()
        self.own.clear()
        self._after = 0
        self._let_go()

    def _let_go(self) -> None:
        snapshot, self._snapshot = self._snapshot, None
        close = getattr(snapshot, "close", None)
        if close is not None:
            with contextlib.suppress(Crash):  # of a process that is dead already
                close()

    def bound_ms(self) -> int | None:
        """The latest time that a write may claim, if this node's daemon knows the server's time: since it was first
        connected it does, by a clock that nobody sets.
        """
        if not self._knows_time:
            return None
        self.reference.heard_server_time(self.world.server.now_ms)
        return self.world.server.now_ms + self.world.tolerance_ms

    def absorb(self) -> None:
        self.call(Replica.absorb, self.bound_ms())
        self.follow()

    def collect(self, how: str) -> None:
        """Pending rows become groups to be sent, if this node may publish now and has sent all before."""
        if not self.online or self.listens_only or self.has_groups() or not self.caught_up():
            return
        self.news.collected()
        if self._collect_held():
            return
        for _ in range(COLLECT_ATTEMPTS):
            if how == "locked":
                self._unsent.extend(self._locked())
                self.follow()
                return
            self.absorb()
            groups = self._outgoing(how == "writer")
            if groups is not None:
                return

    def _collect_held(self) -> bool:
        """Whether what is held is tried again."""
        limit = self.world.server.max_rows
        if limit is not None and any(rows <= limit for rows in self.held().values()):
            self._held_due = True
        groups = self.call(lambda replica: replica.outgoing.read(HELD)) if self._held_due else None
        if groups is not None:
            self._unsent.extend(self.call(lambda _: list(groups)))
            self._held_due = False
        return bool(self._unsent)

    def limit_changed(self) -> None:
        """The stream may hold what it refused."""
        if self._replica is not None:
            self._held_due = True
            self.call(lambda replica: replica.outgoing.keep_together())

    def held(self) -> dict[int, int]:
        """Held batches with their numbers of rows."""
        return self.call(lambda replica: replica.outgoing.held())

    def waits(self) -> bool:
        """Whether anything is pending that is not held."""
        pending: int = self.call(lambda replica: replica.pending(held=False))
        return pending > 0

    def _locked(self) -> list[OutgoingGroup]:
        bound_ms = self.bound_ms()
        return self.call(lambda replica: replica.outgoing.read_locked(self._after, bound_ms))

    def _outgoing(self, on_writer: bool) -> Iterator[OutgoingGroup] | None:
        groups: Iterator[OutgoingGroup] | None = self.call(
            lambda replica: replica.outgoing.read(self._after, on_writer=on_writer)
        )
        if on_writer and groups is not None:
            self._unsent.extend(self.call(lambda _: list(groups)))
        else:
            self._snapshot = groups
        return groups

    def has_groups(self) -> bool:
        """Whether collected groups wait to be sent."""
        return bool(self._unsent) or self._snapshot is not None

    def caught_up(self) -> bool:
        return all(self.cursors[shard] >= target for shard, target in enumerate(self._targets))

    def _next_group(self) -> OutgoingGroup | None:
        if not self._unsent and self._snapshot is not None:
            snapshot = self._snapshot
            group = self.call(lambda _: next(snapshot, None))
            if group is None:
                self._let_go()
                return None
            self._unsent.append(group)
        return self._unsent.popleft() if self._unsent else None

    def publish(self, count: int, fate: str = "acked") -> bool:
        """Send up to `count` groups; `fate` as in history.Publish. Whether any was sent."""
        outgoing: list[OutgoingGroup] = []
        while len(outgoing) < count and (group := self._next_group()) is not None:
            outgoing.append(group)
        shard = self.index % self.world.history.shards
        for place, group in enumerate(outgoing):
            if not self.world.server.holds(group.group):
                if self._refused(group):
                    break
                continue
            if not self.republishes:
                self.collected[-1].append(group.group)
            self.reference.sends(group.group, self.world.server.now_ms)
            self.news.check(self.id, group.group)
            if not is_held(group.through):
                self._after = max(self._after, group.through)
            lost = (fate == "lost" and place == len(outgoing) - 1) or (fate == "hole" and place == 0)
            if not lost:
                self._unacknowledged.append((group, self.world.server.store(shard, group.group)))
        if fate == "lost":
            self._acknowledge()
        if fate == "unacked" and self._unacknowledged:
            self._unacknowledged.pop()
            self._acknowledge()
        if fate == "acked":
            self._acknowledge()
        elif fate != "late" and outgoing:
            self.disconnect()
        return bool(outgoing)

    def _refused(self, group: OutgoingGroup) -> bool:
        """A group is too large for its stream: one transaction is held, several are cut. Whether everything that comes
        after those is collected again."""
        self.republishes = True
        if group.span.lo == group.span.hi:
            self._after = max(self._after, 0 if is_held(group.through) else group.through)
            self.call(lambda replica: replica.outgoing.hold(group.span.hi))
            return False
        self.call(lambda replica: replica.outgoing.keep_apart(group.span.lo, group.span.hi))
        self._unsent.clear()
        self._let_go()
        self._after = group.span.lo - 1
        return True

    def _acknowledge(self) -> None:
        """All acknowledgements that are under way arrive, in order."""
        while self._unacknowledged:
            group, sequence = self._unacknowledged.popleft()
            self.own.add(sequence)
            self._unread.append((group, sequence))
        self.read_back()

    def read_back(self) -> None:
        """A group counts as published once this node has read it in its place: then no position is stored from before
        it, which would pass the gap test when the log has lost it."""
        position = self.cursors.get(self.index % self.world.history.shards, 0)
        while self._unread and self._unread[0][1] <= position:
            group, _ = self._unread.popleft()
            self.published(group.through)

    def published(self, through: int) -> None:
        """The stream has everything up to a batch, or a held batch."""

        if is_held(through):
            while self.call(lambda replica: replica.outgoing.release(through)):
                pass
        else:
            self.call(lambda replica: replica.outgoing.mark_published(through))

    def deliver(self, shard: int, count: int, again: int = 0) -> bool:
        """Apply the next messages of a stream, old ones again before them. Whether there were new ones."""
        return reading.deliver(self, shard, count, again)

    def consume(self) -> bool:
        """Apply everything there is. Whether there was anything."""
        return reading.consume(self)

    def follow(self, changes: Iterable[Change] = ()) -> None:
        """The reference takes `changes` for what took effect since it was last asked."""
        self.reference.follow(self.observe(), changes, self.world.server.now_ms)

    def stream(self, shard: int) -> str:
        return self.world.server.name(shard)

    def observe(self) -> Observed:
        """The node's database as it is."""
        return observe(self.application.connection, self.world.history.tables)
