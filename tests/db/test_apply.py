"""What other nodes wrote takes effect, once, whole, in any order."""

from __future__ import annotations

import itertools
import shutil

import pytest

from harmonylite.model import UNVERSIONED, Group, Position, Stamp, TableChanges, Version
from tests.db.conftest import MakeNode
from tests.db.harness import CREATED, EPOCH_MS, STREAM, Clock, Node, deleted, exchange, stamp, wrote

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"
IDV = ("id", "v")


def both(*groups: Group) -> Group:
    """Several groups as one transaction."""
    return Group(groups[0].publisher, 1, tuple(changes for group in groups for changes in group.tables))


def test_i3_the_position_moves_with_the_rows_or_not_at_all(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.apply(wrote("t", IDV, ((1, "x"), stamp(EPOCH_MS, 2))))
    assert node.replica.position(STREAM) == Position(STREAM, CREATED, 1, 1)
    before = node.everything()
    bad = Group(2, 2, (TableChanges("t", ("id",), IDV, [(2, object())], [stamp(EPOCH_MS, 2)]),))  # type: ignore[list-item]
    with pytest.raises(Exception):  # noqa: B017 - whatever it is, nothing of it stays
        node.apply(wrote("t", IDV, ((3, "good"), stamp(EPOCH_MS, 2))), bad)
    assert node.everything() == before
    assert node.crash().replica.position(STREAM) == Position(STREAM, CREATED, 1, 1)


def test_i3_a_delivery_that_comes_again_changes_nothing(make: MakeNode) -> None:
    script = "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE)"
    a, b = make(1, script), make(2, script)
    groups = []
    for step in ("INSERT INTO t VALUES (1, 'x'), (2, 'y')", "UPDATE t SET v = v || 1", "DELETE FROM t WHERE id = 1"):
        a.sql(step)
        groups += a.publish()
    b.apply(*groups)
    before = b.everything()
    b.received = 0
    b.apply(*groups)
    assert b.everything() == before
    assert b.conflicts() == []


@pytest.mark.parametrize("unique", ["", "UNIQUE"])
def test_i4_any_order_gives_the_same_tables(make: MakeNode, unique: str) -> None:
    script = f"CREATE TABLE t (id INTEGER PRIMARY KEY, v {unique})"
    groups = [
        wrote("t", IDV, ((1, "a"), stamp(1000, 2)), ((2, "b"), stamp(1000, 2))),
        wrote("t", IDV, ((1, "c"), stamp(2000, 3, base=(1000, 2)))),
        deleted("t", ((1,), stamp(3000, 2, base=(2000, 3)))),
        wrote("t", IDV, ((1, "d"), stamp(2500, 4))),
    ]
    seen = set()
    for order in itertools.permutations(range(4)):
        node = make(1, script)
        for index in order:
            node.apply(groups[index])
        seen.add(repr((node.rows("t"), node.version("t", 1), node.version("t", 2))))
        node.replica.close()
    assert seen == {repr(([(2, "b")], Version(3000, 2), Version(1000, 2)))}


def test_own_messages_are_not_skipped_after_a_restored_backup(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'old'), (2, 'gone')")
    groups = node.publish()
    node.stop()
    node.app.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(node.path, node.path.with_suffix(".backup"))
    node.start()
    node.sql("UPDATE t SET v = 'new' WHERE id = 1")
    node.sql("DELETE FROM t WHERE id = 2")
    node.sql("INSERT INTO t VALUES (3, 'newest')")
    groups += node.publish()
    node.stop()
    restored = Node(node.path.with_suffix(".backup"), 1, clock=node.clock).start()
    restored.apply(*groups)
    assert restored.rows("t") == node.rows("t") == [(1, "new"), (3, "newest")]
    restored.replica.close()
    node.start()


@pytest.mark.parametrize("unique", ["", "UNIQUE"])
def test_equal_versions_with_unequal_content_the_larger_hash_wins_the_other_is_logged(
    make: MakeNode, unique: str
) -> None:
    """A cloned card: two writes with the same node id and time. All nodes must choose the same one."""
    script = f"CREATE TABLE t (id INTEGER PRIMARY KEY, v {unique})"
    one, two = (wrote("t", IDV, ((1, value), stamp(EPOCH_MS, 7))) for value in ("one", "two"))
    results = []
    for order in ([one, two], [two, one]):
        node = make(1, script)
        node.apply(*order)
        node.apply(*order)
        [(_, _, version, reason, row)] = node.conflicts()
        assert (version, reason) == (Version(EPOCH_MS, 7), "same version, other content")
        results.append((node.rows("t"), row["v"]))
    assert results[0] == results[1]
    assert {results[0][0][0][1], results[0][1]} == {"one", "two"}


def test_unversioned_rows_any_version_and_any_tombstone_beats_them(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; INSERT INTO t VALUES (1, 'old'), (2, 'old'), (3, 'old')")
    node.apply(wrote("t", IDV, ((1, "new"), stamp(1, 2))))
    node.apply(deleted("t", ((2,), stamp(1, 2))))
    assert node.rows("t") == [(1, "new"), (3, "old")]
    node.apply(wrote("t", IDV, ((1, "unversioned"), Stamp(0, 0, 0, 0, 0)), ((2, "unversioned"), Stamp(0, 0, 0, 0, 0))))
    assert node.rows("t") == [(1, "new"), (3, "old")]


def test_unversioned_rows_of_two_nodes_are_decided_by_content_the_loser_is_logged(make: MakeNode) -> None:
    results = []
    for mine, theirs in (("one", "two"), ("two", "one")):
        node = make(1, f"{PLAIN}; INSERT INTO t VALUES (1, '{mine}'), (2, 'same')")
        zero = Stamp(*UNVERSIONED, 0, 0)
        node.apply(wrote("t", IDV, ((1, theirs), zero), ((2, "same"), zero), ((3, "added"), zero)))
        [(_, key, version, _, row)] = node.conflicts()
        assert (key, version) == ((1,), UNVERSIONED)
        results.append((node.rows("t"), row["v"]))
        assert node.version("t", 1) is None, "(0,0) is never stored"
    assert results[0] == results[1]


def test_i7_a_group_is_visible_as_one_transaction(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; CREATE TABLE u (id INTEGER PRIMARY KEY, v)")
    seen: list[tuple[object, ...]] = []
    reader = node.connect()

    def look(*_: object) -> bool:
        nonlocal seen
        seen += reader.execute("SELECT (SELECT count(*) FROM t), (SELECT count(*) FROM u)").fetchall()
        return True

    group = both(wrote("t", IDV, ((1, "x"), stamp(1, 2))), wrote("u", IDV, ((1, "x"), stamp(1, 2))))
    node.writer.setexectrace(look)
    node.apply(group)
    node.writer.setexectrace(None)
    look()
    assert set(seen) == {(0, 0), (1, 1)}
    reader.close()


def test_i8_triggers_and_cascades_do_not_run_again(make: MakeNode) -> None:
    script = (
        "CREATE TABLE p (id INTEGER PRIMARY KEY, n DEFAULT 0); CREATE TABLE audit (id INTEGER PRIMARY KEY, what);"
        "CREATE TABLE c (id INTEGER PRIMARY KEY, p REFERENCES p ON DELETE CASCADE);"
        "CREATE TRIGGER counts AFTER INSERT ON c BEGIN UPDATE p SET n = n + 1 WHERE id = NEW.p; END;"
        "CREATE TRIGGER tells AFTER DELETE ON c BEGIN INSERT INTO audit (what) VALUES ('c ' || OLD.id); END"
    )
    a, b = make(1, script), make(2, script)
    a.app.execute("PRAGMA foreign_keys=ON")
    a.sql("INSERT INTO p (id) VALUES (1), (2)")
    a.sql("INSERT INTO c VALUES (1, 1), (2, 1), (3, 2)")
    exchange(a, b)
    assert b.rows("p") == a.rows("p") == [(1, 2), (2, 1)]
    a.sql("DELETE FROM p WHERE id = 1")
    exchange(a, b)
    assert b.rows("c") == a.rows("c") == [(3, 2)]
    assert b.rows("audit") == a.rows("audit")
    assert len(b.rows("audit")) == 2
    assert b.publish() == [], "what was applied is not captured"


def test_a_schemas_conflict_clause_cannot_swallow_a_row(make: MakeNode) -> None:
    """ON CONFLICT IGNORE on the NOT NULL would drop the row and let the position pass: it is parked instead."""
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY ON CONFLICT IGNORE, v NOT NULL ON CONFLICT IGNORE)")
    node.apply(wrote("t", IDV, ((1, "x"), stamp(1, 2))))
    node.apply(wrote("t", IDV, ((1, "y"), stamp(2, 2, base=(1, 2)))))
    assert node.rows("t") == [(1, "y")]
    node.apply(wrote("t", IDV, ((2, None), stamp(3, 2))))
    assert [(key, version) for _, key, version, _ in node.parked()] == [((2,), Version(3, 2))]


def test_a_unique_ignore_clause_cannot_swallow_a_row(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE ON CONFLICT IGNORE)")
    node.apply(wrote("t", IDV, ((1, "x"), stamp(1, 2))))
    node.apply(wrote("t", IDV, ((2, "x"), stamp(2, 3))))
    assert node.rows("t") == [(2, "x")]
    assert len(node.conflicts()) == 1


def test_the_key_columns_are_set_too(make: MakeNode) -> None:
    for script in (
        "CREATE TABLE t (id TEXT COLLATE NOCASE PRIMARY KEY, v)",
        "CREATE TABLE t (id TEXT COLLATE NOCASE PRIMARY KEY, v UNIQUE)",
    ):
        node = make(1, script)
        node.apply(wrote("t", IDV, (("abc", "x"), stamp(1, 2))))
        node.apply(wrote("t", IDV, (("ABC", "y"), stamp(2, 2, base=(1, 2)))))
        assert node.rows("t") == [("ABC", "y")]
        node.apply(wrote("t", ("id",), (("Abc",), stamp(3, 2, base=(2, 2)))))
        assert node.rows("t") == [("Abc", "y")]


def test_a_partial_row_does_not_fail_on_a_column_it_does_not_carry(make: MakeNode) -> None:
    """UPDATE first, INSERT only if absent."""
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v, w NOT NULL, x UNIQUE NOT NULL DEFAULT 5)")
    node.apply(wrote("t", ("id", "v", "w", "x"), ((1, "a", "w", 7), stamp(1, 2))))
    node.apply(wrote("t", IDV, ((1, "b"), stamp(2, 3, base=(1, 2)))))
    assert node.rows("t") == [(1, "b", "w", 7)]
    assert node.parked() == []


COLUMNS = ("id", "a", "b")


@pytest.mark.parametrize("unique", ["", "UNIQUE"])
def test_partial_rows_do_not_depend_on_their_order(make: MakeNode, unique: str) -> None:
    groups = [
        wrote("t", COLUMNS, ((1, "a1", "b1"), stamp(1000, 2))),
        wrote("t", ("id", "a"), ((1, "a2"), stamp(2000, 3))),
        wrote("t", ("b", "id"), (("b3", 1), stamp(3000, 4))),
        wrote("t", ("id", "a"), ((1, "a4"), stamp(4000, 5))),
    ]
    for order in itertools.permutations(groups):
        node = make(1, f"CREATE TABLE t (id INTEGER PRIMARY KEY, a {unique}, b)")
        node.apply(*order[:2])
        node.apply(*order[2:])
        assert node.rows("t") == [(1, "a4", "b3")], [group.publisher for group in order]
        assert node.version("t", 1) == Version(4000, 5)
        node.replica.close()


def test_partial_rows_and_a_delete_do_not_depend_on_their_order(make: MakeNode) -> None:
    groups = [
        wrote("t", COLUMNS, ((1, "a1", "b1"), stamp(1000, 2))),
        wrote("t", ("id", "b"), ((1, "b2"), stamp(2000, 3))),
        deleted("t", ((1,), stamp(3000, 4))),
        wrote("t", ("id", "a"), ((1, "a4"), stamp(4000, 5))),
    ]
    for order in itertools.permutations(groups):
        node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, a, b DEFAULT 'none')")
        node.apply(*order)
        assert node.rows("t") == [(1, "a4", "none")], [group.publisher for group in order]
        node.replica.close()


def test_an_own_edit_covers_all_columns_of_a_partial_row(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, a, b)", clock=Clock(10_000))
    node.apply(wrote("t", ("id", "a"), ((1, "a"), stamp(2000, 3))))
    node.sql("UPDATE t SET b = 'mine'")
    node.apply(wrote("t", COLUMNS, ((1, "a1", "b1"), stamp(1000, 2))))
    assert node.rows("t") == [(1, "a", "mine")]


def test_a_partial_row_before_the_row_it_needs(make: MakeNode) -> None:
    script = "CREATE TABLE t (id INTEGER PRIMARY KEY, a, b NOT NULL)"
    whole = wrote("t", COLUMNS, ((1, "a1", "b1"), stamp(1000, 2)))
    part = wrote("t", ("id", "a"), ((1, "a2"), stamp(2000, 3)))
    for order in ([whole, part], [part, whole]):
        node = make(1, script)
        node.apply(*order)
        assert node.rows("t") == [(1, "a2", "b1")]


def test_i10_concurrent_writes_are_logged_and_seen_ones_are_not(make: MakeNode) -> None:
    a, b, c = make(1, PLAIN), make(2, PLAIN), make(3, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'first')")
    exchange(a, b, c)
    b.clock.tick(100)
    b.sql("UPDATE t SET v = 'seen'")
    exchange(a, b, c)
    c.clock.tick(200)
    c.sql("DELETE FROM t")
    exchange(a, b, c)
    assert a.conflicts() == b.conflicts() == c.conflicts() == []
    a.clock.tick(1000)
    b.clock.tick(2000)
    a.sql("INSERT INTO t VALUES (2, 'loses')")
    b.sql("INSERT INTO t VALUES (2, 'wins')")
    exchange(a, b, c)
    for node in (a, b, c):
        [(table, key, version, reason, row)] = node.conflicts()
        assert (table, key, reason, row) == ("t", (2,), "concurrent write", {"id": 2, "v": "loses"})
        assert version.node == 1
        assert node.meta("conflicts_total") == 1


def test_i10_a_row_lost_to_a_delete_is_logged(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x')")
    exchange(a, b)
    a.sql("UPDATE t SET v = 'edit'")
    b.clock.tick(1000)
    b.sql("DELETE FROM t")
    exchange(a, b)
    assert a.rows("t") == b.rows("t") == []
    for node in (a, b):
        [(_, _, _, _, row)] = node.conflicts()
        assert row == {"id": 1, "v": "edit"}


def test_i10_an_edit_made_while_the_last_one_is_in_flight_is_no_conflict(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x')")
    [first] = a.outgoing()
    a.sql("UPDATE t SET v = 'y'")
    [second] = a.outgoing()
    b.apply(first.group)
    b.apply(second.group)
    assert b.rows("t") == [(1, "y")]
    b.apply(first.group)  # delivered again
    assert b.conflicts() == []
    # A true conflict beside it sends the whole group the careful way, which must know it too.
    b.sql("INSERT INTO t VALUES (2, 'mine')")
    a.clock.tick(1000)
    with a.transaction():
        a.sql("UPDATE t SET v = 'z'")
        a.sql("INSERT INTO t VALUES (2, 'theirs')")
    [third] = a.outgoing()
    b.apply(third.group)
    assert [key for _, key, _, _, _ in b.conflicts()] == [(2,)]


def test_i10_concurrent_writes_of_the_same_content_lose_nothing(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    for node in (a, b):
        node.sql("INSERT INTO t VALUES (1, 'same')")
    exchange(a, b)
    assert a.conflicts() == b.conflicts() == []


def test_i10_a_child_of_a_parent_that_was_deleted_elsewhere_stays_and_is_listed(make: MakeNode) -> None:
    script = """CREATE TABLE parent (id INTEGER PRIMARY KEY);
    CREATE TABLE t (id INTEGER PRIMARY KEY, v REFERENCES parent ON DELETE CASCADE)"""
    a, b = make(1, script), make(2, script)
    a.sql("INSERT INTO parent VALUES (1)")
    exchange(a, b)
    a.sql("DELETE FROM parent")
    b.sql("INSERT INTO t VALUES (10, 1)")
    exchange(a, b)
    for node in (a, b):
        assert (node.rows("t"), node.rows("parent")) == ([(10, 1)], [])
        listed = [(table, key, reason, row) for table, key, _, reason, row in node.conflicts()]
        assert listed == [("t", (10,), "orphan: its parent in parent was deleted", {"id": 10, "v": 1})]


def test_i8_of_the_applications_triggers_only_those_of_unreplicated_tables_run(
    make: MakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    script = f"""{PLAIN}; CREATE TABLE words (word); CREATE TABLE audit (id INTEGER PRIMARY KEY, what);
    CREATE TRIGGER index_it AFTER INSERT ON t BEGIN INSERT INTO words VALUES (NEW.v); END;
    CREATE TRIGGER audit_it AFTER INSERT ON t BEGIN INSERT INTO audit VALUES (NEW.id, 'insert'); END;
    CREATE TRIGGER refuse_it BEFORE INSERT ON t WHEN NEW.v = 'refused' BEGIN SELECT RAISE(ABORT, 'no'); END;
    CREATE TRIGGER both AFTER INSERT ON t BEGIN
        INSERT INTO words VALUES ('both'); INSERT INTO audit VALUES (-NEW.id, 'both'); END"""
    node = make(1, script)
    node.apply(wrote("t", IDV, ((1, "fine"), stamp(1, 2)), ((2, "refused"), stamp(1, 2))))
    assert node.rows("t") == [(1, "fine"), (2, "refused")]
    assert node.rows("words") == [("fine",), ("refused",)]
    assert node.rows("audit") == []
    assert [vars(each)["fields"]["trigger"] for each in caplog.records if "trigger does not run" in each.message] == [
        "both"
    ]
