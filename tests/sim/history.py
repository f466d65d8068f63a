"""A history: what applications, clocks, the network and crashes did, as plain data that can be run again.

The `repr` of a `History` is Python that makes the same history; any part of its steps is a history too, which is
what shrinking needs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypeVar

from harmonylite.model import Row, Value
from tests.sim.tables import TABLES, Table, with_needed

HOUR = 3_600_000
Values = tuple[tuple[str, Value], ...]
T = TypeVar("T")


# --- what an application's statement does -----------------------------------------------------------------------


@dataclass(frozen=True)
class Insert:
    """INSERT, INSERT OR REPLACE, INSERT OR IGNORE (`conflict`), or an upsert (`conflict` = "DO UPDATE")."""

    table: str
    key: Row
    values: Values
    conflict: str = ""


@dataclass(frozen=True)
class Update:
    """UPDATE of some columns of one row; `conflict`: "" or "OR REPLACE"."""

    table: str
    key: Row
    values: Values
    conflict: str = ""


@dataclass(frozen=True)
class UpdateAll:
    """One UPDATE of every row; fails as a whole if two rows would clash."""

    table: str
    values: Values


@dataclass(frozen=True)
class Rekey:
    """UPDATE of a row's key."""

    table: str
    key: Row
    new_key: Row
    conflict: str = ""


@dataclass(frozen=True)
class Delete:
    """DELETE of one row."""

    table: str
    key: Row


@dataclass(frozen=True)
class Swap:
    """Two rows exchange the value of a unique column, by way of NULL."""

    table: str
    key: Row
    other: Row
    column: str


Operation = Insert | Update | UpdateAll | Rekey | Delete | Swap


# --- what happens in the world ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Write:
    """A transaction of the application at `node`; a statement that violates a constraint has no effect."""

    node: int
    operations: tuple[Operation, ...]
    commit: bool = True


@dataclass(frozen=True)
class Absorb:
    node: int


@dataclass(frozen=True)
class Collect:
    """Absorb and begin to read pending rows as groups, from the reader's pinned snapshot, from the writer's or under
    the write lock (`how`). Needs a node that is online and has consumed to the end since it connected.
    """

    node: int
    how: str = "reader"


@dataclass(frozen=True)
class Publish:
    """Send up to `count` collected groups. `fate`: "acked"; "late" (stored, the acknowledgements come with later
    ones); "lost" (the last one is never stored); "hole" (the first one is never stored, those behind it are);
    "unacked" (stored, but the node does not hear of the last). The last three break the node's connection.
    """

    node: int
    count: int
    fate: str = "acked"


@dataclass(frozen=True)
class Deliver:
    """Apply up to `count` next messages of a stream, with `again` older ones delivered once more before them."""

    node: int
    stream: int
    count: int
    again: int = 0


@dataclass(frozen=True)
class Sync:
    """Connect if offline, consume everything, publish everything: what a healthy node does all the time."""

    node: int


@dataclass(frozen=True)
class Connect:
    node: int


@dataclass(frozen=True)
class Disconnect:
    node: int


@dataclass(frozen=True)
class Stop:
    """The daemon is stopped in an orderly way; the application goes on."""

    node: int


@dataclass(frozen=True)
class Start:
    node: int


@dataclass(frozen=True)
class SetClock:
    """The node's clock now shows true time plus `offset_ms`."""

    node: int
    offset_ms: int


@dataclass(frozen=True)
class Wait:
    milliseconds: int


@dataclass(frozen=True)
class Interrupt:
    """Run `step` and kill the daemon before its `statement`-th SQL statement (counted from 0), then start it."""

    step: Absorb | Collect | Publish | Deliver | Sync | Start
    statement: int


@dataclass(frozen=True)
class Race:
    """Run `step`; before its `statement`-th SQL statement the application commits `write` (as soon as the lock
    is free).
    """

    step: Absorb | Collect | Publish | Deliver | Sync | Start
    statement: int
    write: Write


Step = (
    Write
    | Absorb
    | Collect
    | Publish
    | Deliver
    | Sync
    | Connect
    | Disconnect
    | Stop
    | Start
    | SetClock
    | Wait
    | Interrupt
    | Race
)


@dataclass(frozen=True)
class History:
    """`nodes` replicas with `tables`, their first rows made by `seed_rows` before HarmonyLite was installed.

    `shards`: number of streams; node i publishes to stream i % shards. `offsets`: each node's clock at the start.
    `listeners`: how many of the last nodes run with publish=false (their applications do not write).
    `exact_bound`: whether absorb is told the latest time it may claim (a daemon that knows the server's time).
    `skip_own`: acknowledged messages of the same session are passed over, as the stream's reader does.
    """

    nodes: int
    tables: tuple[str, ...]
    steps: tuple[Step, ...]
    seed_rows: tuple[Operation, ...] = ()
    shards: int = 1
    offsets: tuple[int, ...] = ()
    listeners: int = 0
    exact_bound: bool = True
    skip_own: bool = True
    group_rows: int = 512

    def __str__(self) -> str:
        head = ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in self.__dataclass_fields__
            if name not in ("steps", "seed_rows")
        )
        lines = [f"History({head},", "  seed_rows=("]
        lines += [f"    {operation!r}," for operation in self.seed_rows]
        lines += ["  ),", "  steps=("]
        lines += [f"    {step!r}," for step in self.steps]
        return "\n".join([*lines, "  ),", ")"])


# --- random histories -------------------------------------------------------------------------------------------

HOW = ("reader", "writer", "locked")
FATES = ("acked", "late", "lost", "hole", "unacked")
_PROFILES = ("honest", "honest", "skewed", "skewed", "wild")


class Generator:
    """Makes random histories from a `random.Random`: the same seed, the same history."""

    def __init__(self, source: random.Random, tables: tuple[str, ...] | None = None) -> None:
        self.random = source
        chosen = tables or tuple(source.sample(sorted(TABLES), source.choice((1, 1, 2, 2, 3))))
        self.tables = with_needed(chosen)
        self.profile = source.choice(_PROFILES)
        self.nodes = source.choice((3, 3, 3, 4, 5))
        self.shards = source.choice((1, 1, 1, 2))
        self.listeners = 1 if source.random() < 0.15 else 0

    def history(self, length: int | None = None) -> History:
        """One history of about `length` steps."""
        source = self.random
        length = length or source.choice((8, 15, 25, 40))
        seeds = tuple(self._insert(self._table()) for _ in range(source.choice((0, 3, 8))))
        offsets = tuple(self._offset() for _ in range(self.nodes))
        opening = self._opening() if source.random() < 0.5 else ()
        return History(
            nodes=self.nodes,
            tables=self.tables,
            steps=(*opening, *(self._step() for _ in range(length))),
            seed_rows=seeds,
            shards=self.shards,
            offsets=offsets,
            listeners=self.listeners,
            exact_bound=source.random() < 0.8,
            skip_own=source.random() < 0.7,
            group_rows=source.choice((1, 2, 512, 512)),
        )

    def _opening(self) -> tuple[Step, ...]:
        """Rows that everybody has, so that later updates and deletes meet something."""
        node = self.random.randrange(self.nodes - self.listeners)
        inserts = tuple(self._insert(self._table()) for _ in range(8))
        return (Write(node, inserts), Sync(node), *(Sync(other) for other in range(self.nodes)))

    # values and operations

    def _table(self) -> Table:
        return TABLES[self.random.choice([n for n in self.tables if TABLES[n].written_directly])]

    def _values(self, table: Table, all_of_them: bool) -> Values:
        pools = table.pools
        if not all_of_them:
            pools = tuple(self.random.sample(pools, self.random.randint(1, len(pools))))
        return tuple((name, self.random.choice(pool)) for name, pool in pools)

    def _insert(self, table: Table, conflict: str = "") -> Insert:
        return Insert(table.name, self.random.choice(table.keys), self._values(table, True), conflict)

    def operation(self) -> Operation:
        """One statement of an application."""
        source = self.random
        table = self._table()
        key = source.choice(table.keys)
        replace = "OR REPLACE" if source.random() < 0.3 else ""
        kinds = ["insert"] * 5 + ["update"] * 4 + ["rekey"] * 2 + ["delete"] * 3 + ["all"]
        if table.swappable:
            kinds += ["swap"] * 3
        kind = source.choice(kinds)
        if kind == "insert":
            return self._insert(table, source.choice(("", "OR REPLACE", "OR REPLACE", "OR IGNORE", "DO UPDATE")))
        if kind == "update":
            return Update(table.name, key, self._values(table, False), replace)
        if kind == "all":
            return UpdateAll(table.name, self._values(table, False))
        if kind == "rekey":
            return Rekey(table.name, key, source.choice(table.keys), replace)
        if kind == "delete":
            return Delete(table.name, key)
        return Swap(table.name, key, source.choice(table.keys), source.choice(table.swappable))

    def write(self, node: int) -> Write:
        """One transaction of an application; a few are rolled back."""
        count = self.random.choice((1, 1, 1, 2, 3, 6))
        operations = tuple(self.operation() for _ in range(count))
        return Write(node, operations, commit=self.random.random() < 0.95)

    # clocks

    def _offset(self) -> int:
        if self.profile == "honest":
            return 0
        if self.profile == "wild" and self.random.random() < 0.3:
            # 1970, a clock that stood still for three days, a year ahead
            return self.random.choice((-1_690_000_000_000, -72 * HOUR, 365 * 24 * HOUR))
        return self.random.randint(-3 * HOUR, 3 * HOUR)

    # steps

    def _engine_step(self, node: int) -> Absorb | Collect | Publish | Deliver | Sync:
        source = self.random
        kind = source.choice(("absorb", "collect", "publish", "deliver", "deliver", "sync", "sync"))
        if kind == "absorb":
            return Absorb(node)
        if kind == "collect":
            return Collect(node, source.choice(HOW))
        if kind == "publish":
            fate = source.choice(("acked", "acked", *FATES))
            return Publish(node, source.choice((1, 2, 100)), fate)
        if kind == "deliver":
            again = source.choice((0, 0, 0, 1, 3, 50))
            return Deliver(node, source.randrange(self.shards), source.choice((1, 2, 100)), again)
        return Sync(node)

    def _step(self) -> Step:
        source = self.random
        node = source.randrange(self.nodes)
        kind = source.choices(
            ("write", "engine", "network", "daemon", "clock", "wait", "interrupt", "race"),
            (40, 32, 6, 4, 4, 4, 7, 7),
        )[0]
        if kind == "write":
            return self.write(source.randrange(self.nodes - self.listeners))
        if kind == "engine":
            return self._engine_step(node)
        if kind == "network":
            return Connect(node) if source.random() < 0.5 else Disconnect(node)
        if kind == "daemon":
            return Start(node) if source.random() < 0.5 else Stop(node)
        if kind == "clock" and self.profile == "wild":
            return SetClock(node, self._offset())
        if kind == "interrupt":
            return Interrupt(self.daemon_step(node), source.choice((1, 3, 8, 20, 50)) + source.randrange(8))
        if kind == "race":
            node = source.randrange(self.nodes - self.listeners)
            statement = source.choice((0, 2, 5, 12, 30)) + source.randrange(6)
            return Race(self.daemon_step(node), statement, self.write(node))
        return Wait(source.choice((1, 50, 5_000, HOUR)))

    def daemon_step(self, node: int) -> Absorb | Collect | Publish | Deliver | Sync | Start:
        """Something that a crash or a write can come in the middle of."""
        return Start(node) if self.random.random() < 0.1 else self._engine_step(node)


def generate(seed: int) -> History:
    """The random history of a seed."""
    return Generator(random.Random(seed)).history()
