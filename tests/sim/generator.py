"""Random histories: the same seed, the same history."""

from __future__ import annotations

import random

from harmonylite.model import Row
from tests.sim.history import (
    HOUR,
    Absence,
    Absorb,
    Backup,
    Collect,
    Connect,
    Delete,
    Deliver,
    Disconnect,
    History,
    Insert,
    Interrupt,
    Lose,
    Operation,
    Prune,
    Publish,
    Race,
    Rekey,
    Replace,
    Restore,
    SetClock,
    Start,
    Step,
    Stop,
    Swap,
    Sync,
    Trim,
    Update,
    UpdateAll,
    Values,
    Wait,
    Write,
)
from tests.sim.tables import TABLES, Table, with_needed

HOW = ("reader", "writer", "locked")
FATES = ("acked", "late", "lost", "hole", "unacked")
MISFORTUNES = ("backups", "replaced", "lost")
_PROFILES = ("honest", "honest", "skewed", "skewed", "wild", "forgetful")


class Generator:
    """Makes random histories from a `random.Random`: the same seed, the same history. profile: what clocks there are,
    or, with right ones, one of MISFORTUNES."""

    def __init__(
        self, source: random.Random, tables: tuple[str, ...] | None = None, profile: str | None = None
    ) -> None:
        self.random = source
        chosen = tables or tuple(source.sample(sorted(TABLES), source.choice((1, 1, 2, 2, 3))))
        self.tables = with_needed(chosen)
        self.profile = profile or source.choice(_PROFILES)
        self.nodes = source.choice((3, 3, 3, 4, 5))
        self.shards = source.choice((1, 1, 1, 2))
        self.listeners = 1 if source.random() < 0.15 else 0
        # Whether the log forgets its beginning, so that who was away needs a snapshot.
        self.trims = source.random() < 0.4
        # What befalls files or logs; two at a time would lose what nobody else has.
        self.misfortune = ""
        if self.profile == "honest":
            self.misfortune = source.choice(("", "backups", "replaced", "lost", "lost"))
        elif self.profile in MISFORTUNES:
            self.misfortune, self.profile = self.profile, "honest"

    def history(self, length: int | None = None) -> History:
        """One history of about `length` steps."""
        source = self.random
        length = length or source.choice((8, 15, 25, 40))
        seeds = tuple(self._insert(self._table()) for _ in range(source.choice((0, 3, 8))))
        offsets = tuple(self._offset() for _ in range(self.nodes))
        opening = self._opening() if source.random() < 0.5 else ()
        own_seeds = self._own_seeds() if self.profile == "honest" and source.random() < 0.15 else ()
        return History(
            nodes=self.nodes,
            tables=self.tables,
            steps=(*opening, *(self._step() for _ in range(length))),
            seed_rows=seeds,
            shards=self.shards,
            offsets=offsets,
            listeners=self.listeners,
            # Unknown, and read from two streams in any order, a claim that is bounded later may beat the wrong one.
            time_known=source.random() < 0.8 or self.profile == "forgetful" or self.shards > 1,
            skip_own=source.random() < 0.7,
            own_seeds=own_seeds,
            group_rows=source.choice((1, 2, 512, 512)),
            retention_ms=10 * HOUR if self.profile == "forgetful" else None,
        )

    def _opening(self) -> tuple[Step, ...]:
        """Rows that everybody has, so that later updates and deletes meet something."""
        node = self.random.randrange(self.nodes - self.listeners)
        inserts = tuple(self._insert(self._table()) for _ in range(8))
        return (Write(node, inserts), Sync(node), *(Sync(other) for other in range(self.nodes)))

    def _own_seeds(self) -> tuple[tuple[int, Operation], ...]:
        """Rows that one node has before HarmonyLite is installed; others may have other rows with that key."""
        source = self.random
        seeds: dict[tuple[str, Row], list[tuple[int, Operation]]] = {}
        for _ in range(5):
            table, node = self._table(), source.randrange(self.nodes - self.listeners)
            insert = self._insert(table)
            same = seeds.setdefault((table.name, insert.key), [])
            if not same or (table.exact and node not in {other for other, _ in same}):
                same.append((node, insert))
        return tuple(seed for same in seeds.values() for seed in same)

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
        if self.profile == "forgetful":
            return Sync(node)
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
        if kind in ("network", "daemon") and self._may_trim() and source.random() < 0.5:
            return self._trim(node)
        if kind in ("clock", "wait") and self.misfortune and source.random() < 0.5:
            return self._misfortune(node)
        if kind == "network":
            return Connect(node) if source.random() < 0.5 else Disconnect(node)
        if kind == "daemon":
            return Start(node) if source.random() < 0.5 else Stop(node)
        if kind == "clock" and self.profile == "wild":
            return SetClock(node, self._offset())
        if kind == "wait" and self.profile == "forgetful":
            return Wait(source.choice((HOUR, 11 * HOUR)))
        if kind in ("clock", "network") and self.profile == "forgetful":
            return Prune(node) if source.random() < 0.3 else Absence(node, self.trims and source.random() < 0.7)
        if kind == "interrupt":
            return Interrupt(self.daemon_step(node), source.choice((1, 3, 8, 20, 50)) + source.randrange(8))
        if kind == "race":
            node = source.randrange(self.nodes - self.listeners)
            statement = source.choice((0, 2, 5, 12, 30)) + source.randrange(6)
            return Race(self.daemon_step(node), statement, self.write(node))
        return Wait(source.choice((1, 50, 5_000, HOUR)))

    def _misfortune(self, node: int) -> Step:
        if self.misfortune == "backups":
            return Backup(node) if self.random.random() < 0.5 else Restore(node)
        if self.misfortune == "replaced":
            return Replace(node)
        return Lose(self.random.choice((1, 1, 2, 5)), recreate=self.random.random() < 0.2)

    def _may_trim(self) -> bool:
        """With tombstones that are forgotten, only after an absence: two who were away would not agree on them."""
        return self.trims and self.profile != "forgetful"

    def _trim(self, node: int) -> Trim:
        return Trim(node, self.random.choice((0, 0, 1, 3)))

    def daemon_step(self, node: int) -> Absorb | Collect | Publish | Deliver | Sync | Trim | Start:
        """Something that a crash or a write can come in the middle of."""
        if self._may_trim() and self.random.random() < 0.1:
            return self._trim(node)
        return Start(node) if self.random.random() < 0.1 else self._engine_step(node)


def generate(seed: int) -> History:
    """The random history of a seed."""
    return Generator(random.Random(seed)).history()
