"""What is published, in which groups, and what an acknowledgement means."""

from __future__ import annotations

from harmonylite.model import Position, Stamp
from tests.db.conftest import MakeNode
from tests.db.harness import CREATED, EPOCH_MS, STREAM, exchange, removed, stamp, written, wrote

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"
TWO = f"{PLAIN}; CREATE TABLE u (id INTEGER PRIMARY KEY, v)"


def test_a_group_holds_no_content_newer_than_its_versions(make: MakeNode) -> None:
    """The application commits between absorb and the pinned read: that snapshot is refused."""
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.absorb()
    node.sql("UPDATE t SET v = 'newer'")
    assert node.collect() is None
    assert node.replica.outgoing.read(on_writer=True) is None
    [group] = node.publish()
    assert written([group], "t") == [((1, "newer"), Stamp(node.clock.now_ms, 1, 0, 0, 0))]


def test_a_pinned_snapshot_does_not_see_later_commits(make: MakeNode) -> None:
    node = make(1, TWO, group_rows=1)
    for key in range(3):
        node.sql("INSERT INTO t VALUES (?, 'x')", (key,))
        node.absorb()
    groups = node.replica.outgoing.read()
    assert groups is not None
    first = next(groups)
    node.sql("UPDATE t SET v = 'later'")
    node.sql("DELETE FROM t WHERE id = 2")
    node.absorb()
    rest = list(groups)
    assert [row for row, _ in written([each.group for each in (first, *rest)], "t")] == [(0, "x"), (1, "x"), (2, "x")]
    again = node.outgoing()
    assert removed([each.group for each in again], "t") == [(2,)]


def test_a_schema_change_between_absorb_and_read_is_noticed(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.absorb()
    node.sql("ALTER TABLE t ADD COLUMN w DEFAULT 5")
    assert node.collect() is None
    node.sql("UPDATE t SET v = 'y'")
    [group] = node.publish()
    assert group.tables[0].columns == ("id", "v", "w")
    assert [row for row, _ in written([group], "t")] == [(1, "y", 5)]


def test_a_snapshot_that_was_never_read_is_let_go(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.absorb()
    groups = node.replica.outgoing.read()
    assert groups is not None
    groups.close()
    assert node.collect() is not None


def test_i3_a_change_is_pending_until_it_is_acknowledged(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    assert node.replica.pending() == 1
    sent = node.outgoing()
    assert node.replica.pending() == 1
    again = node.crash().outgoing()
    assert written([sent[0].group], "t") == written([again[0].group], "t")
    node.replica.outgoing.mark_published(again[0].through)
    assert node.replica.pending() == 0
    assert node.outgoing() == []


def test_i3_an_acknowledgement_that_was_not_stored_is_asked_for_again(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x')")
    first = a.publish()
    second = a.crash().publish()  # the watermark was in memory only
    assert written(first, "t") == written(second, "t")
    b.apply(*first, *second)
    assert b.rows("t") == [(1, "x")]
    assert b.conflicts() == []


def test_an_acknowledgement_leaves_what_changed_meanwhile(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'sent'), (2, 'sent')")
    sent = node.outgoing()
    node.sql("UPDATE t SET v = 'changed' WHERE id = 1")
    node.absorb()
    node.replica.outgoing.mark_published(sent[-1].through)
    assert [row for row, _ in written(node.publish(), "t")] == [(1, "changed")]
    assert node.replica.pending() == 0


def test_groups_after_a_batch_are_those_that_were_not_handed_out(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    [first] = node.outgoing()
    node.sql("INSERT INTO t VALUES (2, 'y')")
    node.absorb()
    groups = node.replica.outgoing.read(first.through)
    assert groups is not None
    assert [row for row, _ in written([each.group for each in groups], "t")] == [(2, "y")]
    assert node.replica.outgoing.pending_at_most(first.through, 1)
    assert not node.replica.outgoing.pending_at_most(0, 1)


def test_a_backlog_is_not_one_giant_group(make: MakeNode) -> None:
    node = make(1, PLAIN, group_rows=10)
    for key in range(40):
        node.sql("INSERT INTO t VALUES (?, 'x')", (key,))
        node.absorb()
    sizes = [len(each.group) for each in node.outgoing()]
    assert sizes == [10, 10, 10, 10]


def test_i7_joined_batches_are_not_cut(make: MakeNode) -> None:
    """Row 1 of the first transaction changed again: both transactions, and those between, are one group."""
    node = make(1, PLAIN, group_rows=1)
    node.sql("INSERT INTO t VALUES (1, 'first'), (2, 'first')")
    node.absorb()
    node.sql("INSERT INTO t VALUES (3, 'between')")
    node.absorb()
    node.sql("UPDATE t SET v = 'again' WHERE id = 1")
    node.absorb()
    node.sql("INSERT INTO t VALUES (4, 'after')")
    groups = [sorted(str(row[0]) for row, _ in written([each.group], "t")) for each in node.outgoing()]
    assert groups == [["1", "2", "3"], ["4"]]


def test_i7_chains_of_joins_and_joins_by_apply_hold_together(make: MakeNode) -> None:
    script = "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE)"
    node = make(1, script, group_rows=1)
    node.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    node.absorb()
    node.sql("UPDATE t SET v = 'c' WHERE id = 2")
    node.sql("INSERT INTO t VALUES (3, 'd')")
    node.absorb()
    node.sql("INSERT INTO t VALUES (4, 'e')")
    node.absorb()
    # A newer row takes 'd': row 3 becomes a pending tombstone, which belongs to the first transactions.
    node.apply(wrote("t", ("id", "v"), ((9, "d"), stamp(node.clock.now_ms + 1000, 2))))
    sent = node.outgoing()
    assert len(sent) == 1
    assert sorted(str(row[0]) for row, _ in written([sent[0].group], "t")) == ["1", "2", "4"]
    assert removed([sent[0].group], "t") == [(3,)]


def test_i7_a_transaction_larger_than_the_limit_is_cut_and_told(make: MakeNode) -> None:
    node, other = make(1, TWO, max_transaction_bytes=200_000), make(2, TWO)
    with node.transaction():
        for key in range(1200):
            node.app.execute("INSERT INTO t VALUES (?, ?)", (key, "x" * 200))
        node.app.execute("INSERT INTO u VALUES (1, 'x')")
    sent = node.outgoing()
    assert len(sent) > 1
    assert [each.torn for each in sent] == [True] * (len(sent) - 1) + [False]
    assert sum(len(each.group) for each in sent) == 1201
    # Only the last one completes the batch: a crash in between sends all of them again.
    node.replica.outgoing.mark_published(sent[0].through)
    assert node.replica.pending() == 1201
    other.apply(*(each.group for each in sent))
    node.replica.outgoing.mark_published(sent[-1].through)
    assert node.replica.pending() == 0
    assert other.rows("t") == node.rows("t")


def test_i7_small_transactions_are_not_torn_because_their_backlog_is_large(make: MakeNode) -> None:
    node = make(1, PLAIN, max_transaction_bytes=300_000)
    for first in range(0, 1200, 300):
        with node.transaction():
            for key in range(first, first + 300):
                node.app.execute("INSERT INTO t VALUES (?, ?)", (key, "x" * 700))
        node.absorb()
    assert not any(each.torn for each in node.outgoing())


def test_i7_groups_are_as_small_as_the_stream_wants_them_but_transactions_stay_whole(make: MakeNode) -> None:
    node = make(1, PLAIN)
    for first in range(0, 100, 10):
        with node.transaction():
            for key in range(first, first + 10):
                node.app.execute("INSERT INTO t VALUES (?, ?)", (key, "x" * 2_000))
        node.absorb()
    assert len(node.outgoing()) == 1
    node.replica.outgoing.limit_groups(50_000)
    sent = node.outgoing()
    assert [len(each.group) for each in sent] == [20, 10, 20, 20, 10, 20]
    assert not any(each.torn for each in sent)
    node.replica.outgoing.limit_groups(5_000)
    sent = node.outgoing()
    assert [len(each.group) for each in sent] == [10] * 10
    assert not any(each.torn for each in sent)


def test_limits_change_while_running(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.absorb()
    for key in range(2, 5):
        node.sql("INSERT INTO t VALUES (?, ?)", (key, "x" * 200_000))
        node.absorb()
    assert len(node.outgoing()) == 1
    node.replica.change_limits(group_rows=2, max_transaction_bytes=1 << 26, tombstone_retention_ms=1)
    assert [len(each.group) for each in node.outgoing()] == [2, 2]
    node.replica.change_limits(group_rows=2, max_transaction_bytes=250_000, tombstone_retention_ms=1)
    assert [len(each.group) for each in node.outgoing()] == [2, 1, 1]


def test_i7_few_large_rows_are_cut_too(make: MakeNode) -> None:
    node = make(1, PLAIN, max_transaction_bytes=200_000)
    with node.transaction():
        for key in range(100):
            node.app.execute("INSERT INTO t VALUES (?, ?)", (key, "x" * 20_000))
    assert len(node.outgoing()) >= 5


def test_an_application_that_never_pauses_is_read_under_the_lock(make: MakeNode) -> None:
    node = make(1, PLAIN, group_rows=2)
    for key in range(10):
        node.sql("INSERT INTO t VALUES (?, 'x')", (key,))
        node.absorb()
    node.sql("UPDATE t SET v = 'y' WHERE id = 9")
    some = node.replica.outgoing.read_locked(limit=4)
    assert [len(each.group) for each in some] == [2, 2]
    rest = node.replica.outgoing.read_locked(after=some[-1].through, limit=100)
    assert [row for row, _ in written([each.group for each in rest], "t")][-1] == (9, "y")


def test_numbers_of_groups_grow_over_restarts_and_clocks_that_go_back(make: MakeNode) -> None:
    node = make(1, PLAIN)
    numbers = []
    for key in range(4):
        node.sql("INSERT INTO t VALUES (?, 'x')", (key,))
        numbers += [group.number for group in node.publish()]
        node.clock.now_ms = EPOCH_MS - key * 10_000_000
        node.restart()
    assert numbers == sorted(set(numbers)) and len(numbers) == 4


def test_a_delete_is_sent_by_its_key_alone(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (a TEXT, v, b BLOB, PRIMARY KEY (b, a))")
    node.sql("INSERT INTO t VALUES ('x', 1, CAST(x'ff' AS TEXT)), ('y', 2, x'01')")
    node.publish()
    node.sql("DELETE FROM t")
    [group] = node.publish()
    assert len(removed([group], "t")) == 2
    assert (b"\x01", "y") in removed([group], "t")


def test_relayed_rows_keep_their_origin(make: MakeNode) -> None:
    """Lineage: after a break of the log, everything is pending, of all origins, at the versions it has."""
    a, b, c = make(1, PLAIN), make(2, PLAIN), make(3, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x'), (2, 'y')")
    b.sql("INSERT INTO t VALUES (3, 'z')")
    a.sql("DELETE FROM t WHERE id = 2")
    exchange(a, b)
    a.stop()
    b.start_over(Position(STREAM, "another", 0))
    b.received = 0
    assert b.replica.pending() == 3
    groups = b.publish()
    assert {group.publisher for group in groups} == {2}
    assert sorted(stamped.node for _, stamped in written(groups, "t")) == [1, 2]
    c.apply(*groups)
    assert c.rows("t") == b.rows("t")
    for key in (1, 2, 3):
        assert c.version("t", key) == a.version("t", key)
    assert b.replica.position(STREAM) == Position(STREAM, "another", 0)
    a.start()


def test_a_mark_is_dropped_when_a_newer_version_arrives(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x')")
    exchange(a, b)
    b.start_over(Position(STREAM, CREATED, 0))
    a.sql("UPDATE t SET v = 'newer'")
    b.apply(*a.publish())
    assert b.replica.pending() == 0


def test_a_mark_is_dropped_when_that_version_arrives(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'x'), (2, 'y')")
    a.sql("DELETE FROM t WHERE id = 2")
    groups = a.publish()
    b.apply(*groups)
    b.start_over(Position(STREAM, CREATED, 0))
    b.apply(*groups)
    assert b.replica.pending() == 0
