"""Merging a snapshot into a live database: by version, without losing a write made meanwhile (docs/rules.md)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import apsw
import pytest

from harmonylite.db.copy import DamagedCopyError, DamagedDatabaseError
from harmonylite.db.merge import Merger, PieceSize, Work
from harmonylite.model import Position, RawText, Version
from tests.db.conftest import MakeNode
from tests.db.harness import EPOCH_MS, STREAM, Killer, Node, deleted, exchange, removed, stamp, written, wrote
from tests.db.snapshots import copy_of, forget_before, merge, merger_of

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"
UNIQUE = "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE)"
IDV = ("id", "v")


def publish(node: Node) -> None:
    """All that is pending goes to the stream, and comes back."""
    groups = node.publish()
    if groups:
        node.apply(*groups)


def next_work(merger: Merger) -> Work:
    """What is to be written next."""
    while (work := merger.find()) is not None:
        if not work.empty:
            return work
    raise AssertionError("nothing is left to be written")


def test_a_node_that_missed_everything_takes_it_from_a_snapshot(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'one'), (2, 'two'), (3, 'three')")
    exchange(a, b)
    a.sql("UPDATE t SET v = 'changed' WHERE id = 1")
    a.sql("DELETE FROM t WHERE id = 2")
    a.sql("INSERT INTO t VALUES (4, 'four')")
    publish(a)
    report = merge(b, copy_of(a))
    assert b.rows("t") == a.rows("t") == [(1, "changed"), (3, "three"), (4, "four")]
    assert [b.version("t", key) for key in range(1, 5)] == [a.version("t", key) for key in range(1, 5)]
    assert b.tombstones("t") == [(2,)]
    assert (report.written, report.deleted, report.marked, report.conflicts) == (3, 0, 0, 0)
    assert b.publish() == []


def test_after_a_merge_reading_goes_on_at_the_later_position_of_the_same_log(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    for stream, created, sequence in (("s1", "x", 50), ("s2", "x", 50), ("s3", "new", 7), ("s4", "x", 9)):
        a.replica.move_position(Position(stream, created, sequence, 5))
    for stream, created, sequence in (("s1", "x", 20), ("s2", "x", 80), ("s3", "old", 900)):
        b.replica.move_position(Position(stream, created, sequence, 5))
    merge(b, copy_of(a))
    found = {stream: b.replica.position(stream) for stream in ("s1", "s2", "s3", "s4")}
    assert {stream: (each.created, each.sequence) for stream, each in found.items() if each} == {
        "s1": ("x", 50),
        "s2": ("x", 80),
        "s3": ("new", 7),
        "s4": ("x", 9),
    }


def test_i3_a_write_between_any_two_steps_is_not_lost(make: MakeNode) -> None:
    """The application changes, deletes and adds rows just before and after each write transaction."""
    a, b = make(1, PLAIN), make(2, PLAIN)
    with a.transaction():
        for key in range(400):
            a.app.execute("INSERT INTO t VALUES (?, 'old')", (key,))
    exchange(a, b)
    with a.transaction():
        a.app.execute("UPDATE t SET v = 'new'")
    publish(a)
    snapshot = copy_of(a)
    b.clock.now_ms = a.clock.now_ms + 1_000
    fresh = iter(range(1_000, 2_000))
    mine: dict[int, str | None] = {}

    def application(work: Work) -> None:
        keys = [each.key[0] for each in work.found]
        assert keys
        for place, content in ((0, "mine"), (len(keys) // 2, None), (len(keys) - 1, "mine too")):
            key = int(str(keys[place]))
            if content is None:
                b.sql("DELETE FROM t WHERE id = ?", (key,))
            else:
                b.sql("INSERT INTO t VALUES (?, ?) ON CONFLICT DO UPDATE SET v = excluded.v", (key, content))
            mine[key] = content
        key = next(fresh)
        b.sql("INSERT INTO t VALUES (?, 'added')", (key,))
        mine[key] = "added"

    merge(b, snapshot, application, application)
    assert len(mine) > 10
    rows = dict(b.rows("t"))
    assert {key: rows.get(key) for key in mine} == mine
    assert {rows[key] for key in rows.keys() - mine.keys()} == {"new"}
    exchange(a, b)
    assert a.rows("t") == b.rows("t")
    assert {key: dict(a.rows("t")).get(key) for key in mine} == mine


def test_pending_local_writes_stay_pending_and_newer_ones_win(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'base'), (2, 'base'), (3, 'base')")
    exchange(a, b)
    b.clock.now_ms = a.clock.now_ms
    b.sql("UPDATE t SET v = 'older' WHERE id = 1")
    b.absorb()
    a.clock.now_ms = b.clock.now_ms + 1_000
    a.sql("UPDATE t SET v = 'a' WHERE id < 3")
    publish(a)
    b.clock.now_ms = a.clock.now_ms + 1_000
    b.sql("UPDATE t SET v = 'newer' WHERE id = 2")
    b.sql("UPDATE t SET v = 'only here' WHERE id = 3")
    merge(b, copy_of(a))
    assert b.rows("t") == [(1, "a"), (2, "newer"), (3, "only here")]
    assert sorted((key, reason, row["v"]) for _, key, _, reason, row in b.conflicts()) == [
        ((1,), "concurrent write", "older"),
        ((2,), "concurrent write", "a"),
    ]
    assert sorted(row for row, _ in written(b.publish(), "t")) == [(2, "newer"), (3, "only here")]


def test_unpublished_rows_of_a_snapshot_are_adopted_with_their_marks(make: MakeNode) -> None:
    """The snapshot's node dies before it published them: whoever merged the snapshot does."""
    a, b, c = make(1, PLAIN), make(2, PLAIN), make(3, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x'), (2, 'x')")
    exchange(a, b, c)
    a.sql("UPDATE t SET v = 'only in the snapshot' WHERE id = 1")
    a.sql("DELETE FROM t WHERE id = 2")
    snapshot = copy_of(a)
    version = a.version("t", 1)
    assert merge(b, snapshot).marked == 2
    assert merge(b, snapshot).marked == 0
    groups = b.publish()
    assert [(row, Version(*each[:3])) for row, each in written(groups, "t")] == [((1, "only in the snapshot"), version)]
    assert removed(groups, "t") == [(2,)]
    c.apply(*groups)
    assert c.rows("t") == b.rows("t") == [(1, "only in the snapshot")]


def test_an_adopted_version_is_bounded_as_the_stream_would_have(make: MakeNode) -> None:
    """A node whose clock is fast publishes what it writes after the snapshot, and that must win (I6)."""
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.clock.tick(500_000)
    a.sql("INSERT INTO t VALUES (1, 'in the snapshot')")
    path, info = copy_of(a)
    a.sql("UPDATE t SET v = 'later'")
    merger = Merger(b.replica, path, info.positions, info.tombstones_since_ms, created_ms=EPOCH_MS)
    merger.open()
    merger.write(next_work(merger))
    merger.close()
    assert b.version("t", 1) == Version(EPOCH_MS + 60_000, 1)
    assert [Version(*each[:3]) for _, each in written(b.publish(), "t")] == [b.version("t", 1)]
    b.apply(*a.publish(), stored_ms=EPOCH_MS + 5)
    assert b.rows("t") == [(1, "later")]


def test_what_is_published_already_needs_no_mark(make: MakeNode) -> None:
    """The snapshot's node had not heard of the acknowledgement, but this node has the row from the stream."""
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x')")
    groups = a.outgoing()
    snapshot = copy_of(a)
    b.apply(*(each.group for each in groups))
    assert merge(b, snapshot).marked == 0
    assert b.publish() == []


def test_what_waited_at_the_snapshots_node_may_have_been_in_the_lost_tail(make: MakeNode) -> None:
    """Published after the snapshot, read here, and gone from the log: then nobody else has it."""
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x'), (2, 'y')")
    a.sql("DELETE FROM t WHERE id = 2")
    groups = a.outgoing()
    snapshot = copy_of(a)
    b.apply(*(each.group for each in groups))
    assert merge(b, snapshot, lost=True).marked == 2
    again = b.publish()
    assert ([row for row, _ in written(again, "t")], removed(again, "t")) == ([(1, "x")], [(2,)])


def test_a_listener_takes_everything_and_marks_nothing(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN, publish=False)
    a.sql("INSERT INTO t VALUES (1, 'x')")
    report = merge(b, copy_of(a))
    assert (b.rows("t"), report.marked) == ([(1, "x")], 0)
    assert b.collect() == []


def test_parked_rows_of_a_snapshot_wait_here_or_fit_here(make: MakeNode) -> None:
    a = make(1, PLAIN)
    a.apply(wrote("t", ("id", "v", "extra"), ((1, "x", 7), stamp(EPOCH_MS, 9))))
    a.apply(wrote("missing", IDV, ((1, "x"), stamp(EPOCH_MS, 9))))
    snapshot = copy_of(a)
    b, c = make(2, "CREATE TABLE t (id INTEGER PRIMARY KEY, v, extra)"), make(3, PLAIN)
    merge(b, snapshot)
    assert b.rows("t") == [(1, "x", 7)]
    assert [(table, key) for table, key, _, _ in b.parked()] == [("missing", (1,))]
    for _ in range(2):
        merge(c, snapshot)
        assert [(table, key) for table, key, _, _ in c.parked()] == [("missing", (1,)), ("t", (1,))]
    c.sql("ALTER TABLE t ADD COLUMN extra")
    c.absorb()
    assert c.rows("t") == [(1, "x", 7)]


def test_rows_without_a_version_are_never_stamped(make: MakeNode) -> None:
    """Equal ones stay without; what is missing here comes without; any version beats one that has none."""
    a = make(1, f"{PLAIN}; INSERT INTO t VALUES (1, 'same'), (2, 'there'), (3, 'seed'), (4, 'seed'), (6, 'seed')")
    b = make(2, f"{PLAIN}; INSERT INTO t VALUES (1, 'same'), (3, 'seed'), (4, 'seed'), (5, 'seed'), (6, 'seed')")
    a.sql("UPDATE t SET v = 'edited' WHERE id = 3")
    a.sql("DELETE FROM t WHERE id = 4")
    publish(a)
    b.sql("UPDATE t SET v = 'edited here' WHERE id = 6")
    merge(b, copy_of(a))
    assert b.rows("t") == [(1, "same"), (2, "there"), (3, "edited"), (5, "seed"), (6, "edited here")]
    assert [b.version("t", key) for key in (1, 2)] == [None, None]
    assert b.version("t", 3) == a.version("t", 3)
    assert b.tombstones("t") == [(4,)]
    assert b.conflicts() == []


@pytest.mark.parametrize("here_wins", [False, True])
def test_different_rows_without_a_version_are_decided_by_content(make: MakeNode, here_wins: bool) -> None:
    """The same content wins on both sides; the loser is logged; a winner here is published as (0, 0)."""
    contents = sorted(["one", "two"], key=_rank)
    if here_wins:
        contents.reverse()
    theirs, ours = contents[1], contents[0]
    a, b = (
        make(1, f"{PLAIN}; INSERT INTO t VALUES (1, '{theirs}')"),
        make(2, f"{PLAIN}; INSERT INTO t VALUES (1, '{ours}')"),
    )
    for _ in range(2):
        merge(b, copy_of(a))
        assert b.rows("t") == [(1, max(contents, key=_rank))]
        assert [(version, row) for _, _, version, _, row in b.conflicts()] == [
            (Version(0, 0), {"id": 1, "v": min(contents, key=_rank)})
        ]
    groups = b.publish()
    assert [(row, Version(*each[:3])) for row, each in written(groups, "t")] == (
        [((1, ours), Version(0, 0))] if here_wins else []
    )
    a.apply(*groups)
    assert a.rows("t") == b.rows("t")
    assert a.version("t", 1) is None


def _rank(content: str) -> bytes:
    """Who wins between rows of one version, as nodes agree on it: found out by letting two of them meet."""
    from harmonylite.db.resolve import _content

    return _content({"id": 1, "v": content}, {"id": 1, "v": content})


@pytest.mark.parametrize("here_wins", [False, True])
def test_cloned_cards_equal_versions_with_other_content(make: MakeNode, here_wins: bool) -> None:
    contents = sorted(["one", "two"], key=_rank)
    if here_wins:
        contents.reverse()
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.apply(wrote("t", IDV, ((1, contents[1]), stamp(EPOCH_MS, 5)), ((2, "same"), stamp(EPOCH_MS, 5))))
    b.apply(wrote("t", IDV, ((1, contents[0]), stamp(EPOCH_MS, 5)), ((2, "same"), stamp(EPOCH_MS, 5))))
    merge(b, copy_of(a))
    winner, loser = max(contents, key=_rank), min(contents, key=_rank)
    assert b.rows("t") == [(1, winner), (2, "same")]
    assert [(key, version, reason, row) for _, key, version, reason, row in b.conflicts()] == [
        ((1,), Version(EPOCH_MS, 5), "same version, other content", {"id": 1, "v": loser})
    ]
    groups = b.publish()
    assert [row for row, _ in written(groups, "t")] == ([(1, winner)] if here_wins else [])
    a.apply(*groups)
    assert a.rows("t") == b.rows("t")


def test_cloned_cards_one_deleted_what_the_other_wrote_at_the_same_version(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.apply(wrote("t", IDV, ((1, "x"), stamp(EPOCH_MS, 5))), deleted("t", ((2,), stamp(EPOCH_MS, 5))))
    b.apply(wrote("t", IDV, ((2, "y"), stamp(EPOCH_MS, 5))), deleted("t", ((1,), stamp(EPOCH_MS, 5))))
    merge(b, copy_of(a))
    assert b.rows("t") == [(1, "x"), (2, "y")]
    a.apply(*b.publish())
    assert a.rows("t") == b.rows("t")


def test_content_is_compared_to_the_byte(make: MakeNode) -> None:
    """1 is not 1.0 in a column without a type, 'a' is not 'A' in a NOCASE one, text is not a blob."""
    script = "CREATE TABLE t (id INTEGER PRIMARY KEY, v, name TEXT COLLATE NOCASE)"
    a, b = make(1, script), make(2, script)
    columns = ("id", "v", "name")
    at = stamp(EPOCH_MS, 5)
    a.apply(wrote("t", columns, ((1, 1, "x"), at), ((2, "t", "x"), at), ((3, None, "A"), at), ((4, 4, "x"), at)))
    b.apply(wrote("t", columns, ((1, 1.0, "x"), at), ((2, b"t", "x"), at), ((3, None, "a"), at), ((4, 4, "x"), at)))
    merge(b, copy_of(a))
    assert {key for _, key, _, _, _ in b.conflicts()} == {(1,), (2,), (3,)}
    a.apply(*b.publish())
    assert repr(a.rows("t")) == repr(b.rows("t"))


def test_a_database_restored_from_an_old_backup_gets_its_own_newer_rows_back(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    b.sql("INSERT INTO t VALUES (1, 'old'), (2, 'old')")
    exchange(a, b)
    backup = copy_of(b, "backup.db")[0]
    b.sql("UPDATE t SET v = 'newer' WHERE id = 1")
    b.sql("INSERT INTO t VALUES (3, 'newer')")
    exchange(a, b)
    b.stop()
    restored = Node(backup, 2, clock=b.clock).start()
    try:
        restored.sql("UPDATE t SET v = 'written after the restore' WHERE id = 2")
        merge(restored, copy_of(a))
        assert restored.rows("t") == [(1, "newer"), (2, "written after the restore"), (3, "newer")]
        assert [restored.version("t", key) for key in (1, 3)] == [a.version("t", key) for key in (1, 3)]
        groups = restored.publish()
        assert [row for row, _ in written(groups, "t")] == [(2, "written after the restore")]
        a.apply(*groups)
        assert a.rows("t") == restored.rows("t")
    finally:
        restored.stop()
        restored.app.close()
        b.start()


# -- unique clashes


def test_a_snapshots_row_clashes_with_a_local_one_and_the_later_wins(make: MakeNode) -> None:
    a, b = make(1, UNIQUE), make(2, UNIQUE)
    a.sql("INSERT INTO t VALUES (1, 'x')")
    publish(a)
    b.clock.now_ms = a.clock.now_ms + 5
    b.sql("INSERT INTO t VALUES (2, 'x')")
    a.clock.now_ms = b.clock.now_ms + 50
    a.sql("INSERT INTO t VALUES (3, 'y')")
    b.sql("INSERT INTO t VALUES (4, 'y')")
    publish(a)
    merge(b, copy_of(a))
    assert b.rows("t") == [(2, "x"), (3, "y")]
    exchange(a, b)
    assert a.rows("t") == b.rows("t") == [(2, "x"), (3, "y")]
    assert {(key, reason) for _, key, _, reason, _ in b.conflicts()} == {((1,), "unique clash"), ((4,), "unique clash")}


@pytest.mark.parametrize(
    "index",
    [
        "v UNIQUE",
        "v, UNIQUE (v)",
        "v); CREATE UNIQUE INDEX u ON t (v",
        "v); CREATE UNIQUE INDEX u ON t (v) WHERE (v IS NOT NULL",
        'v, live DEFAULT 1); CREATE UNIQUE INDEX IF NOT EXISTS [on] ON t ("v" DESC) /* ( */ WHERE t.live AND (live < 2',
        "v); CREATE UNIQUE INDEX u ON t (lower(v)) --, (\n; SELECT (1",
        "v); CREATE UNIQUE INDEX u ON t ((v) || ',', substr(v, 1, 99) COLLATE NOCASE ASC",
        "v); CREATE UNIQUE INDEX u ON t (nullif(v, 'a)'), v) WHERE (length(v) BETWEEN 1 AND 99",
        "v, g AS (v || '!')); CREATE UNIQUE INDEX u ON t (g",
    ],
)
def test_no_good_row_dies_when_unique_values_have_wandered(
    make: MakeNode, monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    """Far apart in the key's order, so that no piece of the merge holds both; the older version would lose a clash
    with the row that held the value before."""
    monkeypatch.setattr("harmonylite.db.merge.WINDOW_ROWS", 10)
    script = f"CREATE TABLE t (id INTEGER PRIMARY KEY, {index})"
    a, b = make(1, script), make(2, script)
    with a.transaction():
        for key in range(1_000):
            a.app.execute("INSERT INTO t (id, v) VALUES (?, ?)", (key, f"value {key}"))
    exchange(a, b)
    # A slow clock elsewhere gave row 1 the value of row 999, after that had been given up.
    columns, live = (("id", "v", "live"), (1,)) if "live" in index else (IDV, ())
    a.apply(wrote("t", columns, ((999, "gave up", *live), stamp(EPOCH_MS + 10_000, 3, base=(EPOCH_MS + 10, 1)))))
    a.apply(wrote("t", columns, ((1, "value 999", *live), stamp(EPOCH_MS + 20, 4, base=(EPOCH_MS + 10, 1)))))
    assert a.sql("SELECT v FROM t WHERE id = 1") == [("value 999",)]
    # And some turned by one.
    with a.transaction():
        a.app.execute("UPDATE t SET v = 'moving ' || id WHERE id BETWEEN 100 AND 120")
        a.app.execute(
            "UPDATE t SET v = 'value ' || (CASE id WHEN 120 THEN 100 ELSE id + 1 END) WHERE id BETWEEN 100 AND 120"
        )
    publish(a)
    merge(b, copy_of(a))
    assert b.rows("t") == a.rows("t")
    assert b.conflicts() == [] and b.tombstones("t") == []
    assert b.publish() == []


def test_a_long_chain_of_unique_values_ends_right_in_short_transactions(make: MakeNode) -> None:
    a, b = make(1, UNIQUE), make(2, UNIQUE)
    with a.transaction():
        for key in range(500):
            a.app.execute("INSERT INTO t VALUES (?, ?)", (key, key))
    exchange(a, b)
    with a.transaction():
        a.app.execute("UPDATE t SET v = -1 - v")
        a.app.execute("UPDATE t SET v = (id + 1) % 500")
    publish(a)
    most = 0

    def measure(work: Work) -> None:
        nonlocal most
        most = max(most, len(work.found))

    merge(b, copy_of(a), measure)
    assert b.rows("t") == a.rows("t")
    assert most < 250
    exchange(a, b)
    assert b.rows("t") == a.rows("t")
    assert b.tombstones("t") == a.tombstones("t") == []


def test_partial_and_expression_indexes_converge(make: MakeNode) -> None:
    script = """CREATE TABLE t (id INTEGER PRIMARY KEY, v, live);
        CREATE UNIQUE INDEX one ON t (v) WHERE live; CREATE UNIQUE INDEX two ON t (lower(v) || live)"""
    a, b = make(1, script), make(2, script)
    a.sql("INSERT INTO t VALUES (1, 'x', 1), (2, 'y', 1)")
    exchange(a, b)
    a.sql("UPDATE t SET live = 0 WHERE id = 1")
    a.sql("INSERT INTO t VALUES (3, 'X', 1)")
    publish(a)
    b.clock.now_ms = a.clock.now_ms + 10
    b.sql("INSERT INTO t VALUES (4, 'X', 0)")
    merge(b, copy_of(a))
    exchange(a, b)
    assert a.rows("t") == b.rows("t")
    assert [row[0] for row in a.rows("t")] == [2, 3, 4]


# -- schemas that differ


def test_a_table_that_is_missing_here_waits_and_one_missing_there_is_left_alone(make: MakeNode) -> None:
    a = make(1, f"{PLAIN}; CREATE TABLE extra (id INTEGER PRIMARY KEY, v); INSERT INTO extra VALUES (1, 'seed')")
    b = make(2, f"{PLAIN}; CREATE TABLE mine (id INTEGER PRIMARY KEY, v)")
    a.sql("INSERT INTO extra VALUES (2, 'x'), (3, 'y')")
    a.sql("DELETE FROM extra WHERE id = 3")
    publish(a)
    b.sql("INSERT INTO mine VALUES (1, 'x')")
    publish(b)
    snapshot = copy_of(a)
    merge(b, snapshot)
    assert [(table, key) for table, key, _, _ in b.parked()] == [("extra", (1,)), ("extra", (2,)), ("extra", (3,))]
    assert b.rows("mine") == [(1, "x")]
    assert b.publish() == [], "the snapshot says nothing of this table: nothing is known to be missing anywhere"
    b.sql("CREATE TABLE extra (id INTEGER PRIMARY KEY, v)")
    b.absorb()
    assert (b.rows("extra"), b.tombstones("extra"), b.parked()) == ([(1, "seed"), (2, "x")], [(3,)], [])


def test_a_table_that_is_excluded_is_not_looked_at(make: MakeNode) -> None:
    script = f"{PLAIN}; CREATE TABLE private (id INTEGER PRIMARY KEY, v)"
    a, b, c = make(1, script), make(2, script, exclude=("private",)), make(3, script, exclude=("private",))
    a.sql("INSERT INTO private VALUES (1, 'x')")
    merge(b, copy_of(a, "a.db"))
    assert (b.rows("private"), b.parked()) == ([], [])
    c.sql("INSERT INTO private VALUES (9, 'c')")
    merge(a, copy_of(c, "c.db"))
    assert a.rows("private") == [(1, "x")]


def test_a_snapshot_with_a_column_more_waits_and_with_one_less_keeps_it(make: MakeNode) -> None:
    wide = "CREATE TABLE t (id INTEGER PRIMARY KEY, v, extra DEFAULT 'default')"
    a, b = make(1, wide), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x', 'kept')")
    publish(a)
    merge(b, copy_of(a, "wide.db"))
    assert [(table, key) for table, key, _, _ in b.parked()] == [("t", (1,))]
    b.sql("ALTER TABLE t ADD COLUMN extra DEFAULT 'default'")
    b.absorb()
    assert b.rows("t") == [(1, "x", "kept")]
    narrow = make(3, PLAIN)
    narrow.apply(
        wrote("t", IDV, ((1, "from the narrow"), stamp(EPOCH_MS + 5_000, 3)), ((2, "new"), stamp(EPOCH_MS, 3)))
    )
    for _ in range(2):
        merge(b, copy_of(narrow, "narrow.db"))
        assert b.rows("t") == [(1, "from the narrow", "kept"), (2, "new", "default")]


def test_a_different_key_waits(make: MakeNode) -> None:
    a, b = make(1, "CREATE TABLE t (id INTEGER, v PRIMARY KEY)"), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x')")
    merge(b, copy_of(a))
    assert [reason for _, _, _, reason in b.parked()] == ["different key"]


def test_columns_that_are_older_than_their_row_stay_so(make: MakeNode) -> None:
    """The snapshot's node has a message from a narrow node: its extra column is older than the row. Who merges must
    fill it from a message that comes later, exactly as the snapshot's node does."""
    wide = "CREATE TABLE t (id INTEGER PRIMARY KEY, v, extra NOT NULL DEFAULT 'none', other NOT NULL)"
    columns = ("id", "v", "extra", "other")
    a, fresh, stale, ahead, same = (make(number, wide) for number in (1, 2, 3, 4, 5))
    first = wrote("t", columns, ((1, "v1", "e1", "o1"), stamp(1_000, 5)))
    without_other = wrote("t", ("id", "v", "extra"), ((1, "v2", "e2"), stamp(2_000, 6, base=(1_000, 5))))
    without_both = wrote("t", ("id", "v"), ((1, "v3"), stamp(3_000, 7, base=(2_000, 6))))
    a.apply(first, without_other, without_both)
    stale.apply(wrote("t", columns, ((1, "v0", "e0", "o0"), stamp(500, 5))))
    ahead.apply(wrote("t", columns, ((1, "v0", "e0", "o0"), stamp(500, 5))), without_both)
    same.apply(wrote("t", columns, ((1, "v0", "e2", "o1"), stamp(500, 5))), without_both)
    same.sql("DELETE FROM __harmonylite__conflict")
    snapshot = copy_of(a)
    sparse = "SELECT col, ts, node FROM __harmonylite__sparse ORDER BY col"
    late = wrote("t", columns, ((1, "late", "late", "late"), stamp(1_500, 8)))
    for node in (fresh, stale, ahead, same):
        merge(node, snapshot)
        assert node.rows("t") == a.rows("t") == [(1, "v3", "e2", "o1")]
        assert node.query(sparse) == a.query(sparse) == [("extra", 2_000, 6), ("other", 1_000, 5)]
        assert node.conflicts() == []
    for node in (a, fresh, stale, ahead, same):
        node.apply(late)
        assert node.rows("t") == [(1, "v3", "e2", "late")]


def test_a_column_that_stayed_behind_is_no_conflict(make: MakeNode) -> None:
    script = "CREATE TABLE t (id INTEGER PRIMARY KEY, v, w)"
    a, b = make(1, script), make(2, script)
    a.sql("INSERT INTO t VALUES (1, 'old', 5), (2, 'old', 5), (3, 'old', 5)")
    exchange(a, b)
    version = a.version("t", 1)
    assert version is not None
    seen = version[:2]
    for key, value in ((1, "new"), (2, "NEW"), (3, b"new")):
        a.apply(wrote("t", IDV, ((key, value), stamp(EPOCH_MS + 10_000, 3, base=seen))))
    # One was changed here since, before that came.
    b.sql("UPDATE t SET w = 6 WHERE id = 3")
    publish(b)
    merge(b, copy_of(a))
    assert b.rows("t") == [(1, "new", 5), (2, "NEW", 5), (3, b"new", 6)]
    assert [key for _, key, *_ in b.conflicts()] == [(3,)]


def test_a_schema_that_changes_in_the_middle_starts_the_merge_again(make: MakeNode) -> None:
    a = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v, extra); CREATE TABLE u (id INTEGER PRIMARY KEY, v)")
    b = make(2, PLAIN)
    with a.transaction():
        for key in range(500):
            a.app.execute("INSERT INTO t VALUES (?, 'x', 'e')", (key,))
        a.app.execute("INSERT INTO u VALUES (1, 'u')")
    publish(a)
    changes = iter(["ALTER TABLE t ADD COLUMN extra", "CREATE TABLE u (id INTEGER PRIMARY KEY, v)"])

    def migrate(_: Work) -> None:
        for statement in changes:
            b.sql(statement)
            break

    merge(b, copy_of(a), migrate, migrate)
    b.absorb()
    assert (b.rows("t"), b.rows("u"), b.parked()) == (a.rows("t"), a.rows("u"), [])


@pytest.mark.parametrize("change", ["DROP TABLE t", "ALTER TABLE t RENAME TO renamed", "ALTER TABLE t DROP COLUMN v"])
def test_a_table_that_goes_between_reading_and_writing(make: MakeNode, change: str) -> None:
    for since_ms in (0, 2 * EPOCH_MS):
        a, b = make(1, PLAIN), make(2, PLAIN)
        a.sql("INSERT INTO t VALUES (1, 'x')")
        publish(a)
        b.apply(wrote("t", IDV, ((2, "received"), stamp(EPOCH_MS, 9))))
        forget_before(a, since_ms)
        changes = iter([change])

        def migrate(_: Work, b: Node = b, changes: Iterator[str] = changes) -> None:
            for statement in changes:
                b.sql(statement)

        merge(b, copy_of(a, f"{since_ms}.db"), migrate)
        assert b.query("PRAGMA integrity_check") == [("ok",)]
        assert [(key, reason) for _, key, _, reason in b.parked()] == [
            ((1,), "missing column" if "COLUMN" in change else "missing table")
        ]


# -- all kinds of keys

KEYS: dict[str, list[tuple[Any, ...]]] = {
    "id INTEGER PRIMARY KEY": [(1,), (-(2**63),), (2**63 - 1,)],
    "id TEXT PRIMARY KEY": [("a",), ("A",), ("",), ("a\x00b",), ("ü",)],
    "id TEXT PRIMARY KEY COLLATE NOCASE": [("Ann",), ("bob",), ("Ü",), ("ü",)],
    "id TEXT COLLATE RTRIM PRIMARY KEY": [("x  ",), ("y",)],
    "id REAL PRIMARY KEY": [(1.5,), (2.0,), (-1e300,), (float("inf"),)],
    "id PRIMARY KEY": [(1,), ("1",), (b"1",), (1.5,), ("",), (b"",)],
    "id BLOB PRIMARY KEY": [(b"\x00\xff",), (b"",)],
    "id TEXT, n INTEGER, PRIMARY KEY (id, n)": [("a", 1), ("a", 2), ("b", 1)],
    "id TEXT, n, PRIMARY KEY (n DESC, id COLLATE NOCASE)": [("a", 1), ("B", "x"), ("b", 2.5), ("c", b"")],
}


@pytest.mark.parametrize("without_rowid", ["", " WITHOUT ROWID"])
@pytest.mark.parametrize("key", KEYS)
def test_every_kind_of_key(make: MakeNode, key: str, without_rowid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through every way of the merge, one row at a time."""
    monkeypatch.setattr("harmonylite.db.merge.WINDOW_ROWS", 1)
    monkeypatch.setattr("harmonylite.db.merge.FIRST_ROWS", 1)
    columns, _, constraint = key.partition(", PRIMARY")
    width = len(KEYS[key][0])
    script = f"CREATE TABLE t ({columns}, v{', PRIMARY' + constraint if constraint else ''}){without_rowid};"
    names = ("id", "n")[:width]
    marks = ", ".join("?" * width)
    a, b = make(1, script), make(2, script)
    a.clock.now_ms += 5_000
    where = " AND ".join(f"{name} = ?" for name in names)

    def insert(node: Node, values: tuple[object, ...], content: str) -> None:
        node.sql(f"INSERT INTO t ({', '.join(names)}, v) VALUES ({marks}, ?)", (*values, content))

    for values in KEYS[key]:
        insert(b, values, "stale")
    publish(b)
    for values in KEYS[key]:
        insert(a, values, "new")
    a.sql(f"DELETE FROM t WHERE {where}", KEYS[key][0])
    publish(a)
    merge(b, copy_of(a))
    assert b.rows("t") == a.rows("t")
    version = 'SELECT * FROM "__harmonylite__t_version" ORDER BY ts'
    assert [row[:width] for row in b.query(version)] == [row[:width] for row in a.query(version)]
    assert b.publish() == []
    # Rows that only this node has go out again, by their mark.
    empty = make(3, script)
    empty.replica.completeness.note_synced(1)
    assert merge(b, copy_of(empty, "empty.db")).marked == len(KEYS[key])
    groups = b.publish()
    assert len(written(groups, "t")) == len(KEYS[key]) - 1
    empty.apply(*groups)
    assert empty.rows("t") == b.rows("t")


def test_keys_and_values_that_are_not_utf8(make: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harmonylite.db.merge.WINDOW_ROWS", 2)
    monkeypatch.setattr("harmonylite.db.merge.FIRST_ROWS", 1)
    script = "CREATE TABLE t (id TEXT, n INTEGER, v, PRIMARY KEY (id, n))"
    a, b, c = make(1, script), make(2, script), make(3, script)
    for number in range(5):
        a.sql(
            "INSERT INTO t VALUES (CAST(? AS TEXT), 1, CAST(? AS TEXT))", (b"\xff" + bytes([65 + number]), b"\xfe\x80")
        )
    a.sql("DELETE FROM t WHERE id = CAST(? AS TEXT)", (b"\xffA",))
    merge(b, copy_of(a))
    shown = "SELECT hex(id), n, typeof(v), hex(v) FROM t ORDER BY id"
    assert b.query(shown) == a.query(shown) and len(a.query(shown)) == 4
    groups = b.publish()
    assert {type(row[0]) for row, _ in written(groups, "t")} == {RawText}
    c.apply(*groups)
    assert c.query(shown) == a.query(shown)
    # Adopted marks were read back, and a second merge finds nothing more to do.
    assert merge(b, copy_of(a)).written == 0


def test_rows_with_null_in_their_key_are_left_alone(make: MakeNode) -> None:
    script = "CREATE TABLE t (id TEXT PRIMARY KEY, v); INSERT INTO t VALUES (NULL, 'a'), (NULL, 'b'), ('x', 'c')"
    a, b = make(1, script), make(2, "CREATE TABLE t (id TEXT PRIMARY KEY, v); INSERT INTO t VALUES (NULL, 'mine')")
    merge(b, copy_of(a))
    assert b.rows("t") == [("x", "c"), (None, "mine")]


def test_i8_a_full_text_index_that_triggers_keep_stays_right(make: MakeNode) -> None:
    script = """
        CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT);
        CREATE VIRTUAL TABLE found USING fts5(v, content='t', content_rowid='id');
        CREATE TRIGGER ai AFTER INSERT ON t BEGIN INSERT INTO found (rowid, v) VALUES (NEW.id, NEW.v); END;
        CREATE TRIGGER ad AFTER DELETE ON t BEGIN
            INSERT INTO found (found, rowid, v) VALUES ('delete', OLD.id, OLD.v); END;
        CREATE TRIGGER au AFTER UPDATE ON t BEGIN
            INSERT INTO found (found, rowid, v) VALUES ('delete', OLD.id, OLD.v);
            INSERT INTO found (rowid, v) VALUES (NEW.id, NEW.v); END;
    """
    a, b = make(1, script), make(2, script)
    a.sql("INSERT INTO t VALUES (1, 'alpha'), (2, 'beta'), (3, 'gamma')")
    exchange(a, b)
    a.sql("UPDATE t SET v = 'delta' WHERE id = 1")
    a.sql("DELETE FROM t WHERE id = 2")
    a.sql("INSERT INTO t VALUES (4, 'epsilon')")
    publish(a)
    a.replica.prune_tombstones(EPOCH_MS)
    a.replica.prune_tombstones(EPOCH_MS + 100 * 86_400_000)
    merge(b, copy_of(a))
    assert b.rows("t") == a.rows("t")
    b.sql("INSERT INTO found (found, rank) VALUES ('integrity-check', 1)")
    assert [b.query("SELECT rowid FROM found WHERE found MATCH ?", (word,)) for word in ("alpha", "beta", "delta")] == [
        [],
        [],
        [(1,)],
    ]


# -- trouble


def test_killed_at_any_step_and_run_again_the_result_is_the_same(make: MakeNode) -> None:
    """Killed before each statement of the writer in turn, then all is opened again and merged from the start."""
    script = f"{UNIQUE}; INSERT INTO t VALUES (90, 'seed'), (91, 'other')"
    results = set()
    for count in range(1, 3_000, 5):
        a, b = make(1, f"{UNIQUE}; INSERT INTO t VALUES (90, 'seed')"), make(2, script)
        a.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'c')")
        exchange(a, b)
        b.clock.now_ms = a.clock.now_ms
        b.sql("INSERT INTO t VALUES (7, 'received')")
        publish(b)
        b.replica.completeness.note_synced(EPOCH_MS)
        b.replica.flush()
        a.sql("UPDATE t SET v = 'd' WHERE id = 1")
        a.sql("DELETE FROM t WHERE id = 2")
        publish(a)
        b.sql("INSERT INTO t VALUES (8, 'd')")
        forget_before(a, 2 * EPOCH_MS)
        a.sql("INSERT INTO t VALUES (9, 'waits')")
        snapshot = copy_of(a)
        die = Killer(count)
        b.writer.setexectrace(die)
        try:
            merge(b, snapshot)
        except KeyboardInterrupt:
            b.crash()
            if b.meta("tombstones_since_ms"):
                assert b.rows("t")[0] == (3, "c"), "where reading goes on is said last"
            merge(b, snapshot)
        else:
            b.writer.setexectrace(None)
        finished = die.left > 0
        state = (b.rows("t"), b.query('SELECT k0, ts, node, rank, deleted, batch > 0 FROM "__harmonylite__t_version"'))
        results.add(repr((state, sorted((key, reason) for _, key, _, reason, _ in b.conflicts()))))
        for each in (a, b):
            each.replica.close()
            each.app.close()
            each.replica.open = lambda: None  # type: ignore[method-assign]
        if finished:
            break
    assert finished
    assert len(results) == 1, "\n".join(results)


def test_a_full_disk_in_the_middle_leaves_the_database_intact_and_the_merge_goes_on(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    with a.transaction():
        for key in range(3_000):
            a.app.execute("INSERT INTO t VALUES (?, zeroblob(500))", (key,))
    publish(a)
    snapshot = copy_of(a)
    b.writer.execute("PRAGMA max_page_count = 120")
    merger = merger_of(b, snapshot)
    failed: Work | None = None
    while failed is None:
        work = next_work(merger)
        try:
            merger.write(work)
        except apsw.FullError:
            failed = work
    there = len(b.rows("t"))
    assert 0 < there < 3_000
    assert b.query("PRAGMA integrity_check") == [("ok",)]
    b.sql("UPDATE t SET v = 'the application goes on' WHERE id = 0")
    with pytest.raises(apsw.FullError):
        merger.write(failed)
    assert len(b.rows("t")) == there
    b.writer.execute("PRAGMA max_page_count = 1000000")
    merger.write(failed)
    while (more := merger.find()) is not None:
        merger.write(more)
    assert merger.finish().written == 3_000
    merger.close()
    assert b.rows("t")[1:] == a.rows("t")[1:] and b.rows("t")[0] == (0, "the application goes on")


def test_a_busy_database_is_tried_again(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x')")
    publish(a)
    merger = merger_of(b, copy_of(a))
    b.writer.setbusytimeout(1)
    work = next_work(merger)
    b.app.execute("BEGIN IMMEDIATE")
    with pytest.raises(apsw.BusyError):
        merger.write(work)
    b.app.execute("COMMIT")
    merger.write(work)
    merger.close()
    assert b.rows("t") == [(1, "x")]


def test_find_takes_no_lock_and_writes_nothing(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x')")
    publish(a)
    path, info = copy_of(a)
    before = path.read_bytes()
    merger = merger_of(b, (path, info))
    b.app.execute("BEGIN IMMEDIATE")
    assert [each.key for each in next_work(merger).found] == [(1,)]
    b.app.execute("COMMIT")
    merger.close()
    merger.close()
    assert path.read_bytes() == before
    assert sorted(each.name for each in path.parent.glob("snapshot.db*")) == ["snapshot.db"]


def test_a_broken_snapshot_is_told_from_a_broken_database(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    with a.transaction():
        for key in range(2_000):
            a.app.execute("INSERT INTO t VALUES (?, 'some content')", (key,))
    publish(a)
    path, info = copy_of(a)
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 8_192] = b"\xa5" * 8_192
    path.write_bytes(content)
    with pytest.raises(DamagedCopyError, match=re.escape(str(path))):
        merge(b, (path, info))
    assert b.query("PRAGMA integrity_check") == [("ok",)]
    assert b.replica.position(STREAM) is None
    path.write_bytes(b"no database")
    with pytest.raises(DamagedCopyError):
        merge(b, (path, info))
    b.sql("VACUUM INTO ?", (str(path.with_name("plain.db")),))
    plain = apsw.Connection(str(path.with_name("plain.db")))
    plain.execute("DROP TABLE __harmonylite__meta")
    plain.close()
    with pytest.raises(DamagedCopyError, match="not a copy"):
        Merger(b.replica, path.with_name("plain.db"), (), 0).open()


def damage(node: Node, name: str) -> None:
    """Every page of one table or index becomes unreadable, and nobody has it in memory."""
    node.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    ((root, page_bytes),) = node.query(
        "SELECT rootpage, (SELECT page_size FROM pragma_page_size) FROM sqlite_schema WHERE name = ?", (name,)
    )
    with node.path.open("r+b") as file:
        file.seek((root - 1) * page_bytes)
        file.write(b"\xff" * page_bytes)
    for connection in (node.replica.writer, node.replica._reader):
        connection.execute("PRAGMA cache_size = 0")
        connection.execute("PRAGMA shrink_memory")


@pytest.mark.parametrize(("table", "step"), [("__harmonylite__t_version", "find"), ("t", "write")])
def test_a_broken_database_is_told_from_a_broken_snapshot(make: MakeNode, table: str, step: str) -> None:
    """The snapshot is good, and another one would be no better."""
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'theirs')")
    publish(a)
    b.sql("INSERT INTO t VALUES (2, 'mine')")
    publish(b)
    merger = merger_of(b, copy_of(a))
    try:
        if step == "write":
            work = next_work(merger)
        damage(b, table)
        with pytest.raises(DamagedDatabaseError, match=f"this node's database {re.escape(str(b.path))} is damaged"):
            if step == "find":
                next_work(merger)
            else:
                merger.write(work)
    finally:
        merger.close()


def test_on_a_busy_machine_transactions_compute_for_less_than_a_time_slice() -> None:
    """Rows of a hundredth of a millisecond; 20 ms more when the scheduler takes the processor away."""
    size, now = PieceSize(), 100.0

    def write(interrupted: bool) -> int:
        nonlocal now
        rows = size.rows
        computed_s = rows / 100_000
        now += 0.02
        size.took(rows, computed_s + 0.02 * interrupted, computed_s, now)
        return rows

    assert [write(False) for _ in range(20)][-1] == 700, "nobody else computes"
    write(True)
    quiet = [write(False) for _ in range(200)]
    assert max(quiet[1:]) <= 280
    assert [write(False) for _ in range(100)][-1] == 700, "not for ever"
    slow = PieceSize()
    slow.took(100, 0.02, 0.019, now)
    assert slow.busy_until == 0.0, "slow all by itself"


def test_write_transactions_stay_short_and_progress_is_told(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    with a.transaction():
        for key in range(20_000):
            a.app.execute("INSERT INTO t VALUES (?, ?)", (key, "content " * 20))
    publish(a)
    seen = []
    merger = merger_of(b, copy_of(a))
    while (work := merger.find()) is not None:
        seen.append(merger.progress)
        merger.write(work)
    report = merger.finish()
    merger.close()
    assert report.written == 20_000
    assert report.longest_s < 0.5, "tens of milliseconds, on a machine that has nothing else to do"
    assert [each.done for each in seen] == sorted(each.done for each in seen)
    assert {each.phase for each in seen} == {"comparing", "reconciling"}
    assert 0 < seen[-1].done <= seen[-1].total


FILLED = (
    ";WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)"
    " INSERT INTO t SELECT i, 'content ' || i FROM n"
)


@pytest.mark.parametrize("case", ["new rows", "rows from before the installation", "changed rows", "rows of this node"])
def test_progress_goes_evenly_with_what_is_written(make: MakeNode, case: str) -> None:
    """Looking at a row costs next to nothing: it must not be said to be half of the work."""
    before = case == "rows from before the installation"
    a, b = make(1, PLAIN + (FILLED if before else "")), make(2, PLAIN)
    if not before:
        (b if case == "rows of this node" else a).sql(FILLED)
        publish(b if case == "rows of this node" else a)
    if case == "changed rows":
        merge(b, copy_of(a))
        a.sql("UPDATE t SET v = 'changed'")
        publish(a)
    snapshot = copy_of(a, "second.db")
    merger = merger_of(b, snapshot)
    written, told = 0, []
    while (work := merger.find()) is not None:
        if work.empty:
            continue
        merger.write(work)
        written += len(work.found)
        progress = merger.progress
        told.append((written, progress.done / progress.total))
    merger.finish()
    merger.close()
    assert written >= 30_000
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    # The last look at what is equal by now is what is left.
    assert max(abs(share - so_far / written) for so_far, share in told) < 0.15, told
