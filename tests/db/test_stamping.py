"""Rows older than the installation get their (0, 0) versions a few at a time, whatever happens meanwhile."""

from __future__ import annotations

import apsw
import pytest

from harmonylite.db import stamping, unversioned
from harmonylite.db.cleanup import cleanup
from harmonylite.db.copy import adopt_copy
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.model import RawText, Row, Version
from tests.db.conftest import MakeNode
from tests.db.harness import DAY_MS, EPOCH_MS, Node, ours, removed, stamp, written, wrote
from tests.db.snapshots import copy_of, forget_before, merge
from tests.db.test_install import REBUILD

SCHEMA = "CREATE TABLE t (id INTEGER PRIMARY KEY, v); CREATE UNIQUE INDEX i ON t (v)"
FILL = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < {0}) INSERT INTO t SELECT x, x FROM n"
TEN = f"{SCHEMA}; {FILL.format(10)}"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than three rows are many, and two are a piece."""
    monkeypatch.setattr(stamping, "AT_ONCE_ROWS", 3)
    for name in ("FIRST_ROWS", "LEAST_ROWS", "MOST_ROWS"):
        monkeypatch.setattr(stamping, name, 2)


def step(node: Node, pieces: int = 1_000_000) -> int:
    """Write so many pieces. Returns how many there were."""
    done = 0
    while done < pieces and (under_way := node.replica.unseen.stamping()) is not None:
        while done < pieces and (piece := under_way.find()) is not None:
            under_way.write(node.replica, piece)
            done += 1
    return done


def known(node: Node) -> list[int]:
    return [key for (key,) in node.query('SELECT k0 FROM "__harmonylite__t_version" WHERE deleted = 0 ORDER BY k0')]


def look(node: Node) -> int:
    """As the daemon looks at a large table. Returns how many rows were found."""
    assert node.replica.unseen.take_unlooked() == ["t"]
    return node.replica.unseen.log_vanished("t", node.vanished("t"))


def evicted(node: Node) -> list[Row]:
    """Keys of rows that are found missing, by the absorb or by a look, and published as deletes."""
    node.replica.unseen.log_vanished("t", node.vanished("t"))
    return removed(node.publish(), "t")


def test_many_rows_are_not_stamped_while_the_application_waits(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    assert known(node) == []
    assert step(node, 2) == 2
    assert known(node) == [1, 2, 3, 4]
    step(node)
    assert known(node) == [*range(1, 11)]
    assert node.version("t", 7) == Version(0, 0)
    assert node.publish() == [], "nothing is published for that"
    assert not node.replica.unseen.has_stamping()


def test_few_rows_are_stamped_at_once_but_only_few_of_all_tables_together(make: MakeNode, small: None) -> None:
    other = SCHEMA.replace("TABLE t", "TABLE u").replace("i ON t", "j ON u")
    node = make(1, f"{SCHEMA}; {other}; {FILL.format(3)}; INSERT INTO u SELECT * FROM t")
    assert known(node) == [1, 2, 3]
    assert node.version("u", 1) is None
    step(node)
    assert node.version("u", 1) == Version(0, 0)


def test_i4_a_row_evicted_before_its_turn_is_missed(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    step(node, 1)
    node.sql("REPLACE INTO t VALUES (11, 10)")
    node.sql("UPDATE t SET v = 'else' WHERE id = 11")  # nobody else sees a clash
    node.publish()
    assert look(node) == 0, "nobody can know"
    step(node)
    assert known(node) == [*range(1, 12)]
    assert look(node) == 1
    assert removed(node.publish(), "t") == [(10,)]
    assert node.replica.unseen.log_vanished("t", node.vanished("t")) == 0


@pytest.mark.parametrize("killed", [True, False], ids=["a kill", "another view"])
def test_i4_a_row_evicted_before_its_turn_and_before_the_view_was_lost_comes_back(
    make: MakeNode, small: None, killed: bool
) -> None:
    """Nobody here can know that it was there. The others have it: the node takes their next snapshot for that."""
    a, b = make(1, TEN), make(2, TEN)
    unversioned.set_joined(a.replica)
    step(a, 1)
    a.sql("REPLACE INTO t VALUES (11, 10)")
    a.sql("UPDATE t SET v = 'else' WHERE id = 11")  # nobody else sees a clash
    b.apply(*a.publish())
    if killed:
        a.crash()
    else:
        under_way = a.replica.unseen.stamping()
        assert under_way is not None
        under_way._renew_view(a.replica)
    step(a)
    a.absorb()
    assert not unversioned.is_joined(a.replica)
    assert a.rows("t") != b.rows("t")
    merge(a, copy_of(b))
    a.replica.unseen.log_vanished("t", a.vanished("t"))
    for here, there in ((a, b), (b, a)):
        there.apply(*here.publish())
    assert a.rows("t") == b.rows("t")
    assert (10, 10) in a.rows("t") and (11, "else") in a.rows("t")


def test_a_start_after_all_rows_were_known_takes_no_snapshot(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    unversioned.set_joined(node.replica)
    step(node)
    node.crash()
    step(node)
    assert unversioned.is_joined(node.replica)
    node.app.execute("CREATE TABLE u (id INTEGER PRIMARY KEY, v); CREATE UNIQUE INDEX j ON u (v)")
    node.absorb()
    step(node)
    assert unversioned.is_joined(node.replica)


def test_a_row_evicted_between_the_installation_and_the_first_piece_is_missed(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    node.sql("REPLACE INTO t VALUES (11, 1)")
    step(node)
    assert evicted(node) == [(1,)]


@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed before", "absorbed afterwards"])
def test_a_delete_meanwhile_stays_a_delete(make: MakeNode, small: None, absorbed: bool) -> None:
    node = make(1, TEN)
    step(node, 1)
    node.sql("DELETE FROM t WHERE id = 9")
    deleted_at = node.clock.now_ms
    if absorbed:
        node.absorb()
    node.clock.tick(DAY_MS)
    step(node)
    assert look(node) == 0, "its delete was seen"
    node.absorb()
    assert node.tombstones("t") == [(9,)]
    assert node.version("t", 9) == Version(deleted_at, 1)
    [group] = node.publish()
    assert removed([group], "t") == [(9,)]
    assert group.tables[0].deleted_stamps[0][3:] == (0, 0), "of a row that nobody had written"


def test_a_delete_that_arrives_meanwhile_is_not_found_as_an_eviction(make: MakeNode, small: None) -> None:
    a, b = make(1, TEN), make(2, TEN)
    b.sql("DELETE FROM t WHERE id = 9")
    b.sql("UPDATE t SET v = 'b' WHERE id = 10")
    a.apply(*b.publish())
    version = a.version("t", 9)
    step(a)
    assert look(a) == 0
    assert a.version("t", 9) == version
    assert a.tombstones("t") == [(9,)]


@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed before", "absorbed afterwards"])
def test_a_row_that_gets_another_key_meanwhile(make: MakeNode, small: None, absorbed: bool) -> None:
    node = make(1, TEN)
    step(node, 1)
    node.sql("UPDATE t SET id = 99 WHERE id = 9")
    if absorbed:
        node.absorb()
    step(node)
    assert node.replica.unseen.log_vanished("t", node.vanished("t")) == 0
    node.absorb()
    assert node.tombstones("t") == [(9,)]
    groups = node.publish()
    assert [row for row, _ in written(groups, "t")] == [(99, 9)]
    assert removed(groups, "t") == [(9,)]


def test_rows_written_meanwhile_keep_their_versions(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    step(node, 1)
    node.sql("UPDATE t SET v = 'x' WHERE id = 9")
    node.sql("INSERT INTO t VALUES (12, 'y')")
    updated = node.clock.now_ms - 10
    node.absorb()
    step(node)
    assert node.version("t", 9) == Version(updated, 1)
    assert [row[0] for row, _ in written(node.publish(), "t")] == [9, 12]


def test_a_table_with_some_versions_is_left_to_the_look(make: MakeNode, small: None) -> None:
    """One version too many and one too few are no difference of two counts."""
    node = make(1, SCHEMA)
    node.stop()
    node.app.execute("DROP INDEX i")
    node.app.execute(FILL.format(4))
    node.start()
    node.publish()
    node.sql("DELETE FROM __harmonylite__t_version WHERE k0 = 4")
    node.sql("CREATE UNIQUE INDEX i ON t (v)")
    node.publish()
    assert node.replica.unseen.has_stamping()
    node.replica.unseen.take_unlooked()
    node.sql("REPLACE INTO t VALUES (1, 2)")  # versions of 1, 2, 3; rows 1, 3, 4
    assert removed(node.publish(), "t") == []
    assert look(node) == 1
    assert removed(node.publish(), "t") == [(2,)]


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_killed_in_between_it_begins_again(make: MakeNode, small: None, pieces: int) -> None:
    node = make(1, TEN)
    step(node, pieces)
    node.crash()
    assert node.meta("stamped") is None
    node.sql("REPLACE INTO t VALUES (11, 10)")
    node.publish()
    step(node)
    assert known(node) == [*range(1, 12)]
    assert look(node) == 1
    assert removed(node.publish(), "t") == [(10,)]
    node.crash()
    assert not node.replica.unseen.has_stamping(), "it is noted that this is done"


def test_what_an_older_version_stamped_is_only_noted(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    step(node)
    node.stop()
    node.app.execute("DELETE FROM __harmonylite__meta WHERE name = 'stamped'")
    node.start()
    assert step(node) == 1, "one transaction, that has nothing to insert"
    assert node.meta("stamped") == '["t"]'


def test_another_schema_in_between_loses_no_eviction(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    step(node, 1)
    node.sql("REPLACE INTO t VALUES (11, 10)")
    node.sql("ALTER TABLE t ADD COLUMN w")
    node.sql("UPDATE t SET v = 'else', w = 1 WHERE id = 11")
    node.sql("ALTER TABLE t RENAME COLUMN id TO key")
    node.publish()
    step(node)
    assert look(node) == 1
    assert removed(node.publish(), "t") == [(10,)]


def test_another_table_in_its_place_is_not_stamped_with_the_old_ones_keys(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    step(node, 1)
    under_way = node.replica.unseen.stamping()
    assert under_way is not None
    piece = under_way.find()
    assert piece is not None
    node.app.execute(REBUILD.format("id INTEGER PRIMARY KEY, v"))
    node.app.execute("CREATE UNIQUE INDEX i ON t (v); DELETE FROM t WHERE id > 2")
    under_way.write(node.replica, piece)
    step(node)
    assert known(node) == [1, 2]
    assert node.meta("stamped") == '["t"]'
    assert node.vanished("t") == []


def test_a_renamed_table_is_stamped_under_its_new_name(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    step(node, 1)
    node.sql("ALTER TABLE t RENAME TO u")
    node.publish()
    step(node)
    assert node.version("u", 10) == Version(0, 0)
    assert node.meta("stamped") == '["u"]'
    node.sql(SCHEMA.replace("i ON", "j ON"))
    node.sql("ALTER TABLE u RENAME TO gone")
    node.sql("ALTER TABLE t RENAME TO u")
    node.absorb()
    assert node.meta("stamped") == '["u"]', "the new one"
    step(node)
    assert node.meta("stamped") == '["gone", "u"]'


def test_an_index_that_comes_again_finds_what_was_not_known_meanwhile(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    step(node)
    node.sql("DROP INDEX i")
    node.apply(wrote("t", ("id", "v"), ((20, "seed"), stamp(0, 0))))
    assert node.version("t", 20) is None
    assert node.meta("stamped") == "[]"
    node.sql("CREATE UNIQUE INDEX i ON t (v)")
    node.publish()
    step(node)
    assert node.version("t", 20) == Version(0, 0)


def test_a_dropped_table_ends_it(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    step(node, 1)
    node.sql("DROP TABLE t")
    node.absorb()
    assert step(node) == 0
    assert not node.replica.unseen.has_stamping()


def test_a_node_that_does_not_publish_stamps_nothing(make: MakeNode, small: None) -> None:
    node = make(1, TEN, publish=False)
    assert step(node) == 0
    assert known(node) == []
    node.restart(publish=True)
    assert known(node) == [*range(1, 11)], "nobody knows what happened to them"
    assert node.meta("stamped") == '["t"]'


def test_an_installation_that_was_undone_leaves_no_view_behind(make: MakeNode, small: None) -> None:
    """What is deleted before capture stands was not evicted."""
    node = make(1, TEN)
    node.stop()
    cleanup(node.path, everything=True, force=True)

    def fail(_: object, sql: str, __: object) -> bool:
        if sql == "COMMIT":
            raise OSError("no space")
        return True

    def hook(connection: apsw.Connection) -> None:
        connection.setexectrace(fail)

    apsw.connection_hooks.append(hook)
    replica = Replica(node.path, ReplicaSettings(1))
    try:
        with pytest.raises(OSError, match="no space"):
            replica.open()
    finally:
        apsw.connection_hooks.remove(hook)
    assert ours(node) == []
    assert replica.unseen.stamping() is None
    node.sql("DELETE FROM t WHERE id = 10")
    replica.open()
    node.replica = replica
    step(node)
    assert known(node) == [*range(1, 10)]
    assert node.vanished("t") == []


def test_what_is_under_way_is_not_done_at_once_by_another_installation(make: MakeNode, small: None) -> None:
    """The rows that are there then are not all that were."""
    other = SCHEMA.replace("TABLE t", "TABLE a").replace("i ON t", "j ON a")
    node = make(1, f"{SCHEMA}; {other}; {FILL.format(3)}; INSERT INTO a SELECT * FROM t")
    assert node.meta("stamped") == '["a"]'
    node.sql("REPLACE INTO t VALUES (4, 1)")
    node.sql("UPDATE t SET v = 'else' WHERE id = 4")
    node.sql("CREATE TABLE new (id INTEGER PRIMARY KEY)")
    node.publish()
    assert node.meta("stamped") == '["a"]'
    step(node)
    assert evicted(node) == [(1,)]


def test_tables_that_exchange_names_are_not_taken_for_each_other(make: MakeNode, small: None) -> None:
    other = SCHEMA.replace("TABLE t", "TABLE a").replace("i ON t", "j ON a")
    node = make(1, f"{other}; INSERT INTO a VALUES (1, 1); {TEN}")
    assert node.meta("stamped") == '["a"]'
    node.sql("ALTER TABLE a RENAME TO x")
    node.sql("ALTER TABLE t RENAME TO a")
    node.absorb()
    step(node)
    assert node.meta("stamped") == '["a", "x"]'
    assert node.version("a", 10) == Version(0, 0)


def test_keys_of_a_renamed_table_are_not_stamped_in_the_one_that_has_its_name_now(make: MakeNode, small: None) -> None:
    other = SCHEMA.replace("TABLE t", "TABLE a").replace("i ON t", "j ON a")
    node = make(1, f"{other}; INSERT INTO a VALUES (1, 1); {TEN}")
    step(node, 1)
    node.sql("ALTER TABLE t RENAME TO x")
    node.sql("ALTER TABLE a RENAME TO t")
    node.absorb()
    step(node)
    assert known(node) == [1]
    assert node.version("x", 10) == Version(0, 0)


def test_a_write_that_fails_is_done_again(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    under_way = node.replica.unseen.stamping()
    assert under_way is not None
    node.writer.setbusytimeout(10)
    while (piece := under_way.find()) is not None:
        with node.transaction(), pytest.raises(apsw.BusyError):
            under_way.write(node.replica, piece)
        assert under_way.find() is piece
        under_way.write(node.replica, piece)
    assert known(node) == [*range(1, 11)]
    assert node.meta("stamped") == '["t"]'


def test_rows_that_a_merge_deleted_were_not_evicted(make: MakeNode, small: None) -> None:
    """They have neither row nor version then; the cluster has forgotten that it deleted them."""
    taker, node = make(1, f"{SCHEMA}; {FILL.format(8)}"), make(2, TEN)
    forget_before(taker, EPOCH_MS + 1)
    node.replica.completeness.note_synced(EPOCH_MS)
    step(node, 1)
    assert merge(node, copy_of(taker)).deleted == 2
    assert node.rows("t") == [(number, number) for number in range(1, 9)]
    step(node)
    assert known(node) == [*range(1, 9)]
    assert node.vanished("t") == []


def test_a_copy_made_meanwhile_knows_that_it_is_not_complete(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    step(node, 1)
    path, _ = copy_of(node)
    assert unversioned.exist(path, node.replica.schema)
    adopt_copy(path, 2)
    other = Node(path, 2).start()
    try:
        other.sql("REPLACE INTO t VALUES (11, 10)")
        other.publish()
        step(other)
        assert look(other) == 1
    finally:
        other.replica.close()
        other.app.close()
    step(node)
    assert unversioned.exist(node.path, node.replica.schema)


KEYS = {
    "text": ("id TEXT PRIMARY KEY", ["'b'", "'a'", "'A'", "CAST(x'ff61' AS TEXT)", "''", "'ü'", "NULL", "NULL"]),
    "nocase": ("id TEXT COLLATE NOCASE PRIMARY KEY", ["'b'", "'A'", "'c '", "'C'"]),
    "blob": ("id BLOB PRIMARY KEY", ["x'00'", "1", "1.5", "'1'", "x''"]),
    "real": ("id REAL PRIMARY KEY", ["1", "-0.5", "9e999", "2.5"]),
    "descending": ("id INT, other TEXT, PRIMARY KEY (id DESC, other)", ["1, 'a'", "1, 'b'", "2, 'a'", "NULL, 'c'"]),
    "without rowid": ("id INT, other TEXT, PRIMARY KEY (other, id DESC)", ["1, 'a'", "1, 'b'", "2, 'a'", "3, 'c'"]),
}


@pytest.mark.parametrize("kind", KEYS)
def test_every_kind_of_key(make: MakeNode, small: None, kind: str) -> None:
    columns, values = KEYS[kind]
    head, _, primary = columns.partition(", PRIMARY")
    definition = f"{head}, v" + (f", PRIMARY{primary}" if primary else "")
    without = " WITHOUT ROWID" if kind == "without rowid" else ""
    rows = "; ".join(f"INSERT INTO t VALUES ({value}, {number})" for number, value in enumerate(values))
    node = make(1, f"CREATE TABLE t ({definition}){without}; CREATE UNIQUE INDEX i ON t (v); {rows}")
    under_way = node.replica.unseen.stamping()
    assert under_way is not None
    plans: list[str] = []

    def explain(cursor: apsw.Cursor, sql: str, bindings: object) -> bool:
        if "AS r " in sql:
            plans.extend(row[3] for row in node.query(f"EXPLAIN QUERY PLAN {sql}"))
        return True

    under_way._connection.setexectrace(explain)
    step(node)
    assert any("SCAN" in line or "SEARCH" in line for line in plans)
    assert not any("TEMP B-TREE" in line for line in plans), "millions of keys would be sorted in memory"
    keyed = sum("NULL" not in value for value in values)
    assert node.query('SELECT count(*) FROM "__harmonylite__t_version"') == [(keyed,)]
    assert node.vanished("t") == []
    node.sql("UPDATE OR REPLACE t SET v = 1 WHERE v = 0")
    assert len(evicted(node)) == 1


def test_stopped_it_ends_soon(make: MakeNode, small: None) -> None:
    node = make(1, f"{SCHEMA}; {FILL.format(200_000)}")
    step(node, 1)
    node.replica.close()
    node.app.execute('INSERT INTO "__harmonylite__t_version" (k0, ts, node) SELECT id, 0, 0 FROM t WHERE id > 2')
    node.start()
    under_way = node.replica.unseen.stamping()
    assert under_way is not None
    node.replica.unseen.stop_stamping()
    with pytest.raises(apsw.InterruptError):
        under_way.find()


@pytest.mark.slow
@pytest.mark.parametrize(("aim_s", "rows"), [(10.0, stamping.MOST_ROWS), (0.0, stamping.LEAST_ROWS)])
def test_300_000_rows_in_short_transactions(
    make: MakeNode, monkeypatch: pytest.MonkeyPatch, aim_s: float, rows: int
) -> None:
    """As many at a time as take `AIM_S`: on a quick machine, and on one that is slower than any."""
    monkeypatch.setattr(stamping, "AIM_S", aim_s)
    count = 300_000 if aim_s else 20_000
    node = make(1, f"{SCHEMA}; {FILL.format(count)}")
    installed = node.replica.take_lock_seconds()
    assert known(node) == []
    under_way = node.replica.unseen.stamping()
    assert under_way is not None
    sizes, held = [], []
    while (piece := under_way.find()) is not None:
        under_way.write(node.replica, piece)
        sizes.append(len(piece.keys))
        held.append(node.replica.take_lock_seconds())
        if len(sizes) == 20:
            node.sql("REPLACE INTO t VALUES (-1, ?)", (count,))
            node.publish()
    print(f"installed in {installed:.4f} s, then {len(held)} times up to {max(held):.4f} s")
    assert sizes[0] == stamping.FIRST_ROWS
    assert set(sizes[10:-1]) == {rows}
    assert sum(sizes) == count
    assert look(node) == 1
    assert removed(node.publish(), "t") == [(count,)]


def test_a_raw_text_key_is_kept_to_the_byte(make: MakeNode, small: None) -> None:
    values = ", ".join(f"(CAST(x'ff{number:02x}' AS TEXT), {number})" for number in range(5))
    node = make(1, f"{SCHEMA.replace('INTEGER', 'TEXT')}; INSERT INTO t VALUES {values}")
    step(node)
    node.sql("REPLACE INTO t VALUES ('x', 4)")
    assert evicted(node) == [(RawText(b"\xff\x04"),)]


def test_the_write_ahead_log_does_not_grow_without_end(
    make: MakeNode, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamping, "MOST_WAL_BYTES", 1 << 20)
    monkeypatch.setattr(stamping, "WAL_PIECES", 1)
    node = make(1, f"{SCHEMA}; {FILL.format(400)}; CREATE TABLE blob (id INTEGER PRIMARY KEY, v)")
    size = 0
    while step(node, 1):
        node.sql("REPLACE INTO blob VALUES (1, randomblob(100000))")
        size = max(size, node.path.with_name(f"{node.path.name}-wal").stat().st_size)
    assert known(node) == [*range(1, 401)]
    assert 1 << 20 < size < 4 << 20, "20 MB were written"
    assert node.vanished("t") == []


def test_a_full_disk_is_not_kept_full(make: MakeNode, small: None) -> None:
    node = make(1, f"{SCHEMA}; {FILL.format(3_000)}")
    under_way = node.replica.unseen.stamping()
    assert under_way is not None
    [(pages,)] = node.query("PRAGMA page_count")
    node.writer.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(apsw.FullError):
        while (piece := under_way.find()) is not None:
            under_way.write(node.replica, piece)
    [(_, frames, copied)] = node.query("PRAGMA wal_checkpoint(PASSIVE)")
    assert frames == copied > 0, "nothing of it is needed any more"
    node.writer.execute("PRAGMA max_page_count = 1000000")
    step(node)
    assert node.meta("stamped") == '["t"]'


def test_what_cannot_be_read_is_given_up(make: MakeNode, small: None) -> None:
    node = make(1, TEN)
    under_way = node.replica.unseen.stamping()
    assert under_way is not None

    def fail(*_: object) -> bool:
        raise apsw.CorruptError("database disk image is malformed")

    under_way._connection.setexectrace(fail)
    with pytest.raises(apsw.CorruptError):
        under_way.find()
    assert node.replica.unseen.stamping() is None
    assert not node.replica.unseen.has_stamping(), "and the view let go"
    node.restart()
    step(node)
    assert known(node) == [*range(1, 11)]


def test_another_view_is_taken_also_if_the_log_cannot_be_copied(
    make: MakeNode, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamping, "WAL_PIECES", 1)
    monkeypatch.setattr(stamping, "MOST_WAL_BYTES", 0)
    node = make(1, TEN)
    copied: list[str] = []

    def full(_: object, sql: str, __: object) -> bool:
        if "wal_checkpoint" in sql:
            copied.append(sql)
            raise apsw.FullError("database or disk is full")
        return True

    under_way = node.replica.unseen.stamping()
    assert under_way is not None
    node.writer.setexectrace(full)
    assert step(node, 2) == 2
    under_way._renew_view(node.replica)
    assert len(copied) == 3
    assert not under_way._connection.getautocommit(), "it has a view all the same"
    step(node)
    assert known(node) == [*range(1, 11)]


@pytest.mark.parametrize("sql", ["VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"])
def test_the_application_tidies_up_meanwhile(make: MakeNode, small: None, sql: str) -> None:
    fill = FILL.format(10).replace("SELECT x, x", "SELECT 'k' || x, x")
    node = make(1, f"{SCHEMA.replace('INTEGER', 'TEXT')}; {fill}")
    step(node, 1)
    node.sql("REPLACE INTO t VALUES ('n', 10)")
    node.sql("UPDATE t SET v = 'else' WHERE id = 'n'")
    node.sql("DELETE FROM t WHERE id = 'k5'")
    node.app.execute(sql)
    node.publish()
    step(node)
    assert evicted(node) == [("k10",)]
