"""Rows that do not fit wait, and nothing else is stopped by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harmonylite.db import conflicts as conflict_log
from harmonylite.db import inspect
from harmonylite.db.conflicts import waits_for
from harmonylite.model import Version
from tests.db.conftest import MakeNode
from tests.db.harness import EPOCH_MS, Node, deleted, exchange, removed, stamp, written, wrote

IDV = ("id", "v")
CHECKED = "CREATE TABLE t (id INTEGER PRIMARY KEY, v CHECK (v < 10))"

MISFITS = {
    "check": (CHECKED, wrote("t", IDV, ((1, 11), stamp(1000, 2)))),
    "check beside unique": (
        "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE CHECK (v < 10))",
        wrote("t", IDV, ((1, 11), stamp(1000, 2))),
    ),
    "not null": (
        "CREATE TABLE t (id INTEGER PRIMARY KEY, v NOT NULL)",
        wrote("t", IDV, ((1, None), stamp(1000, 2))),
    ),
    "not null with default, beside unique": (
        "CREATE TABLE t (id INTEGER PRIMARY KEY, v NOT NULL DEFAULT 5, u UNIQUE)",
        wrote("t", ("id", "v", "u"), ((1, None, 1), stamp(1000, 2))),
    ),
    "strict type": (
        "CREATE TABLE t (id INTEGER PRIMARY KEY, v INTEGER) STRICT",
        wrote("t", IDV, ((1, "text"), stamp(1000, 2))),
    ),
    "missing column": (
        "CREATE TABLE t (id INTEGER PRIMARY KEY, v)",
        wrote("t", ("id", "v", "w"), ((1, 2, 3), stamp(1000, 2))),
    ),
    "missing table": ("CREATE TABLE other (id INTEGER PRIMARY KEY)", wrote("t", IDV, ((1, 11), stamp(1000, 2)))),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_row_that_does_not_fit_is_parked_and_touches_no_version(make: MakeNode, what: str) -> None:
    script, group = MISFITS[what]
    node = make(1, script)
    applied = node.apply(group)
    assert (applied.rows, applied.parked) == (0, 1)
    [(table, key, version, reason)] = node.parked()
    assert (table, key, version) == ("t", (1,), Version(1000, 2))
    assert reason == ("does not fit" if not what.startswith("missing") else what)
    assert node.received == 1
    if what != "missing table":
        assert node.version("t", 1) is None
        assert node.rows("t") == []
    assert node.replica.parked() == 1


def test_a_parked_row_leaves_the_old_one_and_its_version(make: MakeNode) -> None:
    for script in (CHECKED, "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE CHECK (v < 10))"):
        node = make(1, script)
        node.apply(wrote("t", IDV, ((1, 5), stamp(1000, 2))))
        node.apply(wrote("t", IDV, ((1, 11), stamp(2000, 2, base=(1000, 2)))))
        assert node.rows("t") == [(1, 5)]
        assert node.version("t", 1) == Version(1000, 2)


def test_a_null_that_does_not_fit_leaves_the_old_row_beside_unique_columns_too(make: MakeNode) -> None:
    """A trial by INSERT OR REPLACE would put the column's default in the NULL's place and find nothing wrong."""
    columns = ("id", "v", "u")
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v NOT NULL DEFAULT 5, u UNIQUE)")
    node.apply(wrote("t", columns, ((1, 1, 1), stamp(1000, 2))))
    node.apply(wrote("t", columns, ((1, None, 2), stamp(2000, 2, base=(1000, 2)))))
    assert node.rows("t") == [(1, 1, 1)]
    assert node.version("t", 1) == Version(1000, 2)


def test_of_one_key_the_highest_version_is_kept(make: MakeNode) -> None:
    node = make(1, CHECKED)
    for ts in (2000, 3000, 1000):
        node.apply(wrote("t", IDV, ((1, ts), stamp(ts, 2))))
    assert [version for _, _, version, _ in node.parked()] == [Version(3000, 2)]


@pytest.mark.parametrize("base", [(0, 0), (2000, 2)], ids=["concurrent", "ordinary"])
@pytest.mark.parametrize("how", ["row", "delete"])
def test_a_parked_row_is_dropped_when_a_newer_version_applied(make: MakeNode, how: str, base: tuple[int, int]) -> None:
    node = make(1, CHECKED)
    node.apply(wrote("t", IDV, ((1, 11), stamp(2000, 2)), ((2, 12), stamp(2000, 2))))
    older = wrote("t", IDV, ((1, 1), stamp(1000, 2)))
    node.apply(older)
    assert len(node.parked()) == 2, "an older version proves nothing"
    newer = stamp(3000, 3, base=base)
    node.apply(wrote("t", IDV, ((1, 5), newer)) if how == "row" else deleted("t", ((1,), newer)))
    assert [key for _, key, _, _ in node.parked()] == [(2,)]


def test_a_missing_table_and_column_are_tried_again_when_the_schema_changes(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v)")
    node.apply(wrote("t", ("id", "v", "w"), ((1, "x", 3), stamp(2000, 2))))
    node.apply(wrote("u", IDV, ((1, "x"), stamp(1000, 2)), ((2, "y"), stamp(1000, 2))))
    node.apply(deleted("u", ((2,), stamp(2000, 3))))
    assert len(node.parked()) == 3
    node.sql("ALTER TABLE t ADD COLUMN w")
    node.sql("CREATE TABLE u (id INTEGER PRIMARY KEY, v)")
    node.replica.absorb()
    node.apply(wrote("t", ("id", "v", "w"), ((9, "z", 9), stamp(1000, 2))))
    assert node.parked() == []
    assert node.rows("t") == [(1, "x", 3), (9, "z", 9)]
    assert node.rows("u") == [(1, "x")]
    assert node.version("t", 1) == Version(2000, 2)
    assert node.version("u", 2) == Version(2000, 3)
    assert node.publish() == [], "what was received is not sent again"


def test_a_parked_row_is_tried_again_as_a_normal_row(make: MakeNode) -> None:
    """Versions are compared again: what was written here meanwhile is not overwritten."""
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v)")
    node.apply(wrote("t", ("id", "v", "w"), ((1, "theirs", 3), stamp(EPOCH_MS - 5000, 2))))
    node.sql("INSERT INTO t VALUES (1, 'mine')")
    node.publish()
    node.sql("ALTER TABLE t ADD COLUMN w")
    node.apply(wrote("t", ("id", "v", "w"), ((9, "z", 9), stamp(1000, 2))))
    assert node.rows("t")[0][:2] == (1, "mine")
    assert node.parked() == []


def test_a_check_that_was_relaxed_lets_parked_rows_in(make: MakeNode) -> None:
    node = make(1, CHECKED)
    node.apply(wrote("t", IDV, ((1, 11), stamp(1000, 2))))
    node.sql(
        "BEGIN; CREATE TABLE n (id INTEGER PRIMARY KEY, v); INSERT INTO n SELECT * FROM t; DROP TABLE t;"
        " ALTER TABLE n RENAME TO t; COMMIT"
    )
    node.apply(wrote("t", IDV, ((2, 5), stamp(1000, 2))))
    assert node.rows("t") == [(1, 11), (2, 5)]


def test_a_parked_row_is_dropped_when_an_own_newer_version_was_written(make: MakeNode) -> None:
    node = make(1, CHECKED)
    node.apply(wrote("t", IDV, ((1, 11), stamp(1000, 2))))
    node.sql("INSERT INTO t VALUES (1, 5)")
    exchange(node)
    assert node.parked() == []


def test_i1_a_write_does_not_look_at_all_that_is_parked(make: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node = make(1, "CREATE TABLE t (id TEXT COLLATE NOCASE PRIMARY KEY, v CHECK (v < 10))")
    node.apply(wrote("t", IDV, *(((f"key {number}", 11), stamp(1000, 2)) for number in range(50))))
    load, loaded = conflict_log.load_parked, []

    def count(*arguments: Any) -> list[conflict_log.Parked]:
        found = load(*arguments)
        loaded.extend(found)
        return found

    monkeypatch.setattr(conflict_log, "load_parked", count)
    node.sql("INSERT INTO t VALUES ('KEY 7', 5), ('other', 5)")
    node.absorb()
    assert [parked.key for parked in loaded] == [("key 7",)]
    assert len(node.parked()) == 49


def test_a_parked_row_is_dropped_when_it_was_beaten_while_the_daemon_was_stopped(make: MakeNode) -> None:
    node = make(1, CHECKED)
    node.apply(wrote("t", IDV, ((1, 11), stamp(1000, 2)), ((2, 11), stamp(1000, 2))))
    node.stop()
    node.sql("INSERT INTO t VALUES (1, 5)")
    node.start()
    node.absorb()
    assert [key for _, key, _, _ in node.parked()] == [(2,)]


def test_a_parked_row_is_dropped_by_its_key_in_another_spelling(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id TEXT COLLATE NOCASE PRIMARY KEY, v CHECK (v < 10))")
    node.apply(wrote("t", IDV, (("a", 11), stamp(1000, 2))))
    node.apply(wrote("t", IDV, (("A", 5), stamp(2000, 2))))
    assert node.parked() == []


def test_a_poisoned_row_does_not_keep_the_others_of_its_group(make: MakeNode) -> None:
    node = make(1, CHECKED)
    node.apply(wrote("t", IDV, ((1, 11), stamp(1000, 2)), ((2, 2), stamp(1000, 2)), ((3, 3), stamp(1000, 2))))
    assert node.rows("t") == [(2, 2), (3, 3)]
    assert len(node.parked()) == 1


def test_the_conflict_log_records_a_loser_once_and_stays_bounded(
    make: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conflict_log, "KEEP_CONFLICTS", 5)
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v)")
    node.apply(wrote("t", IDV, *(((key, "winner"), stamp(5000, 9)) for key in range(8))))
    losers = [wrote("t", IDV, ((key, "loser"), stamp(1000, 2))) for key in range(8)]
    node.apply(losers[0], losers[0])
    node.apply(losers[0])
    assert node.meta("conflicts_total") == 1
    node.apply(*losers)
    assert [key for _, key, _, _, _ in node.conflicts()] == [(3,), (4,), (5,), (6,), (7,)]
    assert node.meta("conflicts_total") == node.replica.conflicts_total == 8


def test_i10_losers_that_differ_are_each_recorded_though_they_have_one_version(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v)")
    node.apply(wrote("t", IDV, ((1, "winner"), stamp(5000, 9))))
    for content in ("one", "other", "one"):
        node.apply(wrote("t", IDV, ((1, content), stamp(1000, 2))))
    assert sorted(row["v"] for _, _, _, _, row in node.conflicts()) == ["one", "other"]
    assert node.meta("conflicts_total") == 2


# publish=false.


def test_a_publish_false_node_has_no_triggers_and_what_the_cluster_says_wins(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v)", publish=False)
    assert node.query("SELECT count(*) FROM sqlite_schema WHERE type = 'trigger'") == [(0,)]
    assert node.query("SELECT count(*) FROM sqlite_schema WHERE name LIKE '%change_log'") == [(0,)]
    node.sql("INSERT INTO t VALUES (1, 'mine')")
    assert node.publish() == []
    node.apply(wrote("t", IDV, ((1, "theirs"), stamp(1000, 2))))
    assert node.rows("t") == [(1, "theirs")]


def test_publish_false_and_true_again_guesses_at_current_ts_plus_one_never_at_now(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id INTEGER PRIMARY KEY, v)")
    node.apply(wrote("t", IDV, *(((key, "theirs"), stamp(1000, 2)) for key in (1, 2, 3))))
    node.sql("INSERT INTO t VALUES (4, 'pending')")
    node.restart(publish=False)
    node.sql("UPDATE t SET v = 'unseen' WHERE id = 1")
    node.sql("DELETE FROM t WHERE id = 2")
    node.sql("INSERT INTO t VALUES (5, 'unseen')")
    node.restart(publish=True)
    groups = node.publish()
    assert sorted(row for row, _ in written(groups, "t")) == [
        (1, "unseen"),
        (3, "theirs"),
        (4, "pending"),
        (5, "unseen"),
    ]
    assert removed(groups, "t") == [(2,)]
    assert [node.version("t", key) for key in (1, 2, 3, 5)] == [*[Version(1001, 1)] * 3, Version(1, 1)]
    pending = node.version("t", 4)
    assert pending is not None and pending.ts == EPOCH_MS + 11


def test_nodes_of_both_kinds(make: MakeNode) -> None:
    script = "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE)"
    nodes: list[Node] = [make(1, script), make(2, script), make(3, script, publish=False)]
    for number, node in enumerate(nodes[:2]):
        node.clock.tick(number * 100)
        node.sql("INSERT INTO t VALUES (?, 'same')", (number,))
    exchange(*nodes)
    assert [node.rows("t") for node in nodes] == [[(1, "same")]] * 3
    assert nodes[2].parked() == []


PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"
REBUILD = "CREATE TABLE n (id INTEGER PRIMARY KEY, v); DROP TABLE t; ALTER TABLE n RENAME TO t"

# What is declared, what takes that away again, the name that the error has.
OWN = {
    "index": (f"{PLAIN}; CREATE INDEX i ON t (v COLLATE icu)", "DROP INDEX i", "icu"),
    "unique": (f"{PLAIN}; CREATE UNIQUE INDEX i ON t (v COLLATE icu)", "DROP INDEX i", "icu"),
    "partial": (f"{PLAIN}; CREATE INDEX i ON t (v) WHERE myf(v)", "DROP INDEX i", "myf()"),
    "generated": ("CREATE TABLE t (id INTEGER PRIMARY KEY, v, w AS (myf(v)) STORED)", REBUILD, "myf()"),
    "check": ("CREATE TABLE t (id INTEGER PRIMARY KEY, v CHECK (myf(v)))", REBUILD, "myf()"),
}


@pytest.mark.parametrize("what", OWN)
def test_what_needs_the_applications_own_functions_is_told_and_waits_for_that(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    script, mend, name = OWN[what]
    node = Node(tmp_path / "app.db", 1)
    node.app.createscalarfunction("myf", lambda *_: 1, 1, deterministic=True)
    node.app.createcollation("icu", lambda a, b: (a > b) - (a < b))
    node.app.execute(f"{script}; CREATE TABLE fine (id INTEGER PRIMARY KEY, v)")
    # A trigger runs in the application alone, which has what it needs.
    node.app.execute("CREATE TRIGGER mine AFTER INSERT ON fine BEGIN SELECT nobody_has_this(); END")
    node.start()
    [told] = node.replica.unwritable
    assert (told.table, name in told.reason) == ("t", True)
    [warned] = [record for record in caplog.records if "cannot be written to" in record.message]
    assert vars(warned)["fields"] == {"table": "t", "reason": told.reason}
    if what != "check":
        assert inspect.health(node.path).unwritable == (told,)
    node.sql("INSERT INTO t (id, v) VALUES (1, 'here')")
    assert [row for row, _ in written(node.publish(), "t")] == [(1, "here")]
    node.apply(wrote("t", ("id", "v"), ((2, "there"), stamp(EPOCH_MS, 2))))
    [(_, _, _, reason)] = node.parked()
    [row] = inspect.parked(node.path, None)
    assert waits_for(reason, row.detail).endswith("what only the application has")
    assert any("what only the application has" in record.message for record in caplog.records)
    node.app.execute(mend)
    node.absorb()
    node.apply()
    assert (2, "there") in node.rows("t")
    assert node.parked() == []
    assert node.replica.unwritable == ()
    assert waits_for("does not fit", "CHECK constraint failed: v") == "the schema here fits"
    node.replica.close()
    node.app.close()


def test_an_index_that_comes_later_is_told_too(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.app.createcollation("icu", lambda a, b: (a > b) - (a < b))
    for _ in range(2):
        assert not node.replica.unwritable
        node.app.execute("CREATE INDEX i ON t (v COLLATE icu)")
        node.sql("INSERT INTO t VALUES (NULL, 'x')")
        node.absorb()
        assert [each.table for each in node.replica.unwritable] == ["t"]
        node.app.execute("DROP INDEX i")
        node.sql("INSERT INTO t VALUES (NULL, 'x')")
        node.absorb()
