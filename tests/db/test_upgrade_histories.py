"""I4: generated histories in which one node after the other gets a new column, while all of them write."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from harmonylite.model import Group
from tests.db.harness import Clock, Node

SCRIPT = "CREATE TABLE t (id INTEGER PRIMARY KEY, v{unique}); INSERT INTO t VALUES (1, 'old')"
HISTORIES = 40


class Cluster:
    """Three nodes and a stream. Each node's clock is off by up to an hour."""

    def __init__(self, folder: Path, coin: random.Random) -> None:
        self.coin = coin
        self.stream: list[tuple[Group, int]] = []
        self.now = Clock()
        script = SCRIPT.format(unique=coin.choice(("", "", " UNIQUE")))
        self.offsets = [coin.randint(-3_600_000, 3_600_000) for _ in range(3)]
        self.nodes = [Node(folder / f"{number}.db", number, script).start() for number in (1, 2, 3)]
        self.cursors = [0, 0, 0]
        self.upgraded = [False, False, False]
        self.steps: list[str] = []

    def tick(self) -> None:
        self.now.tick(self.coin.choice((1, 10, 100_000)))
        for node, offset in zip(self.nodes, self.offsets, strict=True):
            node.clock.now_ms = self.now.now_ms + offset

    def step(self) -> None:
        self.tick()
        number = self.coin.randrange(3)
        kind = self.coin.choice(("write", "write", "write", "sync", "sync", "upgrade"))
        if kind == "upgrade" and self.coin.random() < 0.7:
            return
        getattr(self, kind)(number)

    def write(self, number: int) -> None:
        node, key, value = self.nodes[number], self.coin.randint(1, 3), self.coin.randint(100, 999)
        has = self.upgraded[number]
        statements = [
            f"UPDATE OR IGNORE t SET v = {value} WHERE id = {key}",
            f"INSERT OR IGNORE INTO t (id, v) VALUES ({key}, {value})",
            f"DELETE FROM t WHERE id = {key}",
        ]
        if has:
            statements += [f"UPDATE t SET w = {value} WHERE id = {key}"] * 3
        statement = self.coin.choice(statements)
        self.steps.append(f"{node.id}: {statement}")
        node.app.execute(statement)

    def sync(self, number: int) -> bool:
        """Read to the end, publish, read that. Whether anything was done."""
        node = self.nodes[number]
        self.steps.append(f"{node.id}: sync")
        done = self.read(number)
        groups = node.publish()
        self.stream += [(group, self.now.tick(1)) for group in groups]
        return self.read(number) or bool(groups) or done

    def read(self, number: int) -> bool:
        new = self.stream[self.cursors[number] :]
        for group, stored_ms in new:
            self.nodes[number].apply(group, stored_ms=stored_ms)
        self.cursors[number] = len(self.stream)
        return bool(new)

    def upgrade(self, number: int) -> None:
        """As docs/applications.md says: connected, with nothing pending."""
        if self.upgraded[number]:
            return
        self.sync(number)
        node = self.nodes[number]
        self.steps.append(f"{node.id}: upgrade")
        node.app.execute("ALTER TABLE t ADD COLUMN w")
        self.upgraded[number] = True
        if self.coin.random() < 0.5:
            node.replica.follow_schema()

    def finish(self) -> None:
        self.tick()
        for number in self.coin.sample(range(3), 3):
            self.upgrade(number)
        for _ in range(20):
            busy = [self.sync(number) for number in range(3)]
            if not any(busy):
                return
        raise AssertionError("the nodes never come to rest")

    def close(self) -> None:
        for node in self.nodes:
            node.replica.close()
            node.app.close()


@pytest.mark.parametrize("first", range(0, HISTORIES, 10))
def test_i4_a_rolling_upgrade_converges_whatever_is_written_meanwhile(tmp_path: Path, first: int) -> None:
    for seed in range(first, first + 10):
        folder = tmp_path / str(seed)
        folder.mkdir()
        cluster = Cluster(folder, random.Random(seed))
        for _ in range(25):
            cluster.step()
        cluster.finish()
        states = [node.rows("t") for node in cluster.nodes]
        told = "\n".join([f"seed {seed}", *cluster.steps, *map(repr, states)])
        assert states[0] == states[1] == states[2], told
        assert all(node.parked() == [] for node in cluster.nodes), told
        cluster.close()
