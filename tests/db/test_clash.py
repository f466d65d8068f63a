"""Rows of different keys that may not stand beside each other."""

from __future__ import annotations

import itertools

import pytest

from harmonylite.model import UNVERSIONED, Group, Stamp, Version
from tests.db.conftest import MakeNode
from tests.db.harness import EPOCH_MS, Node, deleted, exchange, removed, stamp, written, wrote

UNIQUE = "CREATE TABLE t (id INTEGER PRIMARY KEY, u UNIQUE, w)"
COLUMNS = ("id", "u", "w")


def row(key: int, u: object, ts: int, node: int = 2, w: object = None, base: tuple[int, int] = (0, 0)) -> Group:
    return wrote("t", COLUMNS, ((key, u, w), stamp(ts, node, base=base)))  # type: ignore[arg-type]


def state(node: Node, *keys: int) -> object:
    return node.rows("t"), [node.version("t", key) for key in keys]


@pytest.mark.parametrize(
    "script",
    [
        UNIQUE,
        "CREATE TABLE t (id INTEGER PRIMARY KEY, u, w); CREATE UNIQUE INDEX i ON t (u) WHERE w IS NULL",
        "CREATE TABLE t (id INTEGER PRIMARY KEY, u, w); CREATE UNIQUE INDEX i ON t (lower(u))",
        "CREATE TABLE t (id INTEGER PRIMARY KEY, u COLLATE NOCASE UNIQUE, w)",
        "CREATE TABLE t (id INTEGER PRIMARY KEY, u, w, g AS (u || 'x') UNIQUE)",
        "CREATE TABLE t (id PRIMARY KEY, u UNIQUE, w) WITHOUT ROWID",
    ],
    ids=["plain", "partial", "expression", "nocase", "generated", "without rowid"],
)
def test_the_loser_becomes_a_clash_tombstone_the_same_on_every_node(make: MakeNode, script: str) -> None:
    for order in itertools.permutations([row(1, "a", 1000), row(2, "a", 2000, 3)]):
        node = make(9, script)
        for group in order:
            node.apply(group)
        assert [each[:2] for each in node.rows("t")] == [(2, "a")]
        assert node.version("t", 1) == Version(1000, 2, 1)
        [(_, key, version, reason, content)] = node.conflicts()
        assert (key, version, reason) == ((1,), Version(1000, 2), "unique clash")
        assert content["u"] == "a"
        groups = node.publish()
        assert removed(groups, "t") == [(1,)], "the tombstone is published"
        assert groups[0].tables[0].deleted_stamps == [Stamp(1000, 2, 1, 0, 0)]


def test_an_incoming_row_must_beat_all_rivals_or_loses_alone(make: MakeNode) -> None:
    node = make(9, "CREATE TABLE t (id INTEGER PRIMARY KEY, u UNIQUE, w UNIQUE)")
    node.apply(row(1, "a", 1000, w=10), row(2, "b", 3000, w=20))
    node.apply(row(3, "a", 2000, w=20))
    assert node.rows("t") == [(1, "a", 10), (2, "b", 20)], "older than one rival: no rival is touched"
    assert node.version("t", 3) == Version(2000, 2, 1)
    node.apply(row(4, "a", 4000, w=20))
    assert node.rows("t") == [(4, "a", 20)]


def test_any_later_edit_beats_a_clash_tombstone(make: MakeNode) -> None:
    script = UNIQUE
    a, b = make(1, script), make(2, script)
    a.sql("INSERT INTO t VALUES (1, 'x', 'a')")
    b.clock.tick(100)
    b.sql("INSERT INTO t VALUES (2, 'x', 'b')")
    exchange(a, b)
    assert a.rows("t") == b.rows("t") == [(2, "x", "b")]
    a.sql("INSERT INTO t VALUES (1, 'y', 'again')")
    exchange(a, b)
    assert a.rows("t") == b.rows("t") == [(1, "y", "again"), (2, "x", "b")]


def test_a_clash_tombstone_beats_the_very_row_it_buries_and_nothing_newer(make: MakeNode) -> None:
    node = make(9, UNIQUE)
    node.apply(row(1, "a", 1000))
    tomb = deleted("t", ((1,), stamp(1000, 2, rank=1)))
    node.apply(tomb)
    assert node.rows("t") == []
    [(_, _, version, reason, content)] = node.conflicts()
    assert (version, reason, content["u"]) == (Version(1000, 2), "unique clash", "a")
    node.apply(row(1, "a", 1000))
    assert node.rows("t") == []
    node.apply(row(1, "b", 1001, base=(1000, 2)))
    node.apply(tomb)
    assert node.rows("t") == [(1, "b", None)]


def test_equal_times_are_decided_by_node_then_key(make: MakeNode) -> None:
    for order in itertools.permutations([row(1, "a", 1000, 5), row(2, "a", 1000, 4)]):
        node = make(9, UNIQUE)
        node.apply(*order)
        assert node.rows("t") == [(1, "a", None)]
    for order in itertools.permutations([row(1, "a", 1000, 5), row(2, "a", 1000, 5)]):
        node = make(9, UNIQUE)
        for group in order:
            node.apply(group)
        assert node.rows("t") == [(2, "a", None)]


def test_swaps_of_unique_values_work(make: MakeNode) -> None:
    a, b = make(1, UNIQUE), make(2, UNIQUE)
    a.sql("INSERT INTO t (id, u) VALUES (1, 'a'), (2, 'b'), (3, 'c')")
    exchange(a, b)
    with a.transaction():
        a.sql("UPDATE t SET u = 'tmp' WHERE id = 1")
        a.sql("UPDATE t SET u = 'a' WHERE id = 2")
        a.sql("UPDATE t SET u = 'b' WHERE id = 3")
        a.sql("UPDATE t SET u = 'c' WHERE id = 1")
    exchange(a, b)
    assert b.rows("t") == a.rows("t") == [(1, "c", None), (2, "a", None), (3, "b", None)]
    assert b.conflicts() == []


def test_a_value_that_moves_from_a_deleted_row_is_no_clash(make: MakeNode) -> None:
    a, b = make(1, UNIQUE), make(2, UNIQUE)
    a.sql("INSERT INTO t (id, u) VALUES (1, 'a')")
    exchange(a, b)
    with a.transaction():
        a.sql("DELETE FROM t WHERE id = 1")
        a.sql("INSERT INTO t (id, u) VALUES (2, 'a')")
    exchange(a, b)
    assert b.rows("t") == [(2, "a", None)]
    assert b.conflicts() == []


def test_i4_chains_of_clashes_converge_in_any_order(make: MakeNode) -> None:
    script = "CREATE TABLE t (id INTEGER PRIMARY KEY, u UNIQUE, w UNIQUE)"
    rows = [row(1, "a", 1000, 2, w=1), row(2, "a", 2000, 3, w=2), row(3, "c", 3000, 4, w=2), row(4, "d", 1500, 5, w=1)]
    results = set()
    for number, order in enumerate(itertools.permutations(rows)):
        nodes = [make(90 + number, script), make(50, script)]
        nodes[0].apply(*order)
        nodes[1].apply(*rows)
        exchange(*nodes)
        assert nodes[0].rows("t") == nodes[1].rows("t")
        results.add(repr(nodes[0].rows("t")))
        for node in nodes:
            node.replica.close()
    assert all("(3, 'c', 2)" in each for each in results), "the newest row stands in every order"


def test_i4_a_group_is_written_newest_first(make: MakeNode) -> None:
    """The middle row loses to the newest before it could take the oldest down with it."""
    columns = ("id", "u", "w")
    rows = [((1, "a", 1), stamp(3000, 2)), ((2, "a", 2), stamp(2000, 2)), ((3, "b", 2), stamp(1000, 2))]
    for order in itertools.permutations(rows):
        node = make(9, "CREATE TABLE t (id INTEGER PRIMARY KEY, u UNIQUE, w UNIQUE)")
        node.apply(wrote("t", columns, *order))
        assert node.rows("t") == [(1, "a", 1), (3, "b", 2)]


def test_a_pending_loser_becomes_a_pending_tombstone(make: MakeNode) -> None:
    node = make(1, UNIQUE)
    node.sql("INSERT INTO t VALUES (1, 'a', 'mine')")
    node.sql("INSERT INTO t VALUES (5, 'other', 'mine')")
    at = node.clock.now_ms
    node.apply(row(2, "a", at + 1000))
    assert node.rows("t") == [(2, "a", None), (5, "other", "mine")]
    groups = node.publish()
    assert removed(groups, "t") == [(1,)]
    [stamped] = groups[0].tables[0].deleted_stamps
    assert stamped[1:3] == (1, 1)
    assert [each for each, _ in written(groups, "t")] == [(5, "other", "mine")]


def test_a_pending_rival_that_is_newer_wins(make: MakeNode) -> None:
    node = make(1, UNIQUE)
    node.sql("INSERT INTO t VALUES (1, 'a', 'mine')")
    node.apply(row(2, "a", EPOCH_MS - 1000))
    assert node.rows("t") == [(1, "a", "mine")]
    groups = node.publish()
    assert [each for each, _ in written(groups, "t")] == [(1, "a", "mine")]
    assert removed(groups, "t") == [(2,)]


def test_an_unversioned_loser_becomes_0_0_1(make: MakeNode) -> None:
    node = make(1, f"{UNIQUE}; INSERT INTO t VALUES (1, 'a', 'old')")
    node.apply(row(2, "a", 5))
    assert node.rows("t") == [(2, "a", None)]
    assert node.version("t", 1) == Version(0, 0, 1)
    [(_, key, version, _, content)] = node.conflicts()
    assert (key, version, content["w"]) == ((1,), UNVERSIONED, "old")
    groups = node.publish()
    assert removed(groups, "t") == [(1,)]
    other = make(2, f"{UNIQUE}; INSERT INTO t VALUES (1, 'a', 'old')")
    other.apply(*groups)
    assert other.rows("t") == [], "it beats the unversioned row everywhere"


def test_a_publish_false_node_parks_the_loser(make: MakeNode) -> None:
    node = make(1, UNIQUE, publish=False)
    node.apply(row(1, "a", 1000))
    node.apply(row(2, "a", 2000))
    assert node.rows("t") == [(2, "a", None)]
    assert node.parked() == [("t", (1,), Version(1000, 2), "unique clash")]
    assert node.publish() == []
    assert node.tombstones("t") == [], "it makes no tombstone that only it would have"
    node.apply(row(3, "a", 500))
    assert [key for _, key, _, _ in node.parked()] == [(1,), (3,)]
    # What the cluster says later wins.
    node.apply(deleted("t", ((2,), stamp(3000, 2, base=(2000, 2)))), row(1, "a", 3000, base=(1000, 2)))
    node.apply(deleted("t", ((3,), stamp(500, 2, rank=1))))
    assert node.rows("t") == [(1, "a", None)]
    assert node.parked() == []


def test_a_clash_inside_a_partial_row(make: MakeNode) -> None:
    """The unique column is not in the message: the row keeps its own value and is no rival of itself."""
    node = make(1, UNIQUE)
    node.apply(row(1, "a", 1000, w="x"), row(2, "b", 1000, w="x"))
    node.apply(wrote("t", ("id", "w"), ((1, "y"), stamp(2000, 3, base=(1000, 2)))))
    assert node.rows("t") == [(1, "a", "y"), (2, "b", "x")]
    assert node.conflicts() == []


def test_nulls_never_clash(make: MakeNode) -> None:
    node = make(1, UNIQUE)
    node.apply(row(1, None, 1000), row(2, None, 2000))
    assert len(node.rows("t")) == 2
