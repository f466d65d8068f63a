"""What triggers see, for keys of every kind, and what the application may do beside them."""

from __future__ import annotations

import math

import apsw
import pytest

from harmonylite.db.schema import load
from tests.db.conftest import MakeNode
from tests.db.harness import Node, exchange, removed, stamp, written, wrote

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"


def types(node: Node, table: str, *columns: str) -> list[tuple[object, ...]]:
    listed = ", ".join(f"typeof({c}), hex(CAST({c} AS BLOB))" for c in columns)
    return sorted(node.query(f"SELECT {listed} FROM {table}"), key=repr)


# Keys of every kind: (table, columns of the key, keys as SQL literals).
KEYS = {
    "integer": ("CREATE TABLE t (k INTEGER PRIMARY KEY, v)", "k", ["1", "-9223372036854775808", "9223372036854775807"]),
    "autoincrement": ("CREATE TABLE t (k INTEGER PRIMARY KEY AUTOINCREMENT, v)", "k", ["1", "7"]),
    "integer desc": ("CREATE TABLE t (k INTEGER PRIMARY KEY DESC, v)", "k", ["1", "2"]),
    "int without rowid": ("CREATE TABLE t (k INTEGER PRIMARY KEY, v) WITHOUT ROWID", "k", ["1", "2"]),
    "text": ("CREATE TABLE t (k TEXT PRIMARY KEY, v)", "k", ["''", "'a'", "'A'", "'a '", "'ü'", "'a' || char(0)", "5"]),
    "blob": ("CREATE TABLE t (k BLOB PRIMARY KEY, v)", "k", ["x''", "x'00'", "x'ff'", "'ff'"]),
    "real": ("CREATE TABLE t (k REAL PRIMARY KEY, v)", "k", ["0.1", "2", "9e999", "-9e999", "1e300"]),
    "numeric": ("CREATE TABLE t (k DECIMAL PRIMARY KEY, v)", "k", ["'10'", "'1.5'", "'x'"]),
    "any": ("CREATE TABLE t (k PRIMARY KEY, v)", "k", ["1", "1.5", "'1'", "x'31'", "9007199254740993"]),
    "strict any": ("CREATE TABLE t (k ANY PRIMARY KEY, v ANY) STRICT", "k", ["1", "'1'", "x'31'", "1.5"]),
    "strict text": ("CREATE TABLE t (k TEXT PRIMARY KEY, v ANY) STRICT, WITHOUT ROWID", "k", ["'a'", "'b'"]),
    "composite": ("CREATE TABLE t (a INTEGER, b TEXT, v, PRIMARY KEY (b, a))", "b, a", ["'x', 1", "'x', 2", "'y', 1"]),
    "composite without rowid": (
        "CREATE TABLE t (v, a TEXT, b BLOB, PRIMARY KEY (a, b)) WITHOUT ROWID",
        "a, b",
        ["'x', x'01'", "'x', 1", "'y', 'z'"],
    ),
    "reserved": ('CREATE TABLE t ("select" TEXT PRIMARY KEY, "from", v)', '"select"', ["'a'", "'b'"]),
    "quoted": ('CREATE TABLE t ("a""b\'c" TEXT PRIMARY KEY, v)', '"a""b\'c"', ["'a'", "'b'"]),
    "non-ascii": ('CREATE TABLE t ("schlüssel" TEXT PRIMARY KEY, v)', '"schlüssel"', ["'a'", "'b'"]),
    "not utf-8": ("CREATE TABLE t (k TEXT PRIMARY KEY, v)", "k", ["CAST(x'ff' AS TEXT)", "CAST(x'fe' AS TEXT)", "'a'"]),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_every_kind_are_captured_and_applied(make: MakeNode, kind: str) -> None:
    script, key, keys = KEYS[kind]
    a, b = make(1, script), make(2, script)
    for number, literal in enumerate(keys):
        a.sql(f"INSERT INTO t ({key}, v) VALUES ({literal}, {number})")
    exchange(a, b)
    columns = [*(part.strip() for part in key.split(", ")), "v"]
    assert len(b.query("SELECT 1 FROM t")) == len(keys)
    assert types(b, "t", *columns) == types(a, "t", *columns)
    a.sql(f"UPDATE t SET v = 'again' WHERE ({key}) = ({keys[0]})")
    b.sql(f"DELETE FROM t WHERE ({key}) = ({keys[1]})")
    exchange(a, b)
    assert types(b, "t", *columns) == types(a, "t", *columns)
    assert len(b.query("SELECT 1 FROM t")) == len(keys) - 1
    assert b.query("SELECT count(*) FROM t WHERE v = 'again'") == [(1,)]
    assert a.conflicts() == b.conflicts() == []


@pytest.mark.parametrize("name", ["order", "two words", 'a"b', "Überweg", "x_change_log", "per%cent", "a.b"])
def test_tables_of_any_name_are_captured(make: MakeNode, name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    script = f"CREATE TABLE {quoted} (id INTEGER PRIMARY KEY, v UNIQUE)"
    a, b = make(1, script), make(2, script)
    a.sql(f"INSERT INTO {quoted} VALUES (1, 'x')")
    exchange(a, b)
    b.sql(f"UPDATE OR REPLACE {quoted} SET v = 'y'")
    exchange(a, b)
    assert a.query(f"SELECT * FROM {quoted}") == [(1, "y")]


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [
        ("k TEXT COLLATE NOCASE PRIMARY KEY", "A", "b"),
        ("k TEXT COLLATE RTRIM PRIMARY KEY", "a  ", "b"),
        # The index's collation counts, not the column's.
        ("k TEXT, PRIMARY KEY (k COLLATE NOCASE)", "A", "b"),
        ("k TEXT COLLATE BINARY, PRIMARY KEY (k COLLATE RTRIM)", "a ", "b"),
    ],
)
def test_key_collation_equal_keys_are_one_row(make: MakeNode, key: str, same: str, other: str) -> None:
    script = f"CREATE TABLE t (v, {key})"
    a, b = make(1, script), make(2, script)
    a.sql("INSERT INTO t (k, v) VALUES ('a', 1)")
    a.sql("INSERT INTO t (k, v) VALUES (?, 1)", (other,))
    exchange(a, b)
    b.sql("UPDATE t SET k = ?, v = 2 WHERE v = 1 AND k <> ?", (same, other))
    groups = b.publish()
    assert removed(groups, "t") == [], "the same row by another spelling, not a new one"
    a.apply(*groups)
    assert a.query("SELECT k, v FROM t ORDER BY v") == [(other, 1), (same, 2)]
    assert len(a.query('SELECT 1 FROM "__harmonylite__t_version"')) == 2


def test_key_collation_of_the_index_tells_rows_apart(make: MakeNode) -> None:
    """The column is NOCASE, the key is not: 'a' and 'A' are two rows."""
    script = "CREATE TABLE t (k TEXT COLLATE NOCASE, v, PRIMARY KEY (k COLLATE BINARY))"
    a, b = make(1, script), make(2, script)
    a.sql("INSERT INTO t VALUES ('a', 1), ('A', 2)")
    exchange(a, b)
    assert b.rows("t") == [("A", 2), ("a", 1)]
    a.sql("DELETE FROM t WHERE v = 1")
    exchange(a, b)
    assert b.rows("t") == [("A", 2)]
    b.sql("UPDATE t SET k = 'a'")
    groups = b.publish()
    assert removed(groups, "t") == [("A",)]
    a.apply(*groups)
    assert a.rows("t") == [("a", 2)]


def test_our_tables_keys_have_the_affinity_of_the_original(make: MakeNode) -> None:
    """A node whose key is declared otherwise sends an integer: here it is text, in the row and in its version."""
    for script in ("CREATE TABLE t (id TEXT PRIMARY KEY, v)", "CREATE TABLE t (id TEXT PRIMARY KEY, v UNIQUE)"):
        node = make(1, script)
        node.apply(wrote("t", ("id", "v"), ((5, "x"), stamp(1000, 2))))
        node.sql("UPDATE t SET v = 'y'")
        [(row, stamped)] = written(node.publish(), "t")
        assert (row, stamped.base_ts) == (("5", "y"), 1000)
        assert node.query('SELECT k0, typeof(k0) FROM "__harmonylite__t_version"') == [("5", "text")]


def test_null_in_a_key_is_not_captured_but_counted(make: MakeNode) -> None:
    script = "CREATE TABLE t (a TEXT, b TEXT, v, PRIMARY KEY (a, b))"
    node = make(1, script)
    node.sql("INSERT INTO t VALUES (NULL, 'x', 1), (NULL, 'x', 2), ('y', NULL, 3), ('y', 'z', 4)")
    node.sql("UPDATE t SET v = v + 1")
    assert node.replica.unkeyed() == 3
    assert [row for row, _ in written(node.publish(), "t")] == [("y", "z", 5)]
    node.sql("UPDATE t SET b = NULL WHERE b = 'z'")
    groups = node.publish()
    assert removed(groups, "t") == [("y", "z")]
    assert written(groups, "t") == []
    node.sql("UPDATE t SET a = 'new' WHERE v = 2")
    assert [row for row, _ in written(node.publish(), "t")] == [("new", "x", 2)]
    node.sql("DELETE FROM t")
    assert removed(node.publish(), "t") == [("new", "x")]


def test_null_in_two_parts_of_a_key_counts_one_row(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (a TEXT, b TEXT, PRIMARY KEY (a, b))")
    node.sql("INSERT INTO t VALUES (NULL, NULL)")
    assert node.replica.unkeyed() == 1


def test_key_with_the_applications_own_collation_is_skipped_loudly(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.app.createcollation("german", lambda x, y: (x > y) - (x < y))
    node.sql("CREATE TABLE g (k TEXT COLLATE german PRIMARY KEY, v)")
    node.sql("INSERT INTO g VALUES ('a', 1)")
    node.sql("INSERT INTO t VALUES (1, 1)")
    assert written(node.publish(), "t")
    assert [(each.table, "german" in each.reason) for each in node.replica.schema.skipped] == [("g", True)]
    assert "g" not in node.replica.schema.tables


def test_tables_without_a_key_virtual_and_own_tables_are_left_alone(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; CREATE TABLE bare (v); CREATE VIRTUAL TABLE f USING fts5(v); CREATE VIEW w AS SELECT 1")
    assert list(node.replica.schema.tables) == ["t"]
    assert [each.table for each in node.replica.schema.skipped] == ["bare"]
    node.sql("INSERT INTO bare VALUES (1)")
    node.sql("INSERT INTO f VALUES ('text')")
    assert node.publish() == []
    assert list(load(node.writer, include=("T*",)).tables) == ["t"]
    assert list(load(node.writer, exclude=("*",)).tables) == []


def test_i2_capture_works_under_trusted_schema_off(make: MakeNode) -> None:
    node = make(
        1,
        "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE, w, x, UNIQUE (w, x));"
        "CREATE UNIQUE INDEX i ON t (lower(v)); CREATE UNIQUE INDEX p ON t (x) WHERE w > 0",
    )
    strict = apsw.Connection(str(node.path))
    strict.execute("PRAGMA trusted_schema=OFF; PRAGMA recursive_triggers=ON; PRAGMA foreign_keys=ON")
    strict.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
    strict.execute("INSERT INTO t VALUES (1, 'a', 1, 1), (2, 'b', 2, 2); UPDATE t SET id = 3 WHERE id = 2")
    strict.execute("INSERT OR REPLACE INTO t VALUES (4, 'A', 9, 9); DELETE FROM t WHERE id = 3")
    strict.close()
    groups = node.publish()
    assert [row for row, _ in written(groups, "t")] == [(4, "A", 9, 9)]
    assert sorted(removed(groups, "t")) == [(1,), (2,), (3,)]


def test_i2_triggers_use_no_virtual_table_and_no_function_of_their_own(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE)")
    texts = [sql for (sql,) in node.query("SELECT sql FROM sqlite_schema WHERE type = 'trigger'")]
    assert len(texts) == 6
    assert not any("pragma_" in text.lower() or "json" in text.lower() for text in texts)


def test_a_change_of_the_key_logs_the_old_key_too(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; CREATE TABLE c (a, b, v, PRIMARY KEY (a, b))")
    node.sql("INSERT INTO t VALUES (1, 'x'), (2, 'y')")
    node.sql("INSERT INTO c VALUES (1, 1, 'x')")
    node.publish()
    node.sql("UPDATE t SET id = 10 WHERE id = 1")
    node.sql("UPDATE t SET rowid = 20 WHERE id = 2")
    node.sql("UPDATE c SET b = 2")
    groups = node.publish()
    assert sorted(removed(groups, "t")) == [(1,), (2,)]
    assert sorted(row for row, _ in written(groups, "t")) == [(10, "x"), (20, "y")]
    assert removed(groups, "c") == [(1, 1)]


# (extra columns and constraints, index, rows before, statement, keys evicted)
EVICTIONS = {
    "plain": ("v UNIQUE, w", "", "(1, 'a', 0), (2, 'b', 0)", "INSERT OR REPLACE INTO t VALUES (3, 'a', 0)", [1]),
    "replace into": ("v UNIQUE, w", "", "(1, 'a', 0), (2, 'b', 0)", "REPLACE INTO t VALUES (3, 'a', 0)", [1]),
    "update": ("v UNIQUE, w", "", "(1, 'a', 0), (2, 'b', 0)", "UPDATE OR REPLACE t SET v = 'a' WHERE id = 2", [1]),
    "schema's clause": ("v UNIQUE ON CONFLICT REPLACE, w", "", "(1, 'a', 0)", "INSERT INTO t VALUES (3, 'a', 0)", [1]),
    "two at once": ("v UNIQUE, w UNIQUE", "", "(1, 'a', 1), (2, 'b', 2)", "REPLACE INTO t VALUES (3, 'a', 2)", [1, 2]),
    "two columns": ("v, w, UNIQUE (v, w)", "", "(1, 'a', 1), (2, 'a', 2)", "REPLACE INTO t VALUES (3, 'a', 2)", [2]),
    "nocase": ("v COLLATE NOCASE UNIQUE, w", "", "(1, 'a', 0)", "REPLACE INTO t VALUES (3, 'A', 0)", [1]),
    "nocase index": ("v, w", "i ON t (v COLLATE NOCASE)", "(1, 'a', 0)", "REPLACE INTO t VALUES (3, 'A', 0)", [1]),
    "partial": ("v, w", "i ON t (v) WHERE w = 1", "(1, 'a', 0), (2, 'a', 1)", "REPLACE INTO t VALUES (3, 'a', 1)", [2]),
    "partial, update": (
        "v, w",
        "i ON t (v) WHERE w = 1",
        "(1, 'a', 0), (2, 'a', 1)",
        "UPDATE OR REPLACE t SET w = 1 WHERE id = 1",
        [2],
    ),
    "expression": ("v, w", "i ON t (lower(v) || w)", "(1, 'a', 1)", "REPLACE INTO t VALUES (3, 'A', 1)", [1]),
    "expression, update": (
        "v, w",
        "i ON t (lower(v), w + 1)",
        "(1, 'a', 1), (2, 'A', 2)",
        "UPDATE OR REPLACE t SET w = 1 WHERE id = 2",
        [1],
    ),
    "generated": (
        "v, w, g AS (w * 2) UNIQUE",
        "",
        "(1, 'a', 1), (2, 'a', 2)",
        "UPDATE OR REPLACE t SET w = 1 WHERE id = 2",
        [1],
    ),
    "descending": ("v, w", "i ON t (v DESC, w)", "(1, 'a', 0)", "REPLACE INTO t VALUES (3, 'a', 0)", [1]),
}


@pytest.mark.parametrize("kind", EVICTIONS)
def test_rows_evicted_by_replace_are_deletes(make: MakeNode, kind: str) -> None:
    columns, index, before, statement, evicted = EVICTIONS[kind]
    script = f"CREATE TABLE t (id INTEGER PRIMARY KEY, {columns});" + (f"CREATE UNIQUE INDEX {index}" if index else "")
    a, b = make(1, script), make(2, script)
    a.sql(f"INSERT INTO t (id, v, w) VALUES {before}")
    exchange(a, b)
    a.sql(statement.replace("INTO t VALUES", "INTO t (id, v, w) VALUES"))
    groups = a.publish()
    assert sorted(removed(groups, "t")) == [(key,) for key in evicted]
    b.apply(*groups)
    assert b.rows("t") == a.rows("t")
    assert b.conflicts() == []


def test_rows_evicted_through_a_generated_column_of_two_are_deletes(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v, w, g AS (v || w) UNIQUE)")
    node.sql("INSERT INTO t (id, v, w) VALUES (1, 'a', 1), (2, 'a', 2)")
    node.publish()
    node.sql("UPDATE OR REPLACE t SET w = 1 WHERE id = 2")
    assert removed(node.publish(), "t") == [(1,)]


def test_maybe_evicted_is_no_delete_and_no_change_while_the_row_is_there(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE)")
    node.sql("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    node.publish()
    node.sql("INSERT OR IGNORE INTO t VALUES (3, 'a')")
    with pytest.raises(apsw.ConstraintError):
        node.sql("INSERT OR FAIL INTO t VALUES (3, 'b')")  # FAIL keeps what the BEFORE trigger wrote
    node.sql("UPDATE t SET v = 'a' WHERE id = 1")
    groups = node.publish()
    assert removed(groups, "t") == []
    assert [row for row, _ in written(groups, "t")] == [(1, "a")]


def test_rows_cascaded_by_a_replace_are_deletes(make: MakeNode) -> None:
    script = (
        "CREATE TABLE p (id INTEGER PRIMARY KEY);"
        " CREATE TABLE t (id INTEGER PRIMARY KEY, p REFERENCES p ON DELETE CASCADE)"
    )
    node = make(1, script)
    node.app.execute("PRAGMA foreign_keys=ON")
    node.sql("INSERT INTO p VALUES (1)")
    node.sql("INSERT INTO t VALUES (7, 1)")
    node.publish()
    node.sql("REPLACE INTO p VALUES (1)")
    assert node.rows("t") == []
    assert removed(node.publish(), "t") == [(7,)]


def test_a_row_that_vanished_unseen_is_found_by_the_second_look(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x'), (2, 'y')")
    node.publish()
    node.app.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0)
    node.sql("DELETE FROM t WHERE id = 1")
    node.app.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 1)
    assert node.publish() == []
    keys = node.vanished("t")
    assert keys == [(1,)]
    node.sql("INSERT INTO t VALUES (3, 'z')")
    assert node.replica.unseen.log_vanished("t", [*keys, (3,)]) == 1
    assert removed(node.publish(), "t") == [(1,)]
    assert node.vanished("t") == []


def test_installing_never_stamps_rows(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; INSERT INTO t VALUES (1, 'old')")
    assert node.version("t", 1) is None
    node.sql("CREATE TABLE u (id INTEGER PRIMARY KEY)")
    node.sql("INSERT INTO t VALUES (2, 'new')")
    assert [row for row, _ in written(node.publish(), "t")] == [(2, "new")]
    node.restart()
    assert node.version("t", 1) is None
    assert node.publish() == []


def test_many_updates_of_a_row_cost_one_row(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 0)")
    for number in range(100):
        node.sql("UPDATE t SET v = ?", (number,))
    assert [row for row, _ in written(node.publish(), "t")] == [(1, 99)]


def test_values_keep_their_storage_class(make: MakeNode) -> None:
    script = (
        "CREATE TABLE t (id INTEGER PRIMARY KEY, v, r REAL, txt TEXT, num NUMERIC, g AS (v || 'x') STORED,"
        " h AS (id * 2)); CREATE TABLE s (id INTEGER PRIMARY KEY, v ANY, i INT, b BLOB) STRICT"
    )
    a, b = make(1, script), make(2, script)
    numbers = [2**63 - 1, -(2**63), 0, 1.5, -0.0, math.inf, -math.inf, 5e-324]
    values = [*numbers, "", "a\0b", "ünï \U0001f980", b"", b"\0\xff", None]
    for number, value in enumerate(values):
        a.sql("INSERT INTO t (id, v, r, txt, num) VALUES (?, ?, ?, ?, ?)", (number, value, 1, 17, "12"))
        a.sql("INSERT INTO s VALUES (?, ?, 5, x'00')", (number, value))
    a.sql("INSERT INTO t (id, v, txt) VALUES (100, CAST(x'ff00fe' AS TEXT), CAST(x'80' AS TEXT)), (101, 'after', 'x')")
    exchange(a, b)
    columns = ("id", "v", "r", "txt", "num", "g", "h")
    assert types(b, "t", *columns) == types(a, "t", *columns)
    assert b.query("SELECT typeof(v), hex(v), i, b FROM s") == a.query("SELECT typeof(v), hex(v), i, b FROM s")
    assert b.query("SELECT count(*) FROM t") == [(len(values) + 2,)]
    b.sql("UPDATE t SET v = CAST(x'fd' AS TEXT) WHERE id = 100")
    exchange(a, b)
    assert a.query("SELECT hex(v), typeof(v) FROM t WHERE id = 100") == [("FD", "text")]
