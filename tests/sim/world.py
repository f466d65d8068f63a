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

from harmonylite.model import ReceivedGroup
from tests.sim import backups, catchup, checks, operator
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
    Join,
    Limit,
    Lose,
    Perish,
    Prune,
    Publish,
    Race,
    Replace,
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
from tests.sim.node import Node
from tests.sim.observe import Conflict, conflicts_of
from tests.sim.process import Crash
from tests.sim.reference import Place, RowWrite, Violation
from tests.sim.server import Server

TOLERANCE_MS = 60_000
# Node ids are not in the order of the nodes, and one has all its bits.
NODE_IDS = (7, 3, 2**63 - 1, 11, 1)
# Clash tombstones of one round are news in the next; more rounds than this are a loop.
MAX_ROUNDS = 40


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
        self.gone: set[int] = set()
        # Rows that were written by who was away so long that their later deletion is forgotten.
        self.revived: set[Place] = set()
        # Rows of which somebody did not see a version, as it merged a later one.
        self.passed_over: set[Place] = set()
        # Rows that a snapshot brought with a time that its node claimed too much of, before the stream bounded it.
        self.claimed: set[Place] = set()
        self.step_number = 0
        self._serial = 0
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="sim-", dir=memory if memory.is_dir() else None))
        self.nodes = [Node(self, index, NODE_IDS[index]) for index in range(history.nodes)]
        for node in self.nodes:
            self._serial = 0  # the same first rows everywhere
            node.prepare()
        self._serial = len(self.writes)
        for index, operation in history.own_seeds:
            self.nodes[index].seed((operation,))
        # What each node had before the installation.
        self.had = [dict(node.reference.rows) for node in self.nodes]

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.living():
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
        for node in self.living():
            node.start()

    def living(self) -> list[Node]:
        return [node for node in self.nodes if node.index not in self.gone]

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
        of_node = step.step if isinstance(step, (Interrupt, Race)) else step
        if getattr(of_node, "node", None) in self.gone:
            return
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
        elif isinstance(step, Replace):
            self._replace(self.nodes[step.node], step.sudden)
        elif isinstance(step, Perish):
            self._perish(self.nodes[step.node])
        elif isinstance(step, Lose):
            self._lose(step)
        elif isinstance(step, Limit):
            self._limit(step.rows)
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
        self,
        step: Absorb | Collect | Publish | Deliver | Sync | Prune | Trim | Join | Connect | Disconnect | Stop | Start,
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
        elif isinstance(step, Join):
            catchup.join(node)
        elif isinstance(step, Disconnect):
            node.disconnect()
        else:
            node.stop()

    def trim(self, node: Node, keep: int) -> None:
        """`node` takes a snapshot, if it may, and the log forgets what is older, but for `keep` messages."""
        if self.snapshot(node):
            for shard in range(self.history.shards):
                self.server.trim(shard, keep)

    def snapshot(self, node: Node) -> bool:
        """`node` takes one, if it may."""
        snapshot = catchup.take(node, self.folder / f"snapshot-{len(self.snapshots)}.db")
        if snapshot is not None:
            self.snapshots.append(snapshot)
        return snapshot is not None

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
        others = [node for node in self.living() if node is not absent and node.running]
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
        if saved is not None and node.running and self._publish_all(node):
            backups.restore(node, saved)
            self._catch_up(node)

    def _catch_up(self, node: Node) -> None:
        """Before the application writes again: nobody can tell that a node has not seen its own lost write."""
        node.start()
        self._sync(node)
        if not node.online:  # it waits for somebody who can give it a snapshot
            for other in self.living():
                self._sync(other)
            self._sync(node)

    def _publish_all(self, node: Node) -> bool:
        """Whether everybody can know all that this node knows."""
        return any(not (self._sync(node) or self._joins(node)) for _ in range(MAX_ROUNDS)) and not node.held()

    def _joins(self, node: Node) -> bool:
        return bool(self.history.own_seeds) and catchup.join(node)

    def _replace(self, node: Node, sudden: bool) -> None:
        usable = [each for each in self.snapshots if each.is_usable(self.server, {})]
        if usable and node.running and (sudden or self._publish_all(node)):
            backups.replace(node, usable[-1])
            self._catch_up(node)

    def _perish(self, node: Node) -> None:
        node.stop()
        self.lost_conflicts += conflicts_of(node.application.connection)
        node.remove()
        self.gone.add(node.index)

    def _lose(self, step: Lose) -> None:
        for node in self.living():
            node.disconnect()
        for shard in range(self.history.shards):
            if step.recreate:
                self.server.recreate(shard)
            else:
                self.server.lose(shard, step.count)

    def _limit(self, rows: int | None) -> None:
        self.server.max_rows = rows
        for node in self.living():
            node.limit_changed()

    def _lift_limit(self) -> None:
        """The streams hold everything again. Before, whatever fits was published: nothing waits for what does not."""
        if self.server.max_rows is None:
            return
        for node in self.living():
            node.disconnect()
        self._exchange()
        for node in self.living():
            held = node.held()
            if node.waits() and not node.listens_only:
                raise Violation(f"node {node.id} has not published all that its stream can hold; held: {held}")
            if held and min(held.values()) <= self.server.max_rows:
                raise Violation(f"node {node.id} holds what its stream could hold: {held}")
        self._limit(None)

    def _sync(self, node: Node) -> bool:
        """Whether anything was applied or published, or the node has to wait for another."""
        node.connect()
        if not node.online:
            return True
        node.learn_time()
        busy = node.consume()
        busy = node.publish(1_000_000) or busy
        node.collect("reader")
        busy = node.publish(1_000_000) or busy
        return node.consume() or busy

    def settle(self) -> None:
        """Everything runs and is connected until nobody has anything to say; then the final checks."""
        self.start()
        self._lift_limit()
        self._exchange()
        checks.check_all(self)

    def _exchange(self) -> None:
        """Until nobody has anything to say."""
        for _ in range(MAX_ROUNDS):
            self.server.now_ms += 1
            busy = [self._sync(node) for node in self.living()]
            busy += [self._joins(node) for node in self.living()]
            if not any(busy):
                return
            if not any(node.online for node in self.living() if not node.listens_only):
                operator.declare_one_complete(self)
        raise Violation(f"I4: nodes still have something to say after {MAX_ROUNDS} rounds")

    def log(self) -> Iterator[ReceivedGroup]:
        """Every message that a stream ever had."""
        yield from self.server.log()


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
