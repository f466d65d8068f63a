"""What a stream refused, being larger than it: it stays pending, and nothing else waits for it."""

from __future__ import annotations

import pytest

from harmonylite.db.copy import adopt_copy, start_copy
from harmonylite.db.held import HELD
from harmonylite.db.outbox import OutgoingGroup
from harmonylite.model import Position, Stamp
from tests.db.conftest import MakeNode
from tests.db.harness import CREATED, EPOCH_MS, STREAM, Killer, Node, exchange, removed, written

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"
TWO = f"{PLAIN}; CREATE TABLE u (id INTEGER PRIMARY KEY, v)"


def commit(node: Node, *keys: int, value: object = "x", table: str = "t") -> int:
    """One transaction that writes these rows, absorbed. Returns its batch."""
    with node.transaction():
        for key in keys:
            node.sql(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (key, value))
    node.absorb()
    return node.replica._state.batch


def keys_of(groups: list[OutgoingGroup], table: str = "t") -> list[list[int]]:
    """By group, the keys of the rows that it writes."""
    return [sorted(int(str(row[0])) for row, _ in written([each.group], table)) for each in groups]


def held(node: Node) -> list[OutgoingGroup]:
    groups = node.replica.outgoing.read(HELD)
    assert groups is not None
    return list(groups)


def test_a_held_batch_is_pending_and_is_not_read_with_the_others(make: MakeNode) -> None:
    node = make(1, TWO, group_rows=1)
    large = commit(node, 1, 2, 3)
    node.sql("DELETE FROM t WHERE id = 9")
    commit(node, 4)
    node.replica.outgoing.hold(large)
    assert keys_of(node.outgoing()) == [[4]]
    assert node.replica.pending() == 4
    assert node.replica.pending(held=False) == 1
    assert node.replica.outgoing.held() == {HELD + large: 3}
    node.publish()
    assert (node.replica.pending(), node.replica.pending(held=False)) == (3, 0)
    for again in (node, node.restart(), node.crash()):
        assert again.outgoing() == []
        assert keys_of(held(again)) == [[1, 2, 3]]


def test_r1_a_later_write_to_a_row_of_a_held_batch_joins_nothing_to_it(make: MakeNode) -> None:
    node = make(1, TWO, group_rows=1)
    large = commit(node, 1, 2, 3)
    node.replica.outgoing.hold(large)
    node.publish()
    commit(node, 7, table="u")
    commit(node, 2, value="later")
    groups = node.outgoing()
    assert [len(each.group) for each in groups] == [1, 1]
    assert [row for row, _ in written([groups[1].group], "t")] == [(2, "later")]
    assert keys_of(held(node)) == [[1, 3]]


def test_r1_a_joined_span_that_does_not_fit_is_cut_between_its_batches(make: MakeNode) -> None:
    """Offline: a large transaction, many small ones, the last of which writes a row of the large one again."""
    node, other = make(1, PLAIN, group_rows=1), make(2, PLAIN)
    large = commit(node, *range(100))
    for key in range(100, 110):
        commit(node, key)
    last = commit(node, 5, value="later")
    [whole] = node.outgoing()
    assert (whole.span.lo, whole.span.hi) == (large, last)
    node.replica.outgoing.keep_apart(large, last)
    groups = node.outgoing()
    assert [(each.span.lo, each.span.hi, each.through) for each in groups] == [
        (batch, batch, batch) for batch in range(large, last + 1)
    ]
    assert not any(each.torn for each in groups)
    node.replica.outgoing.hold(large)
    behind = node.publish()
    assert [len(group) for group in behind] == [1] * 11
    other.apply(*behind)
    assert sorted(other.rows("t")) == [(5, "later"), *((key, "x") for key in range(100, 110))]
    [late] = held(node)
    other.apply(late.group)
    assert sorted(other.rows("t")) == sorted(node.rows("t"))
    assert other.conflicts() == []


def test_what_fits_together_again_is_one_group(make: MakeNode) -> None:
    node = make(1, PLAIN, group_rows=1)
    first = commit(node, 1, 2)
    commit(node, 3)
    last = commit(node, 1)
    node.replica.outgoing.keep_apart(first, last)
    assert len(node.outgoing()) == 3
    commit(node, 3, value="later")  # what is joined to it now does not come apart
    assert keys_of(node.outgoing()) == [[2], [1], [3]]
    node.replica.outgoing.keep_together()
    assert keys_of(node.outgoing()) == [[1, 2, 3]]


def test_a_batch_that_is_kept_apart_ends_the_group_before_it(make: MakeNode) -> None:
    node = make(1, PLAIN, group_rows=100)
    commit(node, 1)
    commit(node, 2)
    first = commit(node, 3, 4)
    last = commit(node, 3)
    commit(node, 5)
    node.replica.outgoing.keep_apart(first, last)
    assert keys_of(node.outgoing()) == [[1, 2], [4], [3], [5]]


def test_an_acknowledgement_of_a_held_batch_leaves_what_changed_meanwhile(make: MakeNode) -> None:
    node = make(1, PLAIN)
    large = commit(node, 1, 2, 3)
    node.replica.outgoing.hold(large)
    [again] = held(node)
    commit(node, 2, value="later")
    node.replica.outgoing.release(again.through)
    assert node.replica.outgoing.held() == {}
    assert [row for row, _ in written(node.publish(), "t")] == [(2, "later")]
    assert node.replica.pending() == 0


def test_a_batch_that_is_released_before_anything_was_published_is_not_pending(make: MakeNode) -> None:
    node = make(1, PLAIN)
    large = commit(node, 1, 2)
    node.replica.outgoing.hold(large)
    node.replica.outgoing.release(HELD + large)
    assert node.replica.pending() == 0
    # Its writer knows that the others have it.
    commit(node, 1, value="later")
    [(_, seen)] = written(node.publish(), "t")
    assert seen[3:] == (EPOCH_MS + 10, 1)


def test_a_row_of_a_held_batch_is_written_again_as_one_that_nobody_has_seen(make: MakeNode) -> None:
    node = make(1, PLAIN)
    large = commit(node, 1)
    node.replica.outgoing.hold(large)
    node.publish()
    commit(node, 1, value="later")
    [(_, stamp)] = written(node.publish(), "t")
    assert stamp[3:] == (0, 0)


def test_a_tombstone_of_a_held_batch_is_not_forgotten(make: MakeNode) -> None:
    node = make(1, PLAIN, tombstone_retention_ms=1_000)
    commit(node, 1, 2)
    node.publish()
    node.sql("DELETE FROM t")
    node.absorb()
    large = node.replica._state.batch
    node.replica.outgoing.hold(large)
    commit(node, 3)
    node.publish()
    for hours in (1, 2):
        node.replica.prune_tombstones(EPOCH_MS + hours * 3_600_000)
    assert sorted(removed([each.group for each in held(node)], "t")) == [(1,), (2,)]
    node.replica.outgoing.release(HELD + large)
    assert [node.replica.prune_tombstones(EPOCH_MS + hours * 3_600_000) for hours in (3, 4)] == [0, 2]


def test_a_newer_row_from_elsewhere_leaves_the_held_batch(make: MakeNode) -> None:
    node, other = make(1, PLAIN), make(2, PLAIN)
    large = commit(node, 1, 2)
    node.replica.outgoing.hold(large)
    other.clock.tick(1_000)
    commit(other, 1, value="newer")
    node.apply(*other.publish())
    assert node.rows("t") == [(1, "newer"), (2, "x")]
    assert keys_of(held(node)) == [[2]]


def test_an_older_row_from_elsewhere_does_not_beat_a_held_one(make: MakeNode) -> None:
    other, node = make(2, PLAIN), make(1, PLAIN)
    commit(other, 1, value="older")
    older = other.publish()
    node.clock.tick(1_000)
    large = commit(node, 1, 2)
    node.replica.outgoing.hold(large)
    node.apply(*older)
    assert node.rows("t") == [(1, "x"), (2, "x")]
    assert keys_of(held(node)) == [[1, 2]]


def test_killed_anywhere_the_batch_is_held_whole_or_not_at_all(make: MakeNode) -> None:
    node = make(1, TWO)
    with node.transaction():
        node.sql("INSERT INTO t VALUES (1, 'x')")
        node.sql("INSERT INTO u VALUES (1, 'x')")
    node.absorb()
    batch = node.replica._state.batch
    for statement in range(1, 100):
        node.writer.setexectrace(Killer(statement))
        try:
            node.replica.outgoing.hold(batch)
        except KeyboardInterrupt:
            node.crash()
            waiting, kept = [sum(len(each.group) for each in groups) for groups in (node.outgoing(), held(node))]
            assert (waiting, kept) in ((2, 0), (0, 2))
            if kept:
                node.replica.outgoing.release(HELD + batch)
                return
        else:
            break
    node.writer.setexectrace(None)
    assert statement > 3
    assert node.replica.outgoing.held() == {HELD + batch: 2}


def test_a_held_batch_does_not_count_as_the_newest(make: MakeNode) -> None:
    """Nor after our settings were lost, when batches are counted from what the rows say."""
    node = make(1, PLAIN)
    large = commit(node, 1)
    node.replica.outgoing.hold(large)
    node.stop()
    node.app.execute("DELETE FROM __harmonylite__meta WHERE name = 'batch'")
    node.start()
    assert commit(node, 2) < HELD


def test_a_clock_correction_leaves_held_batches_apart(make: MakeNode) -> None:
    node = make(1, PLAIN, group_rows=1)
    one, two = commit(node, 1, 2), commit(node, 3, 4)
    node.replica.outgoing.hold(one)
    node.replica.outgoing.hold(two)
    commit(node, 5)
    node.replica.times.shift_clock(from_ms=EPOCH_MS, to_ms=EPOCH_MS + 1_000, delta_ms=5_000)
    assert keys_of(node.outgoing()) == [[5]]
    assert keys_of(held(node)) == [[1, 2], [3, 4]]
    assert [stamp[0] for _, stamp in written([held(node)[0].group], "t")] == [EPOCH_MS + 5_010, EPOCH_MS + 5_020]
    # What was on the way with the old times counts for nothing.
    node.replica.outgoing.release(HELD + one)
    assert keys_of(held(node)) == [[1, 2], [3, 4]]
    for old in node.replica.outgoing.held():
        node.replica.outgoing.release(old)
    assert node.replica.pending() == 1


def test_a_clock_correction_spares_held_batches_of_an_earlier_boot(make: MakeNode) -> None:
    node = make(1, PLAIN, boot_id="one")
    one = commit(node, 1)
    node.replica.outgoing.hold(one)
    node.restart(boot_id="two")
    two = commit(node, 2)
    node.replica.outgoing.hold(two)
    node.replica.times.shift_clock(from_ms=EPOCH_MS, to_ms=EPOCH_MS + 1_000, delta_ms=5_000)
    times = [stamp[0] for each in held(node) for _, stamp in written([each.group], "t")]
    assert times == [EPOCH_MS + 10, EPOCH_MS + 5_020]


def test_a_held_version_of_2099_is_clamped(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.clock.now_ms = 4_070_908_800_000
    large = commit(node, 1)
    node.replica.outgoing.hold(large)
    node.replica.times.server_time(EPOCH_MS)
    assert keys_of(node.outgoing()) == []
    assert [stamp for _, stamp in written([held(node)[0].group], "t")] == [Stamp(EPOCH_MS + 60_000, 1, 0, 0, 0)]


def test_everything_is_published_again_but_what_is_held_stays_so(make: MakeNode) -> None:
    node = make(1, PLAIN)
    commit(node, 1)
    node.publish()
    large = commit(node, 2, 3)
    node.replica.outgoing.hold(large)
    node.start_over(Position(STREAM, CREATED, 0))
    assert keys_of(node.outgoing()) == [[1]]
    assert keys_of(held(node)) == [[2, 3]]


def test_a_copy_has_what_is_held(make: MakeNode, tmp_path_factory: pytest.TempPathFactory) -> None:
    node = make(1, PLAIN)
    large = commit(node, 1, 2)
    node.replica.outgoing.hold(large)
    commit(node, 3)
    node.publish()
    node.replica.flush()
    path = tmp_path_factory.mktemp("copy") / "copy.db"
    copy = start_copy(node.replica, path)
    assert copy is not None
    assert copy.run().pending == 2
    adopt_copy(path, 2)
    other = Node(path, 2).start()
    assert keys_of(held(other)) == [[1, 2]]
    assert other.outgoing() == []
    other.stop()
    other.app.close()


def test_a_held_transaction_over_a_lowered_limit_comes_in_steps(make: MakeNode) -> None:
    node, other = make(1, PLAIN), make(2, PLAIN)
    large = commit(node, *range(200), value="x" * 200)
    node.replica.outgoing.hold(large)
    node.replica.change_limits(group_rows=512, max_transaction_bytes=10_000, tombstone_retention_ms=1_000)
    groups = held(node)
    assert len(groups) > 2
    assert [each.through for each in groups] == [HELD + large - 1] * (len(groups) - 1) + [HELD + large]
    other.apply(*(each.group for each in groups))
    node.replica.outgoing.release(groups[-1].through)
    exchange(node, other)
    assert sorted(other.rows("t")) == sorted(node.rows("t"))
    assert node.replica.pending() == 0


def test_the_index_of_pending_rows_finds_what_is_held_and_what_is_not(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id TEXT PRIMARY KEY, v)")
    node.sql("INSERT INTO t VALUES ('a', 1)")
    node.absorb()
    version = '"__harmonylite__t_version"'
    conditions = (
        f"SELECT 1 FROM {version} WHERE batch > ? AND batch < {HELD} LIMIT 1",
        f"SELECT batch, count(*) FROM {version} WHERE batch > ? AND batch < ? GROUP BY batch",
        f"SELECT batch, count(*) FROM {version} WHERE batch > ? GROUP BY batch",
        f"UPDATE {version} SET batch = ? WHERE batch = ?",
    )
    for sql in conditions:
        bindings = (0,) * sql.count("?")
        plan = " ".join(str(row[-1]) for row in node.app.execute(f"EXPLAIN QUERY PLAN {sql}", bindings))
        assert "__harmonylite__t_pending" in plan, (sql, plan)
        assert "SCAN" not in plan, (sql, plan)
        assert "TEMP B-TREE" not in plan, (sql, plan)


def test_a_clock_correction_does_not_take_a_held_transaction_apart(make: MakeNode) -> None:
    """Only the times of some of its rows are wrong: others were written before the clock went wrong, or are clamped."""
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.clock.now_ms = 4_070_908_800_000
    node.sql("INSERT INTO t VALUES (2, 'x')")
    node.absorb()
    large = node.replica._state.batch
    node.replica.outgoing.hold(large)
    node.replica.times.server_time(EPOCH_MS)
    assert keys_of(held(node)) == [[1, 2]]
    node.replica.outgoing.release(HELD + large)
    assert keys_of(held(node)) == [[1, 2]]


def test_a_refused_held_batch_counts_only_its_own_rows(make: MakeNode) -> None:
    node = make(1, PLAIN)
    batches = [commit(node, key, key + 1) for key in range(0, 20, 2)]
    for batch in batches:
        assert node.replica.outgoing.hold(batch) == 2
    assert node.replica.outgoing.hold(HELD + batches[3]) == 2
    commit(node, 6)
    assert node.replica.outgoing.hold(HELD + batches[3]) == 1


def test_a_held_batch_that_comes_back_from_the_stream_is_held_no_longer(make: MakeNode) -> None:
    """Stored, and the node was stopped before it knew; meanwhile one of its rows was written again."""
    node, other = make(1, PLAIN), make(2, PLAIN)
    commit(node, 1, 2, 3, 4)
    node.publish()
    with node.transaction():
        node.sql("UPDATE t SET v = 'held' WHERE id < 4")
        node.sql("DELETE FROM t WHERE id = 4")
    node.absorb()
    node.replica.outgoing.hold(node.replica._state.batch)
    [stored] = held(node)
    node.crash()
    commit(node, 3, value="later")
    node.apply(stored.group)
    assert node.replica.outgoing.held() == {}
    [later] = node.publish()
    assert [row for row, _ in written([later], "t")] == [(3, "later")]
    other.apply(stored.group, later)
    assert sorted(other.rows("t")) == [(1, "held"), (2, "held"), (3, "later")] == sorted(node.rows("t"))
    assert (node.conflicts(), node.replica.pending()) == ([], 0)


def test_a_large_held_batch_is_released_in_short_transactions(make: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in between, what is left is sent once more."""
    monkeypatch.setattr("harmonylite.db.held.RELEASE_ROWS", 2)
    node = make(1, TWO)
    with node.transaction():
        for table, number in (("t", 3), ("u", 4)):
            for key in range(number):
                node.sql(f"INSERT INTO {table} VALUES (?, 'x')", (key,))
    node.absorb()
    large = node.replica._state.batch
    node.replica.outgoing.hold(large)
    left = []
    while node.replica.outgoing.release(HELD + large):
        left.append(node.replica.pending())
        node.crash()
    assert left == [5, 3, 1]
    assert node.replica.pending() == 0
