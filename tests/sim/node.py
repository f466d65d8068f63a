"""One replica: its file, its application, its clock, and the engine that it feeds as the daemon would."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import apsw

from harmonylite.db.outbox import OutgoingGroup
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.model import Delivery, Group, Position, ReceivedGroup, Version
from tests.sim.application import Application
from tests.sim.history import Write
from tests.sim.reference import Change, Observed, Place, ReferenceNode, RowWrite, Violation, changes_of
from tests.sim.tables import TABLES, RowState, read_columns, read_rows, row_key

if TYPE_CHECKING:
    from tests.sim.world import World

T = TypeVar("T")

CREATED = "2023-11-14T22:13:20Z"
# The daemon absorbs again when a write slipped in before the reader was pinned; so often at most in a row here.
COLLECT_ATTEMPTS = 5
# In a change log: the row may have been removed by a REPLACE; it means nothing while the row is there.
MAYBE_EVICTED = 3


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
        self.dead = False
        self.in_flight: deque[OutgoingGroup] = deque()
        self.collected: list[Group] = []
        self.transactions: list[list[RowWrite]] = []
        self.reference = ReferenceNode(node_id, world.tolerance_ms, self.listens_only)
        self.application = Application(self.path, history.tables, self.clock_ms, world.next_serial)
        self._replica: Replica | None = None
        self._connections: list[apsw.Connection] = []
        self._cursors: dict[int, int] = {}
        self._targets: list[int] = []
        self._countdown: int | None = None
        self._race: tuple[int, Write] | None = None

    def clock_ms(self) -> int:
        return self.world.server.now_ms + self.offset_ms

    @property
    def running(self) -> bool:
        return self._replica is not None

    # --- the application ---

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
        )
        with self._engine():
            replica = Replica(self.path, settings, self.clock_ms)
            replica.open()
        self._replica = replica
        self.reference.follow(self.observe(), (), self.world.server.now_ms)

    def stop(self) -> None:
        if self._replica is not None:
            self.disconnect()
            self._call(Replica.close)
            self._replica = None
            self._connections.clear()
            self.reference.follow(self.observe(), (), self.world.server.now_ms)

    def bury(self) -> None:
        """What the kernel does for a killed process: its files are closed, open transactions are gone."""
        self.disconnect()
        self._replica = None
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

    def connect(self) -> None:
        """Online; from now on the end of the streams, as it is now, must be consumed before publishing."""
        if self.online or self._replica is None:
            return
        self.online = True
        server = self.world.server
        self._targets = [len(stream) for stream in server.streams]
        for shard in range(len(server.streams)):
            position = self._call(Replica.position, self._stream(shard))
            self._cursors[shard] = position.sequence if position else 0
        now = server.now_ms
        self.reference.heard_server_time(now)
        try:
            self._call(Replica.server_time, now)
        finally:
            self.reference.follow(self.observe(), (), now, may_clamp=True)

    def disconnect(self) -> None:
        self.online = False
        self.in_flight.clear()

    def _bound(self) -> int | None:
        """The latest time that a write may claim, if this node's daemon knows the server's time."""
        if not (self.online and self.world.history.exact_bound):
            return None
        self.reference.heard_server_time(self.world.server.now_ms)
        return self.world.server.now_ms + self.world.tolerance_ms

    def absorb(self) -> None:
        self._call(Replica.absorb, self._bound())
        self.reference.follow(self.observe(), (), self.world.server.now_ms)

    def collect(self) -> None:
        """Pending rows become groups to be sent, if this node may publish now and has sent all before."""
        if not self.online or self.in_flight or self.listens_only or not self.caught_up():
            return
        for _ in range(COLLECT_ATTEMPTS):
            self.absorb()
            groups = self._call(Replica.collect)
            if groups is not None:
                self.in_flight.extend(groups)
                self.collected.extend(outgoing.group for outgoing in groups)
                return

    def caught_up(self) -> bool:
        return all(self._cursors[shard] >= target for shard, target in enumerate(self._targets))

    def publish(self, count: int, fate: str = "acked") -> bool:
        """Send up to `count` groups; `fate` of the last as in history.Publish. Whether any was sent."""
        sent = False
        for remaining in range(min(count, len(self.in_flight)), 0, -1):
            outgoing = self.in_flight.popleft()
            sent = True
            last = remaining == 1
            if not (last and fate == "lost"):
                self.world.server.store(self.index % self.world.history.shards, outgoing.group)
            if last and fate != "acked":
                self.disconnect()
            else:
                self._call(Replica.mark_published, outgoing.through)
        return sent

    def deliver(self, shard: int, count: int, again: int = 0) -> bool:
        """Apply the next messages of a stream, old ones again before them. Whether there were new ones."""
        if not self.online:
            return False
        stream = self.world.server.streams[shard]
        cursor = self._cursors[shard]
        new = stream[cursor : cursor + count]
        received = stream[max(0, cursor - again) : cursor] + new
        if received:
            self._apply(shard, received, cursor + len(new))
        return bool(new)

    def consume(self) -> bool:
        """Apply everything there is. Whether there was anything."""
        applied = [self.deliver(shard, 1_000_000) for shard in range(len(self.world.server.streams))]
        return any(applied)

    def _apply(self, shard: int, received: Sequence[ReceivedGroup], end: int) -> None:
        stream = self.world.server.streams[shard]
        stored_ns = stream[end - 1].stored_ms * 1_000_000
        position = Position(self._stream(shard), CREATED, end, stored_ns)
        tolerance = self.world.tolerance_ms
        changes = [change for each in received for change in changes_of(each, tolerance)]
        try:
            self._call(Replica.apply, Delivery(position, tuple(received)), self._bound())
        except Crash:
            took_effect = self.observe().sequences.get(position.stream, 0) == end > self._cursors[shard]
            self._follow_apply(changes if took_effect else ())
            raise
        self._cursors[shard] = end
        self._follow_apply(changes)
        if (stored := self.observe().sequences.get(position.stream)) != end:
            raise Violation(f"I3: node {self.id} applied up to {end}, its stored position is {stored}")

    def _follow_apply(self, changes: Iterable[Change]) -> None:
        self.reference.follow(self.observe(), changes, self.world.server.now_ms)

    def _stream(self, shard: int) -> str:
        return f"changes-{shard + 1}"

    # --- engine calls, crashes and races ---

    def _call(self, method: Callable[..., T], *arguments: object) -> T:
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

    # --- looking at the database ---

    def observe(self) -> Observed:
        """Everything of the database that the rules speak about."""
        connection = self.application.connection
        rows: dict[Place, RowState] = {}
        versions: dict[Place, tuple[Version, bool]] = {}
        logged: set[Place] = set()
        log_rows = 0
        existing = {str(name) for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        for name in self.world.history.tables:
            table = TABLES[name]
            for key, row in read_rows(connection, table).items():
                rows[name, key] = row
            keys = [f"k{i}" for i in range(len(table.key))]
            width = len(keys)
            if (version_table := f"__harmonylite__{name}_version") in existing:
                for cells in read_columns(connection, version_table, [*keys, "ts", "node", "rank", "deleted"]):
                    ts, node, rank, deleted = (content for _, content in cells[width:])
                    place = (name, row_key(table, cells[:width]))
                    versions[place] = (Version(ts, node, rank), bool(deleted))  # type: ignore[arg-type]
            if (log_table := f"__harmonylite__{name}_change_log") in existing:
                for cells in read_columns(connection, log_table, [*keys, "op"]):
                    place = (name, row_key(table, cells[:width]))
                    log_rows += 1
                    if cells[width][1] != MAYBE_EVICTED or place not in rows:
                        logged.add(place)
        sequences: dict[str, int] = {}
        if "__harmonylite__position" in existing:
            sequences.update(connection.execute("SELECT stream, sequence FROM __harmonylite__position"))
        return Observed(rows, versions, frozenset(logged), log_rows, sequences)
