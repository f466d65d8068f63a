"""Copies: consistent while the application writes, complete, and what becomes of them elsewhere."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import apsw
import pytest

from harmonylite.db import copy as copy_module
from harmonylite.db import sql, tables
from harmonylite.db.copy import CopyCancelledError, DamagedCopyError, adopt_copy, check_copy, clean_copy, start_copy
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.model import Position
from tests.db.conftest import MakeNode
from tests.db.harness import CREATED, EPOCH_MS, STREAM, Node, ours, stamp, written, wrote
from tests.db.snapshots import copy_of

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"


def query(path: Path, sql: str) -> list[tuple[object, ...]]:
    connection = apsw.Connection(str(path))
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def test_a_copy_keeps_versions_pending_marks_parked_rows_and_positions(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'sent'), (2, 'sent')")
    node.apply(*node.publish())
    node.sql("DELETE FROM t WHERE id = 2")
    node.sql("INSERT INTO t VALUES (3, 'waits')")
    node.apply(wrote("missing", ("id", "v"), ((1, "x"), stamp(EPOCH_MS, 2))))
    path, info = copy_of(node)
    assert info.positions == (Position(STREAM, CREATED, 2, 1),)
    assert (info.pending, info.parked, info.size) == (2, 1, path.stat().st_size)
    assert info.fingerprint == node.replica.schema.fingerprint()
    versions = 'SELECT * FROM "__harmonylite__t_version" ORDER BY k0'
    assert query(path, versions) == node.query(versions)
    assert query(path, f"SELECT tbl, ts FROM {tables.PARKED}") == [("missing", EPOCH_MS)]
    assert query(path, "SELECT * FROM t") == [(1, "sent"), (3, "waits")]
    assert query(path, 'SELECT * FROM "__harmonylite__t_change_log"') == []


def test_a_copy_is_one_moment_although_the_application_writes_on(make: MakeNode) -> None:
    """The application moves money between two rows, and a third says how often; the copy never shows a half."""
    node = make(
        1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v INTEGER); CREATE TABLE ballast (id INTEGER PRIMARY KEY, b)"
    )
    node.sql("INSERT INTO t VALUES (1, 1000), (2, 0), (3, 0)")
    with node.transaction():
        for number in range(2_000):
            node.app.execute("INSERT INTO ballast VALUES (?, zeroblob(2000))", (number,))
    stop = threading.Event()
    moved = 0

    def move() -> None:
        nonlocal moved
        application = node.connect()
        while not stop.wait(0.0005):  # SQLite's lock is not fair: without a pause nobody else ever gets it
            application.execute(
                "BEGIN IMMEDIATE; UPDATE t SET v = v - 1 WHERE id = 1; UPDATE t SET v = v + 1 WHERE id > 1;"
                " UPDATE ballast SET b = zeroblob(1999) WHERE id = abs(random()) % 2000; COMMIT"
            )
            moved += 1
        application.close()

    application = threading.Thread(target=move)
    application.start()
    try:
        for number in range(5):
            path, _ = copy_of(node, f"copy-{number}.db")
            assert query(path, "SELECT count(DISTINCT v) = 1 FROM t WHERE id > 1") == [(1,)]
            assert query(path, "SELECT sum(v) FROM t WHERE id < 3") == [(1000,)]
            assert query(path, 'SELECT count(*) FROM "__harmonylite__t_change_log"') == [(0,)]
            # No row is newer than its version: the copy holds one for what it shows.
            assert query(path, "PRAGMA integrity_check") == [("ok",)]
    finally:
        stop.set()
        application.join()
    assert moved > 5


def test_what_is_not_absorbed_is_not_in_a_copy_without_its_version(make: MakeNode) -> None:
    """A commit between the absorb and the copy's view: the copy is tried again, with that row's version."""
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'a')")
    late = iter(["INSERT INTO t VALUES (2, 'late')"])

    def slip_in(_: object, sql: str, __: object) -> bool:
        if sql == "BEGIN IMMEDIATE" and node.replica._state.batch == 1:
            for statement in late:
                node.sql(statement)
        return True

    node.writer.setexectrace(slip_in)
    path, _ = copy_of(node)
    node.writer.setexectrace(None)
    assert query(path, "SELECT id FROM t") == [(1,), (2,)]
    assert query(path, 'SELECT k0 FROM "__harmonylite__t_version"') == [(1,), (2,)]


def test_a_copy_holds_no_write_lock_and_can_be_given_up(make: MakeNode) -> None:
    node = make(1, PLAIN)
    with node.transaction():
        for number in range(3_000):
            node.app.execute("INSERT INTO t VALUES (?, zeroblob(2000))", (number,))
    target = node.path.with_name("copy.db")
    copy = start_copy(node.replica, target)
    assert copy is not None
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        node.sql("UPDATE t SET v = ? WHERE id = 1", (len(seen),))

    with pytest.raises(CopyCancelledError):
        copy.run(progress, lambda: len(seen) == 3)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] < seen[-1][1]
    assert [path.name for path in target.parent.glob("copy.db*")] == []


def test_of_a_copy_that_fails_nothing_is_left(make: MakeNode, tmp_path: Path) -> None:
    node = make(1, PLAIN)
    folder = tmp_path / "nowhere"
    copy = start_copy(node.replica, folder / "copy.db")
    assert copy is not None
    with pytest.raises(apsw.CantOpenError):
        copy.run()
    folder.mkdir()
    path = folder / "copy.db"
    path.write_text("left behind by a crash")
    path.with_name("copy.db-journal").write_text("left behind, too")
    copy = start_copy(node.replica, path)
    assert copy is not None
    copy.run()
    assert [each.name for each in folder.iterdir()] == ["copy.db"]
    assert stat.S_ISREG(path.stat().st_mode)


def test_a_clean_copy_is_the_applications_alone(make: MakeNode) -> None:
    script = """
        CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT UNIQUE, v);
        CREATE INDEX by_v ON t (v);
        CREATE VIEW names AS SELECT name FROM t;
        CREATE VIRTUAL TABLE found USING fts5(name, content='t', content_rowid='id');
        CREATE TRIGGER index_insert AFTER INSERT ON t BEGIN
            INSERT INTO found (rowid, name) VALUES (NEW.id, NEW.name); END;
        CREATE TABLE heap (name TEXT PRIMARY KEY, v);
    """
    node = make(1, script)
    definitions = (
        "SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE name NOT LIKE '%harmonylite%' ORDER BY name"
    )
    node.sql("INSERT INTO t VALUES (1, 'ann', 7), (2, 'bob', 8)")
    node.sql("INSERT INTO heap VALUES ('x', 1)")
    node.sql("DELETE FROM t WHERE id = 2")
    path, _ = copy_of(node)
    clean_copy(path)
    assert query(path, "SELECT name FROM sqlite_schema WHERE name LIKE '%harmonylite%'") == []
    assert query(path, definitions) == node.query(definitions)
    assert query(path, "SELECT * FROM t") == [(1, "ann", 7)]
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    assert query(path, "PRAGMA journal_mode") == [("delete",)]
    query(path, "INSERT INTO t VALUES (3, 'cid', 9)")
    assert query(path, "SELECT rowid FROM found WHERE found MATCH 'cid'") == [(3,)]
    assert sorted(each.name for each in path.parent.glob("snapshot.db*")) == ["snapshot.db"]


def test_a_new_node_adopts_a_copy_with_what_waits_in_it(make: MakeNode) -> None:
    a = make(1, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'sent')")
    a.apply(*a.publish())
    a.sql("INSERT INTO t VALUES (2, 'waits')")
    path, _ = copy_of(a)
    adopt_copy(path, 9)
    node = Node(path, 9).start()
    assert node.meta("floor_ms") == 0, "what another node has seen on its clock says nothing of this one's"
    try:
        assert (node.meta("node_id"), node.meta("instance_id") == a.meta("instance_id")) == (9, False)
        assert node.replica.position(STREAM) == Position(STREAM, CREATED, 1, 1)
        assert node.version("t", 2) == a.version("t", 2)
        groups = node.publish()
        assert [(row, each.node) for row, each in written(groups, "t")] == [((2, "waits"), 1)]
        node.sql("UPDATE t SET v = 'mine' WHERE id = 1")
        ((row, each),) = written(node.publish(), "t")
        assert (row, each.node) == ((1, "mine"), 9)
        assert ours(node) == ours(a)
    finally:
        node.stop()
        node.app.close()


def test_an_adopted_version_that_the_stream_never_bounded_is_bounded(make: MakeNode) -> None:
    """A node whose clock is fast, and that knows no server's time: what it publishes later must still win."""
    a = make(1, PLAIN)
    a.sql("INSERT INTO t VALUES (1, 'sent')")
    a.apply(*a.publish())
    a.clock.tick(500_000)
    a.sql("INSERT INTO t VALUES (2, 'waits')")
    sent = a.version("t", 1)
    path, _ = copy_of(a)
    adopt_copy(path, 9, latest_ms=EPOCH_MS + 60_000)
    assert query(path, 'SELECT k0, ts FROM "__harmonylite__t_version"') == [
        (1, sent.ts if sent else None),
        (2, EPOCH_MS + 60_000),
    ]


def test_a_damaged_copy_is_refused(make: MakeNode, tmp_path: Path) -> None:
    node = make(1, PLAIN)
    with node.transaction():
        for number in range(500):
            node.app.execute("INSERT INTO t VALUES (?, ?)", (number, "x" * 100))
    path, _ = copy_of(node)
    torn = tmp_path / "torn.db"
    content = path.read_bytes()
    torn.write_bytes(content[: len(content) // 2 // 4096 * 4096])
    with pytest.raises(DamagedCopyError):
        clean_copy(torn)
    text = tmp_path / "text.db"
    text.write_text("this is no database at all, but long enough to be looked at" * 20)
    for refuse in (clean_copy, lambda each: adopt_copy(each, 3)):
        with pytest.raises(DamagedCopyError):
            refuse(text)
    plain = tmp_path / "plain.db"
    query(plain, "CREATE TABLE t (id INTEGER PRIMARY KEY)")
    with pytest.raises(DamagedCopyError, match="not a copy"):
        adopt_copy(plain, 3)


def test_a_check_reads_all_tells_how_far_it_is_and_can_be_given_up(
    make: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_module, "CHECK_LOOK_S", 0.001)
    monkeypatch.setattr(sql, "STOP_STEPS", 10_000)
    node = make(1, PLAIN)
    with node.transaction():
        node.app.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000)"
            " INSERT INTO t SELECT i, hex(randomblob(200)) FROM n"
        )
    path, info = copy_of(node)
    seen: list[tuple[int, int]] = []
    check_copy(path, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen), "it goes on"
    assert {total for _, total in seen} == {info.size}
    assert 0 < seen[-1][0] <= info.size
    before = path.read_bytes()
    for first in (True, False):
        asked: list[bool] = []

        def cancelled(first: bool = first, asked: list[bool] = asked) -> bool:
            asked.append(first or bool(asked))
            return asked[-1]

        with pytest.raises(CopyCancelledError):
            check_copy(path, cancelled=cancelled)
    middle = len(before) // 2 // 4096 * 4096
    path.write_bytes(before[:middle] + b"\xff" * 4096 + before[middle + 4096 :])
    with pytest.raises(DamagedCopyError):
        check_copy(path)


def test_a_copy_says_since_when_it_has_all_tombstones(make: MakeNode) -> None:
    node = make(1, PLAIN)
    assert copy_of(node)[1].tombstones_since_ms == 0
    day = 86_400_000
    node.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    node.sql("DELETE FROM t WHERE id = 1")
    node.apply(*node.publish())
    node.replica.completeness.note_synced(EPOCH_MS + 5)
    assert node.replica.prune_tombstones(EPOCH_MS) == 0
    assert copy_of(node)[1].tombstones_since_ms == 0, "nothing was forgotten yet"
    assert node.replica.prune_tombstones(EPOCH_MS + 91 * day) == 1
    info = copy_of(node)[1]
    assert info.tombstones_since_ms == EPOCH_MS + day
    assert info.synced_at_ms == EPOCH_MS + 5
    assert node.replica.prune_tombstones(EPOCH_MS + 92 * day) == 0
    assert copy_of(node)[1].tombstones_since_ms == EPOCH_MS + day


def test_a_collation_of_the_application_does_not_hinder(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.app.createcollation("backwards", lambda a, b: (a < b) - (a > b))
    node.sql("CREATE TABLE c (id INTEGER PRIMARY KEY, v TEXT COLLATE backwards)")
    node.sql("CREATE INDEX by_v ON c (v)")
    node.writer.createcollation("backwards", lambda a, b: (a < b) - (a > b))
    node.sql("INSERT INTO c VALUES (1, 'x'), (2, 'y')")
    path, _ = copy_of(node)
    clean_copy(path)
    assert query(path, "SELECT id FROM c ORDER BY id") == [(1,), (2,)]


def test_settings_of_a_publishing_node_do_not_matter_to_a_listener(make: MakeNode) -> None:
    node = make(1, PLAIN, publish=False)
    node.apply(wrote("t", ("id", "v"), ((1, "x"), stamp(EPOCH_MS, 2))))
    path, info = copy_of(node)
    assert info.pending == 0
    adopt_copy(path, 5)
    replica = Replica(path, ReplicaSettings(node_id=5, publish=False))
    replica.open()
    assert replica.pending() == 0
    replica.close()
