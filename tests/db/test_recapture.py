"""Large tables that capture was off for are gone through a few rows at a time, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
from typing import Any

import apsw
import pytest

from harmonylite.db import evictions, recapture, stamping, versions
from harmonylite.db.cleanup import CleanupRefused, cleanup
from harmonylite.db.copy import start_copy
from harmonylite.db.recapture import RecaptureDueError
from harmonylite.model import Position, RawText, Version
from tests.db.conftest import MakeNode
from tests.db.harness import CREATED, DAY_MS, EPOCH_MS, STREAM, Killer, Node, removed, stamp, written, wrote
from tests.db.test_install import IDV, PLAIN, REBUILD

PLAIN_REBUILD = REBUILD.format("id INTEGER PRIMARY KEY, v")
COLUMNS = "id INTEGER PRIMARY KEY, v, w"
WIDER = (
    f"BEGIN; CREATE TABLE n ({COLUMNS}); INSERT INTO n SELECT id, v, 0 FROM t;"
    " DROP TABLE t; ALTER TABLE n RENAME TO t; COMMIT"
)
VERSIONS = 'SELECT k0, ts, node, deleted, batch FROM "__harmonylite__t_version" ORDER BY k0'
FILL = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < {0}) INSERT INTO t SELECT x, x FROM n"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than three rows are many, and two are a piece."""
    monkeypatch.setattr(recapture, "AT_ONCE_ROWS", 3)
    for name in ("FIRST_ROWS", "LEAST_ROWS", "MOST_ROWS"):
        monkeypatch.setattr(recapture, name, 2)


def theirs(node: Node, keys: range) -> None:
    """Rows of node 2, at version 1000."""
    node.apply(wrote("t", IDV, *(((key, "theirs"), stamp(1000, 2)) for key in keys)))


def begun(node: Node) -> None:
    """Whoever needs what the versions say has to wait."""
    with pytest.raises(RecaptureDueError):
        node.replica.absorb()


def finish(node: Node) -> int:
    """Go through all that is left. Returns in how many transactions."""
    done = 1
    while node.replica.recapture():
        done += 1
    return done


def test_a_rebuilt_table_is_not_gone_through_while_the_application_waits(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; {FILL.format(7)}; UPDATE t SET v = 'unversioned'")
    theirs(node, range(1, 6))
    node.app.execute(PLAIN_REBUILD)
    node.sql("DELETE FROM t WHERE id = 2")  # nobody sees it
    begun(node)
    assert {ts for _, ts, *_ in node.query(VERSIONS)} == {1000}, "nothing yet"
    assert node.replica.recapture()
    assert [row[:4] for row in node.query(VERSIONS)][:3] == [(1, 1001, 1, 0), (2, 1001, 1, 1), (3, 1000, 2, 0)]
    assert finish(node) > 4
    groups = node.publish()
    assert len(groups) == 1, "what may have been one transaction"
    rows = sorted(row for row, _ in written(groups, "t"))
    assert rows == [*((key, "theirs") for key in (1, 3, 4, 5)), (6, "unversioned"), (7, "unversioned")]
    assert removed(groups, "t") == [(2,)]
    assert node.version("t", 1) == Version(1001, 1), "at current ts + 1, never at now"
    assert node.version("t", 7) == Version(1, 1)
    node.sql("UPDATE t SET v = 'captured' WHERE id = 1")
    assert [row for row, _ in written(node.publish(), "t")] == [(1, "captured")]


def test_few_rows_are_gone_through_at_once(make: MakeNode) -> None:
    node = make(1, PLAIN)
    theirs(node, range(1, 4))
    node.app.execute(PLAIN_REBUILD)
    assert node.absorb() == 0
    assert {ts for _, ts, *_ in node.query(VERSIONS)} == {1001}
    assert node.replica.recapturing.under_way is None


def test_what_the_application_writes_meanwhile_is_newer(make: MakeNode) -> None:
    node, other = make(1, PLAIN), make(2, PLAIN)
    theirs(node, range(1, 9))
    theirs(other, range(1, 9))
    node.app.execute(PLAIN_REBUILD)
    begun(node)
    node.replica.recapture()  # 1 and 2 are done
    node.sql("UPDATE t SET v = 'later' WHERE id IN (1, 8)")
    node.sql("DELETE FROM t WHERE id IN (2, 7)")
    node.sql("INSERT INTO t VALUES (0, 'before'), (9, 'behind')")
    node.sql("UPDATE t SET id = 10 WHERE id = 6")
    begun(node)
    finish(node)
    groups = node.publish()
    later = {0, 1, 2, 6, 7, 8, 9, 10}
    stamps = {row[0]: at.ts for row, at in written(groups, "t")}
    assert {key for key, ts in stamps.items() if ts >= EPOCH_MS} == later - {2, 6, 7}
    assert {key for key, ts in stamps.items() if ts == 1001} == {3, 4, 5}
    assert set(removed(groups, "t")) == {(2,), (6,), (7,)}
    other.apply(*groups)
    assert other.rows("t") == node.rows("t")


def test_it_goes_on_after_a_kill_at_any_statement(make: MakeNode) -> None:
    statement = 0
    while True:
        node = make(1, PLAIN)
        theirs(node, range(1, 8))
        node.app.execute(PLAIN_REBUILD)
        node.sql("DELETE FROM t WHERE id = 2")
        begun(node)
        statement += 1
        killer = Killer(statement)
        writer: Any = node.writer
        writer.exectrace = killer
        with contextlib.suppress(KeyboardInterrupt):
            finish(node)
        writer.exectrace = None
        node.crash()
        if killer.left > 0:
            break
        finish(node)
        groups = node.publish()
        assert len(groups) == 1 and len(written(groups, "t")) == 6 and removed(groups, "t") == [(2,)]
        assert {ts for _, ts, *_ in node.query(VERSIONS)} == {1001}, "no row is done twice, none is left out"
    assert statement > 20


def test_nothing_is_read_applied_or_copied_before_its_end(make: MakeNode) -> None:
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.sql("INSERT INTO t VALUES (20, 'pending')")
    node.absorb()
    node.app.execute(PLAIN_REBUILD)
    begun(node)
    for _ in range(3):
        node.replica.recapture()
        assert node.collect() is None
        assert node.replica.outgoing.read(on_writer=True) is None
        assert node.replica.outgoing.read_locked() == []
        for wants in (
            lambda: node.apply(wrote("t", IDV, ((1, "newer"), stamp(2000, 2)))),
            lambda: start_copy(node.replica, node.path.with_name("copy.db")),
            lambda: node.replica.times.server_time(EPOCH_MS),
            lambda: node.replica.times.shift_clock(from_ms=0, to_ms=EPOCH_MS, delta_ms=1),
        ):
            with pytest.raises(RecaptureDueError):
                wants()
    assert not list(node.path.parent.glob("copy.db*"))
    finish(node)
    assert len(node.publish()) == 1
    node.apply(wrote("t", IDV, ((1, "newer"), stamp(2000, 2))))
    assert (1, "newer") in node.rows("t")


def test_whoever_finds_the_schema_changed_waits_too(make: MakeNode) -> None:
    """The installation stays, although its finder has nothing of it."""
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.app.execute(PLAIN_REBUILD)
    with pytest.raises(RecaptureDueError):
        node.apply(wrote("t", IDV, ((1, "newer"), stamp(2000, 2))))
    node.app.execute(WIDER)
    with pytest.raises(RecaptureDueError):
        node.replica.times.shift_clock(from_ms=0, to_ms=EPOCH_MS, delta_ms=1)
    finish(node)
    node.apply(wrote("t", IDV, ((1, "newer"), stamp(2000, 2))))
    assert node.query("SELECT v FROM t WHERE id = 1") == [("newer",)]


def test_a_reader_whose_view_is_older_reads_nothing(make: MakeNode) -> None:
    """That all is done, it may not take from the writer: in its view it is not."""
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.app.execute(PLAIN_REBUILD)
    begun(node)
    node.replica.recapture()
    reader = node.replica._reader
    reader.execute("BEGIN")
    reader.execute("PRAGMA schema_version").fetchall()
    reader.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    finish(node)
    assert node.replica.absorbing.has_log(reader)
    reader.execute("ROLLBACK")
    assert not node.replica.absorbing.has_log(reader)


def test_a_second_rebuild_begins_again(make: MakeNode) -> None:
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.app.execute(PLAIN_REBUILD)
    begun(node)
    node.replica.recapture()
    node.sql("UPDATE t SET v = 'seen' WHERE id = 7")
    node.app.execute(WIDER)
    node.sql("DELETE FROM t WHERE id = 1")
    begun(node)
    finish(node)
    groups = node.publish()
    assert len(groups) == 1
    assert removed(groups, "t") == [(1,)]
    assert {row[0] for row, _ in written(groups, "t")} == {*range(2, 8)}
    seen = node.version("t", 7)
    assert seen is not None and seen.ts > EPOCH_MS, "what was logged was absorbed before its log went"
    assert node.version("t", 4) == Version(1001, 1) and node.version("t", 1) == Version(1002, 1)


def test_a_rename_and_a_drop_meanwhile(make: MakeNode) -> None:
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.app.execute(PLAIN_REBUILD)
    begun(node)
    node.replica.recapture()
    node.app.execute("ALTER TABLE t RENAME TO u")
    begun(node)
    finish(node)
    assert len(written(node.publish(), "u")) == 7
    node.app.execute(PLAIN_REBUILD.replace("FROM t", "FROM u").replace("DROP TABLE t", "DROP TABLE u"))
    begun(node)
    node.app.execute("DROP TABLE t; CREATE TABLE t (id INTEGER PRIMARY KEY)")
    node.absorb()
    assert node.replica.recapturing.under_way is None
    assert not recapture.is_due(node.writer)


def test_a_new_table_with_many_rows(make: MakeNode, caplog: pytest.LogCaptureFixture) -> None:
    node = make(1, "CREATE TABLE first (id INTEGER PRIMARY KEY)")
    node.app.execute(f"{PLAIN}; {FILL.format(9)}")
    begun(node)
    finish(node)
    groups = node.publish()
    assert len(groups) == 1 and len(written(groups, "t")) == 9
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


KEYS: dict[str, tuple[str, list[Any]]] = {
    "NOCASE": ("k TEXT COLLATE NOCASE PRIMARY KEY", ["a", "B", "c", "D", "e"]),
    "descending": ("k, PRIMARY KEY (k DESC)", [5, "x", b"x", 2.5, 1, -7]),
    "without rowid": ("k TEXT PRIMARY KEY", ["a", "b", "c", "d", "e"]),
    "not UTF-8": ("k TEXT PRIMARY KEY", ["a", RawText(b"\xff"), RawText(b"\xfe"), "z", RawText(b"a\xff")]),
    "both directions": ("k, j DEFAULT 1, PRIMARY KEY (k DESC, j)", [1, 2, 3, 4, 5]),
    "NULL": ("k TEXT PRIMARY KEY", [None, None, None, "a", "b", "c", "d", "e"]),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_every_kind(make: MakeNode, kind: str) -> None:
    definition, keys = KEYS[kind]
    node = make(1, "CREATE TABLE first (id INTEGER PRIMARY KEY)")
    node.app.execute(f"CREATE TABLE t ({definition}){' WITHOUT ROWID' if kind == 'without rowid' else ''}")

    def insert(key: object) -> None:
        raw = isinstance(key, RawText)
        text = "INSERT INTO t (k) VALUES (CAST(? AS TEXT))" if raw else "INSERT INTO t (k) VALUES (?)"
        node.app.execute(text, (bytes(key) if isinstance(key, RawText) else key,))

    for key in keys:
        insert(key)
    node.replica.follow_schema()
    finish(node)
    wanted = sum(key is not None for key in keys)
    assert len(written(node.publish(), "t")) == wanted
    # Again, with their versions.
    node.app.execute('DROP TRIGGER "__harmonylite__t_insert"')
    insert("zz")
    node.replica.follow_schema()
    finish(node)
    assert len(written(node.publish(), "t")) == wanted + 1
    assert {ts for (ts,) in node.query('SELECT ts FROM "__harmonylite__t_version"')} == {1, 2}


def test_i7_what_its_rows_leave_behind_is_published_with_them(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; CREATE TABLE u (id INTEGER PRIMARY KEY)", group_rows=1)
    theirs(node, range(1, 8))
    with node.transaction():
        node.sql("INSERT INTO u VALUES (1)")
        node.sql("UPDATE t SET v = 'with u' WHERE id = 5")
    node.absorb()
    node.app.execute(PLAIN_REBUILD)
    begun(node)
    finish(node)
    groups = node.publish()
    assert len(groups) == 1
    assert len(written(groups, "u")) == 1 and len(written(groups, "t")) == 7


def test_i7_the_same_for_a_small_table(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; CREATE TABLE u (id INTEGER PRIMARY KEY)", group_rows=1)
    with node.transaction():
        node.sql("INSERT INTO u VALUES (1)")
        node.sql("INSERT INTO t VALUES (5, 'with u')")
    node.absorb()
    node.app.execute(PLAIN_REBUILD)
    assert len(node.publish()) == 1


def test_marks_set_meanwhile_do_not_keep_a_row_from_its_new_version(make: MakeNode) -> None:
    """A log that lost messages is filled again: everything is pending, at the versions that it has."""
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.app.execute(PLAIN_REBUILD)
    begun(node)
    node.replica.recapture()
    node.start_over(Position(STREAM, CREATED, 0))
    finish(node)
    groups = node.publish()
    assert {(at.ts, at.node) for _, at in written(groups, "t")} == {(1001, 1)}


def test_rows_missing_after_it_are_not_taken_for_evicted(make: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node = make(1, f"{PLAIN}; CREATE UNIQUE INDEX i ON t (v); {FILL.format(9)}")
    node.app.execute(f"{PLAIN_REBUILD}; CREATE UNIQUE INDEX i ON t (v)")
    node.sql("DELETE FROM t WHERE id = 3")  # nobody sees it
    monkeypatch.setattr(stamping, "AT_ONCE_ROWS", 3)
    begun(node)
    node.replica.recapture()
    node.sql("REPLACE INTO t VALUES (-1, 5)")  # evicts 5, before its turn
    node.app.execute("ALTER TABLE t ADD COLUMN w")
    node.replica.follow_schema()
    finish(node)
    while (under_way := node.replica.unseen.stamping()) is not None:
        while (piece := under_way.find()) is not None:
            under_way.write(node.replica, piece)
    groups = node.publish()
    missing = node.version("t", 3)
    assert missing is not None and missing.ts == 1, "never at now"
    node.replica.unseen.log_vanished("t", node.vanished("t"))
    assert sorted([*removed(groups, "t"), *removed(node.publish(), "t")]) == [(3,), (5,)]
    assert evictions.LOOK_ROWS > 9
    node.sql("REPLACE INTO t VALUES (-2, 6, NULL)")
    assert removed(node.publish(), "t") == [(6,)], "from now on they are noticed when they are absorbed"


def test_i4_a_row_whose_version_was_lost_and_that_is_evicted_before_its_turn_is_missed(
    make: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamping, "AT_ONCE_ROWS", 3)
    node = make(1, f"{PLAIN}; CREATE UNIQUE INDEX i ON t (v)")
    node.app.execute(FILL.format(9))
    node.publish()
    node.app.execute('DROP TABLE "__harmonylite__t_version"')
    node.replica.follow_schema()
    node.replica.recapture()
    node.sql("REPLACE INTO t VALUES (-1, 9)")
    finish(node)
    while (under_way := node.replica.unseen.stamping()) is not None:
        while (piece := under_way.find()) is not None:
            under_way.write(node.replica, piece)
    groups = node.publish()
    node.replica.unseen.log_vanished("t", node.vanished("t"))
    assert [*removed(groups, "t"), *removed(node.publish(), "t")] == [(9,)]


def test_parked_rows_and_tombstones_wait_for_its_end(make: MakeNode) -> None:
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.apply(wrote("t", (*IDV, "w"), ((1, "later", 5), stamp(2000, 2))))
    assert node.replica.parked() == 1
    node.sql("DELETE FROM t WHERE id = 7")
    node.publish()
    node.replica.prune_tombstones(EPOCH_MS)
    node.app.execute(WIDER)
    node.sql("INSERT INTO t VALUES (7, 'again', 0)")  # nobody sees it
    begun(node)
    assert node.replica.prune_tombstones(EPOCH_MS + 400 * DAY_MS) == 0
    assert node.replica.parked() == 1
    finish(node)
    assert node.replica.parked() == 0
    assert (1, "later", 5) in node.rows("t")
    again = node.version("t", 7)
    assert again is not None and again.ts > EPOCH_MS, "above its tombstone"


def test_i6_what_was_written_meanwhile_comes_before_parked_rows(make: MakeNode) -> None:
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.apply(wrote("t", (*IDV, "w"), ((1, "later", 5), stamp(2000, 2))))
    node.app.execute(WIDER)
    begun(node)
    node.sql("UPDATE t SET v = 'mine' WHERE id = 1")
    node.crash()
    node.sql("UPDATE t SET v = 'still mine' WHERE id = 1")
    finish(node)
    assert node.query("SELECT v FROM t WHERE id = 1") == [("still mine",)]
    assert node.replica.parked() == 0
    assert node.version("t", 1) == Version(node.clock.now_ms, 1)


def test_parked_rows_are_tried_again_although_the_lock_was_not_free_at_its_end(
    make: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.apply(wrote("t", (*IDV, "w"), ((1, "later", 5), stamp(2000, 2))))
    node.app.execute(WIDER)
    begun(node)
    node.writer.setbusytimeout(1)
    step = node.replica.recapturing.step

    def then_locked() -> bool:
        more = step()
        if not more:
            node.app.execute("BEGIN IMMEDIATE")
        return more

    with monkeypatch.context() as patch:
        patch.setattr(node.replica.recapturing, "step", then_locked)
        with pytest.raises(apsw.BusyError):
            finish(node)
    node.app.execute("COMMIT")
    assert node.replica.recapturing.under_way is not None, "for who calls it now and then"
    finish(node)
    assert node.replica.parked() == 0 and (1, "later", 5) in node.rows("t")
    assert node.replica.recapturing.under_way is None


def test_i3_rows_that_are_to_be_known_wait_for_its_end(make: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the version (0, 0), a row that nobody saw written would not be taken for one that is new."""
    monkeypatch.setattr(stamping, "AT_ONCE_ROWS", 3)
    node = make(1, f"{PLAIN}; CREATE UNIQUE INDEX i ON t (v)")
    node.app.execute(FILL.format(2))
    node.publish()
    node.app.execute('DROP TRIGGER "__harmonylite__t_insert"')
    node.app.execute(f"DELETE FROM t; {FILL.format(9)}")
    begun(node)
    more = True
    while more:
        more = node.replica.recapture()
        due = node.replica.recapturing.under_way
        if due is not None and not due.in_rows:
            continue  # versions that are made before that are gone through like others
        while (under_way := node.replica.unseen.stamping()) is not None:
            while (piece := under_way.find()) is not None:
                under_way.write(node.replica, piece)
    assert len(written(node.publish(), "t")) == 9
    assert not node.replica.unseen.has_stamping()


def test_a_log_that_waits_for_its_end_is_not_absorbed_at_once_at_a_start(
    make: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "ABSORB_ROWS", 3)
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.apply(wrote("t", (*IDV, "w"), ((1, "parked", 5), stamp(2000, 2))))
    node.app.execute(PLAIN_REBUILD)
    begun(node)
    for key in range(1, 8):
        node.sql("UPDATE t SET v = 'meanwhile' WHERE id = ?", (key,))
    node.crash()
    assert node.replica.logged() == 7
    finish(node)
    assert {row[1] for row, _ in written(node.publish(), "t")} == {"meanwhile"}


def test_a_node_that_does_not_publish_any_more_forgets_it(make: MakeNode) -> None:
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.app.execute(PLAIN_REBUILD)
    begun(node)
    node.restart(publish=False)
    assert not recapture.is_due(node.writer)
    node.apply(wrote("t", IDV, ((1, "newer"), stamp(2000, 2))))
    node.restart(publish=True)
    finish(node)
    assert len(written(node.publish(), "t")) == 7


def test_cleanup_does_not_wait(make: MakeNode) -> None:
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.app.execute(PLAIN_REBUILD)
    begun(node)
    node.stop()
    cleanup(node.path, everything=False, force=False)
    assert node.app.execute("SELECT count(*) FROM sqlite_schema WHERE type = 'trigger'").fetchall() == [(0,)]
    node.start()
    finish(node)
    assert len(written(node.publish(), "t")) == 7


def test_cleanup_all_is_refused_before_its_end(make: MakeNode) -> None:
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.app.execute(PLAIN_REBUILD)
    begun(node)
    node.stop()
    with pytest.raises(CleanupRefused, match="table t was rebuilt"):
        cleanup(node.path, everything=True, force=False)
    node.start()
    finish(node)
    assert len(written(node.publish(), "t")) == 7, "nothing of it was forgotten"
    node.stop()
    cleanup(node.path, everything=True, force=False)


def test_a_piece_that_failed_is_done_again(make: MakeNode) -> None:
    node = make(1, PLAIN)
    theirs(node, range(1, 8))
    node.app.execute(PLAIN_REBUILD)
    begun(node)
    node.writer.setbusytimeout(1)
    with node.transaction():
        node.app.execute("UPDATE t SET v = 'locked' WHERE id = 1")
        with pytest.raises(apsw.BusyError):
            node.replica.recapture()
    finish(node)
    assert len(written(node.publish(), "t")) == 7
