"""I8: the application's triggers on the receiving side. Every database is a real file with real FTS5."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from harmonylite.db.side_triggers import TEMP_PREFIX, Fate, Report, classify, install, remove
from harmonylite.db.sql import PREFIX, open_writer, quote, rows, scalar
from harmonylite.db.trigger_sql import parse

DOC = frozenset({"doc"})
Open = Callable[..., apsw.Connection]


@pytest.fixture
def opened() -> Iterator[list[apsw.Connection]]:
    connections: list[apsw.Connection] = []
    yield connections
    for connection in connections:
        connection.close()


@pytest.fixture
def application(tmp_path: Path, opened: list[apsw.Connection]) -> Open:
    """Opens a database as an application does, and runs a script in it."""

    def open_it(script: str = "", name: str = "app.db") -> apsw.Connection:
        connection = apsw.Connection(str(tmp_path / name))
        connection.setbusytimeout(5000)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(script)
        opened.append(connection)
        return connection

    return open_it


@pytest.fixture
def receiver(tmp_path: Path, opened: list[apsw.Connection]) -> Open:
    """Opens the connection that applies changes of other nodes."""

    def open_it(name: str = "app.db") -> apsw.Connection:
        (tmp_path / name).touch()  # the application makes its database, never the daemon
        connection = open_writer(tmp_path / name)
        opened.append(connection)
        return connection

    return open_it


def fates(report: Report) -> dict[str, Fate]:
    return {trigger.name: trigger.fate for trigger in report.triggers}


def reasons(report: Report) -> dict[str, str]:
    return {trigger.name: trigger.reason for trigger in report.refused}


def temp_triggers(connection: apsw.Connection) -> list[str]:
    found = rows(connection, "SELECT name FROM sqlite_temp_schema WHERE type = 'trigger' ORDER BY name")
    return [name for (name,) in found]


# Full-text indexes stay right.

TABLE = "CREATE TABLE doc (id INTEGER PRIMARY KEY, title TEXT, body TEXT, code TEXT UNIQUE);"
DELETE_OLD = "INSERT INTO fts(fts, rowid, title, body) VALUES ('delete', old.id, old.title, old.body);"
INSERT_NEW = "INSERT INTO fts(rowid, title, body) VALUES (new.id, new.title, new.body);"

SYNC_BY_COMMAND = f"""
CREATE TRIGGER doc_ai AFTER INSERT ON doc BEGIN {INSERT_NEW} END;
CREATE TRIGGER doc_ad AFTER DELETE ON doc BEGIN {DELETE_OLD} END;
CREATE TRIGGER doc_au AFTER UPDATE ON doc BEGIN {DELETE_OLD} {INSERT_NEW} END;
"""
# As Django and Rails packages write it: BEFORE takes the old words out, AFTER puts the new ones in.
SYNC_BEFORE_AND_AFTER = f"""
CREATE TRIGGER doc_bu BEFORE UPDATE OF title, body ON doc BEGIN {DELETE_OLD} END;
CREATE TRIGGER doc_bd BEFORE DELETE ON doc BEGIN {DELETE_OLD} END;
CREATE TRIGGER doc_au AFTER UPDATE OF title, body ON doc BEGIN {INSERT_NEW} END;
CREATE TRIGGER doc_ai AFTER INSERT ON doc BEGIN {INSERT_NEW} END;
"""
SYNC_BY_ROW = """
CREATE TRIGGER doc_ai AFTER INSERT ON doc BEGIN
  INSERT INTO fts(rowid, title, body) VALUES (new.id, new.title, new.body); END;
CREATE TRIGGER doc_ad AFTER DELETE ON doc BEGIN DELETE FROM fts WHERE rowid = old.id; END;
CREATE TRIGGER doc_au AFTER UPDATE ON doc WHEN old.title IS NOT new.title OR old.body IS NOT new.body BEGIN
  UPDATE fts SET title = new.title, body = new.body WHERE rowid = old.id; END;
"""
INDEXES = {
    "external content": (
        "CREATE VIRTUAL TABLE fts USING fts5(title, body, content='doc', content_rowid='id');",
        SYNC_BY_COMMAND,
    ),
    "external content, BEFORE": (
        "CREATE VIRTUAL TABLE fts USING fts5(title, body, content=doc, content_rowid=id);",
        SYNC_BEFORE_AND_AFTER,
    ),
    "contentless": ("CREATE VIRTUAL TABLE fts USING fts5(title, body, content='');", SYNC_BY_COMMAND),
    "own content": ("CREATE VIRTUAL TABLE fts USING fts5(title, body);", SYNC_BY_ROW),
}
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord")


def random_change(dice: random.Random) -> list[tuple[str, tuple[object, ...]]]:
    """One change in one of the ways in which changes are applied."""
    key = dice.randint(1, 8)
    title, body = (" ".join(dice.choices(WORDS, k=3)) for _ in range(2))
    insert = ("INSERT INTO doc (id, title, body) VALUES (?, ?, ?)", (key, title, body))
    update = ("UPDATE doc SET id = ?, title = ?, body = ? WHERE id = ?", (key, title, body, key))
    upsert_sql = f"{insert[0]} ON CONFLICT (id) DO UPDATE SET title = excluded.title, body = excluded.body"
    upsert = (upsert_sql, insert[1])
    delete = ("DELETE FROM doc WHERE id = ?", (key,))
    return dice.choice([[upsert], [update], [delete], [delete, insert], [upsert, update, delete]])


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("seed", range(3))
def test_i8_search_finds_on_the_receiver_what_it_finds_on_the_writer(
    index: str, seed: int, application: Open, receiver: Open
) -> None:
    script = TABLE + "".join(INDEXES[index])
    writer = application(script, "writer.db")
    application(script, "receiver.db")
    applying = receiver("receiver.db")
    report = install(applying, DOC)
    assert report.recreated and not report.refused

    dice = random.Random(seed)
    for _ in range(60):
        changes = random_change(dice)
        for connection in (writer, applying):
            with connection:
                for sql, bindings in changes:
                    connection.execute(sql, bindings)

    assert rows(writer, "SELECT * FROM doc") == rows(applying, "SELECT * FROM doc") != []
    reading = application("", "receiver.db")
    for word in WORDS:
        search = "SELECT rowid FROM fts WHERE fts MATCH ? ORDER BY rowid"
        assert rows(reading, search, (word,)) == rows(writer, search, (word,))
    if index.startswith("external"):
        # Compares the index with the table it is about, and raises CorruptError on any difference.
        reading.execute("INSERT INTO fts(fts, rank) VALUES ('integrity-check', 1)")


def test_the_index_goes_stale_without_the_temp_triggers(application: Open, receiver: Open) -> None:
    """What makes the test above mean something."""
    application(TABLE + "".join(INDEXES["external content"]))
    applying = receiver()
    install(applying, DOC)
    applying.execute("INSERT INTO doc (id, title) VALUES (1, 'amber')")
    remove(applying)
    applying.execute("INSERT INTO doc (id, title) VALUES (2, 'amber')")
    assert rows(applying, "SELECT rowid FROM fts WHERE fts MATCH 'amber'") == [(1,)]


def test_a_savepoint_that_is_rolled_back_takes_the_index_back(application: Open, receiver: Open) -> None:
    application(TABLE + "".join(INDEXES["external content"]))
    applying = receiver()
    install(applying, DOC)
    applying.execute("INSERT INTO doc VALUES (1, 'amber', '', 'a'), (2, 'birch', '', 'b')")
    applying.execute("SAVEPOINT clash")
    applying.execute("INSERT OR REPLACE INTO doc VALUES (1, 'cedar', '', 'b')")
    assert rows(applying, "SELECT rowid FROM fts WHERE fts MATCH 'amber OR birch'") == []
    applying.execute("ROLLBACK TO clash")
    applying.execute("RELEASE clash")
    assert rows(applying, "SELECT rowid FROM fts WHERE fts MATCH 'amber OR birch'") == [(1,), (2,)]
    applying.execute("INSERT INTO fts(fts, rank) VALUES ('integrity-check', 1)")


# Which triggers are re-created.

SCHEMA = """
CREATE TABLE doc (id INTEGER PRIMARY KEY, title TEXT, hits INTEGER NOT NULL DEFAULT 0);
CREATE TABLE audit (id INTEGER PRIMARY KEY, what TEXT);
CREATE TABLE side (what TEXT);
CREATE TABLE side_count (what TEXT PRIMARY KEY, n INTEGER);
"""
REPLICATED = frozenset({"DOC", "audit"})


def test_fate_follows_from_the_tables_that_are_written(application: Open, receiver: Open) -> None:
    application(
        SCHEMA
        + """
        CREATE TRIGGER side_only AFTER INSERT ON Doc BEGIN INSERT INTO side VALUES (new.title); END;
        CREATE TRIGGER audit_only AFTER INSERT ON doc BEGIN INSERT INTO audit(what) SELECT what FROM side; END;
        CREATE TRIGGER own_table AFTER INSERT ON doc BEGIN UPDATE Doc SET hits = 0 WHERE id = new.id; END;
        CREATE TRIGGER both AFTER DELETE ON doc BEGIN
          DELETE FROM side WHERE what = old.title; DELETE FROM AUDIT WHERE what = old.title; END;
        CREATE TRIGGER silent BEFORE INSERT ON doc WHEN new.title IS NULL BEGIN
          SELECT RAISE(ABORT, 'a title, please'); SELECT count(*) FROM side; END;
        CREATE TRIGGER elsewhere AFTER INSERT ON side BEGIN DELETE FROM side WHERE what IS NULL; END;
        CREATE TRIGGER never AFTER UPDATE OF missing ON doc BEGIN DELETE FROM side; END;
        CREATE TRIGGER upsert AFTER UPDATE OF title ON doc BEGIN
          INSERT INTO side_count VALUES (new.title, 1) ON CONFLICT (what) DO UPDATE SET n = n + 1; END;
        """
        + f"CREATE TRIGGER {PREFIX}doc_insert AFTER INSERT ON doc BEGIN DELETE FROM side_count; END;"
    )
    applying = receiver()
    report = install(applying, REPLICATED)
    assert fates(report) == {
        "side_only": Fate.RECREATED,
        "elsewhere": Fate.RECREATED,  # side_only writes its table
        "audit_only": Fate.ROWS_ARRIVE,
        "own_table": Fate.ROWS_ARRIVE,
        "both": Fate.REFUSED,
        "silent": Fate.NO_WRITES,
        "never": Fate.NO_WRITES,
        "upsert": Fate.RECREATED,
    }
    assert "AUDIT" in reasons(report)["both"] or "audit" in reasons(report)["both"]
    made = [name for name in temp_triggers(applying) if name.startswith(TEMP_PREFIX)]
    assert made == sorted(TEMP_PREFIX + trigger.name for trigger in report.recreated)

    applying.execute("INSERT INTO doc (id, title) VALUES (1, 'a'), (2, NULL)")
    applying.execute("UPDATE doc SET title = 'b'")
    applying.execute("DELETE FROM doc WHERE id = 1")
    assert rows(applying, "SELECT what FROM side") == [("a",)]
    assert rows(applying, "SELECT what, n FROM side_count") == [("b", 2)]
    assert rows(applying, "SELECT count(*) FROM audit") == [(0,)]


def test_a_refusal_is_logged_with_its_reason(
    application: Open, receiver: Open, caplog: pytest.LogCaptureFixture
) -> None:
    application(
        SCHEMA
        + """CREATE TRIGGER both AFTER INSERT ON doc BEGIN
        INSERT INTO side VALUES (1); INSERT INTO audit(what) VALUES (1); END"""
    )
    with caplog.at_level(logging.WARNING):
        install(receiver(), REPLICATED)
    (record,) = caplog.records
    fields = record.__dict__["fields"]
    assert (fields["trigger"], fields["table"]) == ("both", "doc")
    assert "replicated tables (audit) and others (side)" in fields["reason"]


def test_functions_of_the_application(application: Open, receiver: Open) -> None:
    """They matter only to a trigger that has to run here; what it would write is found out all the same."""
    writing = application(
        SCHEMA
        + """
        CREATE TRIGGER to_side AFTER INSERT ON doc BEGIN INSERT INTO side VALUES (slug(new.title, other(1))); END;
        CREATE TRIGGER to_doc AFTER INSERT ON doc BEGIN UPDATE doc SET title = slug(title) WHERE id = new.id; END;
        CREATE TRIGGER notifies AFTER INSERT ON doc BEGIN SELECT notify(new.id); END;
        CREATE TRIGGER in_when AFTER INSERT ON doc WHEN wanted(new.id) BEGIN INSERT INTO side VALUES (1); END;
        CREATE TRIGGER fine AFTER INSERT ON doc BEGIN INSERT INTO side VALUES (upper(new.title)); END;
        """
    )
    for function in ("slug", "other", "notify", "wanted"):
        writing.createscalarfunction(function, lambda *_: 1)
    applying = receiver()
    report = install(applying, REPLICATED)
    assert fates(report) == {
        "to_side": Fate.REFUSED,
        "to_doc": Fate.ROWS_ARRIVE,
        "notifies": Fate.NO_WRITES,
        "in_when": Fate.REFUSED,
        "fine": Fate.RECREATED,
    }
    assert "other, slug" in reasons(report)["to_side"] and "wanted" in reasons(report)["in_when"]
    applying.execute("INSERT INTO doc (id, title) VALUES (1, 'a')")
    assert rows(applying, "SELECT what FROM side") == [("A",)]
    with pytest.raises(apsw.SQLError, match="no such function"):  # the stand-ins are gone
        applying.execute("SELECT slug(1)")


def test_a_trigger_that_does_not_compile_harms_no_other(application: Open, receiver: Open) -> None:
    application(
        SCHEMA
        + """
        CREATE TABLE gone (x);
        CREATE VIEW shown AS SELECT what FROM side;
        CREATE TRIGGER broken AFTER INSERT ON doc BEGIN INSERT INTO gone VALUES (1); END;
        CREATE TRIGGER through_view AFTER INSERT ON doc BEGIN INSERT INTO shown VALUES (1); END;
        CREATE TRIGGER shown_insert INSTEAD OF INSERT ON shown BEGIN INSERT INTO side VALUES (new.what); END;
        CREATE TRIGGER fine AFTER INSERT ON doc BEGIN INSERT INTO side VALUES (new.title); END;
        DROP TABLE gone;
        """
    )
    applying = receiver()
    report = install(applying, REPLICATED)
    assert fates(report) == {"broken": Fate.REFUSED, "through_view": Fate.REFUSED, "fine": Fate.RECREATED}
    assert "no such table" in reasons(report)["broken"]
    assert "view" in reasons(report)["through_view"]
    applying.execute("INSERT INTO doc (id, title) VALUES (1, 'a')")
    assert rows(applying, "SELECT what FROM side") == [("a",)]


@pytest.mark.parametrize("outcome", ["ABORT, 'no'", "IGNORE", "FAIL, 'no'"])
def test_a_trigger_that_could_keep_a_received_row_out_is_refused(
    outcome: str, application: Open, receiver: Open
) -> None:
    application(
        SCHEMA
        + f"""
        CREATE TRIGGER strict BEFORE INSERT ON doc BEGIN
          INSERT INTO side VALUES (new.title);
          SELECT CASE WHEN new.title IS NULL THEN raise /* ! */ ({outcome}) END; END;
        CREATE TRIGGER talks AFTER INSERT ON doc BEGIN INSERT INTO side VALUES ('RAISE(IGNORE)'); END;
        """
    )
    applying = receiver()
    report = install(applying, REPLICATED)
    assert fates(report) == {"strict": Fate.REFUSED, "talks": Fate.RECREATED}
    applying.execute("INSERT INTO doc (id) VALUES (1)")
    assert scalar(applying, "SELECT count(*) FROM doc") == 1


def test_a_definition_that_is_not_utf8_is_refused(application: Open, receiver: Open) -> None:
    writing = application(
        SCHEMA + "CREATE TRIGGER latin AFTER INSERT ON doc BEGIN INSERT INTO side VALUES ('cafe'); END"
    )
    writing.execute("PRAGMA writable_schema=ON")
    writing.execute(
        "UPDATE sqlite_schema SET sql = CAST(replace(CAST(sql AS BLOB), x'63616665', x'636166e9') AS TEXT)"
        " WHERE name = 'latin'"
    )
    report = install(receiver(), REPLICATED)
    assert fates(report) == {"latin": Fate.REFUSED}
    assert "cannot be read" in reasons(report)["latin"]


# The daemon writes with UPSERT and OR ABORT, the application did not: the triggers must not notice.

UPSERT = (
    "INSERT OR ABORT INTO doc (id, title, body) VALUES (?1, ?2, ?3)"
    " ON CONFLICT (id) DO UPDATE SET id = excluded.id, title = excluded.title, body = excluded.body"
)
CLAUSES = {
    "replace": """
        CREATE TABLE side (word TEXT PRIMARY KEY, doc INTEGER, note TEXT);
        CREATE TRIGGER ai AFTER INSERT ON doc BEGIN INSERT OR REPLACE INTO side VALUES (new.title, new.id, 'i'); END;
        CREATE TRIGGER au AFTER UPDATE OF title ON doc WHEN old.title IS NOT new.title BEGIN
          REPLACE INTO side VALUES (new.title, new.rowid, old.title || '-' || "NEW".[title]); END;
    """,
    "ignore": """
        CREATE TABLE side (word TEXT PRIMARY KEY, doc INTEGER NOT NULL);
        CREATE TRIGGER ai AFTER INSERT ON doc BEGIN INSERT OR IGNORE INTO side VALUES (new.title, new.id); END;
        CREATE TRIGGER au AFTER UPDATE ON doc BEGIN
          UPDATE OR IGNORE side SET word = new.title WHERE word = old.title;
          INSERT OR IGNORE INTO side VALUES (new.body, NULL); END;
        CREATE TRIGGER ad AFTER DELETE ON doc BEGIN UPDATE OR IGNORE side SET doc = NULL WHERE doc = old.id; END;
    """,
    "declared by the table": """
        CREATE TABLE side (word TEXT PRIMARY KEY /* on */ ON
          CONFLICT REPLACE, doc INTEGER NOT NULL ON CONFLICT IGNORE);
        CREATE TRIGGER ai AFTER INSERT ON doc BEGIN INSERT INTO side VALUES (new.title, new.id); END;
        CREATE TRIGGER au BEFORE UPDATE ON doc BEGIN INSERT INTO side VALUES (new.title, nullif(new.id, 3)); END;
    """,
    "of a chain": """
        CREATE TABLE side (word TEXT, doc INTEGER);
        CREATE TABLE words (word TEXT PRIMARY KEY, n INTEGER DEFAULT 1);
        CREATE TRIGGER ai AFTER INSERT ON doc BEGIN INSERT INTO side VALUES (new.title, new.id); END;
        CREATE TRIGGER au AFTER UPDATE ON doc BEGIN INSERT INTO side SELECT new.body, new.id; END;
        CREATE TRIGGER side_ai AFTER INSERT ON side BEGIN INSERT OR IGNORE INTO words (word) VALUES (new.word); END;
        CREATE TRIGGER words_ai AFTER INSERT ON words BEGIN UPDATE side SET doc = -doc WHERE word = new.word; END;
    """,
    "full text": """
        CREATE VIRTUAL TABLE side USING fts5(word);
        CREATE TRIGGER ai AFTER INSERT ON doc BEGIN
          INSERT OR REPLACE INTO side(rowid, word) VALUES (new.id, new.title); END;
        CREATE TRIGGER au AFTER UPDATE ON doc BEGIN
          INSERT OR REPLACE INTO side(rowid, word) VALUES (new.id, new.title); END;
        CREATE TRIGGER ad AFTER DELETE ON doc BEGIN DELETE FROM side WHERE rowid = old.id; END;
    """,
}


@pytest.mark.parametrize("clause", CLAUSES)
def test_i8_the_conflict_clauses_of_a_trigger_are_its_own(clause: str, application: Open, receiver: Open) -> None:
    """SQLite lets the clause of the statement that fires a trigger take their place."""
    writer = application(TABLE + CLAUSES[clause], "writer.db")
    application(TABLE + CLAUSES[clause], "receiver.db")
    applying = receiver("receiver.db")
    assert not install(applying, DOC).refused
    changed = False
    dice = random.Random(1)
    for _ in range(80):
        key, title, body = dice.randint(1, 5), dice.choice(WORDS), dice.choice(WORDS)
        there = rows(writer, "SELECT 1 FROM doc WHERE id = ?", (key,))
        if not there:
            writer.execute("INSERT INTO doc (id, title, body) VALUES (?, ?, ?)", (key, title, body))
            applying.execute(UPSERT, (key, title, body))
        elif dice.random() < 0.3:
            for connection in (writer, applying):
                connection.execute("DELETE FROM doc WHERE id = ?", (key,))
        else:
            update = "SET id = ?1, title = ?2, body = ?3 WHERE id = ?1"
            writer.execute(f"UPDATE doc {update}", (key, title, body))
            applying.execute(dice.choice([UPSERT, f"UPDATE OR ABORT doc {update}"]), (key, title, body))
        assert rows(applying, "SELECT rowid, * FROM side") == rows(writer, "SELECT rowid, * FROM side")
        changed = changed or bool(rows(writer, "SELECT 1 FROM side"))
    assert changed


def test_the_clause_of_the_firing_statement_would_take_their_place(application: Open, receiver: Open) -> None:
    """What makes the test above mean something."""
    application(TABLE + CLAUSES["replace"])
    applying = receiver()
    applying.execute(
        "CREATE TEMP TRIGGER plain AFTER INSERT ON main.doc"
        " BEGIN INSERT OR REPLACE INTO side VALUES (new.title, new.id, 'i'); END"
    )
    applying.execute(UPSERT, (1, "amber", ""))
    with pytest.raises(apsw.ConstraintError):
        applying.execute(UPSERT, (2, "amber", ""))


def test_values_that_are_handed_over_compare_as_before(application: Open, receiver: Open) -> None:
    """Collation and affinity of NEW's columns (only the rowid has one); INSERT OR REPLACE has them handed over."""
    script = """
        CREATE TABLE doc (id INTEGER PRIMARY KEY, tag TEXT COLLATE NOCASE, "the exact" TEXT, n NUMERIC, any,
          twice AS (n * 2));
        CREATE TABLE seen (id INTEGER PRIMARY KEY, a, b, c, d, e, f, g);
        CREATE TRIGGER ai AFTER INSERT ON doc BEGIN INSERT OR REPLACE INTO seen VALUES
          (new.id, new.tag = 'RED', new."the exact" = 'RED', new.n = '7', new.any = '7', typeof(new.twice),
           new.id = '1', new.oid = '1'); END;
        """
    writer = application(script, "writer.db")
    application(script, "receiver.db")
    applying = receiver("receiver.db")
    assert install(applying, DOC).recreated
    values = [
        (1, "red", "red", 7, 7),
        (2, "RED", "RED", 7.5, "7"),
        (3, None, None, None, None),
        (4, "r", b"r", "x", 7.0),
    ]
    for connection in (writer, applying):
        connection.executemany("INSERT INTO doc VALUES (?, ?, ?, ?, ?)", values)
    assert rows(applying, "SELECT * FROM seen") == rows(writer, "SELECT * FROM seen")
    assert rows(applying, "SELECT a, b, f, g FROM seen WHERE id = 1") == [(1, 0, 1, 1)]


@pytest.mark.parametrize("condition", ["", "WHEN new.title NOT LIKE '%x' OR 0 -- no x"])
def test_before_insert_does_not_run_for_an_upsert_that_updates(
    condition: str, application: Open, receiver: Open
) -> None:
    application(
        f"""
        CREATE TABLE doc (a TEXT COLLATE NOCASE, b INTEGER, title TEXT, PRIMARY KEY (a, b)) WITHOUT ROWID;
        CREATE TABLE side (x);
        CREATE TRIGGER bi BEFORE INSERT ON doc {condition}
        BEGIN INSERT INTO side VALUES (new.title); END;
        """
    )
    applying = receiver()
    assert fates(install(applying, DOC)) == {"bi": Fate.RECREATED}
    upsert = "INSERT INTO doc VALUES (?, ?, ?) ON CONFLICT (a, b) DO UPDATE SET a = excluded.a, title = excluded.title"
    for values in [("k", 1, "first"), ("K", 1, "again"), ("k", 2, "second"), ("k", 3, "with x")]:
        applying.execute(upsert, values)
    expected = [("first",), ("second",)] if condition else [("first",), ("second",), ("with x",)]
    assert rows(applying, "SELECT x FROM side") == expected


# Chains of triggers, and recursion.


def test_triggers_on_what_re_created_triggers_write_follow_the_same_rule(application: Open, receiver: Open) -> None:
    application(
        SCHEMA
        + """
        CREATE TABLE third (x);
        CREATE TRIGGER first AFTER INSERT ON doc BEGIN INSERT INTO side VALUES (new.title); END;
        CREATE TRIGGER second AFTER INSERT ON side BEGIN
          INSERT INTO side_count VALUES (new.what, 1) ON CONFLICT DO UPDATE SET n = n + 1; END;
        CREATE TRIGGER last AFTER UPDATE ON side_count BEGIN INSERT INTO third VALUES (new.n); END;
        CREATE TRIGGER back AFTER INSERT ON side BEGIN INSERT INTO audit(what) VALUES (new.what); END;
        CREATE TRIGGER both AFTER INSERT ON third BEGIN
          INSERT INTO audit(what) VALUES (1); DELETE FROM side; END;
        """
    )
    applying = receiver()
    report = install(applying, REPLICATED)
    assert fates(report) == {
        "first": Fate.RECREATED,
        "second": Fate.RECREATED,
        "last": Fate.RECREATED,
        "back": Fate.ROWS_ARRIVE,
        "both": Fate.REFUSED,
    }
    applying.execute("INSERT INTO doc (id, title) VALUES (1, 'a'), (2, 'a'), (3, 'b')")
    assert rows(applying, "SELECT * FROM side_count ORDER BY what") == [("a", 2), ("b", 1)]
    assert rows(applying, "SELECT * FROM third") == [(2,)]
    assert rows(applying, "SELECT * FROM audit") == []


def test_a_trigger_that_would_fire_itself_is_refused_since_recursion_is_on(application: Open, receiver: Open) -> None:
    application(
        """
        CREATE TABLE doc (id INTEGER PRIMARY KEY, title TEXT);
        CREATE TABLE stat (id INTEGER PRIMARY KEY, n INTEGER, changed INTEGER DEFAULT 0);
        CREATE TABLE ring (x); CREATE TABLE ring2 (x);
        INSERT INTO stat (id, n) VALUES (1, 0);
        CREATE TRIGGER counts AFTER INSERT ON doc BEGIN UPDATE stat SET n = n + 1; INSERT INTO ring VALUES (1); END;
        CREATE TRIGGER touch AFTER UPDATE ON stat BEGIN UPDATE stat SET changed = changed + 1; END;
        CREATE TRIGGER touch_once AFTER UPDATE OF n ON stat BEGIN UPDATE stat SET changed = changed + 100; END;
        CREATE TRIGGER round AFTER INSERT ON ring BEGIN INSERT INTO ring2 VALUES (1); END;
        CREATE TRIGGER and_round AFTER INSERT ON ring2 BEGIN INSERT INTO ring VALUES (1); END;
        CREATE TRIGGER trim AFTER INSERT ON ring BEGIN DELETE FROM ring WHERE rowid < new.rowid - 2; END;
        """
    )
    applying = receiver()
    assert scalar(applying, "PRAGMA recursive_triggers") == 1
    report = install(applying, DOC)
    assert fates(report) == {
        "counts": Fate.RECREATED,
        "touch": Fate.REFUSED,
        "touch_once": Fate.RECREATED,
        "round": Fate.REFUSED,
        "and_round": Fate.REFUSED,
        "trim": Fate.RECREATED,
    }
    for key in range(5):
        applying.execute("INSERT INTO doc VALUES (?, '')", (key,))
    assert rows(applying, "SELECT n, changed FROM stat") == [(5, 500)]
    assert scalar(applying, "SELECT count(*) FROM ring") == 3


def test_timing_when_and_columns_are_kept(application: Open, receiver: Open) -> None:
    application(
        SCHEMA
        + """
        CREATE TRIGGER b BEFORE UPDATE ON doc BEGIN
          INSERT INTO side SELECT 'before ' || title FROM doc WHERE id = old.id; END;
        CREATE TRIGGER a AFTER UPDATE ON doc BEGIN
          INSERT INTO side SELECT 'after ' || title FROM doc WHERE id = old.id; END;
        CREATE TRIGGER c AFTER UPDATE OF hits, title ON doc FOR EACH ROW WHEN new.hits > 5 BEGIN
          INSERT INTO side VALUES ('many'); END;
        CREATE TRIGGER d UPDATE OF hits ON doc BEGIN INSERT INTO side VALUES ('hits'); END;
        """
    )
    applying = receiver()
    assert len(install(applying, REPLICATED).recreated) == 4
    applying.execute("INSERT INTO doc (id, title) VALUES (1, 'x')")
    applying.execute("UPDATE doc SET title = 'y'")
    assert sorted(rows(applying, "SELECT what FROM side")) == [("after y",), ("before x",)]
    applying.execute("DELETE FROM side")
    applying.execute("UPDATE doc SET hits = 6")
    assert {what for (what,) in rows(applying, "SELECT what FROM side")} == {"after y", "before y", "many", "hits"}


# Installing again, transactions, and the connection it needs.


def test_install_again_replaces_everything(application: Open, receiver: Open) -> None:
    writing = application(SCHEMA + "CREATE TRIGGER t AFTER INSERT ON doc BEGIN INSERT INTO side VALUES ('old'); END")
    applying = receiver()
    for _ in range(3):
        install(applying, REPLICATED)
    applying.execute("INSERT INTO doc (id) VALUES (1)")
    writing.execute(
        "DROP TRIGGER t; CREATE TRIGGER t AFTER INSERT ON doc BEGIN INSERT INTO side VALUES ('new'); END;"
        " CREATE TRIGGER t2 AFTER DELETE ON doc BEGIN INSERT INTO side VALUES ('gone'); END"
    )
    assert fates(install(applying, REPLICATED)) == {"t": Fate.RECREATED, "t2": Fate.RECREATED}
    applying.execute("INSERT INTO doc (id) VALUES (2)")
    applying.execute("DELETE FROM doc WHERE id = 1")
    assert rows(applying, "SELECT what FROM side") == [("old",), ("new",), ("gone",)]
    # A table that is replicated from now on.
    assert fates(install(applying, REPLICATED | {"side"})) == {"t": Fate.ROWS_ARRIVE, "t2": Fate.ROWS_ARRIVE}
    assert temp_triggers(applying) == []


@pytest.mark.parametrize("seen_without_table", [False, True])
def test_a_table_that_was_dropped_and_made_again_has_each_trigger_once(
    seen_without_table: bool, application: Open, receiver: Open
) -> None:
    """SQLite keeps the text of a TEMP trigger whose table is gone, and revives it with the table."""
    trigger = "CREATE TRIGGER t AFTER INSERT ON doc BEGIN INSERT INTO side VALUES (new.id); END;"
    writing = application(SCHEMA + trigger)
    applying = receiver()
    install(applying, REPLICATED)
    writing.execute("DROP TABLE doc")
    if seen_without_table:
        assert fates(install(applying, REPLICATED)) == {}
        assert temp_triggers(applying) == []
        assert scalar(applying, "PRAGMA writable_schema") == 0
    else:
        assert scalar(applying, "SELECT count(*) FROM side") == 0  # reads the schema, does not install
    writing.execute("CREATE TABLE doc (id INTEGER PRIMARY KEY);" + trigger)
    assert fates(install(applying, REPLICATED)) == {"t": Fate.RECREATED}
    applying.execute("INSERT INTO doc VALUES (7)")
    assert rows(applying, "SELECT what FROM side") == [("7",)]


def test_a_rebuild_of_the_table_and_a_rename(application: Open, receiver: Open) -> None:
    trigger = "CREATE TRIGGER t AFTER INSERT ON doc BEGIN INSERT INTO side VALUES (new.title); END;"
    writing = application(SCHEMA + trigger)
    applying = receiver()
    install(applying, REPLICATED)
    writing.execute(
        "BEGIN; CREATE TABLE new_doc (id INTEGER PRIMARY KEY, title TEXT); DROP TABLE doc;"
        f"ALTER TABLE new_doc RENAME TO doc; {trigger} COMMIT"
    )
    install(applying, REPLICATED)
    applying.execute("INSERT INTO doc VALUES (1, 'rebuilt')")
    writing.execute("ALTER TABLE doc RENAME TO paper")
    assert fates(install(applying, REPLICATED)) == {}
    assert fates(install(applying, frozenset({"paper"}))) == {"t": Fate.RECREATED}
    applying.execute("INSERT INTO paper VALUES (2, 'renamed')")
    assert rows(applying, "SELECT what FROM side") == [("rebuilt",), ("renamed",)]


@pytest.mark.parametrize("clause", ["", "OR IGNORE"])
def test_inside_a_transaction_a_rollback_takes_the_triggers_back(
    clause: str, application: Open, receiver: Open
) -> None:
    application(SCHEMA + f"CREATE TRIGGER t AFTER INSERT ON doc BEGIN INSERT {clause} INTO side VALUES (1); END")
    applying = receiver()
    applying.execute("BEGIN IMMEDIATE")
    install(applying, REPLICATED)
    applying.execute("INSERT INTO doc (id) VALUES (1)")
    assert scalar(applying, "SELECT count(*) FROM side") == 1
    applying.execute("ROLLBACK")
    assert temp_triggers(applying) == []
    applying.execute("BEGIN IMMEDIATE")
    install(applying, REPLICATED)
    applying.execute("COMMIT")
    applying.execute("INSERT INTO doc (id) VALUES (1)")
    assert scalar(applying, "SELECT count(*) FROM side") == 1


def test_installing_writes_nothing_to_the_database(application: Open, receiver: Open) -> None:
    """The application may hold the write lock, and its read transactions see no change."""
    writing = application(
        SCHEMA + "CREATE TRIGGER t AFTER DELETE ON doc BEGIN DELETE FROM side; END; INSERT INTO doc (id) VALUES (1)"
    )
    applying = receiver()
    version = scalar(writing, "PRAGMA data_version"), scalar(writing, "PRAGMA schema_version")
    with writing:
        writing.execute("INSERT INTO side VALUES ('kept')")
        assert install(applying, REPLICATED).recreated
        remove(applying)
        install(applying, REPLICATED)
    assert (scalar(writing, "PRAGMA data_version"), scalar(writing, "PRAGMA schema_version")) == version
    assert rows(applying, "SELECT id FROM doc") == [(1,)]
    assert rows(applying, "SELECT what FROM side") == [("kept",)]


def test_classify_leaves_the_connection_as_it_was(application: Open, receiver: Open) -> None:
    writing = application(SCHEMA + "CREATE TRIGGER t AFTER INSERT ON doc BEGIN INSERT INTO side VALUES (1); END")
    applying = receiver()
    install(applying, REPLICATED)
    applying.execute("CREATE TEMP TRIGGER mine AFTER DELETE ON main.doc BEGIN SELECT 1; END")
    before = rows(applying, "SELECT name, sql FROM sqlite_temp_schema ORDER BY name")
    denied: list[str | None] = []

    def authorizer(_code: int, first: str | None, *_: str | None) -> int:
        denied.append(first)
        return apsw.SQLITE_OK

    applying.authorizer = authorizer
    writing.execute("CREATE TRIGGER u AFTER UPDATE ON doc BEGIN INSERT INTO side VALUES (1); END")
    assert [trigger.name for trigger in classify(applying, REPLICATED)] == ["t", "u"]
    assert rows(applying, "SELECT name, sql FROM sqlite_temp_schema ORDER BY name") == before
    denied.clear()
    rows(applying, "SELECT title FROM doc")
    assert "doc" in denied
    applying.authorizer = None
    remove(applying)
    assert rows(applying, "SELECT name FROM sqlite_temp_schema") == [("mine",)]
    applying.execute("INSERT INTO doc (id) VALUES (1)")
    assert scalar(applying, "SELECT count(*) FROM side") == 0


def test_a_connection_whose_schema_triggers_fire_is_refused(application: Open) -> None:
    writing = application(SCHEMA)
    for function in (install, classify):
        with pytest.raises(ValueError, match="switched off"):
            function(writing, REPLICATED)


# Reading definitions. SQLite is the judge: it made the trigger from the text, and the TEMP trigger has to fire.

QUOTES: tuple[Callable[[str], str], ...] = (
    lambda name: '"' + name.replace('"', '""') + '"',
    lambda name: "`" + name.replace("`", "``") + "`",
    lambda name: f"[{name}]",
    lambda name: "'" + name.replace("'", "''") + "'",
)
NAMES = ("select", "after", "naïve \U0001f41f", "a'b\"c`d", "on.t -- no comment", "/* x */", "ON main.doc BEGIN")


@pytest.mark.parametrize(("name", "quoted"), list(itertools.product(NAMES, QUOTES)))
def test_quoted_names(name: str, quoted: Callable[[str], str], application: Open, receiver: Open) -> None:
    application(
        f"CREATE TABLE {quote(name)} (id INTEGER PRIMARY KEY, {quote(name + ' col')} TEXT); CREATE TABLE side (x);"
        f"CREATE TRIGGER {quoted(name)}/* ON x */AFTER\n-- BEGIN 'it'\n UPDATE\tOF id , {quoted(name + ' col')}"
        f" ON{quoted(name)} BEGIN INSERT INTO side VALUES (new.{quote(name + ' col')}); END"
    )
    applying = receiver()
    assert fates(install(applying, frozenset({name}))) == {name: Fate.RECREATED}
    applying.execute(f"INSERT INTO {quote(name)} VALUES (1, 'a')")
    applying.execute(f"UPDATE {quote(name)} SET {quote(name + ' col')} = 'b'")
    assert rows(applying, "SELECT x FROM side") == [("b",)]


@pytest.mark.parametrize(
    "header",
    [
        "TRIGGER after AFTER INSERT ON doc",
        "TRIGGER before INSERT ON doc",
        "TRIGGER instead AFTER INSERT ON main.doc",
        'TRIGGER IF NOT EXISTS main."of" AFTER INSERT ON "main" . "doc"',
        "trigger/**/\r\n\f[if]/* */after--\n insert\ton'DOC'for each row when(1)",
        "TRIGGER _$x1 AFTER INSERT ON doc FOR/* WHEN 0 */EACH ROW WHEN 'x' NOT IN (SELECT what FROM side)",
        "TRIGGER été AFTER INSERT ON doc /* an unlikely ; */",
    ],
)
def test_headers(header: str, application: Open, receiver: Open) -> None:
    application(SCHEMA + f"CREATE {header} BEGIN INSERT INTO side VALUES ('; END'); END")
    applying = receiver()
    assert set(fates(install(applying, REPLICATED)).values()) == {Fate.RECREATED}
    applying.execute("INSERT INTO doc (id) VALUES (1)")
    assert rows(applying, "SELECT what FROM side") == [("; END",)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "CREATE TABLE t (x)",
        "CREATE TRIGGER",
        "CREATE TRIGGER t",
        "CREATE TRIGGER t AFTER",
        "CREATE TRIGGER t AFTER SELECT ON x BEGIN SELECT 1; END",
        "CREATE TRIGGER t INSTEAD INSERT ON x BEGIN SELECT 1; END",
        "CREATE TRIGGER t AFTER UPDATE OF , ON x BEGIN SELECT 1; END",
        "CREATE TRIGGER t AFTER 'INSERT' ON x BEGIN SELECT 1; END",
        "CREATE TRIGGER t AFTER INSERT x BEGIN SELECT 1; END",
        "CREATE TRIGGER t AFTER INSERT ON x",
        "CREATE TRIGGER t AFTER INSERT ON x FOR ROW BEGIN SELECT 1; END",
        "CREATE TRIGGER t AFTER INSERT ON x WHEN 1 BEGIN",
    ],
)
def test_what_is_no_trigger_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse(text)


def test_parse_reads_what_may_stand_before_the_name() -> None:
    """SQLite stores a normal form; other writers of sqlite_schema may not."""
    text = "create temporary trigger if not exists temp.[x] instead of update of a,\"b\" on v.'w' for each row"
    declaration = parse(text + " begin update t set x = 1; end")
    assert (declaration.timing, declaration.event) == ("INSTEAD OF", "UPDATE")
    assert declaration.columns == ("a", "b")


def test_parse_finds_the_body_behind_a_condition_that_mentions_begin() -> None:
    declaration = parse(
        "CREATE TRIGGER t AFTER INSERT ON x WHEN new.begin = 'BEGIN SELECT' AND \"BEGIN\" -- BEGIN SELECT\n"
        " /* BEGIN INSERT */ BEGIN /* the body */ DELETE FROM t; END"
    )
    assert declaration.body == "BEGIN /* the body */ DELETE FROM t; END"
    assert declaration.condition.startswith("new.begin") and declaration.condition.endswith("INSERT */")


def test_references_are_found_and_replaced_where_they_are_references() -> None:
    declaration = parse(
        'CREATE TRIGGER t AFTER UPDATE ON x BEGIN INSERT INTO y SELECT new.a, NEW . "b c", [old].[a], "Old".a,'
        " 'new.a', t.new, main.new.a, new /* . */ . A, renew.a -- new.a\n FROM t; END"
    )
    assert declaration.references() == (("NEW", "a"), ("NEW", "b c"), ("OLD", "a"))
    names = {reference: f"<{i}>" for i, reference in enumerate(declaration.references())}
    assert declaration.body_with(names) == (
        "BEGIN INSERT INTO y SELECT <0>, <1>, <2>, <2>, 'new.a', t.new, main.new.a, <0>, renew.a -- new.a\n FROM t; END"
    )
