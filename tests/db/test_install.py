"""Half of our things are gone, tables are renamed and rebuilt, everything is removed."""

from __future__ import annotations

import logging
from pathlib import Path

import apsw
import pytest

from harmonylite.db import tables
from harmonylite.db.cleanup import cleanup
from harmonylite.db.database import PositionsLostError
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.db.tables import ForeignDatabaseError
from harmonylite.model import Undecodable, Unread, Version
from tests.db.conftest import MakeNode
from tests.db.harness import EPOCH_MS, STREAM, Killer, Node, ours, removed, stamp, written, wrote

PLAIN = "CREATE TABLE t (id INTEGER PRIMARY KEY, v)"
IDV = ("id", "v")
REBUILD = "BEGIN; CREATE TABLE n ({0}); INSERT INTO n SELECT * FROM t; DROP TABLE t; ALTER TABLE n RENAME TO t; COMMIT"


def wake(node: Node) -> None:
    """Any write transaction of the daemon looks at the schema first."""
    node.apply(wrote("t", IDV, ((99, "wake"), stamp(1, 2))))


OURS = ("t_version", "t_change_log", *(name.removeprefix("__harmonylite__") for name in tables._shapes()))

# The table is gone, or has other columns than it should.
DAMAGE = {
    "missing": "DROP TABLE {0}",
    "other columns": "DROP TABLE {0}; CREATE TABLE {0} (x, y); INSERT INTO {0} VALUES (1, 2)",
    "a column more": "ALTER TABLE {0} ADD COLUMN more",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", OURS)
def test_i3_any_table_of_ours_that_is_missing_or_damaged_is_rebuilt_without_loss(
    make: MakeNode, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    node, other = make(1, PLAIN), make(2, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'pending')")
    node.absorb()
    node.sql("INSERT INTO t VALUES (2, 'logged')")
    node.stop() if name != "t_change_log" else node.replica.close()
    node.app.execute(DAMAGE[damage].format(f'"__harmonylite__{name}"'))
    node.start()
    assert f"__harmonylite__{name}" in ours(node)
    warned = [r for r in caplog.records if r.message == "a table of ours was damaged and is made anew"]
    assert len(warned) == (damage != "missing" and not name.startswith("t_"))
    other.apply(*node.publish())
    assert other.rows("t") == [(1, "pending"), (2, "logged")]
    node.sql("INSERT INTO t VALUES (3, 'after')")
    other.apply(*node.publish())
    assert (3, "after") in other.rows("t")
    everything_works(node)


def everything_works(node: Node) -> None:
    """What uses those tables that are empty most of the time."""
    missing = wrote("t", (*IDV, "w"), ((7, "seven", "w"), stamp(EPOCH_MS, 2)))
    node.apply(missing, wrote("elsewhere", IDV, ((1, "x"), stamp(EPOCH_MS, 2))))
    assert node.replica.parked() == 2
    bad = Undecodable(node.received + 1, b"no message", "no version can read it")
    newer = Undecodable(node.received + 2, b"\x09", "of a newer version", Unread(EPOCH_MS, 9, joined=True))
    node.deliver((), [bad, newer])
    assert node.replica.completeness.unread_messages == 1
    node.sql("INSERT INTO t VALUES (8, 'here')")
    node.absorb()
    node.sql("UPDATE t SET v = 'again' WHERE id = 8")
    node.publish()
    node.apply(wrote("t", ("id",), ((8,), stamp(node.clock.now_ms + 1_000, 2))))
    assert node.query(f"SELECT col FROM {tables.SPARSE}") == [("v",)]
    node.apply(wrote("t", IDV, ((8, "there"), stamp(node.clock.now_ms + 2_000, 3))))
    assert [conflict[3] for conflict in node.conflicts()] == ["concurrent write"]
    assert node.replica.position(STREAM) is not None
    node.sql("ALTER TABLE t ADD COLUMN w")
    wake(node)
    assert (7, "seven", "w") in node.rows("t")


@pytest.mark.parametrize(
    ("change", "waits"), [("", True), ("ALTER TABLE t ADD COLUMN w", True), ("CREATE TABLE z (id PRIMARY KEY)", False)]
)
def test_a_start_takes_what_was_logged_at_once_only_if_it_has_to(make: MakeNode, change: str, waits: bool) -> None:
    """A long log would keep the application from its lock for seconds; while capture is as it was, it can wait."""
    node = make(1, PLAIN)
    node.stop()
    node.sql("INSERT INTO t VALUES (1, 'logged')")
    node.sql(change)
    node.start()
    assert node.replica.logged() == (1 if waits else 0)
    assert len(written(node.publish(), "t")) == 1


def test_a_table_that_is_left_out_does_not_have_all_absorbed_at_once_at_each_start(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; CREATE TABLE u (id INTEGER PRIMARY KEY)")
    node.sql("INSERT INTO u VALUES (1)")
    node.restart(exclude=("u",))
    assert node.query('SELECT count(*) FROM "__harmonylite__u_version"') == [(1,)], "what was logged of it is not lost"
    node.stop()
    node.sql("INSERT INTO t VALUES (1, 'logged')")
    node.start()
    assert node.replica.logged() == 1
    node.restart(exclude=())
    assert len(written(node.publish(), "u")) == 1


def test_i6_what_is_logged_comes_before_parked_rows_that_fit_now(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.apply(wrote("t", (*IDV, "w"), ((1, "parked", 5), stamp(2000, 2))))
    node.sql("INSERT INTO t VALUES (1, 'logged')")
    node.sql("ALTER TABLE t ADD COLUMN w")
    node.replica.follow_schema()
    assert node.replica.parked() == 0
    assert node.rows("t") == [(1, "logged", None)]


def test_a_lost_trigger_means_that_anything_may_have_changed(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.apply(wrote("t", IDV, *(((key, "theirs"), stamp(1000, 2)) for key in (1, 2))))
    node.stop()
    node.app.execute('DROP TRIGGER "__harmonylite__t_update"')
    node.sql("UPDATE t SET v = 'unseen' WHERE id = 1")
    node.start()
    assert sorted(row for row, _ in written(node.publish(), "t")) == [(1, "unseen"), (2, "theirs")]
    assert node.version("t", 1) == Version(1001, 1), "at current ts + 1, never at now"
    node.sql("UPDATE t SET v = 'seen' WHERE id = 2")
    assert [row for row, _ in written(node.publish(), "t")] == [(2, "seen")]


def test_a_damaged_version_table_is_rebuilt_and_the_stream_read_again(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.apply(wrote("t", IDV, ((1, "theirs"), stamp(1000, 2))))
    node.stop()
    node.app.execute('ALTER TABLE "__harmonylite__t_version" RENAME COLUMN base_ts TO x')
    node.start()
    assert node.replica.position(STREAM) is None
    assert [row for row, _ in written(node.publish(), "t")] == [(1, "theirs")]
    node.received = 0
    node.apply(wrote("t", IDV, ((1, "theirs"), stamp(1000, 2))))
    assert node.version("t", 1) == Version(1000, 2)


def test_a_trigger_never_stands_without_its_log(make: MakeNode) -> None:
    """At every statement of installing and removing, another connection sees both or neither."""
    node = make(1, PLAIN)
    node.stop()
    cleanup(node.path, everything=False, force=False)
    looking = node.connect()

    def look(*_: object) -> bool:
        names = {name for (name,) in looking.execute("SELECT name FROM sqlite_schema")}
        if any(name.endswith("_insert") for name in names):
            assert "__harmonylite__t_change_log" in names
        return True

    hook = lambda connection: connection.setexectrace(look)  # noqa: E731
    apsw.connection_hooks.append(hook)
    try:
        node.start()
        node.stop()
        cleanup(node.path, everything=True, force=True)
    finally:
        apsw.connection_hooks.remove(hook)
    looking.close()
    assert ours(node) == []
    node.start()


def test_i1_an_install_that_dies_half_way_leaves_the_application_alone(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.stop()
    cleanup(node.path, everything=True, force=True)
    for count in range(1, 200):
        die = Killer(count)
        hook = lambda connection, die=die: connection.setexectrace(die)  # noqa: E731
        apsw.connection_hooks.append(hook)
        try:
            replica = Replica(node.path, ReplicaSettings(1))
            replica.open()
        except (KeyboardInterrupt, apsw.SQLError):  # apsw's own savepoint, interrupted
            assert die.left <= 0
            replica.close()
            if ours(node):  # it died after the commit
                assert node.query("SELECT count(*) FROM sqlite_schema WHERE type = 'trigger'") == [(4,)]
                break
            node.app.execute("INSERT INTO t VALUES (?, 'x')", (count,))
        else:
            replica.close()
            break
        finally:
            apsw.connection_hooks.remove(hook)
    assert count > 20
    node.start()


def test_starting_again_changes_nothing(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; CREATE TABLE u (a, b UNIQUE, PRIMARY KEY (a))")
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.publish()
    node.restart()
    schema = node.query("SELECT name, sql FROM sqlite_schema ORDER BY name")
    cookie = node.query("PRAGMA schema_version")
    node.restart()
    assert node.query("SELECT name, sql FROM sqlite_schema ORDER BY name") == schema
    assert node.query("PRAGMA schema_version") == cookie
    assert node.publish() == []


def test_a_rebuild_recaptures_at_current_ts_plus_one(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; INSERT INTO t VALUES (7, 'unversioned')")
    node.apply(wrote("t", IDV, *(((key, "theirs"), stamp(1000, 2)) for key in (1, 2))))
    node.app.execute(REBUILD.format("id INTEGER PRIMARY KEY, v"))
    node.sql("DELETE FROM t WHERE id = 2")  # nobody sees it
    groups = node.publish()
    assert sorted(row for row, _ in written(groups, "t")) == [(1, "theirs"), (7, "unversioned")]
    assert removed(groups, "t") == [(2,)]
    assert node.version("t", 1) == Version(1001, 1)
    assert node.version("t", 7) == Version(1, 1)
    node.sql("UPDATE t SET v = 'captured' WHERE id = 1")
    assert [row for row, _ in written(node.publish(), "t")] == [(1, "captured")]


def test_a_rename_takes_versions_log_and_triggers_along(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x'), (2, 'y')")
    node.publish()
    node.replica.flush()
    before = node.version("t", 1)
    node.sql("UPDATE t SET v = 'logged' WHERE id = 2")
    node.sql("ALTER TABLE t RENAME TO u")
    node.sql("DELETE FROM u WHERE id = 1")
    groups = node.publish()
    assert (2, "logged") in [row for row, _ in written(groups, "u")]
    assert removed(groups, "u") == [(1,)]
    stamps = groups[0].tables[0].deleted_stamps
    assert stamps[0][3:] == before[:2]  # type: ignore[index]
    assert not [name for name in ours(node) if "__t_" in name]
    node.restart()
    node.sql("INSERT INTO u VALUES (3, 'z')")
    assert [row for row, _ in written(node.publish(), "u")] == [(3, "z")]


def test_an_acknowledgement_counts_before_a_schema_change_is_followed(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.publish()
    version = node.version("t", 1)
    node.sql("UPDATE t SET v = 'y'")
    node.sql("CREATE TABLE u (id INTEGER PRIMARY KEY)")
    [(_, stamped)] = written(node.publish(), "t")
    assert (stamped.base_ts, stamped.base_node) == version[:2]  # type: ignore[index]


def test_a_rename_does_not_send_everything_again(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.publish()
    version = node.version("t", 1)
    node.sql("ALTER TABLE t RENAME TO u")
    node.sql("INSERT INTO u VALUES (2, 'y')")
    assert [row for row, _ in written(node.publish(), "u")] == [(2, "y")]
    assert node.version("u", 1) == version


def test_a_new_unique_index_does_not_send_everything_again(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.publish()
    version = node.version("t", 1)
    node.sql("CREATE UNIQUE INDEX i ON t (v)")
    node.sql("INSERT INTO t VALUES (2, 'y')")
    assert [row for row, _ in written(node.publish(), "t")] == [(2, "y")]
    assert node.version("t", 1) == version


def test_i3_a_rename_and_a_new_table_of_the_old_name(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.sql("ALTER TABLE t RENAME TO u")
    node.sql(PLAIN)
    node.sql("INSERT INTO t VALUES (7, 'new')")
    node.sql("UPDATE u SET v = 'y'")
    groups = node.publish()
    assert (1, "y") in [row for row, _ in written(groups, "u")]
    assert (7, "new") in [row for row, _ in written(groups, "t")]


def test_names_of_triggers_do_not_collide(make: MakeNode) -> None:
    script = "CREATE TABLE t (id INTEGER PRIMARY KEY, v UNIQUE); CREATE TABLE t_evict (id INTEGER PRIMARY KEY, v)"
    node = make(1, script)
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.publish()
    node.sql("INSERT INTO t_evict VALUES (1, 'x')")
    node.sql("REPLACE INTO t VALUES (3, 'x')")
    groups = node.publish()
    assert [row for row, _ in written(groups, "t_evict")] == [(1, "x")]
    assert removed(groups, "t") == [(1,)]


def test_a_table_called_evict_is_not_taken_for_a_renamed_one(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE x_evict (id INTEGER PRIMARY KEY, v)")
    node.sql("INSERT INTO x_evict VALUES (1, 'x')")
    node.publish()
    version = node.version("x_evict", 1)
    node.restart()
    assert node.version("x_evict", 1) == version


def test_a_dropped_table_is_forgotten(make: MakeNode) -> None:
    node = make(1, f"{PLAIN}; CREATE TABLE u (id INTEGER PRIMARY KEY)")
    node.sql("INSERT INTO u VALUES (1)")
    node.sql("DROP TABLE u")
    wake(node)
    assert not [name for name in ours(node) if "__u_" in name]
    node.sql("INSERT INTO t VALUES (1, 'x')")
    assert written(node.publish(), "t")


def test_a_new_table_is_captured_from_its_first_absorb_on(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.sql("CREATE TABLE u (id INTEGER PRIMARY KEY)")
    wake(node)
    node.sql("INSERT INTO u VALUES (1)")
    assert [row for row, _ in written(node.publish(), "u")] == [(1,)]


def test_a_key_that_changed_while_running_reads_the_stream_again(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id TEXT PRIMARY KEY, v)")
    first = wrote("t", IDV, (("a", 1), stamp(EPOCH_MS, 2)))
    node.apply(first)
    node.sql(REBUILD.format("id TEXT COLLATE NOCASE PRIMARY KEY, v"))
    second = wrote("t", IDV, (("b", 1), stamp(EPOCH_MS, 2)))
    with pytest.raises(PositionsLostError):
        node.apply(second)
    assert node.replica.position(STREAM) is None
    node.received = 0
    node.apply(first, second)
    assert node.version("t", "a") == node.version("t", "b") == Version(EPOCH_MS, 2)


def test_a_key_of_another_type_gives_new_versions(make: MakeNode) -> None:
    node = make(1, "CREATE TABLE t (id TEXT PRIMARY KEY, v)")
    node.sql("INSERT INTO t VALUES ('a', 1), ('B', 2)")
    node.publish()
    node.sql(REBUILD.format("id TEXT COLLATE NOCASE PRIMARY KEY, v"))
    node.restart()
    assert sorted(row for row, _ in written(node.publish(), "t")) == [("B", 2), ("a", 1)]
    node.sql("UPDATE t SET v = 3 WHERE id = 'b'")
    assert [row for row, _ in written(node.publish(), "t")] == [("B", 3)]


def test_an_excluded_table_comes_back_as_maybe_changed(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.apply(wrote("t", IDV, ((1, "theirs"), stamp(1000, 2))))
    node.restart(exclude=("t",))
    assert not [name for name in ours(node) if name.endswith("_insert")]
    node.sql("UPDATE t SET v = 'unseen'")
    assert node.publish() == []
    node.restart(exclude=())
    assert [row for row, _ in written(node.publish(), "t")] == [(1, "unseen")]
    assert node.version("t", 1) == Version(1001, 1)


def test_a_newer_format_is_refused(make: MakeNode) -> None:
    node = make(1, PLAIN)
    node.stop()
    node.app.execute("""UPDATE "__harmonylite__meta" SET value = 99 WHERE name = 'format'""")
    with pytest.raises(ForeignDatabaseError, match="format 99"):
        node.start()
    node.app.execute("""UPDATE "__harmonylite__meta" SET value = 1 WHERE name = 'format'""")
    node.start()


def test_tables_of_a_newer_format_are_not_taken_for_damaged(make: MakeNode, caplog: pytest.LogCaptureFixture) -> None:
    node = make(1, PLAIN)
    node.stop()
    for name in ("meta", "parked"):
        node.app.execute(f'ALTER TABLE "__harmonylite__{name}" ADD COLUMN of_a_later_version')
    node.app.execute("""UPDATE "__harmonylite__meta" SET value = 99 WHERE name = 'format'""")
    before = node.everything()
    with pytest.raises(ForeignDatabaseError, match="format 99"):
        node.start()
    assert node.everything() == before
    assert "damaged" not in caplog.text


def test_rows_that_waited_in_a_damaged_table_are_read_again(make: MakeNode) -> None:
    node = make(1, PLAIN)
    waits = wrote("t", (*IDV, "w"), ((7, "seven", "w"), stamp(EPOCH_MS, 2)))
    newer = Undecodable(2, b"\x09", "of a newer version", Unread(EPOCH_MS, 9, joined=True))
    node.apply(waits)
    node.deliver((), [newer])
    node.stop()
    for name in ("parked", "unread"):
        node.app.execute(f'ALTER TABLE "__harmonylite__{name}" ADD COLUMN more')
    node.start()
    assert node.replica.position(STREAM) is None
    node.received = 0
    node.apply(waits)
    node.deliver((), [newer])
    assert (node.replica.parked(), node.replica.completeness.unread_messages) == (1, 1)


def test_a_database_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(apsw.CantOpenError):
        Replica(tmp_path / "mistyped.db", ReplicaSettings(1)).open()


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, int]]:
    """(level, first word, rows) of what the installation says of tables."""
    found = [record for record in caplog.records if record.name == "harmonylite.db.recapture"]
    return [(record.levelname, record.message.split(",")[0], vars(record)["fields"]["rows"]) for record in found]


def test_a_new_table_is_no_reason_to_warn(make: MakeNode, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    node = make(1, PLAIN)
    assert said(caplog) == []
    node.sql("CREATE TABLE u (id INTEGER PRIMARY KEY)")
    node.absorb()
    node.app.execute("CREATE TABLE w (id INTEGER PRIMARY KEY); INSERT INTO w VALUES (1), (2)")
    node.absorb()
    assert said(caplog) == [
        ("INFO", "table is replicated from now on", 0),
        ("INFO", "table is replicated from now on", 2),
    ]
    assert sorted(row for row, _ in written(node.publish(), "w")) == [(1,), (2,)]


def test_capture_that_was_off_is_warned_of_if_there_is_anything_to_publish(
    make: MakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    node = make(1, f"{PLAIN}; CREATE TABLE empty (id INTEGER PRIMARY KEY)")
    node.sql("INSERT INTO t VALUES (1, 'x')")
    node.publish()
    node.app.execute(REBUILD.format("id INTEGER PRIMARY KEY, v"))
    node.app.execute('DROP TRIGGER "__harmonylite__empty_insert"')
    node.publish()
    assert sorted(said(caplog)) == [
        ("INFO", "table is captured again; it has no rows", 0),
        ("WARNING", "table was rebuilt", 1),
    ]
