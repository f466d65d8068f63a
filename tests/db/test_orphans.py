"""Rows whose parent was deleted elsewhere. SQLite's own foreign_key_check is the judge where it can be."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from harmonylite.db import orphans, schema
from harmonylite.db.capture import create_version_sql
from harmonylite.db.orphans import Orphan, find, load_foreign_keys
from harmonylite.db.rows import bound, marker
from harmonylite.db.sql import normal, open_writer, quote, rows, scalar, version_table
from harmonylite.model import RawText, Row


class Database:
    """The applying connection with version tables for every replicated table."""

    def __init__(self, path: Path, script: str, exclude: tuple[str, ...] = ()) -> None:
        path.touch()  # the application makes its database, never the daemon
        self.connection = open_writer(path)
        self.connection.execute(script)
        self.schema = schema.load(self.connection, exclude=exclude)
        for table in self.schema.tables.values():
            for sql in create_version_sql(table):
                self.connection.execute(sql)
        self.foreign_keys = load_foreign_keys(self.connection, self.schema)

    def bury(self, table: str, *keys: Row) -> None:
        """Delete rows and leave their tombstones, as apply does."""
        parts = self.schema.tables[normal(table)].key
        for key in keys:
            where = " AND ".join(f"{quote(p.name)} = {marker(v)}" for p, v in zip(parts, key, strict=True))
            self.connection.execute(f"DELETE FROM {quote(table)} WHERE {where}", bound(key))
            markers = ", ".join(map(marker, key))
            self.connection.execute(
                f"INSERT INTO {version_table(table)} ({', '.join(f'k{i}' for i in range(len(key)))},"
                f" ts, node, deleted) VALUES ({markers}, 5, 1, 1)",
                bound(key),
            )

    def traced(self) -> list[str]:
        """The statements that run from now on."""
        statements: list[str] = []

        def trace(_cursor: object, sql: str, _bindings: object) -> bool:
            statements.append(sql)
            return True

        self.connection.setexectrace(trace)
        return statements

    def written(self, table: str, *keys: Row) -> list[Orphan]:
        return find(self.connection, self.foreign_keys, {table: keys}, {})

    def deleted(self, table: str, *keys: Row) -> list[Orphan]:
        return find(self.connection, self.foreign_keys, {}, {table: keys})


Make = Callable[..., Database]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Database] = []

    def make_it(script: str, exclude: tuple[str, ...] = ()) -> Database:
        made.append(Database(tmp_path / "app.db", script, exclude))
        return made[-1]

    yield make_it
    for database in made:
        database.connection.close()


SIMPLE = """
CREATE TABLE parent (id INTEGER PRIMARY KEY);
CREATE TABLE child (id INTEGER PRIMARY KEY, parent_id INTEGER REFERENCES parent(id) ON DELETE CASCADE);
CREATE TABLE other (id INTEGER PRIMARY KEY);
INSERT INTO parent VALUES (1), (2), (3);
INSERT INTO child VALUES (10, 1), (11, 1), (20, 2), (30, NULL);
"""


def test_a_child_written_under_a_tombstone(make: Make) -> None:
    database = make(SIMPLE)
    database.bury("parent", (1,))
    assert database.written("child", (10,), (20,), (30,), (99,)) == [Orphan("child", (10,), "parent", (1,))]
    assert scalar(database.connection, "SELECT count(*) FROM child") == 4


def test_a_parent_deleted_over_its_children(make: Make) -> None:
    database = make(SIMPLE)
    database.bury("parent", (1,), (3,))
    expected = [Orphan("child", (10,), "parent", (1,)), Orphan("child", (11,), "parent", (1,))]
    assert database.deleted("parent", (1,), (3,)) == expected


def test_both_directions_at_once_report_once(make: Make) -> None:
    database = make(SIMPLE)
    database.bury("parent", (1,), (2,))
    found = find(
        database.connection,
        database.foreign_keys,
        {"CHILD": [(10,), (30,)], "other": [(1,)]},
        {"Parent": [(1,), (2,)], "other": [(2,)]},
    )
    assert [orphan.child_key for orphan in found] == [(10,), (11,), (20,)]


def test_a_parent_that_is_merely_absent_may_still_arrive(make: Make) -> None:
    database = make(SIMPLE + "INSERT INTO child VALUES (40, 4);")
    assert database.written("child", (40,)) == []


def test_a_parent_that_came_back_has_no_orphans(make: Make) -> None:
    database = make(SIMPLE)
    database.bury("parent", (1,))
    database.connection.execute("INSERT INTO parent VALUES (1)")
    database.connection.execute(f"UPDATE {version_table('parent')} SET deleted = 0, ts = 6")
    assert database.written("child", (10,)) == []
    assert database.deleted("parent", (1,)) == []


def test_keys_from_a_node_with_another_primary_key_are_passed_over(make: Make) -> None:
    database = make(SIMPLE)
    database.bury("parent", (1,))
    assert database.written("child", (10, "x"), (10,), ()) == [Orphan("child", (10,), "parent", (1,))]
    assert len(database.deleted("parent", (1, 1), (1,))) == 2


def test_tables_without_foreign_keys_run_no_statement(make: Make) -> None:
    database = make(SIMPLE)
    statements = database.traced()
    assert (
        find(database.connection, database.foreign_keys, {"other": [(1,)], "parent": [(1,)]}, {"child": [(1,)]}) == []
    )
    assert find(database.connection, database.foreign_keys, {"child": []}, {"parent": []}) == []
    assert statements == []
    database.written("child", (10,))
    assert len(statements) == 1


@pytest.mark.parametrize("index", ["", "CREATE INDEX i ON child(parent_id)"])
def test_many_deleted_parents_search_the_children_once(index: str, make: Make) -> None:
    database = make(
        f"""
        CREATE TABLE parent (id INTEGER PRIMARY KEY);
        CREATE TABLE child (id INTEGER PRIMARY KEY, parent_id REFERENCES parent);
        {index};
        WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
        INSERT INTO parent SELECT i FROM n;
        INSERT INTO child SELECT 100000 + id, id FROM parent WHERE id % 3 = 0;
        """
    )
    (foreign_key,) = database.foreign_keys.by_parent["parent"]
    assert foreign_key.indexed == bool(index)
    keys: list[Row] = [(i,) for i in range(1, 3001)]
    database.bury("parent", *keys)
    statements = database.traced()
    found = database.deleted("parent", *keys)
    database.connection.setexectrace(None)
    assert {orphan.child_key for orphan in found} == {(100000 + i,) for i in range(3, 3001, 3)}
    assert len(statements) == 1
    plan = [row[3] for row in rows(database.connection, f"EXPLAIN QUERY PLAN {statements[0]}", [0] * 3001)]
    searched = [step for step in plan if step.split()[1:2] == ["c"]]
    assert len(searched) == 1
    assert searched[0].startswith("SEARCH c USING COVERING INDEX i" if index else "SCAN c")
    assert not any("AUTOMATIC" in step for step in plan)


def test_a_written_child_is_looked_up_by_keys_alone(make: Make) -> None:
    database = make(
        """
        CREATE TABLE parent (a TEXT COLLATE NOCASE, b INTEGER, PRIMARY KEY (a, b));
        CREATE TABLE child (id TEXT PRIMARY KEY, a TEXT, b, FOREIGN KEY (a, b) REFERENCES parent);
        """
    )
    statements = database.traced()
    assert database.written("child", ("x",), ("y",)) == []
    database.connection.setexectrace(None)
    plan = [row[3] for row in rows(database.connection, f"EXPLAIN QUERY PLAN {statements[0]}", ["x", "y", 1])]
    assert {step.split()[1] for step in plan if step.startswith("SEARCH")} == {"c", "v", "p"}
    assert [step for step in plan if step.startswith("SCAN") and step.split()[1] in "cvp"] == []


def test_keys_beyond_one_statement_are_taken_in_parts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "MAX_PARAMETERS", 2)
    database = make(SIMPLE)
    database.bury("parent", (1,), (2,), (3,))
    assert len(database.deleted("parent", (3,), (2,), (1,))) == 3
    assert len(database.written("child", (10,), (11,), (20,), (30,))) == 3


def test_as_many_keys_as_allowed_fit_into_a_statement(make: Make) -> None:
    database = make(SIMPLE)
    database.bury("parent", (2,))
    keys: list[Row] = [(i,) for i in range(orphans.MAX_PARAMETERS + 7)]
    assert len(database.deleted("parent", *keys)) == 1
    assert len(database.written("child", *keys)) == 1


def test_orphans_are_limited_and_the_rest_is_logged(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    database = make(SIMPLE)
    database.bury("parent", (1,), (2,))
    written: dict[str, list[Row]] = {"child": [(10,)]}
    deleted: dict[str, list[Row]] = {"parent": [(1,), (2,)]}
    with caplog.at_level(logging.WARNING):
        found = find(database.connection, database.foreign_keys, written, deleted, limit=3)
    assert len(found) == 3 and not caplog.records
    with caplog.at_level(logging.WARNING):
        found = find(database.connection, database.foreign_keys, written, deleted, limit=2)
    assert len(found) == len(set(found)) == 2
    assert caplog.records[0].__dict__["fields"] == {"limit": 2, "children": ["child"]}


def test_composite_keys_in_another_order_and_with_null(make: Make) -> None:
    database = make(
        """
        CREATE TABLE "the parent" (a TEXT, b INTEGER, c BLOB, PRIMARY KEY (c, a)) WITHOUT ROWID;
        CREATE TABLE "select" (x INTEGER, y TEXT, fa TEXT, fc BLOB, PRIMARY KEY (y, x),
          FOREIGN KEY (fa, fc) REFERENCES "The Parent" (A, C));
        INSERT INTO "the parent" VALUES ('a', 1, x'01'), ('b', 1, x'01');
        INSERT INTO "select" VALUES
          (1, 'k', 'a', x'01'), (2, 'k', 'b', x'01'), (3, 'k', NULL, x'01'), (4, 'k', 'a', NULL);
        """
    )
    database.bury("the parent", (b"\x01", "a"))
    expected = [Orphan("select", ("k", 1), "the parent", (b"\x01", "a"))]
    assert database.written("select", *[("k", i) for i in range(1, 5)]) == expected
    assert database.deleted("the parent", (b"\x01", "a"), (b"\x02", "a")) == expected
    database.connection.execute('CREATE INDEX "an index" ON "select" (fc DESC, y)')
    database.foreign_keys = load_foreign_keys(database.connection, database.schema)
    assert database.foreign_keys.by_parent["the parent"][0].indexed
    assert database.deleted("the parent", (b"\x01", "a"), (b"\x02", "a")) == expected


def test_parent_columns_left_out_mean_its_primary_key(make: Make) -> None:
    database = make(
        """
        CREATE TABLE parent (v, b TEXT, a INTEGER, PRIMARY KEY (a, b));
        CREATE TABLE child (id INTEGER PRIMARY KEY, pa INTEGER, pb TEXT, FOREIGN KEY (pa, pb) REFERENCES parent);
        CREATE TABLE wrong (id INTEGER PRIMARY KEY, pa INTEGER REFERENCES parent);
        INSERT INTO parent VALUES (0, 'x', 1);
        INSERT INTO child VALUES (1, 1, 'x');
        """
    )
    assert "wrong" not in database.foreign_keys.by_child  # SQLite itself: "foreign key mismatch"
    database.bury("parent", (1, "x"))
    assert database.written("child", (1,)) == [Orphan("child", (1,), "parent", (1, "x"))]
    assert database.deleted("parent", (1, "x")) == [Orphan("child", (1,), "parent", (1, "x"))]


def test_a_table_that_refers_to_itself_and_twice_to_another(make: Make) -> None:
    database = make(
        """
        CREATE TABLE person (id INTEGER PRIMARY KEY, boss INTEGER REFERENCES person,
          deputy INTEGER REFERENCES PERSON(ID));
        INSERT INTO person VALUES (1, 1, NULL), (2, 1, 3), (3, 2, 1), (4, 4, 4);
        """
    )
    database.bury("person", (1,), (4,))
    expected = {Orphan("person", (2,), "person", (1,)), Orphan("person", (3,), "person", (1,))}
    assert set(database.deleted("person", (1,), (4,))) == expected
    assert set(database.written("person", (2,), (3,))) == expected


@pytest.mark.parametrize("index", ["", "CREATE INDEX i ON child(tag COLLATE NOCASE)", "CREATE INDEX i ON child(tag)"])
def test_the_parents_collation_decides(index: str, make: Make) -> None:
    database = make(
        f"""
        CREATE TABLE tag (name TEXT COLLATE NOCASE PRIMARY KEY);
        CREATE TABLE exact (name TEXT PRIMARY KEY);
        CREATE TABLE child (id INTEGER PRIMARY KEY, tag TEXT REFERENCES tag,
          exact TEXT COLLATE NOCASE REFERENCES exact);
        {index};
        INSERT INTO tag VALUES ('Red'); INSERT INTO exact VALUES ('Red'), ('RED');
        INSERT INTO child VALUES (1, 'rED', 'Red'), (2, 'blue', 'RED');
        """
    )
    database.bury("tag", ("Red",))
    database.bury("exact", ("Red",))
    by_tag, by_exact = Orphan("child", (1,), "tag", ("rED",)), Orphan("child", (1,), "exact", ("Red",))
    assert set(database.written("child", (1,), (2,))) == {by_tag, by_exact}
    assert database.deleted("tag", ("Red",)) == [by_tag]
    assert database.deleted("exact", ("Red",)) == [by_exact]


def test_values_take_the_affinity_of_the_parents_column(make: Make) -> None:
    database = make(
        """
        CREATE TABLE parent (id INTEGER PRIMARY KEY);
        CREATE TABLE code (id TEXT PRIMARY KEY);
        CREATE TABLE child (id INTEGER PRIMARY KEY, parent_id REFERENCES parent, code INTEGER REFERENCES code);
        INSERT INTO parent VALUES (1); INSERT INTO code VALUES ('7'), ('07');
        INSERT INTO child VALUES (1, '1', 7);
        """
    )
    database.bury("parent", (1,))
    database.bury("code", ("7",))
    assert {o.parent_table for o in database.written("child", (1,))} == {"parent", "code"}


def test_text_that_is_not_utf8(make: Make) -> None:
    database = make(
        """
        CREATE TABLE parent (id TEXT PRIMARY KEY);
        CREATE TABLE child (id TEXT PRIMARY KEY, parent_id TEXT REFERENCES parent);
        INSERT INTO parent VALUES (CAST(x'ff' AS TEXT)), ('p');
        INSERT INTO child VALUES (CAST(x'fe' AS TEXT), CAST(x'ff' AS TEXT)), ('c', 'p');
        """
    )
    raw: Row = (RawText(b"\xff"),)
    database.bury("parent", raw, ("p",))
    first, second = database.deleted("parent", raw, ("p",))
    assert (first.child_key, first.parent_key) == ((RawText(b"\xfe"),), raw)
    assert isinstance(first.child_key[0], RawText)
    assert (second.child_key, second.parent_key) == (("c",), ("p",))
    assert database.written("child", (RawText(b"\xfe"),), ("c",)) == [first, second]


def test_what_is_left_out(make: Make) -> None:
    """References to a UNIQUE column (no tombstone has its value), and tables that are not replicated."""
    database = make(
        """
        CREATE TABLE parent (id INTEGER PRIMARY KEY, code TEXT UNIQUE, a INTEGER, UNIQUE (id, a));
        CREATE TABLE hidden (id INTEGER PRIMARY KEY, parent_id INTEGER REFERENCES parent);
        CREATE TABLE child (id INTEGER PRIMARY KEY, code TEXT REFERENCES parent(code), p INTEGER, a INTEGER,
          hidden_id INTEGER REFERENCES hidden, nowhere INTEGER REFERENCES missing(id),
          FOREIGN KEY (p, a) REFERENCES parent(id, a));
        """,
        exclude=("hidden",),
    )
    assert database.foreign_keys.by_child == {} and database.foreign_keys.by_parent == {}


@pytest.mark.parametrize("index", ["", "CREATE INDEX i ON child(p2)"])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_found_agrees_with_foreign_key_check(seed: int, index: str, make: Make) -> None:
    database = make(
        f"""
        CREATE TABLE one (id INTEGER PRIMARY KEY);
        CREATE TABLE two (a TEXT, b INTEGER, PRIMARY KEY (a, b));
        CREATE TABLE child (id INTEGER PRIMARY KEY, p1 INTEGER REFERENCES one, p2 TEXT, p3 INTEGER,
          FOREIGN KEY (p2, p3) REFERENCES two (a, b));
        {index};
        """
    )
    dice = random.Random(seed)
    ones: list[Row] = [(i,) for i in range(12)]
    twos: list[Row] = [(a, b) for a in "xyz" for b in range(4)]
    execute = database.connection.execute
    database.connection.executemany("INSERT INTO one VALUES (?)", ones)
    database.connection.executemany("INSERT INTO two VALUES (?, ?)", twos)
    for key in range(60):
        two = dice.choice([*twos, (None, 1), ("x", None)])
        execute("INSERT INTO child VALUES (?, ?, ?, ?)", (key, dice.choice([None, *(i for (i,) in ones)]), *two))
    gone_ones, gone_twos = dice.sample(ones, 5), dice.sample(twos, 5)
    database.bury("one", *gone_ones)
    database.bury("two", *gone_twos)
    expected = {(rowid, parent) for _, rowid, parent, _ in rows(database.connection, "PRAGMA foreign_key_check")}
    assert expected
    children: list[Row] = [(key,) for key in range(60)]
    for found in (
        find(database.connection, database.foreign_keys, {"child": children}, {}),
        find(database.connection, database.foreign_keys, {}, {"one": gone_ones, "two": gone_twos}),
    ):
        assert {(orphan.child_key[0], orphan.parent_table) for orphan in found} == expected
        assert len(found) == len(expected)


def test_apsw_connection_stays_usable_inside_the_callers_transaction(make: Make) -> None:
    database = make(SIMPLE)
    database.connection.execute("BEGIN IMMEDIATE")
    database.bury("parent", (1,))
    assert len(database.deleted("parent", (1,))) == 2
    database.connection.execute("ROLLBACK")
    assert database.deleted("parent", (1,)) == []
    with pytest.raises(apsw.SQLError):
        database.connection.execute("COMMIT")
