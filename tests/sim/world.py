"""The simulated world: replicas with real SQLite files, their applications and clocks, a server's log, a network.

Single-threaded and without real time: only steps make anything happen, so a history always runs the same way.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from harmonylite import wire
from harmonylite.model import Group, ReceivedGroup
from tests.sim import backups, catchup, checks
from tests.sim.application import Effect
from tests.sim.backups import SavedNode
from tests.sim.catchup import Snapshot
from tests.sim.history import (
    Absence,
    Absorb,
    Backup,
    Collect,
    Connect,
    Deliver,
    Disconnect,
    History,
    Interrupt,
    Prune,
    Publish,
    Race,
    Restore,
    SetClock,
    Start,
    Step,
    Stop,
    Sync,
    Trim,
    Wait,
    Write,
)
from tests.sim.node import Crash, Node
from tests.sim.observe import Conflict
from tests.sim.reference import Place, RowWrite, Violation

TOLERANCE_MS = 60_000
START_MS = 1_700_000_000_000
# Node ids are not in the order of the nodes, and one has all its bits.
NODE_IDS = (7, 3, 2**63 - 1, 11, 1)
# Clash tombstones of one round are news in the next; more rounds than this are a loop.
MAX_ROUNDS = 40


class Server:
    """JetStream as the replicas see it: numbered messages with the time they were stored."""

    def __init__(self, shards: int) -> None:
        self.now_ms = START_MS
        # Everything that was ever stored, and the number of the first message that is still to be had.
        self.streams: list[list[ReceivedGroup]] = [[] for _ in range(shards)]
        self.firsts = [1] * shards

    def store(self, shard: int, group: Group) -> int:
        """Append a group, as it comes out of its encoding. Returns its sequence number."""
        self.now_ms += 1
        stream = self.streams[shard]
        encoded = wire.encode_group(group, compress=len(stream) % 2 == 0)
        stream.append(ReceivedGroup(wire.decode_group(encoded), len(stream) + 1, self.now_ms))
        return len(stream)


class World:
    """Runs a history. Use as a context manager: its files are in memory where the machine has such a place."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.server = Server(history.shards)
        self.tolerance_ms = TOLERANCE_MS
        self.writes: list[RowWrite] = []
        self.snapshots: list[Snapshot] = []
        self.backups: dict[int, SavedNode] = {}
        self.lost_conflicts: list[Conflict] = []
        # Rows that were written by who was away so long that their later deletion is forgotten.
        self.revived: set[Place] = set()
        self.step_number = 0
        self._serial = 0
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="sim-", dir=memory if memory.is_dir() else None))
        self.nodes = [Node(self, index, NODE_IDS[index]) for index in range(history.nodes)]
        for node in self.nodes:
            self._serial = 0  # the same first rows everywhere
            node.prepare()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes:
            node.remove()
        shutil.rmtree(self.folder)

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def record(self, node_id: int, clock_ms: int, effect: Effect) -> RowWrite:
        """Note what a transaction did; node 0: before HarmonyLite was there."""
        write = RowWrite(
            number=len(self.writes),
            node=node_id,
            place=effect.place,
            before=effect.before,
            after=effect.after,
            true_ms=self.server.now_ms if node_id else 0,
            logged_ms=clock_ms,
        )
        self.writes.append(write)
        return write

    def run(self) -> None:
        """The whole history, the full exchange after it, and every check. Raises Violation."""
        self.start()
        for step in self.history.steps:
            self.do(step)
        self.settle()

    def start(self) -> None:
        """All daemons up."""
        for node in self.nodes:
            node.start()

    def do(self, step: Step) -> None:
        """One step. A step that is impossible now (a node offline, a daemon stopped) does nothing."""
        self.step_number += 1
        # Consecutive writes happen in the same millisecond: equal timestamps on different nodes are common.
        if not isinstance(step, Write):
            self.server.now_ms += 1
        self._do(step)
        if not isinstance(step, Write):
            self.server.now_ms += 1

    def _do(self, step: Step) -> None:
        if isinstance(step, Wait):
            self.server.now_ms += step.milliseconds
        elif isinstance(step, Write):
            self.nodes[step.node].write(step)
        elif isinstance(step, Absence):
            self._absence(step)
        elif isinstance(step, Backup):
            self.backups[step.node] = backups.save(self.nodes[step.node], self.folder / f"backup-{step.node}.db")
        elif isinstance(step, Restore):
            self._restore(self.nodes[step.node])
        elif isinstance(step, SetClock):
            self.nodes[step.node].offset_ms = step.offset_ms
        elif isinstance(step, Interrupt):
            self._interrupt(step)
        elif isinstance(step, Race):
            with self.nodes[step.step.node].racing(step.statement, step.write):
                self._daemon_step(step.step)
        else:
            self._daemon_step(step)

    def _daemon_step(
        self, step: Absorb | Collect | Publish | Deliver | Sync | Prune | Trim | Connect | Disconnect | Stop | Start
    ) -> None:
        node = self.nodes[step.node]
        if isinstance(step, Start):
            node.start()
        elif not node.running:
            return
        elif isinstance(step, Absorb):
            node.absorb()
        elif isinstance(step, Collect):
            node.collect(step.how)
        elif isinstance(step, Publish):
            node.publish(step.count, step.fate)
        elif isinstance(step, Deliver):
            node.deliver(step.stream, step.count, step.again)
        elif isinstance(step, Sync):
            self._sync(node)
        elif isinstance(step, Connect):
            node.connect()
        elif isinstance(step, Prune):
            node.prune()
        elif isinstance(step, Trim):
            self.trim(node, step.keep)
        elif isinstance(step, Disconnect):
            node.disconnect()
        else:
            node.stop()

    def trim(self, node: Node, keep: int) -> None:
        """`node` takes a snapshot, if it may, and the log forgets what is older, but for `keep` messages."""
        snapshot = catchup.take(node, self.folder / f"snapshot-{len(self.snapshots)}.db")
        if snapshot is not None:
            self.snapshots.append(snapshot)
            for shard, first in enumerate(self.server.firsts):
                end = len(self.server.streams[shard])
                self.server.firsts[shard] = max(first, end + 1 - keep)

    def _interrupt(self, step: Interrupt) -> None:
        node = self.nodes[step.step.node]
        if isinstance(step.step, Start):
            node.stop()
        with node.dying_at(step.statement), contextlib.suppress(Crash):
            self._daemon_step(step.step)
        if node.dead:
            node.bury()
            node.start()

    def _absence(self, step: Absence) -> None:
        """Time passes for all but one node."""
        absent = self.nodes[step.node]
        absent.disconnect()
        others = [node for node in self.nodes if node is not absent and node.running]
        for wait_ms in (0, 2 * (self.history.retention_ms or 0)):
            self.server.now_ms += wait_ms
            for _ in range(3):
                self.server.now_ms += 1
                for node in others:
                    self._sync(node)
            for node in others:
                node.prune()
        if step.trim and len(others) == len(self.nodes) - 1 and catchup.joined(absent):
            self.trim(others[0], 0)

    def _restore(self, node: Node) -> None:
        saved = self.backups.get(node.index)
        if saved is None or not node.running:
            return
        for _ in range(MAX_ROUNDS):
            if not self._sync(node):
                backups.restore(node, saved)
                node.start()
                # Before the application writes again: nobody can tell that a node has not seen its own lost write.
                self._sync(node)
                return

    def _sync(self, node: Node) -> bool:
        """Whether anything was applied or published."""
        node.connect()
        node.learn_time()
        busy = node.consume()
        busy = node.publish(1_000_000) or busy
        node.collect("reader")
        busy = node.publish(1_000_000) or busy
        return node.consume() or busy

    def settle(self) -> None:
        """Everything runs and is connected until nobody has anything to say; then the final checks."""
        self.start()
        for _ in range(MAX_ROUNDS):
            self.server.now_ms += 1
            busy = [self._sync(node) for node in self.nodes]
            if not any(busy):
                break
        else:
            raise Violation(f"I4: nodes still have something to say after {MAX_ROUNDS} rounds")
        checks.check_all(self)

    def log(self) -> Iterator[ReceivedGroup]:
        """Every message of every stream."""
        for stream in self.server.streams:
            yield from stream


class HistoryFailed(AssertionError):  # noqa: N818
    """A history that broke a property, with its steps."""

    def __init__(self, history: History, step: int, error: BaseException) -> None:
        self.history = history
        self.step = step
        self.error = error
        where = f"step {step} of {len(history.steps)}" if step <= len(history.steps) else "the end"
        super().__init__(f"{type(error).__name__} at {where}: {error}\n{history}")


def run(history: History) -> World:
    """Run `history` in a world of its own. Raises HistoryFailed with its cause."""
    with World(history) as world:
        try:
            world.run()
        except Exception as error:
            raise HistoryFailed(history, world.step_number, error) from error
    return world
