"""I1: what the application does to its schema works beside our triggers, whether the daemon runs or not."""

from __future__ import annotations

import pytest

from tests.db.conftest import MakeNode
from tests.db.harness import exchange, removed, written

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"

DDL = {
    "drop column": ("ALTER TABLE t DROP COLUMN w", ["id", "v", "u"]),
    "add column": ("ALTER TABLE t ADD COLUMN x DEFAULT 5", ["id", "v", "w", "u", "x"]),
    "rename column": ("ALTER TABLE t RENAME COLUMN w TO wide", ["id", "v", "wide", "u"]),
    "rename unique column": ("ALTER TABLE t RENAME COLUMN u TO uniq", ["id", "v", "w", "uniq"]),
    "rename key": ("ALTER TABLE t RENAME COLUMN id TO key", ["key", "v", "w", "u"]),
    "drop index": ("DROP INDEX i", ["id", "v", "w", "u"]),
    "vacuum": ("VACUUM", ["id", "v", "w", "u"]),
}


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.parametrize("what", DDL)
def test_i1_the_application_changes_its_schema(make: MakeNode, what: str, running: bool) -> None:
    statement, columns = DDL[what]
    script = "CREATE TABLE t (id INTEGER PRIMARY KEY, v, w, u UNIQUE); CREATE UNIQUE INDEX i ON t (v)"
    a, b = make(1, script), make(2, script)
    a.sql("INSERT INTO t (id, v, u) VALUES (1, 'x', 'u1'), (2, 'y', 'u2')")
    exchange(a, b)
    versions = [a.version("t", 1), a.version("t", 2)]
    a.sql("UPDATE t SET v = 'z' WHERE id = 1")
    if not running:
        a.replica.close()
    a.sql(statement)
    a.sql("UPDATE t SET v = 'zz' WHERE v = 'z'")
    if not running:
        a.start()
    b.sql(statement)
    groups = a.publish()
    [(row, stamp)] = written(groups, "t")
    assert row[1] == "zz"
    assert [name for (name,) in a.query("SELECT name FROM pragma_table_info('t')")] == columns
    assert (stamp.base_ts, stamp.base_node) == versions[0][:2]  # type: ignore[index]
    assert a.version("t", 2) == versions[1], "a row that nobody touched keeps its version"
    b.apply(*groups)
    assert b.rows("t") == a.rows("t")


UNIQUE_INDEXES = {
    "plain": "(email)",
    "two columns": "(v, email)",
    "partial": "(v) WHERE email IS NOT NULL",
    "expression": "(lower(email))",
}


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.parametrize("index", UNIQUE_INDEXES)
def test_i1_drop_index_and_its_column_in_one_migration(make: MakeNode, index: str, running: bool) -> None:
    script = f"CREATE TABLE t (id INTEGER PRIMARY KEY, v, email); CREATE UNIQUE INDEX i ON t {UNIQUE_INDEXES[index]}"
    node = make(1, script)
    node.sql("INSERT INTO t VALUES (1, 'x', 'a'), (2, 'y', 'b')")
    node.publish()
    node.sql("INSERT OR REPLACE INTO t VALUES (3, 'x', 'a')")
    if not running:
        node.stop()
    node.app.execute("BEGIN; DROP INDEX i; ALTER TABLE t DROP COLUMN email; COMMIT")
    node.sql("INSERT INTO t VALUES (4, 'z')")
    if not running:
        node.start()
    groups = node.publish()
    assert [row for row, _ in written(groups, "t")] == [(3, "x"), (4, "z")]


def test_i1_writes_and_ddl_work_while_the_daemon_is_stopped(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.publish()
    node.stop()
    node.sql("INSERT INTO t VALUES (2, 'y')")
    node.sql("CREATE TABLE u (id INTEGER PRIMARY KEY)")
    node.sql("DELETE FROM t WHERE id = 1")
    node.start()
    groups = node.publish()
    assert [row for row, _ in written(groups, "t")] == [(2, "y")]
    assert removed(groups, "t") == [(1,)]
