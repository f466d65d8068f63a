"""`[tables]` differs between nodes: what a node leaves out is passed over, and read again when it is wanted."""

from __future__ import annotations

import pytest

from harmonylite.db.copy import DamagedCopyError
from harmonylite.model import Position
from tests.db.conftest import MakeNode
from tests.db.harness import CREATED, STREAM, Node, deleted, stamp, wrote
from tests.db.snapshots import copy_of, merge, merger_of

IDV = ("id", "v")
TWO = "CREATE TABLE t (id INTEGER PRIMARY KEY, v); CREATE TABLE private (id INTEGER PRIMARY KEY, v)"


def position(node: Node) -> Position | None:
    return node.replica.position(STREAM)


@pytest.mark.parametrize("how", [{"exclude": ("priv*",)}, {"include": ("t",)}], ids=["exclude", "include"])
@pytest.mark.parametrize("script", [TWO, "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"], ids=["there", "not there"])
def test_a_table_that_is_left_out_is_passed_over(make: MakeNode, how: dict[str, tuple[str, ...]], script: str) -> None:
    node = make(1, script, **how)
    both = wrote("t", IDV, ((1, "x"), stamp(1000, 2)))
    private = wrote("Private", IDV, ((1, "theirs"), stamp(1000, 2)))
    applied = node.apply(both, private, deleted("private", ((2,), stamp(1000, 2))))
    assert (applied.rows, applied.parked) == (1, 0)
    assert node.rows("t") == [(1, "x")]
    assert node.parked() == [] and node.replica.parked() == 0, "a snapshot may be taken"
    if script == TWO:
        assert node.rows("private") == []
    assert position(node) == Position(STREAM, CREATED, 3, 1)


def test_a_table_that_does_not_exist_still_waits(make: MakeNode) -> None:
    node = make(1, TWO, exclude=("private",))
    node.apply(wrote("later", IDV, ((1, "x"), stamp(1000, 2))))
    assert [(table, reason) for table, _, _, reason in node.parked()] == [("later", "missing table")]


def test_what_waited_for_a_table_is_dropped_when_it_is_left_out(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v)")
    node.apply(wrote("private", IDV, ((1, "x"), stamp(1000, 2))), wrote("later", IDV, ((1, "x"), stamp(1000, 2))))
    before = position(node)
    node.restart(exclude=("private",))
    assert [table for table, _, _, _ in node.parked()] == ["later"]
    assert position(node) == before
    node.restart(exclude=())
    assert position(node) is None, "what was dropped has to be read again"


def test_what_was_passed_over_is_read_again_when_the_table_is_wanted(make: MakeNode) -> None:
    node = make(1, TWO, exclude=("private",))
    groups = (
        wrote("private", IDV, ((1, "theirs"), stamp(1000, 2)), ((2, "theirs"), stamp(1000, 2))),
        deleted("private", ((2,), stamp(2000, 2))),
    )
    node.apply(*groups)
    before = position(node)
    node.restart()
    assert position(node) == before, "nothing has changed"
    node.restart(exclude=())
    assert position(node) is None
    node.received = 0
    node.apply(*groups)
    assert node.rows("private") == [(1, "theirs")]
    after = position(node)
    node.restart()
    assert position(node) == after, "once"


def test_a_table_that_was_never_heard_of_costs_nothing(make: MakeNode) -> None:
    node = make(1, TWO, exclude=("private",))
    node.apply(wrote("t", IDV, ((1, "x"), stamp(1000, 2))))
    before = position(node)
    node.restart(exclude=())
    assert position(node) == before


def test_a_snapshot_without_a_table_is_of_no_use_where_it_is_wanted(make: MakeNode) -> None:
    without, whole, same = make(1, TWO, exclude=("private",)), make(2, TWO), make(3, TWO, exclude=("private",))
    without.apply(wrote("private", IDV, ((1, "theirs"), stamp(1000, 9))), wrote("t", IDV, ((1, "x"), stamp(1000, 9))))
    snapshot = copy_of(without)
    with pytest.raises(DamagedCopyError, match=r"leaves out the table private"):
        merger_of(whole, snapshot)
    merge(same, snapshot)
    assert same.rows("t") == [(1, "x")]


def test_what_a_snapshot_has_of_a_table_that_is_left_out_counts_as_passed_over(make: MakeNode) -> None:
    whole, without = make(1, TWO), make(2, TWO, exclude=("private",))
    private = wrote("private", IDV, ((1, "theirs"), stamp(1000, 9)))
    whole.apply(private)
    merge(without, copy_of(whole))
    assert without.rows("private") == [] and position(without) is not None
    without.restart(exclude=())
    assert position(without) is None


def test_what_waits_in_a_snapshot_for_a_table_that_is_left_out_does_not_wait_here(make: MakeNode) -> None:
    narrow, without = make(1, TWO), make(2, TWO, exclude=("private",))
    narrow.apply(wrote("private", ("id", "v", "w"), ((1, "x", 3), stamp(1000, 9))))
    assert narrow.replica.parked() == 1
    merge(without, copy_of(narrow))
    assert without.parked() == []
    without.restart(exclude=())
    assert position(without) is None
