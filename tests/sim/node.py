"""One replica: its file, its application, its clock, and the engine that it feeds as the daemon would."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import apsw

from harmonylite.db.outbox import OutgoingGroup
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.model import Delivery, Group, Position, ReceivedGroup
from tests.sim import catchup
from tests.sim.application import Application
from tests.sim.history import Write
from tests.sim.observe import observe
from tests.sim.reference import Change, Observed, ReferenceNode, RowWrite, Violation, changes_of

if TYPE_CHECKING:
    from tests.sim.world import World

T = TypeVar("T")

# Longer than any history.
NEVER_MS = 10 * 365 * 86_400_000
CREATED = "2023-11-14T22:13:20Z"
# The daemon absorbs again when a write slipped in before the reader was pinned; so often at most in a row here.
COLLECT_ATTEMPTS = 5


class Crash(BaseException):
    """The daemon is killed here. Not an Exception: nothing in the engine may handle it."""


class Node:
    """`index` in the world, `id` in the cluster. `offset_ms`: what its clock shows minus the server's."""

    def __init__(self, world: World, index: int, node_id: int) -> None:
        self.world = world
        self.index = index
        self.id = node_id
        history = world.history
        self.offset_ms = history.offsets[index] if history.offsets else 0
        self.listens_only = index >= history.nodes - history.listeners
        self.path = world.folder / f"node-{index}.db"
        self.online = False
        self._knows_time = False
        self.dead = False
        # Rows were marked by a merge: their groups are no longer those of the transactions that wrote them.
        self.republishes = False
        # Groups read and not sent; where more come from; sent ones whose acknowledgement is under way.
        self._unsent: deque[OutgoingGroup] = deque()
        self._snapshot: Iterator[OutgoingGroup] | None = None
        self._unacknowledged: deque[tuple[OutgoingGroup, int]] = deque()
        self._after = 0
        # Sequence numbers of own messages that were acknowledged in this session.
        self._own: set[int] = set()
        # The groups of each connection, in the order in which they were sent, whatever became of them.
        self.collected: list[list[Group]] = []
        self.transactions: list[list[RowWrite]] = []
        self.reference = ReferenceNode(node_id, world.tolerance_ms, self.listens_only)
        self.open_application()
        self._replica: Replica | None = None
        self._connections: list[apsw.Connection] = []
        self.cursors: dict[int, int] = {}
        self._targets: list[int] = []
        self._countdown: int | None = None
        self._race: tuple[int, Write] | None = None

    def clock_ms(self) -> int:
        return self.world.server.now_ms + self.offset_ms

    @property
    def running(self) -> bool:
        return self._replica is not None

    # --- the application ---

    def open_application(self) -> None:
        self.application = Application(self.path, self.world.history.tables, self.clock_ms, self.world.next_serial)

    def prepare(self) -> None:
        """The schema and the first rows, before HarmonyLite is installed: their rows have no version."""
        self.application.create()
        for effect in self.application.transaction(self.world.history.seed_rows):
            self.world.record(0, 0, effect)
            if effect.after is not None:
                self.reference.rows[effect.place] = effect.after

    def write(self, step: Write) -> None:
        """A transaction of the application. Raises apsw.BusyError while the engine holds the lock."""
        if self.listens_only:
            return
        effects = self.application.transaction(step.operations, commit=step.commit)
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
        with self._engine():
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
            self._connections.clear()
            self.follow()

    def bury(self) -> None:
        """What the kernel does for a killed process: its files are closed, open transactions are gone."""
        self.disconnect()
        self._replica = None
        self._knows_time = False
        for connection in self._connections:
            connection.close(True)
        self._connections.clear()
        self.dead = False

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
            self.call(Replica.server_time, now)
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
        self.online = True
        self.collected.append([])
        server = self.world.server
        self._targets = [len(stream) for stream in server.streams]
        for shard in range(len(server.streams)):
            self.cursors[shard] = catchup.stored_position(self, shard)
        self.learn_time()
        catchup.bridge(self)

    def disconnect(self) -> None:
        """The connection is gone, and with it everything that was under way."""
        self.online = False
        self._unsent.clear()
        self._unacknowledged.clear()
        self._own.clear()
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
        for _ in range(COLLECT_ATTEMPTS):
            if how == "locked":
                self._unsent.extend(self.call(Replica.outgoing_locked, self._after, self.bound_ms()))
                self.follow()
                return
            self.absorb()
            groups = self._outgoing(how == "writer")
            if groups is not None:
                return

    def _outgoing(self, on_writer: bool) -> Iterator[OutgoingGroup] | None:
        groups: Iterator[OutgoingGroup] | None = self.call(
            lambda replica: replica.outgoing(self._after, on_writer=on_writer)
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
            if not self.republishes:
                self.collected[-1].append(group.group)
            self.reference.sends(group.group, self.world.server.now_ms)
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

    def _acknowledge(self) -> None:
        """All acknowledgements that are under way arrive, in order."""
        while self._unacknowledged:
            group, sequence = self._unacknowledged.popleft()
            self._own.add(sequence)
            self.call(Replica.mark_published, group.through)

    def deliver(self, shard: int, count: int, again: int = 0) -> bool:
        """Apply the next messages of a stream, old ones again before them. Whether there were new ones."""
        if not self.online:
            return False
        catchup.bridge(self)
        stream = self.world.server.streams[shard]
        cursor = self.cursors[shard]
        new = stream[cursor : cursor + count]
        received = stream[max(self.world.server.firsts[shard] - 1, cursor - again) : cursor] + [
            each for each in new if not self._may_skip(shard, each)
        ]
        end = cursor + len(new)
        if received:
            self._apply(shard, received, end)
        elif new:
            self.call(Replica.note_position, self._position(shard, end))
            self.cursors[shard] = end
        return bool(received)

    def consume(self) -> bool:
        """Apply everything there is. Whether there was anything."""
        applied = [self.deliver(shard, 1_000_000) for shard in range(len(self.world.server.streams))]
        if catchup.at_the_end(self):
            self.call(Replica.note_synced, self.world.server.now_ms)
        return any(applied)

    def _apply(self, shard: int, received: Sequence[ReceivedGroup], end: int) -> None:
        position = self._position(shard, end)
        tolerance = self.world.tolerance_ms
        changes = [change for each in received for change in changes_of(each, tolerance)]
        try:
            self.call(Replica.apply, Delivery(position, tuple(received)), self.bound_ms())
        except Crash:
            took_effect = self.observe().sequences.get(position.stream, 0) == end > self.cursors[shard]
            self.follow(changes if took_effect else ())
            raise
        self.cursors[shard] = end
        self.follow(changes)
        if (stored := self.observe().sequences.get(position.stream)) != end:
            raise Violation(f"I3: node {self.id} applied up to {end}, its stored position is {stored}")

    def follow(self, changes: Iterable[Change] = ()) -> None:
        """The reference takes `changes` for what took effect since it was last asked."""
        self.reference.follow(self.observe(), changes, self.world.server.now_ms)

    def _may_skip(self, shard: int, received: ReceivedGroup) -> bool:
        """Whether a message is this session's own, with nothing in it that the stream's time bounds."""
        own = shard == self.index % self.world.history.shards and received.sequence in self._own
        changes = changes_of(received, self.world.tolerance_ms)
        return self.world.history.skip_own and own and all(each.effective == each.claimed for each in changes)

    def _position(self, shard: int, end: int) -> Position:
        """After message `end` of a stream; 0: before the first."""
        stream = self.world.server.streams[shard]
        stored_ns = stream[end - 1].stored_ms * 1_000_000 if end else 0
        return Position(self.stream(shard), CREATED, end, stored_ns)

    def stream(self, shard: int) -> str:
        return f"changes-{shard + 1}"

    # --- engine calls, crashes and races ---

    def call(self, method: Callable[..., T], *arguments: object) -> T:
        assert self._replica is not None
        with self._engine():
            return method(self._replica, *arguments)

    @contextlib.contextmanager
    def _engine(self) -> Iterator[None]:
        """Connections that are opened inside are the daemon's: traced, and on this node's clock."""
        apsw.connection_hooks.append(self._adopt)
        try:
            yield
        finally:
            apsw.connection_hooks.remove(self._adopt)

    def _adopt(self, connection: apsw.Connection) -> None:
        self._connections.append(connection)
        self.application.set_clock(connection)
        connection.exec_trace = self._before_statement

    def _before_statement(self, cursor: object, sql: str, bindings: object) -> bool:
        if self._countdown is not None:
            self._countdown -= 1
            if self._countdown < 0:
                self.dead = True
                raise Crash
        if self._race is not None:
            remaining, write = self._race
            if remaining > 0:
                self._race = (remaining - 1, write)
            else:
                with contextlib.suppress(apsw.BusyError):
                    self._write_in_race(write)
        return True

    def _write_in_race(self, write: Write) -> None:
        self._race = None
        try:
            self.write(write)
        except apsw.BusyError:
            self._race = (0, write)
            raise

    @contextlib.contextmanager
    def dying_at(self, statement: int) -> Iterator[None]:
        """Inside, the engine is killed before its `statement`-th statement."""
        self._countdown = statement
        try:
            yield
        finally:
            self._countdown = None

    @contextlib.contextmanager
    def racing(self, statement: int, write: Write) -> Iterator[None]:
        """Inside, the application commits `write` before the engine's `statement`-th statement, or afterwards."""
        self._race = (statement, write)
        try:
            yield
        finally:
            race, self._race = self._race, None
        if race is not None:
            self.write(race[1])

    def observe(self) -> Observed:
        """The node's database as it is."""
        return observe(self.application.connection, self.world.history.tables)
