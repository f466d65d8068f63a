"""What a merge does with rows that the snapshot does not have, or has older: each case of docs/rules.md."""

from __future__ import annotations

import pytest

from harmonylite.db.reconcile import FORGOTTEN
from harmonylite.model import Position, Stamp, Version
from tests.db.conftest import MakeNode
from tests.db.harness import CREATED, DAY_MS, EPOCH_MS, STREAM, Node, exchange, removed, stamp, written, wrote
from tests.db.snapshots import copy_of, forget_before, merge

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"
IDV = ("id", "v")
SYNCED_MS = EPOCH_MS + DAY_MS

# Tombstones_since of the snapshot: at the very time when the node was last in step, and a moment later.
IN, OUT = SYNCED_MS, SYNCED_MS + 1

# Deletes from before were forgotten, at the snapshot's node and here.
THEIRS, OWN = EPOCH_MS - DAY_MS, EPOCH_MS - 1


class Away:
    """A node that was in step once, and a snapshot of another one."""

    def __init__(self, make: MakeNode, script: str = PLAIN, seed: str = "", **settings: bool) -> None:
        self.taker = make(1, script)
        self.node = make(2, f"{script}; {seed}", **settings)
        self.name = 0

    def in_step(self) -> None:
        self.node.replica.completeness.note_synced(SYNCED_MS)
        self.node.replica.flush()

    def merge(self, since_ms: int) -> int:
        """Returns how many rows are marked to be published again."""
        forget_before(self.taker, since_ms)
        self.name += 1
        snapshot = copy_of(self.taker, f"snapshot-{self.name}.db")
        assert snapshot[1].tombstones_since_ms == since_ms
        report = merge(self.node, snapshot)
        assert (self.node.meta("tombstones_since_ms") or 0) == since_ms
        return report.marked


def test_unpublished_in_and_out_of_the_window_it_is_published(make: MakeNode) -> None:
    for since_ms in (IN, OUT):
        away = Away(make)
        away.in_step()
        away.node.sql("INSERT INTO t VALUES (1, 'waits')")
        away.node.absorb()
        version = away.node.version("t", 1)
        assert away.merge(since_ms) == 0, "it is pending already"
        ((row, each),) = written(away.node.publish(), "t")
        assert (row, Version(*each[:3])) == ((1, "waits"), version)


@pytest.mark.parametrize("since_ms", [IN, OUT])
def test_newer_than_the_snapshots_it_is_published_at_its_version(make: MakeNode, since_ms: int) -> None:
    """The log lost what had acknowledged it: a row, a deletion, a row that had no version there, and others' rows."""
    away = Away(make, seed="INSERT INTO t VALUES (4, 'seed')")
    away.taker.sql("INSERT INTO t VALUES (1, 'old'), (2, 'old'), (3, 'old')")
    exchange(away.taker, away.node)
    base = (EPOCH_MS + 10, 1)
    taker_seed = wrote("t", IDV, ((4, "seed"), Stamp(0, 0, 0, 0, 0)))
    away.taker.apply(taker_seed)
    away.node.apply(wrote("t", IDV, ((1, "of node 7"), stamp(EPOCH_MS + 50, 7, base=base))))
    away.node.sql("DELETE FROM t WHERE id = 2")
    away.node.sql("UPDATE t SET v = 'edited' WHERE id = 4")
    away.node.publish()
    away.node.replica.flush()
    away.in_step()
    versions = {key: away.node.version("t", key) for key in (1, 2, 4)}
    assert away.merge(since_ms) == 3
    assert away.merge(since_ms) == 0, "once"
    groups = away.node.publish()
    assert {row: Version(*each[:3]) for row, each in written(groups, "t")} == {
        (1, "of node 7"): versions[1],
        (4, "edited"): versions[4],
    }
    assert removed(groups, "t") == [(2,)]
    away.taker.apply(*groups)
    assert away.taker.rows("t") == away.node.rows("t") == [(1, "of node 7"), (3, "old"), (4, "edited")]
    assert away.node.conflicts() == []


def test_acknowledged_and_lacking_in_the_window_it_is_published(make: MakeNode) -> None:
    """Nobody can have deleted it: its tombstone would be there. So the log has lost it."""
    away = Away(make)
    away.node.sql("INSERT INTO t VALUES (1, 'mine')")
    away.node.apply(*away.node.publish(), wrote("t", IDV, ((2, "received"), stamp(EPOCH_MS, 9))))
    away.in_step()
    assert away.merge(IN) == 2
    assert sorted(row for row, _ in written(away.node.publish(), "t")) == [(1, "mine"), (2, "received")]


def test_acknowledged_and_lacking_out_of_the_window_it_is_deleted_and_logged(make: MakeNode) -> None:
    away = Away(make)
    away.node.sql("INSERT INTO t VALUES (1, 'mine'), (3, 'stays')")
    away.node.apply(*away.node.publish(), wrote("t", IDV, ((2, "received"), stamp(EPOCH_MS, 9))))
    away.taker.apply(wrote("t", IDV, ((3, "newer there"), stamp(EPOCH_MS + 500, 1))))
    away.in_step()
    away.node.sql("INSERT INTO t VALUES (4, 'waits')")
    versions = {key: away.node.version("t", key) for key in (1, 2)}
    for _ in range(2):
        assert away.merge(OUT) == 0
        assert away.node.rows("t") == [(3, "newer there"), (4, "waits")]
        assert [away.node.version("t", key) for key in (1, 2)] == [None, None]
        logged = {key: (version, reason, row) for _, key, version, reason, row in away.node.conflicts()}
        assert logged[(1,)] == (versions[1], FORGOTTEN, {"id": 1, "v": "mine"})
        assert logged[(2,)] == (versions[2], FORGOTTEN, {"id": 2, "v": "received"})
    groups = away.node.publish()
    assert [row for row, _ in written(groups, "t")] == [(4, "waits")]
    assert removed(groups, "t") == [], "what the cluster has forgotten it need not hear of again"


@pytest.mark.parametrize("late_ms", [60_000, 60_001])
def test_what_was_written_later_than_any_delete_that_is_forgotten_is_published(make: MakeNode, late_ms: int) -> None:
    """Its delete would be in the snapshot. It has been lost: in the end of a log, say."""
    away = Away(make)
    away.in_step()
    away.node.apply(wrote("t", IDV, ((1, "x"), stamp(OUT + late_ms, 9))), stored_ms=OUT + late_ms)
    deleted = late_ms <= 60_000
    assert away.merge(OUT) == int(not deleted)
    assert away.node.rows("t") == ([] if deleted else [(1, "x")])


@pytest.mark.parametrize("since_ms", [IN, OUT])
def test_a_tombstone_that_the_snapshot_lacks_is_published(make: MakeNode, since_ms: int) -> None:
    """It brings nothing back, and may be news to a node that still has the row."""
    away = Away(make)
    away.node.sql("INSERT INTO t VALUES (1, 'x')")
    away.node.sql("DELETE FROM t")
    away.node.apply(*away.node.publish())
    away.in_step()
    assert away.merge(since_ms) == 1
    assert removed(away.node.publish(), "t") == [(1,)]


def test_unversioned_and_lacking_in_the_window_it_is_published_without_a_version(make: MakeNode) -> None:
    away = Away(make, seed="INSERT INTO t VALUES (1, 'seed'), (2, 'seed')")
    away.taker.apply(wrote("t", IDV, ((2, "seed"), Stamp(0, 0, 0, 0, 0))))
    away.in_step()
    assert away.merge(IN) == 1
    assert away.merge(IN) == 0
    groups = away.node.publish()
    ((row, each),) = written(groups, "t")
    assert (row, Version(*each[:3])) == ((1, "seed"), Version(0, 0))
    away.taker.apply(*groups)
    assert away.taker.rows("t") == [(1, "seed"), (2, "seed")]
    assert away.taker.version("t", 1) is None, "nor is it stamped there"
    # Any version beats it still, and a write of its own node is one.
    away.node.apply(wrote("t", IDV, ((1, "edited"), stamp(1, 1))))
    assert away.node.rows("t")[0] == (1, "edited")


def test_unversioned_and_lacking_at_the_first_join_it_is_published(make: MakeNode) -> None:
    """A node that comes with rows of its own: nobody can have deleted what nobody ever saw."""
    away = Away(make, seed="INSERT INTO t VALUES (1, 'seed')")
    assert away.merge(OUT) == 1
    assert [row for row, _ in written(away.node.publish(), "t")] == [(1, "seed")]
    assert away.node.conflicts() == []


def test_unversioned_and_lacking_out_of_the_window_it_is_deleted_and_logged(make: MakeNode) -> None:
    away = Away(make, seed="INSERT INTO t VALUES (1, 'seed'), (2, 'seed'), (3, 'seed')")
    away.taker.apply(wrote("t", IDV, ((2, "seed"), Stamp(0, 0, 0, 0, 0))))
    away.in_step()
    away.node.sql("UPDATE t SET v = 'edited' WHERE id = 3")
    assert away.merge(OUT) == 0
    assert away.node.rows("t") == [(2, "seed"), (3, "edited")]
    assert [(key, version, reason, row) for _, key, version, reason, row in away.node.conflicts()] == [
        ((1,), Version(0, 0), FORGOTTEN, {"id": 1, "v": "seed"})
    ]


def test_a_tombstone_there_deletes_what_has_no_version_here(make: MakeNode) -> None:
    for since_ms in (0, IN, OUT):
        away = Away(make, seed="INSERT INTO t VALUES (1, 'seed')")
        away.in_step()
        away.taker.sql("INSERT INTO t VALUES (1, 'seed')")
        away.taker.sql("DELETE FROM t")
        away.taker.apply(*away.taker.publish())
        assert away.merge(since_ms) == 0
        assert (away.node.rows("t"), away.node.tombstones("t")) == ([], [(1,)])


def test_a_position_tells_too_how_far_a_node_was_in_step(make: MakeNode) -> None:
    """A database of an earlier version knows no time when it was in step; what it last read of every stream has one."""
    for stored_ms, other, kept in (
        (SYNCED_MS + 1, True, True),
        (SYNCED_MS, True, False),
        (SYNCED_MS + 1, False, False),
    ):
        away = Away(make)
        away.node.apply(wrote("t", IDV, ((1, "x"), stamp(EPOCH_MS, 9))))
        away.node.replica.move_position(Position(STREAM, CREATED, 1, stored_ms * 1_000_000))
        for node in (away.taker, away.node) if other else (away.taker,):
            node.replica.move_position(Position("changes-2", CREATED, 1, (OUT + 5) * 1_000_000))
        away.taker.replica.move_position(Position(STREAM, CREATED, 1, OUT * 1_000_000))
        away.merge(OUT)
        assert bool(away.node.rows("t")) == kept


def test_after_a_merge_a_node_is_as_much_in_step_as_the_snapshots(make: MakeNode) -> None:
    away = Away(make)
    away.in_step()
    away.taker.replica.completeness.note_synced(SYNCED_MS + 7)
    away.taker.replica.flush()
    away.merge(OUT)
    assert away.node.meta("synced_at_ms") == SYNCED_MS + 7
    away.node.replica.completeness.note_synced(SYNCED_MS + 9)
    away.node.replica.completeness.note_synced(SYNCED_MS + 8)
    away.node.replica.flush()
    away.merge(OUT)
    assert away.node.meta("synced_at_ms") == SYNCED_MS + 9


@pytest.mark.parametrize("restarted", [False, True])
def test_in_step_in_the_future_was_a_server_whose_clock_was_ahead(make: MakeNode, restarted: bool) -> None:
    """Believed for ever, this node would bring back whatever is deleted while it is away."""
    away = Away(make)
    away.node.replica.completeness.note_synced(SYNCED_MS + 73 * 365 * DAY_MS)
    away.node.replica.flush()
    if restarted:
        away.node.crash()
    away.in_step()
    away.node.sql("INSERT INTO t VALUES (1, 'x')")
    away.node.absorb()
    assert away.node.meta("synced_at_ms") == SYNCED_MS


def test_what_the_application_touches_before_it_would_be_deleted_stays(make: MakeNode) -> None:
    away = Away(make, seed="INSERT INTO t VALUES (3, 'seed'), (4, 'seed')")
    away.node.sql("INSERT INTO t VALUES (1, 'x'), (2, 'y')")
    away.node.apply(*away.node.publish())
    away.in_step()
    forget_before(away.taker, OUT)

    def application(_: object) -> None:
        if away.node.rows("t")[0] == (1, "x"):
            away.node.sql("UPDATE t SET v = 'touched' WHERE id IN (1, 3)")

    merge(away.node, copy_of(away.taker), application)
    assert away.node.rows("t") == [(1, "touched"), (3, "touched")]
    assert sorted(row for row, _ in written(away.node.publish(), "t")) == [(1, "touched"), (3, "touched")]


def test_what_a_message_brings_before_it_would_be_deleted_stays(make: MakeNode) -> None:
    """Other streams go on meanwhile."""
    away = Away(make)
    away.node.apply(wrote("t", IDV, ((1, "x"), stamp(EPOCH_MS, 9))))
    away.in_step()
    forget_before(away.taker, OUT)
    messages = iter([wrote("t", IDV, ((1, "newer"), stamp(EPOCH_MS + 1, 9)))])

    def arrive(_: object) -> None:
        for message in messages:
            away.node.apply(message)

    merge(away.node, copy_of(away.taker), arrive)
    assert away.node.rows("t") == [(1, "newer")]


def test_a_seed_row_that_does_not_fit_is_not_mistaken_for_one_that_vanished(make: MakeNode) -> None:
    taker = make(1, f"{PLAIN}; INSERT INTO t VALUES (1, 'seed')")
    node = make(2, "CREATE TABLE t (id INTEGER PRIMARY KEY, v CHECK (v <> 'seed'))")
    merge(node, copy_of(taker))
    assert [(key, reason) for _, key, _, reason in node.parked()] == [((1,), "does not fit")]
    assert node.vanished("t") == []
    assert node.publish() == []


def test_a_deleted_rows_stale_copy_kills_no_good_row_by_a_clash(make: MakeNode) -> None:
    """What the cluster has forgotten goes first: else it would win a unique clash against a row that is alive."""
    unique = "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE)"
    away = Away(make, unique)
    away.node.apply(wrote("t", IDV, ((1, "x"), stamp(EPOCH_MS + 9_000, 9))))
    away.taker.apply(wrote("t", IDV, ((2, "x"), stamp(EPOCH_MS, 8))))
    away.in_step()
    assert away.merge(OUT) == 0
    assert away.node.rows("t") == [(2, "x")]
    assert away.node.publish() == []
    assert [reason for _, _, _, reason, _ in away.node.conflicts()] == [FORGOTTEN]


def test_a_listener_publishes_nothing_and_forgets_what_the_cluster_has(make: MakeNode) -> None:
    for since_ms, rows in ((IN, [(1, "x")]), (OUT, [])):
        away = Away(make, publish=False)
        away.node.apply(wrote("t", IDV, ((1, "x"), stamp(EPOCH_MS, 9))))
        away.in_step()
        assert away.merge(since_ms) == 0
        assert away.node.rows("t") == rows


def test_rows_evicted_through_an_index_that_no_trigger_sees(make: MakeNode) -> None:
    """Such tables note that a row exists, at (0, 0): that is no version either."""
    script = "CREATE TABLE t (id INTEGER PRIMARY KEY, v); CREATE UNIQUE INDEX u ON t (lower(v))"
    away = Away(make, script, seed="INSERT INTO t VALUES (1, 'seed'), (2, 'here')")
    away.taker.apply(wrote("t", IDV, ((1, "seed"), Stamp(0, 0, 0, 0, 0)), ((3, "there"), Stamp(0, 0, 0, 0, 0))))
    away.in_step()
    assert away.merge(IN) == 1
    groups = away.node.publish()
    assert [row for row, _ in written(groups, "t")] == [(2, "here")]
    away.taker.apply(*groups)
    assert away.taker.rows("t") == away.node.rows("t") == [(1, "seed"), (2, "here"), (3, "there")]
    away.in_step()
    away.node.sql("UPDATE t SET v = 'edited' WHERE id = 3")
    assert away.merge(OUT) == 0


# -- everything is published again


def test_marking_everything_is_done_in_short_pieces_and_resumed(
    make: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The position moves last: killed anywhere, the node finds the same gap again, and marks the rest."""
    monkeypatch.setattr("harmonylite.db.marking.MARK_ROWS", 3)
    script = (
        "CREATE TABLE t (id INTEGER PRIMARY KEY, v); CREATE TABLE w (a TEXT, b, v, PRIMARY KEY (a, b)) WITHOUT ROWID"
    )
    node = make(1, script)
    for key in range(10):
        node.sql("INSERT INTO t VALUES (?, 'x')", (key,))
        node.sql("INSERT INTO w VALUES (CAST(? AS TEXT), ?, 'x')", (b"\xff" if key % 2 else b"a", key))
    node.sql("DELETE FROM t WHERE id = 3")
    node.apply(*node.publish())
    node.sql("INSERT INTO t VALUES (50, 'waits')")
    node.absorb()
    everything = 'SELECT * FROM (SELECT k0, ts, node FROM "__harmonylite__t_version") ORDER BY k0'
    before = node.query(everything)
    old, new = node.replica.position(STREAM), Position(STREAM, "another", 0)
    for kill_at in range(1, 9):
        marking = _marking(node)
        for _ in range(kill_at):
            assert marking.step()
        node.crash()
        assert node.replica.position(STREAM) == old
    marking = _marking(node)
    steps = 0
    while marking.step():
        steps += 1
    marking.finish(new)
    assert (steps, marking.looked_at) == (8, 21)
    assert node.replica.position(STREAM) == new
    assert node.query(everything) == before
    assert node.query('SELECT count(*) FROM "__harmonylite__t_version" WHERE batch IS NULL') == [(0,)]
    assert node.query('SELECT max(n) FROM (SELECT count(*) AS n FROM "__harmonylite__t_version" GROUP BY batch)') == [
        (3,)
    ]
    groups = node.publish()
    assert (len(written(groups, "t")), removed(groups, "t"), len(written(groups, "w"))) == (10, [(3,)], 10)


def test_what_is_marked_again_is_published_in_groups_of_bounded_size(
    make: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harmonylite.db.marking.MARK_ROWS", 3)
    node = make(1, PLAIN, group_rows=1)
    for key in range(10):
        node.sql("INSERT INTO t VALUES (?, 'x')", (key,))
    node.apply(*node.publish())
    node.start_over(Position(STREAM, "another", 0))
    assert [len(group) for group in node.publish()] == [3, 3, 3, 1]


def test_what_arrives_from_the_log_after_all_loses_its_mark(make: MakeNode) -> None:
    """Rows and tombstones: else every node would publish everything again, one after the other."""
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x'), (2, 'x')")
    first = node.publish()
    node.apply(*first)
    node.sql("DELETE FROM t WHERE id = 1")
    second = node.publish()
    node.apply(*second)
    node.sql("DELETE FROM t WHERE id = 2")
    node.apply(*node.publish())
    node.start_over(Position(STREAM, "another", 0))
    node.apply(*second)
    assert removed(node.publish(), "t") == [(2,)], "the log does not have that one"


def _marking(node: Node):  # type: ignore[no-untyped-def]
    from harmonylite.db.marking import Marking

    return Marking(node.replica)


@pytest.mark.parametrize(
    ("mine", "created", "counts"),
    [
        (None, CREATED, THEIRS),
        (1, CREATED, THEIRS),
        (2, CREATED, THEIRS),
        (3, CREATED, OWN),  # what it read beyond the snapshot may be what it has forgotten since
        (1, "2023-11-15T00:00:00Z", OWN),  # nobody knows what that stream held
    ],
)
def test_what_was_forgotten_here_is_forgotten_still_after_a_snapshot_from_before(
    make: MakeNode, mine: int | None, created: str, counts: int
) -> None:
    """Else a node that knows of less would bring back what is deleted, once it merges a snapshot of this one."""
    taker, node = make(1, PLAIN), make(2, PLAIN)
    taker.replica.move_position(Position(STREAM, CREATED, 2, 1))
    forget_before(taker, THEIRS)
    forget_before(node, OWN)
    if mine is not None:
        node.replica.move_position(Position(STREAM, created, mine, 1))
    merge(node, copy_of(taker))
    assert node.meta("tombstones_since_ms") == counts
    assert copy_of(node)[1].tombstones_since_ms == counts
