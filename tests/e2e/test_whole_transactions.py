"""I7: what belongs together is seen together: a reader on the receiving node never sees half a transaction."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from tests.e2e.cluster import Node, hub_and_leaves

TRANSACTIONS = 10_000
SCHEMA = """
CREATE TABLE credit (id INTEGER PRIMARY KEY, amount INTEGER NOT NULL, note TEXT);
CREATE TABLE debit (id INTEGER PRIMARY KEY, amount INTEGER NOT NULL, note TEXT);
INSERT INTO credit VALUES (1, 0, '');
INSERT INTO debit VALUES (1, 0, '');
"""


class Bookkeeper(threading.Thread):
    """Moves money between two tables, so that both rows always sum to zero; sometimes beside many other rows."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node
        self.last = 0
        self.error: Exception | None = None

    def run(self) -> None:
        dice = random.Random(1)
        try:
            with self._node.open_db() as connection:
                connection.execute("PRAGMA synchronous = NORMAL")
                for number in range(1, TRANSACTIONS + 1):
                    connection.execute("BEGIN IMMEDIATE")
                    connection.execute(
                        "UPDATE credit SET amount = ?, note = ? WHERE id = 1", (number, "x" * (number % 50))
                    )
                    if number % 500 == 0:  # the two rows end up far apart in the message, or in two parts of it
                        rows = [(number * 1000 + i, dice.randbytes(400).hex()) for i in range(700)]
                        connection.executemany("INSERT INTO credit VALUES (?, 0, ?)", rows)
                    connection.execute("UPDATE debit SET amount = ? WHERE id = 1", (-number,))
                    connection.execute("COMMIT")
                    self.last = number
                    if dice.random() < 0.3:
                        time.sleep(dice.uniform(0, 0.004))
        except Exception as error:
            self.error = error


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_reader_never_sees_half_a_transaction(tmp_path: Path, killed: bool) -> None:
    """killed: the daemons of both nodes are killed now and then meanwhile."""
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    with cluster:
        receiver, sender = cluster.start().nodes.values()
        writer = Bookkeeper(sender)
        writer.start()
        reads = kills = 0
        seen: set[int] = set()
        next_kill = time.monotonic() + 2
        deadline = time.monotonic() + 100
        with receiver.open_db() as connection:
            while TRANSACTIONS not in seen and time.monotonic() < deadline:
                [(credit, debit)] = connection.execute(
                    "SELECT (SELECT amount FROM credit WHERE id = 1), (SELECT amount FROM debit WHERE id = 1)"
                ).fetchall()
                assert credit + debit == 0, f"half of a transaction after {reads} reads: {credit} and {debit}"
                reads += 1
                seen.add(credit)
                if killed and writer.is_alive() and time.monotonic() > next_kill:
                    victim = (receiver, sender)[kills % 2]
                    victim.kill()
                    victim.start()
                    kills += 1
                    next_kill = time.monotonic() + 2
        writer.join()
        assert writer.error is None
        assert writer.last == TRANSACTIONS
        print(
            f"{TRANSACTIONS} transactions, {reads} reads on the other node, {len(seen)} different states seen,"
            f" {kills} daemons killed: never half a transaction"
        )
        assert TRANSACTIONS in seen
        assert len(seen) > 50, "the reader saw too little for this to mean anything"
        cluster.wait_settled()
        assert receiver.execute("SELECT count(*) FROM credit") == [(1 + 700 * 20,)]
