"""I3: killed at any point, a node resumes."""

from __future__ import annotations

import pytest

from tests.db.conftest import MakeNode
from tests.db.harness import EPOCH_MS, STREAM, Killer, exchange, stamp, written, wrote

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"
IDV = ("id", "v")


def test_i3_killed_at_any_statement_a_node_resumes(make: MakeNode) -> None:
    """Absorb, publish and apply, killed before each of their statements; then done again: the same result."""
    script = "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE); CREATE TABLE u (id INTEGER PRIMARY KEY, v)"
    results = set()
    for count in range(1, 400, 3):
        node, other = make(1, script), make(2, script)
        with node.transaction():
            node.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
            node.sql("INSERT INTO u VALUES (1, 'a')")
        theirs = wrote("t", IDV, ((3, "a"), stamp(EPOCH_MS + 500, 2)), ((2, "c"), stamp(EPOCH_MS - 5, 2)))
        die = Killer(count)
        node.writer.setexectrace(die)
        node.replica._reader.setexectrace(die)
        sent = []
        try:
            sent += node.publish()
            node.apply(theirs, stored_ms=EPOCH_MS)
            sent += node.publish()
            node.replica.flush()
        except KeyboardInterrupt:
            node.crash()
            position = node.replica.position(STREAM)
            node.received = position.sequence if position else 0
            assert (node.version("t", 3) is None) == (position is None), "rows and position move together"
        finished = die.left > 0
        node.writer.setexectrace(None)
        node.replica._reader.setexectrace(None)
        sent += node.publish()
        if not node.received:
            node.apply(theirs, stored_ms=EPOCH_MS)
        sent += node.publish()
        other.apply(theirs, *sent, stored_ms=EPOCH_MS)
        results.add(repr((node.rows("t"), node.rows("u"), other.rows("t"), other.rows("u"))))
        for each in (node, other):
            each.replica.close()
        if finished:
            break
    assert finished
    assert results == {repr(([(2, "b"), (3, "a")], [(1, "a")]) * 2)}


def test_a_commit_that_fails_is_not_believed(make: MakeNode) -> None:
    """In WAL mode a full disk shows at COMMIT: state, schema and conflict count go back with the database."""
    node = make(1, PLAIN)
    node.apply(wrote("t", IDV, ((1, "winner"), stamp(5000, 9))))
    state = node.replica._state

    def fail(_: object, sql: str, __: object) -> bool:
        if sql == "COMMIT":
            raise OSError("no space")
        return True

    node.sql("INSERT INTO t VALUES (2, 'x')")
    node.sql("CREATE TABLE late (id INTEGER PRIMARY KEY)")
    node.writer.setexectrace(fail)
    with pytest.raises(OSError, match="no space"):
        node.apply(wrote("t", IDV, ((1, "loser"), stamp(1000, 2))))
    node.writer.setexectrace(None)
    assert node.replica._state == state
    assert node.replica.conflicts_total == 0
    node.apply(wrote("t", IDV, ((1, "loser"), stamp(1000, 2))))
    assert node.meta("conflicts_total") == 1
    node.sql("INSERT INTO late VALUES (1)")
    groups = node.publish()
    assert written(groups, "t") and written(groups, "late")


def test_exchange_of_three_nodes_that_crash_in_turn(make: MakeNode) -> None:
    nodes = [make(number, PLAIN) for number in (1, 2, 3)]
    for round_ in range(6):
        for node in nodes:
            node.clock.tick(7 * node.id)
            node.sql("INSERT INTO t VALUES (?, ?) ON CONFLICT DO UPDATE SET v = excluded.v", (round_ % 3, node.id))
        nodes[round_ % 3].outgoing()
        nodes[round_ % 3].crash()
        exchange(*nodes)
        assert nodes[0].rows("t") == nodes[1].rows("t") == nodes[2].rows("t")
