"""I1, I3 to I8 and I10 as properties of random histories of several replicas with real SQLite files.

What is checked is listed in checks.py (the end state) and reference.py (every step). A failure names its seed and
prints the shortest history that still fails; `python -m tests.sim.soak --replay FILE` runs it again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.sim.generator import FATES, HOW, Generator, generate
from tests.sim.history import (
    HOUR,
    Absorb,
    Collect,
    Connect,
    Deliver,
    Disconnect,
    History,
    Interrupt,
    Publish,
    Race,
    SetClock,
    Start,
    Step,
    Stop,
    Sync,
    Wait,
)
from tests.sim.regressions import REGRESSIONS
from tests.sim.soak import run_as_test
from tests.sim.tables import TABLES
from tests.sim.world import HistoryFailed, World, run

QUICK_HISTORIES = 100
ALL_HISTORIES = 2_000


@pytest.mark.parametrize("first", range(0, QUICK_HISTORIES, 10))
def test_generated_histories_converge(first: int) -> None:
    for seed in range(first, first + 10):
        run_as_test(generate(seed), seed)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(QUICK_HISTORIES, ALL_HISTORIES, 100))
def test_many_generated_histories_converge(first: int) -> None:
    for seed in range(first, first + 100):
        run_as_test(generate(seed), seed)


@pytest.mark.parametrize("name", REGRESSIONS)
def test_histories_that_once_failed_pass(name: str) -> None:
    run(REGRESSIONS[name])


@pytest.mark.parametrize("name", sorted(name for name, table in TABLES.items() if table.written_directly))
def test_each_kind_of_table_converges(name: str) -> None:
    for seed in range(3):
        history = Generator(random.Random(f"{name} {seed}"), (name,)).history(30)
        run_as_test(history, f"{name} {seed}")


# Numbers from hypothesis that the generator of histories uses as its coin: what fails is then shrunk by hypothesis.
COINS = st.randoms(use_true_random=False)
NODES = st.integers(0, 4)
STATEMENTS = st.integers(0, 60)


class Replicas(RuleBasedStateMachine):
    """Each rule is one step of history.py; the steps so far make the history that a failure prints."""

    world: World | None = None
    failed = False

    @initialize(coin=COINS)
    def build(self, coin: random.Random) -> None:
        self.generator = Generator(coin)
        self.world = World(self.generator.history(1))
        self.steps: list[Step] = []
        self._attempt(self.world.start)

    @rule(node=NODES, coin=COINS)
    def write(self, node: int, coin: random.Random) -> None:
        self.generator.random = coin
        self._do(self.generator.write(self._writer(node)))

    @rule(node=NODES)
    def absorb(self, node: int) -> None:
        self._do(Absorb(self._node(node)))

    @rule(node=NODES, how=st.sampled_from(HOW))
    def collect(self, node: int, how: str) -> None:
        self._do(Collect(self._node(node), how))

    @precondition(lambda self: self.world is None or any(node.has_groups() for node in self.world.nodes))
    @rule(node=NODES, count=st.integers(1, 3), fate=st.sampled_from(FATES))
    def publish(self, node: int, count: int, fate: str) -> None:
        self._do(Publish(self._node(node), count, fate))

    @rule(node=NODES, stream=st.integers(0, 1), count=st.integers(1, 4), again=st.integers(0, 4))
    def deliver(self, node: int, stream: int, count: int, again: int) -> None:
        self._do(Deliver(self._node(node), stream % self.generator.shards, count, again))

    @rule(node=NODES)
    def sync(self, node: int) -> None:
        self._do(Sync(self._node(node)))

    @rule(node=NODES, step=st.sampled_from((Connect, Disconnect, Stop, Start)))
    def change(self, node: int, step: type[Connect | Disconnect | Stop | Start]) -> None:
        self._do(step(self._node(node)))

    @rule(node=NODES, hours=st.integers(-72, 24 * 365))
    def set_clock(self, node: int, hours: int) -> None:
        self._do(SetClock(self._node(node), hours * HOUR))

    @rule(milliseconds=st.integers(1, HOUR))
    def wait(self, milliseconds: int) -> None:
        self._do(Wait(milliseconds))

    @rule(node=NODES, statement=STATEMENTS, coin=COINS)
    def interrupt(self, node: int, statement: int, coin: random.Random) -> None:
        self.generator.random = coin
        self._do(Interrupt(self.generator.daemon_step(self._node(node)), statement))

    @rule(node=NODES, statement=STATEMENTS, coin=COINS)
    def race(self, node: int, statement: int, coin: random.Random) -> None:
        self.generator.random = coin
        writer = self._writer(node)
        self._do(Race(self.generator.daemon_step(writer), statement, self.generator.write(writer)))

    def teardown(self) -> None:
        if self.world is not None:
            with self.world as world:
                if not self.failed:
                    self._attempt(world.settle)

    def _node(self, number: int) -> int:
        return number % self.generator.nodes

    def _writer(self, number: int) -> int:
        return number % (self.generator.nodes - self.generator.listeners)

    def _do(self, step: Step) -> None:
        assert self.world is not None
        self.steps.append(step)
        world = self.world
        self._attempt(lambda: world.do(step))

    def _attempt(self, action: Callable[[], None]) -> None:
        assert self.world is not None
        try:
            action()
        except Exception as error:
            self.failed = True
            history: History = replace(self.world.history, steps=tuple(self.steps))
            raise HistoryFailed(history, len(self.steps), error) from error


def _explore(histories: int, steps: int) -> None:
    run_state_machine_as_test(
        Replicas,
        settings=settings(
            max_examples=histories,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_histories_that_hypothesis_finds_converge() -> None:
    _explore(histories=30, steps=25)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_histories_that_hypothesis_finds_converge() -> None:
    _explore(histories=300, steps=40)
