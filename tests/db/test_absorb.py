"""How logged changes get their versions, and how clocks that are wrong do no harm."""

from __future__ import annotations

import apsw
import pytest

from harmonylite.db import versions
from harmonylite.db.absorbing import LEAST_ROWS, LONGEST_HELD_S
from harmonylite.db.versions import Correction
from harmonylite.model import Position, Version
from harmonylite.pace import AIM_S
from tests.db.conftest import MakeNode
from tests.db.harness import CREATED, DAY_MS, EPOCH_MS, STREAM, Clock, deleted, exchange, removed, stamp, written, wrote

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"
TWO = f"{PLAIN}; CREATE TABLE u (id INTEGER PRIMARY KEY, v)"


def insert_many(count: int, first: int = 1) -> str:
    return (
        f"WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {first + count - 1})"
        " INSERT INTO t SELECT i, 'v' || i FROM n"
    )


def test_i5_a_version_has_the_time_of_writing_not_of_absorbing(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    at = node.clock.now_ms
    node.clock.tick(3 * DAY_MS)
    node.absorb(bound_ms=node.clock.now_ms)
    assert node.version("t", 1) == Version(at, 1)


def test_i5_a_stale_edit_does_not_overwrite_yesterdays(make: MakeNode) -> None:
    """The device was offline for three days; it learns the server's time before it absorbs what it wrote."""
    old, fresh = make(9, PLAIN), make(2, PLAIN, clock=Clock(EPOCH_MS + 2 * DAY_MS))
    old.sql("INSERT INTO t VALUES (1, 'stale')")
    fresh.sql("INSERT INTO t VALUES (1, 'yesterday')")
    old.clock.now_ms = fresh.clock.now_ms = EPOCH_MS + 3 * DAY_MS
    for node in (old, fresh):
        node.replica.times.server_time(node.clock.now_ms)
    exchange(old, fresh)
    assert old.rows("t") == fresh.rows("t") == [(1, "yesterday")]
    assert old.version("t", 1) == Version(EPOCH_MS + 2 * DAY_MS + 10, 2)


def test_i5_equal_times_go_to_the_higher_node(make: MakeNode) -> None:
    clock = Clock()
    a, b = make(1, PLAIN, clock=clock), make(2, PLAIN, clock=clock)
    b.sql("INSERT INTO t VALUES (1, 'b')")
    a.app.execute("INSERT INTO t VALUES (1, 'a')")
    exchange(a, b)
    assert a.rows("t") == b.rows("t") == [(1, "b")]


def test_i5_a_backlog_absorbed_in_pieces_keeps_its_times(make: MakeNode) -> None:
    """A long log of one table must not lift the old edits of another to its newest time."""
    node = make(1, TWO)
    node.sql("INSERT INTO u VALUES (1, 'stale')")
    at = node.clock.now_ms
    node.clock.tick(3 * DAY_MS)
    node.sql(insert_many(versions.ABSORB_ROWS))
    node.absorb()
    assert node.version("u", 1) == Version(at, 1)


def test_i6_an_edit_beats_what_its_node_had_seen_whatever_the_clocks_say(make: MakeNode) -> None:
    ahead, behind = make(1, PLAIN, clock=Clock(EPOCH_MS + 40_000)), make(2, PLAIN)
    ahead.sql("INSERT INTO t VALUES (1, 'ahead')")
    exchange(ahead, behind)
    seen = behind.version("t", 1)
    assert seen is not None
    behind.sql("UPDATE t SET v = 'behind'")
    exchange(ahead, behind)
    assert ahead.rows("t") == behind.rows("t") == [(1, "behind")]
    assert behind.version("t", 1) == Version(seen.ts + 1, 2)
    ahead.sql("DELETE FROM t")
    exchange(ahead, behind)
    assert ahead.rows("t") == behind.rows("t") == []
    assert ahead.conflicts() == behind.conflicts() == []


def test_i6_a_write_before_the_apply_is_concurrent_also_if_absorbed_with_it(make: MakeNode) -> None:
    a, b = make(1, PLAIN), make(2, PLAIN, clock=Clock(EPOCH_MS + 1000))
    b.sql("INSERT INTO t VALUES (1, 'newer')")
    groups = b.publish()
    a.sql("INSERT INTO t VALUES (1, 'older')")
    a.apply(*groups)
    assert a.rows("t") == [(1, "newer")]
    assert [(reason, row["v"]) for _, _, _, reason, row in a.conflicts()] == [("concurrent write", "older")]


def test_floor_keeps_the_order_of_a_clock_that_steps_back(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.absorb()
    first = node.clock.now_ms
    node.clock.tick(-DAY_MS)
    node.sql("INSERT INTO t VALUES (2, 'y')")
    node.absorb()
    assert node.version("t", 2) == Version(first, 1)
    node.restart()
    node.sql("INSERT INTO t VALUES (3, 'z')")
    node.absorb()
    assert node.version("t", 3) == Version(first, 1), "the floor survives a restart"


def test_floor_is_not_dragged_by_other_nodes(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.apply(wrote("t", ("id", "v"), ((1, "fast"), stamp(EPOCH_MS + 50_000, 2))))
    node.sql("INSERT INTO t VALUES (2, 'own')")
    node.absorb()
    assert node.version("t", 2) == Version(node.clock.now_ms, 1)


def test_current_ts_plus_one_does_not_raise_the_floor(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.apply(wrote("t", ("id", "v"), ((1, "fast"), stamp(EPOCH_MS + 50_000, 2))))
    node.sql("UPDATE t SET v = 'own'")
    node.absorb()
    assert node.version("t", 1) == Version(EPOCH_MS + 50_001, 1)
    node.sql("INSERT INTO t VALUES (2, 'own')")
    node.absorb()
    assert node.version("t", 2) == Version(node.clock.now_ms, 1)


def test_the_servers_time_raises_the_floor_of_a_clock_that_is_behind(make: MakeNode) -> None:
    node = make(1, PLAIN, clock=Clock(0))
    node.replica.times.server_time(EPOCH_MS)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.absorb()
    assert node.version("t", 1) == Version(EPOCH_MS, 1)


def test_a_node_in_2099_claims_no_more_than_the_server_allows(make: MakeNode) -> None:
    """Rows, pending or not yet absorbed, and the floor: one fast clock cannot win for ever."""
    node = make(1, PLAIN, clock=Clock(EPOCH_MS + 80 * 365 * DAY_MS))
    node.sql("INSERT INTO t VALUES (1, 'absorbed')")
    node.absorb()
    node.sql("INSERT INTO t VALUES (2, 'logged')")
    node.replica.times.server_time(EPOCH_MS)
    node.absorb(bound_ms=EPOCH_MS + 30_000)
    node.sql("INSERT INTO t VALUES (3, 'later')")
    node.absorb(bound_ms=EPOCH_MS + 30_000)
    for key in (1, 2, 3):
        version = node.version("t", key)
        assert version is not None and version.ts <= EPOCH_MS + 60_000, key
    node.clock.now_ms = EPOCH_MS  # set right
    node.replica.times.server_time(EPOCH_MS + 3_600_000 * 2)
    node.sql("INSERT INTO t VALUES (4, 'right')")
    node.absorb(bound_ms=EPOCH_MS + 8_000_000)
    version = node.version("t", 4)
    assert version is not None and version.ts <= EPOCH_MS + 7_260_000


def test_clamping_stays_above_what_the_write_replaced_and_spares_others(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.apply(
        wrote(
            "t",
            ("id", "v"),
            ((1, "theirs"), stamp(EPOCH_MS + 50_000, 2)),
            ((2, "theirs"), stamp(EPOCH_MS + 50_000, 2)),
        )
    )
    node.clock.now_ms = EPOCH_MS + DAY_MS
    node.sql("UPDATE t SET v = 'mine' WHERE id = 1")
    node.sql("INSERT INTO t VALUES (3, 'sent')")
    node.publish()
    sent = node.version("t", 3)
    node.sql("UPDATE t SET v = 'mine' WHERE id = 2")
    node.absorb()
    node.replica.times.server_time(EPOCH_MS - 100_000)
    assert node.version("t", 2) == Version(EPOCH_MS + 50_001, 1)
    assert node.version("t", 3) == sent, "an acknowledged version is what all others have"


def test_the_effective_time_of_a_version_is_bounded_by_the_streams(make: MakeNode) -> None:
    """The same for every receiver, whenever it reads; the sender adopts it with its own message."""
    sender, early, late = make(1, PLAIN, clock=Clock(EPOCH_MS + DAY_MS)), make(2, PLAIN), make(3, PLAIN)
    sender.sql("INSERT INTO t VALUES (1, 'fast')")
    sender.sql("INSERT INTO t VALUES (2, 'fast')")
    sender.sql("DELETE FROM t WHERE id = 2")
    groups = sender.publish()
    early.apply(*groups, stored_ms=EPOCH_MS)
    late.clock.tick(5 * DAY_MS)
    late.apply(*groups, stored_ms=EPOCH_MS)
    sender.apply(*groups, stored_ms=EPOCH_MS)
    for node in (sender, early, late):
        assert node.version("t", 1) == Version(EPOCH_MS + 60_000, 1)
        assert node.version("t", 2) == Version(EPOCH_MS + 60_000, 1)
    assert sender.conflicts() == []


def test_i6_no_version_is_given_out_twice_after_the_stream_has_bounded_one(make: MakeNode) -> None:
    """The floor is bounded together with the version, or the next write would get the time that was refused."""
    node = make(1, PLAIN, clock=Clock(EPOCH_MS + DAY_MS))
    node.sql("INSERT INTO t VALUES (1, 'first')")
    [first] = node.publish()
    [(_, refused)] = written([first], "t")
    node.clock.now_ms = EPOCH_MS  # set right by hand; the server does not tell its time
    node.apply(first, stored_ms=EPOCH_MS)
    node.sql("UPDATE t SET v = 'second'")
    [(_, second)] = written(node.publish(), "t")
    assert second[:2] != refused[:2]
    assert second[:2] == (EPOCH_MS + 60_001, 1)


def test_the_floor_is_not_lowered_below_what_is_still_to_be_published(make: MakeNode) -> None:
    """Writes of one node stay in their order, whatever becomes of the clock between them."""
    node = make(1, PLAIN, clock=Clock(EPOCH_MS + DAY_MS))
    node.sql("INSERT INTO t VALUES (1, 'first')")
    [first] = node.publish()
    node.sql("INSERT INTO t VALUES (2, 'second')")
    node.apply(first, stored_ms=EPOCH_MS)  # absorbs the second before that
    node.clock.now_ms = EPOCH_MS
    node.sql("INSERT INTO t VALUES (3, 'third')")
    stamps = {row[0]: sent[:2] for row, sent in written(node.publish(), "t")}
    assert stamps[3] >= stamps[2] == (EPOCH_MS + DAY_MS + 20, 1)


def test_the_floor_is_not_lowered_by_what_others_published(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.clock.tick(DAY_MS)
    node.sql("INSERT INTO t VALUES (1, 'mine')")
    node.publish()
    floor = node.meta("floor_ms")
    node.apply(wrote("t", ("id", "v"), ((2, "theirs"), stamp(EPOCH_MS + 2 * DAY_MS, 2))), stored_ms=EPOCH_MS)
    assert node.meta("floor_ms") == floor == EPOCH_MS + DAY_MS + 10


def test_i10_a_base_is_bounded_with_the_version_that_it_names(make: MakeNode) -> None:
    """What others write meanwhile is not taken for seen because this node's clock is ahead."""
    a = make(1, PLAIN, clock=Clock(EPOCH_MS + DAY_MS))
    a.sql("INSERT INTO t VALUES (1, 'first')")
    [first] = a.publish()
    a.sql("UPDATE t SET v = 'second'")
    a.absorb()
    a.apply(first, stored_ms=EPOCH_MS)  # read back when the second is there already
    theirs = wrote("t", ("id", "v"), ((1, "theirs"), stamp(EPOCH_MS + DAY_MS, 2, base=(EPOCH_MS + 60_000, 1))))
    [(_, second)] = written(a.publish(), "t")
    assert (second.base_ts, second.base_node) == (EPOCH_MS + 60_000, 1)
    a.apply(theirs, stored_ms=EPOCH_MS + 2 * DAY_MS)
    assert [(reason, row) for *_, reason, row in a.conflicts()] == [("concurrent write", {"id": 1, "v": "theirs"})]


def test_a_step_of_the_clock_is_added_to_unsent_versions_of_this_boot(make: MakeNode) -> None:
    node = make(1, PLAIN, boot_id="one")
    node.sql("INSERT INTO t VALUES (1, 'earlier boot')")
    node.absorb()
    node.restart(boot_id="two")
    node.apply(wrote("t", ("id", "v"), ((5, "theirs"), stamp(EPOCH_MS, 2))))
    started = node.clock.tick()
    node.sql("INSERT INTO t VALUES (2, 'sent')")
    node.sql("INSERT INTO t VALUES (1, 'x') ON CONFLICT DO NOTHING")
    node.publish()
    before = {key: node.version("t", key) for key in (1, 2, 5)}
    node.sql("INSERT INTO t VALUES (3, 'absorbed')")
    at = node.clock.now_ms
    node.absorb()
    node.sql("INSERT INTO t VALUES (4, 'logged')")
    until = node.clock.now_ms
    node.replica.times.shift_clock(from_ms=started, to_ms=until, delta_ms=3 * DAY_MS)
    assert node.version("t", 3) == Version(at + 3 * DAY_MS, 1)
    assert node.version("t", 4) == Version(until + 3 * DAY_MS, 1)
    assert {key: node.version("t", key) for key in (1, 2, 5)} == before


def test_a_step_is_not_added_to_versions_of_an_earlier_boot(make: MakeNode) -> None:
    """Without a battery both boots begin at the same time by the wrong clock."""
    node = make(1, PLAIN, boot_id="one")
    node.sql("INSERT INTO t VALUES (1, 'earlier boot')")
    node.absorb()
    before = node.version("t", 1)
    node.restart(boot_id="two")
    node.restart(boot_id="two")
    node.clock.now_ms = EPOCH_MS
    node.sql("INSERT INTO t VALUES (2, 'this boot')")
    node.replica.times.shift_clock(from_ms=EPOCH_MS, to_ms=EPOCH_MS + 1000, delta_ms=DAY_MS)
    assert node.version("t", 1) == before
    shifted = node.version("t", 2)
    assert shifted is not None and shifted.ts >= EPOCH_MS + DAY_MS


def test_a_step_is_added_to_what_this_boot_wrote_before_the_daemon_started(make: MakeNode) -> None:
    """What is in the log when a boot begins is of it, unless its times say otherwise: applications start first."""
    node = make(1, PLAIN, boot_id="one")
    node.stop()
    node.sql("INSERT INTO t VALUES (1, 'earlier boot')")
    earlier = node.clock.now_ms
    started = node.clock.tick()
    node.sql("INSERT INTO t VALUES (2, 'this boot')")
    at = node.clock.now_ms
    node.start(boot_id="two")
    node.absorb()
    node.replica.times.shift_clock(from_ms=started, to_ms=node.clock.tick(), delta_ms=DAY_MS)
    assert (node.version("t", 1), node.version("t", 2)) == (Version(earlier, 1), Version(at + DAY_MS, 1))


def test_a_step_back_keeps_edits_above_what_they_replaced(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.apply(wrote("t", ("id", "v"), ((1, "theirs"), stamp(EPOCH_MS, 2))))
    started = node.clock.tick()
    node.sql("UPDATE t SET v = 'mine'")
    node.absorb()
    node.replica.times.shift_clock(from_ms=started, to_ms=node.clock.now_ms, delta_ms=-DAY_MS)
    assert node.version("t", 1) == Version(EPOCH_MS + 1, 1)


def test_a_step_back_does_not_lift_what_is_logged_to_the_clock_that_was_ahead(make: MakeNode) -> None:
    node = make(1, PLAIN)
    started = node.clock.tick()
    node.sql("INSERT INTO t VALUES (1, 'absorbed')")
    absorbed = node.clock.now_ms
    node.absorb()
    node.sql("INSERT INTO t VALUES (2, 'logged')")
    logged = node.clock.now_ms
    node.replica.times.shift_clock(from_ms=started, to_ms=logged, delta_ms=-DAY_MS)
    assert (node.version("t", 1), node.version("t", 2)) == (Version(absorbed - DAY_MS, 1), Version(logged - DAY_MS, 1))
    node.clock.now_ms = logged - DAY_MS + 1
    node.sql("INSERT INTO t VALUES (3, 'the right time')")
    node.absorb()
    assert node.version("t", 3) == Version(node.clock.now_ms, 1)


def test_a_step_back_leaves_the_floor_above_what_was_sent_with_the_wrong_time(make: MakeNode) -> None:
    """That keeps its time; deleted and forgotten, the row must not get the same version again for another content."""
    node = make(1, PLAIN)
    started = node.clock.tick()
    node.sql("INSERT INTO t VALUES (1, 'sent')")
    sent = node.clock.now_ms
    node.publish()
    node.sql("INSERT INTO t VALUES (2, 'logged')")
    node.replica.times.shift_clock(from_ms=started, to_ms=node.clock.now_ms, delta_ms=-DAY_MS)
    assert (node.version("t", 1), node.version("t", 2)) == (Version(sent, 1), Version(sent, 1))


def test_a_correction_is_added_to_times_up_to_its_end(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'wrong clock')")
    wrong = node.clock.now_ms
    node.sql("INSERT INTO t VALUES (2, 'clock was set')")
    node.replica.absorb(None, Correction(DAY_MS, wrong))
    assert node.version("t", 1) == Version(wrong + DAY_MS, 1)
    assert node.version("t", 2) == Version(node.clock.now_ms, 1)


@pytest.mark.parametrize("what", ["correction", "bound"])
def test_a_schema_change_before_the_absorb_changes_no_rule_of_time(make: MakeNode, what: str) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    at = node.clock.now_ms
    node.sql("CREATE TABLE z (id INTEGER PRIMARY KEY)")
    if what == "bound":
        node.replica.absorb(at - 5000)
        assert node.version("t", 1) == Version(at - 5000, 1)
    else:
        node.replica.absorb(None, Correction(DAY_MS))
        assert node.version("t", 1) == Version(at + DAY_MS, 1)


def test_absorb_in_pieces_loses_nothing_and_joins_the_batches(make: MakeNode) -> None:
    node = make(1, TWO, group_rows=10)
    with node.transaction():
        node.sql(insert_many(versions.ABSORB_ROWS * 2 + 7))
        node.sql("INSERT INTO u VALUES (1, 'same transaction')")
    assert node.replica.absorb() <= versions.ABSORB_ROWS
    assert node.collect() is None, "a half absorbed transaction is not published"
    node.crash()
    [outgoing] = node.outgoing()
    assert len(outgoing.group) == versions.ABSORB_ROWS * 2 + 8
    assert not outgoing.torn


def test_pieces_grow_with_an_application_that_never_pauses(make: MakeNode) -> None:
    """It writes more between two pieces than a piece takes: the log would never be empty, nothing ever published."""
    node = make(1, PLAIN)
    size = versions.ABSORB_ROWS
    node.sql(insert_many(size))
    for number in range(1, 20):
        node.sql(insert_many(2 * size, number * 2 * size))
        if node.replica.absorbing.absorb().drained:
            break
    else:
        pytest.fail("the log is never empty")
    for number in range(20, 30):  # once it pauses, the lock is as short again
        node.sql(insert_many(1, number * 2 * size))
        node.replica.absorb()
    node.sql(insert_many(3 * size, 100 * size))
    assert node.replica.absorb() <= size


def test_pieces_of_a_long_log_stay_small(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql(insert_many(versions.ABSORB_ROWS * 6))
    taken = []
    for number in range(100, 106):
        node.sql(insert_many(versions.ABSORB_ROWS // 3, versions.ABSORB_ROWS * number))
        taken.append(node.replica.absorb())
    assert max(taken) <= versions.ABSORB_ROWS


def test_pieces_that_are_rolled_back_do_not_grow(make: MakeNode) -> None:
    """A disk that is full for an hour: each try finds the log as long as before, not longer."""
    node = make(1, PLAIN)
    size = versions.ABSORB_ROWS
    node.sql(insert_many(size * 6))
    assert node.replica.absorb() == size
    for _ in range(10):
        with pytest.raises(apsw.FullError), node.replica.transaction():
            node.replica.absorbing.piece(None)
            raise apsw.FullError
    assert node.replica.absorb() <= size


def test_pieces_shrink_where_they_hold_the_lock_for_long(make: MakeNode) -> None:
    """Growing with an application that never pauses comes before that."""
    node = make(1, PLAIN)
    absorbing, size = node.replica.absorbing, versions.ABSORB_ROWS
    node.sql(insert_many(4 * size))
    assert node.replica.absorb() == size
    absorbing.took(size, 10 * AIM_S)
    assert node.replica.absorb() == size // 10
    absorbing.took(size // 10, AIM_S)
    assert node.replica.absorb() == size // 10
    absorbing.took(size // 10, 1000 * AIM_S)
    assert node.replica.absorb() == LEAST_ROWS
    absorbing.took(LEAST_ROWS, AIM_S / 10)
    assert node.replica.absorb() == 2 * LEAST_ROWS
    for _ in range(10):
        absorbing.took(1, AIM_S / 100)
    assert node.replica.absorb() == 2 * LEAST_ROWS, "a few rows tell nothing of so many"
    for doublings in range(10):
        absorbing.took(LEAST_ROWS << doublings, AIM_S / 10)
    assert node.replica.absorb() == size
    absorbing.took(size, 3 * AIM_S)
    for number in range(5, 20):
        node.sql(insert_many(2 * size, number * 2 * size))
        absorbing.took(taken := node.replica.absorb(), taken / size * 3 * AIM_S)
        if not node.replica.logged():
            break
    else:
        pytest.fail("the log is never empty")


def test_pieces_that_grow_join_no_transactions(make: MakeNode) -> None:
    """Who receives a batch has the lock for as long as all of it takes."""
    node = make(1, PLAIN, group_rows=10)
    absorbing, part, taken = node.replica.absorbing, versions.ABSORB_ROWS // 2, []
    for number in range(40):
        node.sql(insert_many(part, 1 + number * part))
        absorbing.sight(on_writer=False)
        if number % 5 == 4:
            taken.append(node.replica.absorb())
    node.absorb()
    assert max(taken) > versions.ABSORB_ROWS
    assert max(len(each.group) for each in node.outgoing()) <= versions.ABSORB_ROWS


def test_i1_pieces_grow_no_further_than_to_a_fifth_of_a_second(make: MakeNode) -> None:
    """Absorbing is slower than the application: it comes first."""
    node = make(1, PLAIN)
    absorbing, size = node.replica.absorbing, versions.ABSORB_ROWS
    node.sql(insert_many(size))
    held = []
    for number in range(1, 12):
        node.sql(insert_many(3 * size, number * 3 * size))
        taken = node.replica.absorb()
        absorbing.took(taken, held_s := taken / size * 10 * AIM_S)
        held.append(held_s)
        if number > 1:  # how long it takes is not known before
            assert held_s <= LONGEST_HELD_S + AIM_S
    assert held[-1] > LONGEST_HELD_S / 2, "it does what it can"


def test_apply_absorbs_a_log_of_any_length_first(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql(insert_many(versions.ABSORB_ROWS * 2))
    node.apply(wrote("t", ("id", "v"), ((1, "newer"), stamp(EPOCH_MS + 50_000, 2))))
    assert not node.replica.absorbing.has_log(node.replica.writer)
    assert node.query("SELECT v FROM t WHERE id IN (1, 2)") == [("newer",), ("v2",)]


def test_i9_growth_follows_the_rows_changed(make: MakeNode) -> None:
    node = make(1, PLAIN)
    for _ in range(5):
        for _ in range(50):
            node.sql("INSERT INTO t VALUES (1, 1) ON CONFLICT DO UPDATE SET v = v + 1")
        node.absorb()
    assert node.query('SELECT count(*) FROM "__harmonylite__t_version"') == [(1,)]
    assert node.query('SELECT count(*) FROM "__harmonylite__t_change_log"') == [(0,)]
    assert node.query('SELECT count(*) FROM "__harmonylite__join"') == [(1,)]


def test_the_base_is_the_version_that_the_cluster_had(make: MakeNode) -> None:
    """While a row is pending, its base stays: what the cluster has not seen cannot be a base."""
    node = make(1, PLAIN)
    node.apply(wrote("t", ("id", "v"), ((1, "theirs"), stamp(EPOCH_MS, 2))))
    node.clock.tick(100)
    for value in ("a", "b", "c"):
        node.sql("UPDATE t SET v = ?", (value,))
        node.absorb()
    [(_, first)] = written(node.publish(), "t")
    assert (first.base_ts, first.base_node) == (EPOCH_MS, 2)
    node.sql("UPDATE t SET v = 'd'")
    [(_, second)] = written(node.publish(), "t")
    assert (second.base_ts, second.base_node) == (first.ts, 1)


def test_absorb_takes_no_lock_when_there_is_nothing(make: MakeNode) -> None:
    """A commit of ours fails the application's read-then-write transactions: write as seldom as possible."""
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 1)")
    node.publish()
    node.sql("BEGIN")
    node.query("SELECT * FROM t")
    assert node.replica.absorb() == 0
    node.replica.outgoing.mark_published(10**6)
    node.replica.note_position(Position(STREAM, CREATED, 7))
    assert node.outgoing() == []
    node.app.execute("UPDATE t SET v = 2")  # SQLITE_BUSY_SNAPSHOT if anything was committed meanwhile
    node.app.execute("COMMIT")


# Tombstones.


def prune_all(node: object, server_ms: int) -> int:
    return node.replica.prune_tombstones(server_ms)  # type: ignore[attr-defined, no-any-return]


def test_tombstones_are_pruned_after_the_retention_by_server_time_since_they_settled(make: MakeNode) -> None:
    node = make(1, PLAIN, tombstone_retention_ms=10 * DAY_MS)
    node.sql("INSERT INTO t VALUES (1, 'x'), (2, 'y')")
    node.sql("DELETE FROM t WHERE id = 1")
    node.publish()
    node.apply(deleted("t", ((7,), stamp(EPOCH_MS, 2))))
    now = EPOCH_MS + 100 * DAY_MS
    assert prune_all(node, now) == 0, "settled just now, however old its version"
    assert prune_all(node, now + 10 * DAY_MS) == 0
    assert prune_all(node, now + 10 * DAY_MS + 1) == 2
    assert node.tombstones("t") == []
    assert node.version("t", 2) is not None, "rows keep their versions"


def test_a_jump_to_2099_prunes_nothing(make: MakeNode) -> None:
    """The local clock is never asked, and the server's own jump starts a retention instead of ending it."""
    node = make(1, PLAIN, tombstone_retention_ms=10 * DAY_MS)
    node.apply(deleted("t", ((7,), stamp(EPOCH_MS, 2))))
    node.clock.now_ms += 80 * 365 * DAY_MS
    assert prune_all(node, EPOCH_MS) == 0
    assert prune_all(node, EPOCH_MS + DAY_MS) == 0
    assert node.tombstones("t") == [(7,)]


def test_unpublished_tombstones_are_never_pruned(make: MakeNode) -> None:
    node = make(1, PLAIN, tombstone_retention_ms=0)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.sql("DELETE FROM t")
    node.absorb()
    for day in range(5):
        assert prune_all(node, EPOCH_MS + day * DAY_MS) == 0
    assert removed(node.publish(), "t") == [(1,)]
    prune_all(node, EPOCH_MS + 10 * DAY_MS)
    assert prune_all(node, EPOCH_MS + 11 * DAY_MS) == 1


def test_a_tombstone_that_is_pending_again_starts_anew(make: MakeNode) -> None:
    node = make(1, PLAIN, tombstone_retention_ms=10 * DAY_MS)
    node.apply(deleted("t", ((7,), stamp(EPOCH_MS, 2))))
    prune_all(node, EPOCH_MS)
    node.start_over(Position(STREAM, CREATED, 0))
    assert prune_all(node, EPOCH_MS + 20 * DAY_MS) == 0
    assert removed(node.publish(), "t") == [(7,)]
    assert prune_all(node, EPOCH_MS + 30 * DAY_MS) == 0, "settles now"
    assert prune_all(node, EPOCH_MS + 41 * DAY_MS) == 1
