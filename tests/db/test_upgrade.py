"""I4 through a rolling upgrade: some nodes have a new column already and others do not: what loses still
fills the columns whose version is older (docs/rules.md, Apply)."""

from __future__ import annotations

import itertools

import pytest

from harmonylite.model import Group, TableChanges, Version
from tests.db.conftest import MakeNode
from tests.db.harness import DAY_MS, EPOCH_MS, Clock, Node, deleted, exchange, stamp, written, wrote

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"
ADD = "ALTER TABLE t ADD COLUMN w"
OLD, NEW = ("id", "v"), ("id", "v", "w")


def follow(node: Node) -> None:
    """The daemon notices a change of the schema."""
    node.replica.follow_schema()


@pytest.mark.parametrize("late", ["edited here", "edited elsewhere"])
def test_i4_a_rolling_upgrade_converges(make: MakeNode, late: str) -> None:
    """C has the new column and sets it; A, which does not, edits the same row later; then A and B are upgraded."""
    a, b, c = make(1, PLAIN), make(2, PLAIN), make(3, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x')")
    exchange(a, b, c)
    c.clock.tick(1000)
    c.sql(ADD)
    c.sql("UPDATE t SET w = 5")
    exchange(a, b, c)
    a.clock.tick(2000)
    a.sql("UPDATE t SET v = 'y'")
    exchange(a, b, c)
    assert c.rows("t") == [(1, "y", 5)]
    node = a if late == "edited here" else b
    node.sql(ADD)
    follow(node)
    assert node.rows("t") == c.rows("t")
    assert node.parked() == []
    assert node.publish() == [], "nothing new was written"


@pytest.mark.parametrize("unique", ["", "UNIQUE"])
def test_i4_the_order_of_arrival_does_not_matter(make: MakeNode, unique: str) -> None:
    groups = [
        wrote("t", OLD, ((1, "v1"), stamp(1000, 2))),
        wrote("t", NEW, ((1, "v2", "w2"), stamp(2000, 3))),
        wrote("t", OLD, ((1, "v3"), stamp(3000, 4))),
    ]
    for order in itertools.permutations(groups):
        for upgraded_before in (True, False):
            node = make(1, f"CREATE TABLE t (id INTEGER PRIMARY KEY, v {unique})")
            if upgraded_before:
                node.sql(ADD)
            node.apply(*order[:2])
            node.apply(*order[2:])
            if not upgraded_before:
                node.sql(ADD)
                follow(node)
            assert node.rows("t") == [(1, "v3", "w2")], ([group.publisher for group in order], upgraded_before)
            assert node.version("t", 1) == Version(3000, 4)
            assert node.parked() == []
            node.replica.close()


def test_a_column_set_aside_is_not_a_row_that_waits(make: MakeNode) -> None:
    """Nothing is late: the table is as new as everybody's. Nor does it keep this node from taking a snapshot."""
    node = make(1, PLAIN)
    node.apply(wrote("t", NEW, ((1, "x", 5), stamp(1000, 2))))
    assert (node.replica.parked(), node.replica.paused_tables) == (1, 1)
    node.apply(wrote("t", OLD, ((1, "y"), stamp(2000, 3))))
    assert (node.replica.parked(), node.replica.paused_tables) == (0, 0)
    assert [reason for *_, reason in node.parked()] == ["older column"]


def test_a_delete_is_newer_than_every_column(make: MakeNode) -> None:
    for again in (False, True):
        node = make(1, PLAIN)
        node.apply(wrote("t", NEW, ((1, "x", 5), stamp(1000, 2))))
        node.apply(wrote("t", OLD, ((1, "y"), stamp(2000, 3))))
        node.apply(deleted("t", ((1,), stamp(3000, 3))))
        if again:
            node.apply(wrote("t", OLD, ((1, "z"), stamp(4000, 3))))
        node.sql(ADD)
        follow(node)
        assert node.rows("t") == ([(1, "z", None)] if again else [])
        node.replica.close()


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with others"])
def test_a_delete_that_loses_is_newer_than_columns_of_older_rows(make: MakeNode, alone: bool) -> None:
    node = make(1, PLAIN)
    node.apply(wrote("t", OLD, ((1, "y"), stamp(3000, 3)), ((2, "y"), stamp(3000, 3))))
    node.apply(wrote("t", NEW, ((1, "x", 5), stamp(1000, 2)), ((2, "x", 6), stamp(2500, 2))))
    keys = [(1,), (2,)] if alone else [(1,), (2,), (3,)]
    lost = TableChanges("t", ("id",), OLD, deleted=keys, deleted_stamps=[stamp(2000, 4)] * len(keys))
    node.apply(Group(4, 1, (lost,)))
    node.sql(ADD)
    follow(node)
    assert node.rows("t") == [(1, "y", None), (2, "y", 6)]


def test_an_own_delete_is_newer_than_every_column(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.apply(wrote("t", NEW, ((1, "x", 5), stamp(1000, 2))))
    node.apply(wrote("t", OLD, ((1, "y"), stamp(2000, 3))))
    node.sql("DELETE FROM t")
    node.absorb()
    assert node.parked() == []


def test_a_value_written_here_since_the_upgrade_stays(make: MakeNode) -> None:
    """The daemon sees the new column and the write at the same time."""
    node = make(1, PLAIN)
    node.apply(*(wrote("t", NEW, ((key, "x", 5), stamp(1000, 2))) for key in (1, 2)))
    node.sql("INSERT INTO t VALUES (1, 'mine'), (2, 'mine')")
    node.publish()
    node.sql(f"{ADD} DEFAULT 3")
    node.sql("UPDATE t SET w = 7 WHERE id = 1")
    follow(node)
    assert node.rows("t") == [(1, "mine", 7), (2, "mine", 5)]


def test_of_several_columns_those_that_are_there_are_filled(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.apply(wrote("t", ("id", "v", "W", "x"), ((1, "a", 5, 6), stamp(1000, 2))))
    node.apply(wrote("t", OLD, ((1, "b"), stamp(2000, 3))))
    node.sql(ADD)
    follow(node)
    assert node.rows("t") == [(1, "b", 5)]
    node.sql("ALTER TABLE t ADD COLUMN x")
    follow(node)
    assert node.rows("t") == [(1, "b", 5, 6)]
    assert node.parked() == []


def test_a_later_message_fills_over_what_was_set_aside(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.apply(wrote("t", NEW, ((1, "a", "first"), stamp(1000, 2))))
    node.apply(wrote("t", OLD, ((1, "b"), stamp(9000, 3))))
    node.sql(ADD)
    follow(node)
    node.apply(wrote("t", NEW, ((1, "c", "second"), stamp(2000, 2))))
    node.apply(wrote("t", NEW, ((1, "d", "zeroth"), stamp(500, 2))))
    assert node.rows("t") == [(1, "b", "second")]


def test_a_value_that_does_not_fit_the_new_column_keeps_the_schema_not_out(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.apply(wrote("t", NEW, ((1, "a", 11), stamp(1000, 2))))
    node.apply(wrote("t", OLD, ((1, "b"), stamp(2000, 3))))
    node.sql(f"{ADD} CHECK (w < 10)")
    follow(node)
    assert node.rows("t") == [(1, "b", None)]
    assert len(node.parked()) == 1


def test_a_column_that_nobody_adds_is_forgotten_in_the_end(make: MakeNode) -> None:
    clock = Clock()
    node = make(1, PLAIN, clock=clock, tombstone_retention_ms=30 * DAY_MS)
    node.apply(wrote("t", NEW, ((1, "a", 5), stamp(1000, 2)), ((2, "waits", 5), stamp(1000, 2))))
    node.apply(wrote("t", OLD, ((1, "b"), stamp(2000, 3))))
    node.replica.prune_tombstones(EPOCH_MS + 29 * DAY_MS)
    assert len(node.parked()) == 2
    node.replica.prune_tombstones(EPOCH_MS + 31 * DAY_MS)
    assert [key for _, key, _, _ in node.parked()] == [(2,)]


def test_a_parked_row_that_is_tried_again_after_an_own_write_is_published_as_it_was(make: MakeNode) -> None:
    """Filling is no write: what is pending goes out at the version it has, filled."""
    node = make(1, PLAIN)
    node.apply(wrote("t", NEW, ((1, "x", 5), stamp(1000, 2))))
    node.sql("INSERT INTO t VALUES (1, 'mine')")
    node.absorb()
    version = node.version("t", 1)
    node.sql(ADD)
    follow(node)
    [(row, sent)] = written(node.publish(), "t")
    assert (row, Version(*sent[:3])) == ((1, "mine", 5), version)


@pytest.mark.parametrize("unique", ["", "UNIQUE"])
def test_i3_a_column_that_waits_to_be_published_is_not_lost_to_a_message_without_it(
    make: MakeNode, unique: str
) -> None:
    """C is upgraded and writes while it is away; A, which is not, edits the same row later."""
    script = f"CREATE TABLE t (id INTEGER PRIMARY KEY, v {unique})"
    a, b, c = make(1, script), make(2, script), make(3, script)
    a.sql("INSERT INTO t VALUES (1, 'x')")
    exchange(a, b, c)
    for node in (b, c):
        node.sql(ADD)
    c.sql("UPDATE t SET v = 'z', w = 5")
    a.clock.tick(1000)
    a.sql("UPDATE t SET v = 'y'")
    groups = a.publish()
    for node in (a, b, c):
        node.apply(*groups)
    exchange(a, b, c)
    assert b.rows("t") == c.rows("t") == [(1, "y", 5)]
    a.sql(ADD)
    follow(a)
    assert a.rows("t") == c.rows("t")
    assert a.version("t", 1) == b.version("t", 1) == c.version("t", 1)
    lost = {"id": 1, "v": "z", "w": 5}
    assert [row for *_, row in c.conflicts()] == [lost], "its other columns are in the conflict log"


def test_i4_a_delete_that_waits_to_be_published_is_not_lost_to_a_message_without_a_column(make: MakeNode) -> None:
    a, b, c = make(1, PLAIN), make(2, PLAIN), make(3, PLAIN)
    for node in (b, c):
        node.sql(ADD)
        node.clock.tick()
    b.sql("INSERT INTO t VALUES (1, 'x', 5)")
    exchange(a, b, c)
    c.clock.tick(1000)
    c.sql("DELETE FROM t")
    a.clock.tick(2000)
    a.sql("INSERT INTO t VALUES (1, 'y')")
    groups = a.publish()
    for node in (a, b, c):
        node.apply(*groups)
    exchange(a, b, c)
    assert b.rows("t") == c.rows("t") == [(1, "y", None)]


def test_what_was_published_already_is_not_published_again(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; {ADD}")
    node.sql("INSERT INTO t VALUES (1, 'x', 5)")
    node.publish()
    node.apply(wrote("t", OLD, ((1, "y"), stamp(EPOCH_MS + DAY_MS, 3))))
    assert node.rows("t") == [(1, "y", 5)]
    assert node.publish() == []
