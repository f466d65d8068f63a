"""Tables of about a thousand columns: SQLite has 2,000 result columns and expressions 1,000 deep."""

from __future__ import annotations

from collections.abc import Sequence

import apsw
import pytest

from harmonylite.db import apply
from harmonylite.db.schema import LONGEST_SQL
from harmonylite.model import Version
from tests.db.conftest import MakeNode
from tests.db.harness import Node, exchange
from tests.db.snapshots import copy_of, merge

NARROW = "; CREATE TABLE narrow (id INTEGER PRIMARY KEY, v)"
old_apsw = pytest.mark.skipif(LONGEST_SQL is not None, reason="this apsw cannot fail in statements of such a length")


def wide(columns: int, last: str = "", names: str = "c{}") -> str:
    """A table w, the first column of which is its key."""
    listed = [names.format(i) for i in range(columns)]
    return f"CREATE TABLE w ({listed[0]} INTEGER PRIMARY KEY, {', '.join(listed[1:])} {last})"


def fill(node: Node, key: int, value: object, columns: int) -> None:
    node.sql(f"INSERT INTO w VALUES ({', '.join('?' * columns)})", (key, *[value] * (columns - 1)))


def same(*nodes: Node) -> list[Sequence[object]]:
    """The rows that all nodes have, none of which waits for anything."""
    assert [node.replica.parked() for node in nodes] == [0] * len(nodes)
    found = [node.rows("w") for node in nodes]
    assert all(each == found[0] for each in found)
    return list(found[0])


def concurrent_edit(a: Node, b: Node) -> None:
    b.clock.now_ms = a.clock.now_ms
    a.sql("UPDATE w SET c1 = 'A'")
    b.sql("UPDATE w SET c1 = 'B'")
    exchange(a, b)


def not_utf8(a: Node, b: Node) -> None:
    a.sql("UPDATE w SET c1 = CAST(x'ff' AS TEXT)")
    a.sql("INSERT INTO narrow VALUES (1, 'of another table')")
    exchange(a, b)


@pytest.mark.parametrize("change", [concurrent_edit, not_utf8])
def test_i3_a_table_that_is_too_wide_is_skipped_loudly_and_holds_nothing_up(make: MakeNode, change: object) -> None:
    a, b = make(1, wide(1100) + NARROW), make(2, wide(1100) + NARROW)
    for node in (a, b):
        [skipped] = node.replica.schema.skipped
        assert skipped.table == "w"
        assert "it has 1,100 columns, 995 can be replicated" in skipped.reason
        fill(node, 1, "x", 1100)
    assert callable(change)
    change(a, b)
    a.sql("INSERT INTO narrow VALUES (2, 'later')")
    exchange(a, b)
    assert (2, "later") in b.rows("narrow")
    assert b.rows("narrow") == a.rows("narrow")
    assert a.replica.parked() == b.replica.parked() == 0


@old_apsw
def test_i4_a_table_just_below_the_limit_replicates(make: MakeNode) -> None:
    columns = 995
    a, b = make(1, wide(columns, "UNIQUE") + NARROW), make(2, wide(columns, "UNIQUE") + NARROW)
    assert not a.replica.schema.skipped
    fill(a, 1, "x", columns)
    exchange(a, b)
    concurrent_edit(a, b)
    assert [row[:3] for row in same(a, b)] == [(1, "B", "x")]
    not_utf8(a, b)
    [typed] = b.query("SELECT typeof(c1), CAST(c1 AS BLOB) FROM w")
    assert typed == ("text", b"\xff")
    a.sql("UPDATE w SET c1 = 'text'")
    fill(a, 2, "clash", columns)
    b.clock.now_ms = a.clock.now_ms
    fill(b, 3, "clash", columns)
    exchange(a, b)
    assert [row[0] for row in same(a, b)] == [1, 3]


def test_one_column_more_is_too_many(make: MakeNode) -> None:
    assert [each.table for each in make(1, wide(996)).replica.schema.skipped] == ["w"]


@old_apsw
@pytest.mark.parametrize("columns", [300, 600, 995])
def test_i9_a_wide_table_comes_with_a_snapshot(make: MakeNode, columns: int) -> None:
    a, b = make(1, wide(columns)), make(2, wide(columns))
    fill(a, 1, "x", columns)
    exchange(a, b)
    a.sql("UPDATE w SET c1 = 'missed'")
    a.publish()
    merge(b, copy_of(a))
    assert [row[:2] for row in same(a, b)] == [(1, "missed")]
    assert b.version("w", 1) == a.version("w", 1) != Version(0, 0, 0)


def key_of(columns: int) -> str:
    names = [f"c{i}" for i in range(columns)]
    return f"CREATE TABLE w ({', '.join(names)}, v, PRIMARY KEY ({', '.join(names)})) WITHOUT ROWID"


def test_a_key_of_too_many_columns_is_skipped(make: MakeNode) -> None:
    [skipped] = make(1, key_of(481)).replica.schema.skipped
    assert skipped.reason == "its key has 481 columns, with 480 of them it could be replicated"


@old_apsw
def test_a_key_of_many_columns(make: MakeNode) -> None:
    script = key_of(480)
    a, b = make(1, script), make(2, script)
    assert not a.replica.schema.skipped
    a.sql(f"INSERT INTO w VALUES ({', '.join('?' * 481)})", [1] * 481)
    exchange(a, b)
    a.sql("UPDATE w SET c0 = 2")
    b.sql("UPDATE w SET v = 2")
    exchange(a, b)
    assert [row[0] for row in same(a, b)] == [2]


def test_a_long_statement_is_not_left_to_an_apsw_that_dies_when_it_fails(make: MakeNode) -> None:
    """With apsw 3.40 a process ends in a statement of more than 16 kB that fails, here in a unique clash."""
    script = wide(300, "UNIQUE", names="a_column_with_a_long_name_{}")
    a, b = make(1, script), make(2, script)
    assert not a.replica.schema.skipped
    fill(a, 1, "clash", 300)
    fill(b, 2, "clash", 300)
    exchange(a, b)
    assert [row[0] for row in same(a, b)] == [2]


def test_where_no_statement_for_its_rows_is_short_enough_the_table_is_skipped(
    make: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harmonylite.db.schema.LONGEST_SQL", 16_383)
    monkeypatch.setattr(apply, "LONGEST_SQL", 16_383)
    script = wide(300, names="a_column_with_a_rather_long_name_{}") + "; " + NARROW
    [skipped] = make(1, script).replica.schema.skipped
    assert apsw.apswversion() in skipped.reason
    assert "300 columns are together too long" in skipped.reason


def test_where_only_the_short_statements_can_be_run_rows_take_the_careful_way(
    make: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harmonylite.db.schema.LONGEST_SQL", 16_383)
    monkeypatch.setattr(apply, "LONGEST_SQL", 16_383)
    script = wide(300, names="a_column_with_a_long_name_{}")
    a, b = make(1, script), make(2, script)
    longest = 0

    def trace(_: object, sql: str, bindings: object) -> bool:
        nonlocal longest
        if sql.startswith(("INSERT OR", "UPDATE OR")):
            longest = max(longest, len(sql))
        return True

    b.writer.setexectrace(trace)
    fill(a, 1, "x", 300)
    exchange(a, b)
    a.sql("UPDATE w SET a_column_with_a_long_name_1 = CAST(x'ff' AS TEXT)")
    exchange(a, b)
    assert 8_000 < longest <= 16_383
    assert a.query("SELECT count(*) FROM w") == b.query("SELECT count(*) FROM w") == [(1,)]
