"""What docs/applications.md tells application developers, each statement tried with real daemons."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.cluster import Node, eventually, hub_and_leaves

Rows = list[tuple[object, ...]]


@contextmanager
def two_nodes(folder: Path, schema: str, exclude: str = "") -> Iterator[tuple[Node, Node]]:
    more = {"tables": {"exclude": [exclude]}} if exclude else None
    cluster, _ = hub_and_leaves(folder, schema, leaves=1, more=more)
    with cluster:
        one, two = cluster.start().nodes.values()
        yield one, two


def wait_same(one: Node, two: Node, *tables: str) -> None:
    """Nothing pending, and the same rows on both."""

    def same() -> bool:
        states = one.status(), two.status()
        return all(each and not each["pending_rows"] for each in states) and all(
            all_of(one, table) == all_of(two, table) for table in tables
        )

    eventually(same, 20.0, f"the same rows in {', '.join(tables)}")


def all_of(node: Node, table: str) -> Rows:
    return node.execute(f"SELECT * FROM {table} ORDER BY 1")


@contextmanager
def apart(one: Node, two: Node, *tables: str) -> Iterator[None]:
    """Neither sees what the other writes inside; afterwards both have the same."""
    wait_same(one, two, *tables)
    two.stop()
    yield
    two.start()
    wait_same(one, two, *tables)


def discarded(node: Node, table: str) -> list[tuple[str, int]]:
    """(reason, node that wrote it) of the table's rows in the conflict log."""
    return node.execute("SELECT reason, node FROM __harmonylite__conflict WHERE tbl = ? ORDER BY id", table)


def test_keys(tmp_path: Path) -> None:
    """Automatic keys collide, random ones do not."""
    schema = """
    CREATE TABLE counted (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT);
    CREATE TABLE uuid (id TEXT PRIMARY KEY DEFAULT (lower(hex(randomblob(16)))), name TEXT);
    CREATE TABLE random_number (id INTEGER PRIMARY KEY, name TEXT);
    """
    with two_nodes(tmp_path, schema) as (one, two):
        with apart(one, two, "counted", "uuid", "random_number"):
            for node in (one, two):
                name = f"from {node.node_id}"
                node.execute("INSERT INTO counted (name) VALUES (?)", name)
                node.execute("INSERT INTO uuid (name) VALUES (?)", name)
                node.execute("INSERT INTO random_number VALUES (abs(random() / 2048) + 1, ?)", name)
        for node in (one, two):
            assert all_of(node, "counted") == [(1, "from 2")]
            assert discarded(node, "counted") == [("concurrent write", 1)]
            for table in ("uuid", "random_number"):
                assert node.execute(f"SELECT name FROM {table} ORDER BY name") == [("from 1",), ("from 2",)]


def test_a_range_of_automatic_keys_does_not_stay_with_its_node(tmp_path: Path) -> None:
    """SQLite goes on from the largest key in the table, whoever wrote it, whatever sqlite_sequence says."""
    with two_nodes(tmp_path, "CREATE TABLE counted (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT)") as (one, two):
        for node in (one, two):
            node.execute("INSERT INTO sqlite_sequence VALUES ('counted', ?)", node.node_id * 1_000_000)
        one.execute("INSERT INTO counted (name) VALUES ('in the range of one')")
        two.execute("INSERT INTO counted (name) VALUES ('in the range of two')")
        wait_same(one, two, "counted")
        assert one.execute("INSERT INTO counted (name) VALUES ('strayed') RETURNING id") == [(2_000_002,)]


def test_unique_values(tmp_path: Path) -> None:
    with two_nodes(tmp_path, "CREATE TABLE user (id TEXT PRIMARY KEY, email TEXT UNIQUE)") as (one, two):
        with apart(one, two, "user"):
            one.execute("INSERT INTO user VALUES ('a', 'x@example.org')")
            two.execute("INSERT INTO user VALUES ('b', 'x@example.org')")
        for node in (one, two):
            assert all_of(node, "user") == [("b", "x@example.org")]
            assert discarded(node, "user") == [("unique clash", 1)]


def test_conflicts_are_settled_by_row(tmp_path: Path) -> None:
    """Not by column; a delete is a write as any other; of two that add to a number one is lost."""
    schema = """
    CREATE TABLE person (id INTEGER PRIMARY KEY, name TEXT, town TEXT);
    CREATE TABLE counter (id INTEGER PRIMARY KEY, value INTEGER);
    CREATE TABLE event (id TEXT PRIMARY KEY DEFAULT (hex(randomblob(16))), counter INTEGER);
    INSERT INTO person VALUES (1, 'n', 't'), (2, 'n', 't'), (3, 'n', 't');
    INSERT INTO counter VALUES (1, 10);
    """
    with two_nodes(tmp_path, schema) as (one, two):
        with apart(one, two, "person", "counter", "event"):
            one.execute("UPDATE person SET name = 'earlier' WHERE id = 1")
            one.execute("DELETE FROM person WHERE id = 2")
            one.execute("UPDATE person SET name = 'earlier' WHERE id = 3")
            two.execute("UPDATE person SET town = 'later' WHERE id = 1")
            two.execute("UPDATE person SET town = 'later' WHERE id = 2")
            two.execute("DELETE FROM person WHERE id = 3")
            for node in (one, two):
                node.execute("UPDATE counter SET value = value + 1")
                node.execute("INSERT INTO event (counter) VALUES (1)")
        for node in (one, two):
            assert all_of(node, "person") == [(1, "n", "later"), (2, "n", "later")]
            assert all_of(node, "counter") == [(1, 11)]
            assert node.execute("SELECT count(*) FROM event WHERE counter = 1") == [(2,)]


def test_foreign_keys(tmp_path: Path) -> None:
    """A child written while its parent was deleted elsewhere stays, and is listed."""
    schema = """
    CREATE TABLE parent (id INTEGER PRIMARY KEY);
    CREATE TABLE child (id INTEGER PRIMARY KEY, parent INTEGER REFERENCES parent (id) ON DELETE CASCADE);
    INSERT INTO parent VALUES (1), (2);
    INSERT INTO child VALUES (20, 2);
    """
    with two_nodes(tmp_path, schema) as (one, two):
        with apart(one, two, "parent", "child"):
            with one.open_db() as db:
                db.execute("PRAGMA foreign_keys = ON")
                db.execute("DELETE FROM parent")
            two.execute("INSERT INTO child VALUES (10, 1)")
        for node in (one, two):
            assert all_of(node, "parent") == [] and all_of(node, "child") == [(10, 1)]
            assert node.execute("PRAGMA foreign_key_check") == [("child", 10, "parent", 0)]
            assert discarded(node, "child") == [("orphan: its parent in parent was deleted", 2)]


def test_transactions_that_read_before_they_write(tmp_path: Path) -> None:
    with two_nodes(tmp_path, "CREATE TABLE t (id INTEGER PRIMARY KEY, v)") as (one, two):
        one.execute("INSERT INTO t VALUES (1, 0)")
        wait_same(one, two, "t")
        with two.open_db() as db, two.open_db() as other:
            db.execute("BEGIN")
            assert db.execute("SELECT v FROM t WHERE id = 1").fetchall() == [(0,)]
            one.execute("INSERT INTO t VALUES (2, 0)")
            eventually(lambda: other.execute("SELECT 1 FROM t WHERE id = 2").fetchall(), what="a row from elsewhere")
            begun = time.monotonic()
            with pytest.raises(sqlite3.OperationalError, match="database is locked") as refused:
                db.execute("UPDATE t SET v = v + 1 WHERE id = 1")
            assert time.monotonic() - begun < 1.0  # the connection's timeout is 30 s
            if hasattr(refused.value, "sqlite_errorname"):  # Python 3.11
                assert refused.value.sqlite_errorname == "SQLITE_BUSY_SNAPSHOT"
            db.execute("ROLLBACK")

            db.execute("BEGIN IMMEDIATE")
            assert db.execute("SELECT v FROM t WHERE id = 1").fetchall() == [(0,)]
            one.execute("INSERT INTO t VALUES (3, 0)")
            db.execute("UPDATE t SET v = v + 1 WHERE id = 1")
            db.execute("COMMIT")
        wait_same(one, two, "t")
        assert all_of(one, "t") == [(1, 1), (2, 0), (3, 0)]


def test_write_ahead_log(tmp_path: Path) -> None:
    """The database is in WAL mode, and stays in it while the daemon runs."""
    with two_nodes(tmp_path, "CREATE TABLE t (id INTEGER PRIMARY KEY)") as (one, two):
        with one.open_db() as db, pytest.raises(sqlite3.OperationalError, match="locked"):
            db.execute("PRAGMA journal_mode = DELETE")
        assert one.execute("PRAGMA journal_mode") == [("wal",)]
        one.stop()
        assert one.execute("PRAGMA journal_mode = DELETE") == [("delete",)]
        one.start()
        eventually(one.connected)
        assert one.execute("PRAGMA journal_mode") == [("wal",)]
        one.execute("INSERT INTO t VALUES (1)")
        wait_same(one, two, "t")


def test_what_is_not_replicated(tmp_path: Path) -> None:
    schema = """
    CREATE TABLE first (id INTEGER PRIMARY KEY, v, half AS (v / 2));
    CREATE TABLE keyless (v);
    CREATE TABLE secret (id INTEGER PRIMARY KEY);
    CREATE TABLE text_key (id TEXT PRIMARY KEY, v);
    CREATE TABLE last (id INTEGER PRIMARY KEY);
    """
    with two_nodes(tmp_path, schema, exclude="secret") as (one, two):
        one.execute("PRAGMA user_version = 7")
        one.execute("CREATE VIEW seen AS SELECT * FROM first")
        one.execute("CREATE INDEX by_v ON first (v)")
        one.execute("INSERT INTO first (id, v) VALUES (1, 10)")
        one.execute("INSERT INTO keyless VALUES ('x')")
        one.execute("INSERT INTO secret VALUES (1)")
        one.execute("INSERT INTO text_key VALUES (NULL, 'no key'), ('k', 'a key')")
        with one.open_db() as db:
            db.execute("CREATE TEMP TABLE passing (id INTEGER PRIMARY KEY)")
            db.execute("INSERT INTO passing VALUES (1)")
        one.execute("INSERT INTO last VALUES (1)")
        wait_same(one, two, "first", "last")
        assert all_of(two, "first") == [(1, 10, 5)]  # the generated column is computed there
        assert all_of(two, "keyless") == all_of(two, "secret") == []
        assert all_of(two, "text_key") == [("k", "a key")]
        assert two.execute("PRAGMA user_version") == [(0,)]
        assert two.execute("SELECT name FROM sqlite_schema WHERE name IN ('seen', 'by_v', 'passing')") == []
        assert [each["table"] for each in (one.status() or {})["skipped_tables"]] == ["keyless"]
        with one.open_db() as db:
            db.create_collation("icu", lambda a, b: (a > b) - (a < b))
            db.execute("CREATE INDEX own ON text_key (v COLLATE icu)")
        one.execute("INSERT INTO last VALUES (2)")
        wait_same(one, two, "last")
        [_, told] = (one.status() or {})["skipped_tables"]
        assert told["table"] == "text_key"
        assert told["reason"].endswith("no such collation sequence: icu")


def test_rows_older_than_the_first_start(tmp_path: Path) -> None:
    """They stay where they are until they change; then the whole row is sent."""
    cluster, _ = hub_and_leaves(tmp_path, "CREATE TABLE t (id INTEGER PRIMARY KEY, a, b)", leaves=1)
    one, two = cluster.nodes.values()
    with cluster:
        one.execute("INSERT INTO t VALUES (1, 'old', 'row'), (2, 'stays', 'here')")
        cluster.start()
        one.execute("UPDATE t SET a = 'changed' WHERE id = 1")
        eventually(lambda: all_of(two, "t") == [(1, "changed", "row")], what="the changed row, whole")
        assert (one.status() or {})["pending_rows"] == 0


def test_a_schema_change_on_one_node_after_the_other(tmp_path: Path) -> None:
    with two_nodes(tmp_path, "CREATE TABLE t (id INTEGER PRIMARY KEY, a)") as (one, two):
        one.execute("INSERT INTO t VALUES (1, 'before')")
        wait_same(one, two, "t")
        one.execute("ALTER TABLE t ADD COLUMN b DEFAULT 'b'")
        one.execute("INSERT INTO t VALUES (2, 'wider', 'new')")
        eventually(lambda: (two.status() or {})["parked_rows"] == 1, what="it waits for its column")
        two.execute("INSERT INTO t VALUES (3, 'narrower')")
        eventually(lambda: one.execute("SELECT * FROM t WHERE id = 3") == [(3, "narrower", "b")], what="it fits there")
        two.execute("ALTER TABLE t ADD COLUMN b DEFAULT 'b'")
        two.execute("INSERT INTO t VALUES (4, 'both', 'have it')")
        wait_same(one, two, "t")
        assert all_of(two, "t") == [
            (1, "before", "b"),
            (2, "wider", "new"),
            (3, "narrower", "b"),
            (4, "both", "have it"),
        ]
        assert (two.status() or {})["parked_rows"] == 0


def test_triggers(tmp_path: Path) -> None:
    """One that writes both a replicated and a local table does not run for rows from elsewhere; split in two it does
    what it should."""
    schema = """
    CREATE TABLE t (id INTEGER PRIMARY KEY);
    CREATE TABLE copied (id INTEGER PRIMARY KEY);
    CREATE TABLE local_both (id INTEGER PRIMARY KEY);
    CREATE TABLE local_split (id INTEGER PRIMARY KEY);
    CREATE TRIGGER both AFTER INSERT ON t BEGIN
        INSERT OR IGNORE INTO copied VALUES (NEW.id);
        INSERT INTO local_both VALUES (NEW.id);
    END;
    CREATE TRIGGER split AFTER INSERT ON t BEGIN INSERT INTO local_split VALUES (NEW.id); END;
    """
    with two_nodes(tmp_path, schema, exclude="local_*") as (one, two):
        one.execute("INSERT INTO t VALUES (1)")
        wait_same(one, two, "t", "copied")
        assert all_of(two, "copied") == all_of(two, "local_split") == [(1,)]
        assert all_of(one, "local_both") == [(1,)] and all_of(two, "local_both") == []
        assert "trigger=both" in two.log_text()
