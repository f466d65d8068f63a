"""Rows that OR REPLACE evicts through an index that no trigger watches: noticed with the write, or soon."""

from __future__ import annotations

import pytest

from harmonylite.db import evictions, unversioned, versions
from harmonylite.model import Position, Version
from tests.db.conftest import MakeNode
from tests.db.harness import CREATED, DAY_MS, STREAM, deleted, exchange, removed, stamp, written, wrote

SCRIPT = "CREATE TABLE t (id INTEGER PRIMARY KEY, v); CREATE UNIQUE INDEX i ON t (v)"


def test_the_triggers_do_not_mention_what_can_be_dropped(make: MakeNode) -> None:
    columns = "id INTEGER PRIMARY KEY, v, w, u UNIQUE, g AS (w + 1) UNIQUE"
    node = make(1, f"CREATE TABLE t ({columns}); CREATE UNIQUE INDEX i ON t (v); CREATE UNIQUE INDEX j ON t (w)")
    texts = [sql for (sql,) in node.query("SELECT sql FROM sqlite_schema WHERE type = 'trigger'")]
    assert not any(f'"{column}"' in text for text in texts for column in ("v", "w", "g"))
    assert sum('NEW."u"' in text for text in texts) == 2


INDEXES = {
    "plain": "i ON t (v)",
    "two columns": "i ON t (v, w)",
    "partial": "i ON t (v) WHERE w = 1",
    "expression": "i ON t (lower(v))",
}


@pytest.mark.parametrize("index", INDEXES)
def test_an_eviction_is_in_the_group_of_its_write(make: MakeNode, index: str) -> None:
    node = make(1, f"CREATE TABLE t (id INTEGER PRIMARY KEY, v, w); CREATE UNIQUE INDEX {INDEXES[index]}")
    node.sql("INSERT INTO t VALUES (1, 'a', 1), (2, 'b', 1)")
    node.publish()
    node.sql("REPLACE INTO t VALUES (3, 'a', 1)")
    at = node.clock.now_ms
    node.clock.tick(DAY_MS)
    [group] = node.publish()
    assert removed([group], "t") == [(1,)]
    assert node.version("t", 1) == Version(at, 1), "the time of the write, not of absorbing"
    assert node.publish() == []


def test_i5_what_was_written_and_evicted_unseen_has_the_time_of_the_eviction(make: MakeNode) -> None:
    node = make(1, SCRIPT)
    node.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    node.sql("DELETE FROM t WHERE id = 2")
    deleted_at = node.clock.now_ms
    node.clock.tick(DAY_MS)
    node.sql("REPLACE INTO t VALUES (3, 'a')")
    node.absorb()
    assert node.version("t", 1) == Version(node.clock.now_ms, 1)
    assert node.version("t", 2) == Version(deleted_at, 1)


def test_i4_a_row_older_than_the_installation_is_missed_too(make: MakeNode) -> None:
    """The evicting row is gone itself when it is published, so that nobody else sees a clash."""
    rows = "INSERT INTO t VALUES (1, 'a'), (2, 'b')"
    a, b = make(1, f"{SCRIPT}; {rows}"), make(2, f"{SCRIPT}; {rows}")
    a.sql("REPLACE INTO t VALUES (3, 'a')")
    a.sql("UPDATE t SET v = 'c' WHERE id = 3")
    exchange(a, b)
    assert a.rows("t") == b.rows("t") == [(2, "b"), (3, "c")]


def test_rows_are_known_from_when_their_table_gets_such_an_index(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v); INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    assert node.version("t", 1) is None
    node.sql("CREATE UNIQUE INDEX i ON t (v)")
    assert node.publish() == [], "nothing is published for that"
    node.sql("REPLACE INTO t VALUES (3, 'a')")
    assert removed(node.publish(), "t") == [(1,)]


def test_rows_that_are_only_known_are_not_published_after_a_lost_log(make: MakeNode) -> None:
    node = make(1, f"{SCRIPT}; INSERT INTO t VALUES (1, 'old')")
    node.apply(wrote("t", ("id", "v"), ((2, "theirs"), stamp(1000, 2))))
    node.apply(deleted("t", ((3,), stamp(0, 0, rank=1))))  # the loser of a clash, unversioned
    node.start_over(Position(STREAM, CREATED, 0))
    groups = node.publish()
    assert [row for row, _ in written(groups, "t")] == [(2, "theirs")]
    assert removed(groups, "t") == [(3,)]


def test_rows_that_are_only_known_are_still_unversioned(make: MakeNode) -> None:
    node = make(1, f"{SCRIPT}; INSERT INTO t VALUES (1, 'old')")
    assert unversioned.exist(node.path, node.replica.schema)
    node.sql("UPDATE t SET v = 'new'")
    node.absorb()
    assert not unversioned.exist(node.path, node.replica.schema)


@pytest.mark.parametrize("published", [False, True])
def test_what_was_evicted_unseen_does_not_come_back_with_its_own_version(
    make: MakeNode, monkeypatch: pytest.MonkeyPatch, *, published: bool
) -> None:
    """In a table so large that it is looked through later; a snapshot, or a log that is filled again, has the row."""
    monkeypatch.setattr(evictions, "LOOK_ROWS", 0)
    node = make(1, SCRIPT if published else f"{SCRIPT}; INSERT INTO t VALUES (1, 'a')")
    if published:
        node.sql("INSERT INTO t VALUES (1, 'a')")
        node.publish()
    version = node.version("t", 1)
    assert version is not None
    node.sql("REPLACE INTO t VALUES (3, 'a')")
    node.sql("UPDATE t SET v = 'c' WHERE id = 3")
    node.apply(wrote("t", ("id", "v"), ((1, "a"), stamp(version.ts, version.node))))
    assert node.rows("t") == [(3, "c")]
    assert removed(node.publish(), "t") == [(1,)]


def test_an_unversioned_row_from_elsewhere_is_known_too(make: MakeNode) -> None:
    node = make(1, SCRIPT)
    node.apply(wrote("t", ("id", "v"), ((1, "a"), stamp(0, 0))))
    assert node.rows("t") == [(1, "a")]
    node.sql("REPLACE INTO t VALUES (3, 'a')")
    assert removed(node.publish(), "t") == [(1,)]


def test_a_null_in_the_key_hides_no_eviction(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id TEXT PRIMARY KEY, v); CREATE UNIQUE INDEX i ON t (v)")
    node.sql("INSERT INTO t VALUES ('x', 'a')")
    node.publish()
    node.sql("INSERT INTO t VALUES (NULL, 'null')")
    node.sql("REPLACE INTO t VALUES ('y', 'a')")
    assert removed(node.publish(), "t") == [("x",)]


def test_an_eviction_while_the_daemon_is_stopped(make: MakeNode) -> None:
    node = make(1, SCRIPT)
    node.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    node.publish()
    node.stop()
    node.sql("REPLACE INTO t VALUES (3, 'a')")
    at = node.clock.now_ms
    node.clock.tick(DAY_MS)
    node.start()
    assert removed(node.publish(), "t") == [(1,)]
    assert node.version("t", 1) == Version(at, 1)


def test_an_eviction_through_an_index_that_is_gone_when_it_is_absorbed(make: MakeNode) -> None:
    node = make(1, SCRIPT)
    node.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    node.publish()
    node.stop()
    node.sql("REPLACE INTO t VALUES (3, 'a')")
    node.sql("DROP INDEX i")
    node.start()
    node.publish()
    assert node.replica.unseen.log_vanished("t", node.vanished("t")) == 1  # what the hourly audit does
    assert removed(node.publish(), "t") == [(1,)]


def test_rows_missing_after_a_rebuild_are_not_taken_for_evicted(make: MakeNode) -> None:
    """Nobody knows when they went: at the version they had and 1, never at now."""
    node = make(1, SCRIPT)
    node.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    node.publish()
    before = node.version("t", 1)
    assert before is not None
    node.clock.tick(DAY_MS)
    node.sql("UPDATE t SET v = 'c' WHERE id = 2")
    with node.transaction():
        node.app.execute("CREATE TABLE n (id INTEGER PRIMARY KEY, v); INSERT INTO n SELECT * FROM t WHERE id > 1")
        node.app.execute("DROP TABLE t; ALTER TABLE n RENAME TO t; CREATE UNIQUE INDEX i ON t (v)")
    node.absorb()
    assert node.version("t", 1) == Version(before.ts + 1, 1)
    assert node.tombstones("t") == [(1,)]


def test_a_large_log_is_looked_through_at_its_end(make: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = versions.Absorber.absorb.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "limit", 3)
    node = make(1, SCRIPT)
    node.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'c')")
    node.publish()
    with node.transaction():
        node.sql("REPLACE INTO t VALUES (4, 'a')")
        for key in range(5, 15):
            node.sql("INSERT INTO t VALUES (?, ?)", (key, key))
        node.sql("DELETE FROM t WHERE id = 3")
    [group] = node.publish()
    assert sorted(removed([group], "t")) == [(1,), (3,)]


def test_what_is_not_absorbed_makes_a_look_due(make: MakeNode) -> None:
    node = make(1, f"{SCRIPT}; CREATE TABLE plain (id INTEGER PRIMARY KEY)")
    node.sql("INSERT INTO plain VALUES (1)")
    assert not node.replica.unseen.look_is_due()
    node.sql("INSERT INTO t VALUES (1, 'a')")
    assert node.replica.unseen.look_is_due()
    node.absorb()
    assert not node.replica.unseen.look_is_due()


def test_a_table_that_is_only_written_by_others_is_not_looked_through(make: MakeNode) -> None:
    node = make(1, SCRIPT)
    node.sql("INSERT INTO t VALUES (1, 'a')")
    node.absorb()
    assert node.replica.unseen.take_unlooked() == []
    node.apply(wrote("t", ("id", "v"), ((2, "b"), stamp(1000, 2))))
    assert not node.replica.unseen.has_unlooked()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Tables of more than three rows are large."""
    monkeypatch.setattr(evictions, "LOOK_ROWS", 3)
    return 3


def test_a_large_table_is_not_looked_through_in_the_transaction_that_absorbs(make: MakeNode, small: int) -> None:
    node = make(1, SCRIPT)
    node.replica.unseen.take_unlooked()
    node.sql("INSERT INTO t VALUES (1, 1), (2, 2), (3, 3)")
    node.publish()
    assert not node.replica.unseen.has_unlooked()
    node.sql("INSERT INTO t VALUES (4, 4)")  # grows too large, and is looked through once more
    node.sql("REPLACE INTO t VALUES (5, 1)")
    assert removed(node.publish(), "t") == [(1,)]
    assert not node.replica.unseen.has_unlooked()
    node.sql("REPLACE INTO t VALUES (6, 2)")
    assert removed(node.publish(), "t") == []
    assert node.replica.unseen.take_unlooked() == ["t"]
    assert not node.replica.unseen.has_unlooked()


@pytest.mark.parametrize("columns", ["id INTEGER PRIMARY KEY, other, v", "other, id, v, PRIMARY KEY (other, id)"])
def test_a_look_goes_through_all_of_a_large_table_in_pieces(
    make: MakeNode, small: int, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setattr(evictions, "PIECE_ROWS", 3)
    node = make(1, f"CREATE TABLE t ({columns}); CREATE UNIQUE INDEX i ON t (v)")
    for number in range(11):
        node.sql("INSERT INTO t (id, other, v) VALUES (?, 'x', ?)", (number, number))
    node.publish()
    for number in (0, 2, 3, 5, 6, 10):
        node.sql("REPLACE INTO t (id, other, v) VALUES (?, 'x', ?)", (100 + number, number))
    node.publish()
    pieces = list(node.replica.unseen.look_through(node.replica.schema.tables["t"]))
    assert max(map(len, pieces)) <= 3
    found = [key for piece in pieces for key in piece]
    assert [each[-1] for each in found] == [0, 2, 3, 5, 6, 10]
    assert node.replica.unseen.log_vanished("t", found) == 6
    assert sorted(removed(node.publish(), "t")) == found
    assert node.vanished("t") == []


def test_a_delete_that_is_still_logged_is_not_taken_for_an_eviction(make: MakeNode, small: int) -> None:
    node = make(1, SCRIPT)
    node.sql("INSERT INTO t VALUES (1, 1), (2, 2), (3, 3), (4, 4)")
    node.publish()
    node.sql("DELETE FROM t WHERE id = 1")
    deleted_at = node.clock.now_ms
    keys = node.vanished("t")
    assert keys == [(1,)]
    node.clock.tick(DAY_MS)
    assert node.replica.unseen.log_vanished("t", keys) == 0
    node.absorb()
    assert node.version("t", 1) == Version(deleted_at, 1)


@pytest.mark.parametrize("known", [False, True], ids=["from before the installation", "written since"])
def test_a_row_that_arrives_again_does_not_undo_an_eviction_that_nobody_has_noticed(
    make: MakeNode, small: int, known: bool
) -> None:
    """A node that merges a snapshot of that moment publishes the row, which the snapshot lacks."""
    one, two = make(1, SCRIPT), make(2, SCRIPT)
    again = wrote("t", ("id", "v"), ((5, 5), stamp(0, 0)))
    for number in range(1, 6):
        one.apply(wrote("t", ("id", "v"), ((number, number), stamp(0, 0))))
    if known:
        one.sql("UPDATE t SET v = 55 WHERE id = 5")
        [again] = one.publish()
        two.apply(again)
    one.sql("REPLACE INTO t VALUES (6, (SELECT v FROM t WHERE id = 5))")
    one.sql("UPDATE t SET v = 'other' WHERE id = 6")
    exchange(one, two)
    one.apply(again)
    assert one.rows("t") == [(1, 1), (2, 2), (3, 3), (4, 4), (6, "other")]
    one.replica.unseen.log_vanished("t", one.vanished("t"))
    two.apply(again)
    exchange(one, two)
    assert one.tombstones("t") == two.tombstones("t") == [(5,)]
