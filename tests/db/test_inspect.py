"""Read-only questions to real databases: right answers while others write, and nothing created or changed."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from harmonylite.db import inspect
from harmonylite.db.inspect import DatabaseUnreadable
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.db.tables import CONFLICT, PARKED
from harmonylite.model import Delivery, Group, Position, RawText, ReceivedGroup, Stamp, TableChanges

SCHEMA = """
PRAGMA journal_mode=WAL;
CREATE TABLE orders (id INTEGER PRIMARY KEY, item TEXT NOT NULL);
CREATE TABLE "odd ""name" (a TEXT, b BLOB, note, PRIMARY KEY (a, b)) WITHOUT ROWID;
CREATE TABLE keyless (x);
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "app %3F ? #.db"
    application = apsw.Connection(str(path))
    application.execute(SCHEMA).fetchall()
    application.close()
    return path


@pytest.fixture
def replica(path: Path) -> Iterator[Replica]:
    replica = Replica(path, ReplicaSettings(node_id=7))
    replica.open()
    yield replica
    replica.close()


def write(path: Path, *statements: str) -> None:
    application = apsw.Connection(str(path))
    for statement in statements:
        application.execute(statement).fetchall()
    application.close()


def delivery(changes: TableChanges, sequence: int = 1) -> Delivery:
    group = ReceivedGroup(Group(3, sequence, (changes,)), sequence, 1_700_000_000_000)
    return Delivery(
        Position("harmonylite-changes-1", "2024-01-01T00:00:00Z", sequence, 1_700_000_000_000_000_000), (group,)
    )


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_a_database_without_our_tables_gives_zeros_and_stays_as_it_is(path: Path) -> None:
    before = contents(path.parent)
    assert inspect.overview(path) == inspect.Overview(None, (), 0, 0, 0, ())
    assert inspect.conflicts(path) == []
    assert inspect.parked(path) == []
    health = inspect.health(path)
    assert (health.journal_mode, health.tables, health.uncaptured) == (
        "wal",
        ('odd "name', "orders"),
        ('odd "name', "orders"),
    )
    assert [skipped.table for skipped in health.skipped] == ["keyless"]
    assert contents(path.parent) == before
    assert list(before) == [path.name]


def test_pending_rows_are_counted_before_and_after_they_are_absorbed(path: Path, replica: Replica) -> None:
    assert inspect.overview(path).pending_rows == 0
    write(
        path,
        "INSERT INTO orders VALUES (1, 'a'), (2, 'b')",
        "UPDATE orders SET item = 'c' WHERE id = 1",
        """INSERT INTO "odd ""name" VALUES ('x', x'00', NULL)""",
    )
    logged = inspect.overview(path)
    assert (logged.node_id, logged.tables, logged.pending_rows) == (7, ('odd "name', "orders"), 4)

    replica.absorb()
    assert inspect.overview(path).pending_rows == 3 == replica.pending()
    write(path, "DELETE FROM orders WHERE id = 2")
    assert inspect.overview(path).pending_rows == 4

    replica.absorb()
    groups = list(replica.outgoing.read() or ())
    assert groups
    replica.outgoing.mark_published(max(group.through for group in groups))
    replica.flush()
    assert inspect.overview(path).pending_rows == 0 == replica.pending()


def test_position_parked_rows_and_conflicts(path: Path, replica: Replica) -> None:
    write(path, "INSERT INTO orders VALUES (1, 'mine')")
    replica.absorb()
    older = TableChanges("orders", ("id",), ("id", "item"), ((1, "theirs"),), (Stamp(5, 3, 0, 0, 0),))
    unknown = TableChanges("stock", ("id",), ("id", "n"), (("k", RawText(b"\xff")),), (Stamp(6, 3, 0, 0, 0),))
    replica.apply(delivery(older, 1))
    replica.apply(delivery(unknown, 2))

    found = inspect.overview(path)
    assert (found.parked_rows, found.conflicts_total) == (1, 1)
    assert found.positions == (Position("harmonylite-changes-1", "2024-01-01T00:00:00Z", 2, 1_700_000_000_000_000_000),)

    (conflict,) = inspect.conflicts(path)
    assert (conflict.table, conflict.key, conflict.ts, conflict.node, conflict.rank) == ("orders", (1,), 5, 3, 0)
    assert conflict.winner_node == 7
    assert conflict.row == {"id": 1, "item": "theirs"}
    assert inspect.conflicts(path, "ORDERS") == [conflict]
    assert inspect.conflicts(path, "stock") == []

    (parked,) = inspect.parked(path)
    assert (parked.table, parked.key, parked.ts, parked.deleted) == ("stock", ("k",), 6, False)
    assert parked.row == {"id": "k", "n": RawText(b"\xff")}
    assert parked.reason
    assert inspect.parked(path, "Stock") == [parked]
    assert inspect.parked(path, "orders") == []


def test_the_newest_conflicts_come_first_and_unreadable_bytes_do_not_hide_the_others(
    path: Path, replica: Replica
) -> None:
    rows = [(i, b"\xc1" if i == 2 else b"\x91\x05", b"\xc1" if i == 2 else None) for i in range(1, 4)]
    for number, key, row in rows:
        values = (number, "orders", key, number, 1, 0, None, None, "test", row, number)
        write_bound(path, f"INSERT INTO {CONFLICT} VALUES (?,?,?,?,?,?,?,?,?,?,?)", values)
    gone = TableChanges("stock", ("id",), ("id",), deleted=((1,),), deleted_stamps=(Stamp(6, 3, 0, 0, 0),))
    replica.apply(delivery(gone))
    write(path, f"UPDATE {PARKED} SET key = x'c1'")
    found = inspect.conflicts(path)
    assert [conflict.id for conflict in found] == [3, 2, 1]
    assert [conflict.key for conflict in found] == [(5,), (b"\xc1",), (5,)]
    assert [conflict.row for conflict in found] == [None, {"unreadable": b"\xc1"}, None]
    assert [conflict.id for conflict in inspect.conflicts(path, limit=2)] == [3, 2]
    (parked,) = inspect.parked(path)
    assert (parked.key, parked.row, parked.deleted) == ((b"\xc1",), None, True)


def write_bound(path: Path, sql: str, values: tuple[object, ...]) -> None:
    application = apsw.Connection(str(path))
    application.execute(sql, values)
    application.close()


def test_answers_come_while_the_application_holds_the_write_lock(path: Path, replica: Replica) -> None:
    application = apsw.Connection(str(path))
    application.execute("BEGIN IMMEDIATE; INSERT INTO orders VALUES (1, 'a')")
    assert inspect.overview(path).pending_rows == 0
    application.execute("COMMIT")
    assert inspect.overview(path).pending_rows == 1
    application.close()


def test_a_missing_trigger_is_noticed(path: Path, replica: Replica) -> None:
    assert inspect.health(path).uncaptured == ()
    write(path, 'DROP TRIGGER "__harmonylite__orders_update"')
    assert inspect.health(path).uncaptured == ("orders",)
    assert inspect.health(path, exclude=("orders",)).uncaptured == ()


def test_a_damaged_installation_still_answers(path: Path, replica: Replica) -> None:
    write(path, "INSERT INTO orders VALUES (1, 'a')")
    replica.close()
    write(path, 'DROP TABLE "__harmonylite__orders_version"', 'DROP TABLE "__harmonylite__position"')
    assert inspect.overview(path).pending_rows == 1


def test_a_stopped_daemon_leaves_nothing_to_create(path: Path, replica: Replica) -> None:
    write(path, "INSERT INTO orders VALUES (1, 'a')")
    replica.close()
    before = contents(path.parent)
    assert list(before) == [path.name]
    assert inspect.overview(path).pending_rows == 1
    assert contents(path.parent) == before


def test_a_rollback_journal_database_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    write(path, "CREATE TABLE t (a INTEGER PRIMARY KEY)")
    assert inspect.health(path).journal_mode == "delete"
    assert list(contents(tmp_path)) == ["app.db"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"SQLite format 4" + bytes(4096), "is not a SQLite database"),
        (b"nothing of the kind, and long enough to be looked at" * 100, "is not a SQLite database"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "app.db"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatabaseUnreadable) as caught:
        inspect.overview(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert path.exists() == (content is not None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_reader_who_may_write_nothing_gets_answers_at_rest_and_in_use() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        path = folder / "app.db"
        application = apsw.Connection(str(path))
        application.execute(SCHEMA).fetchall()
        os.seteuid(65534)
        try:
            in_use = inspect.health(path)
            os.seteuid(0)
            application.close()
            os.seteuid(65534)
            at_rest = inspect.health(path)
        finally:
            os.seteuid(0)
        assert in_use == at_rest
        assert in_use.tables == ('odd "name', "orders")

        path.chmod(0o600)
        os.seteuid(65534)
        try:
            with pytest.raises(DatabaseUnreadable, match="Permission denied"):
                inspect.overview(path)
        finally:
            os.seteuid(0)


def filled(path: Path, rows: int) -> None:
    write(
        path,
        "CREATE INDEX item ON orders (item)",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < " + str(rows) + ")"
        " INSERT INTO orders SELECT i, hex(randomblob(50)) FROM n",
    )


def damage(path: Path) -> None:
    """A page in the middle becomes something else, as a card does it."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 // 4096 * 4096)
        file.write(b"\xff" * 4096)


def test_a_sound_database_is_looked_through_to_its_end(path: Path) -> None:
    filled(path, 2_000)
    before = contents(path.parent)
    found = inspect.soundness(path, 60)
    assert (found.complaint, found.looked_at) == (None, 1.0)
    assert found.size == path.stat().st_size
    assert contents(path.parent) == before, "nothing was created or changed"


def test_damage_in_a_page_that_nobody_reads_is_found(path: Path) -> None:
    filled(path, 2_000)
    damage(path)
    assert inspect.overview(path).pending_rows == 0, "nothing else notices it"
    found = inspect.soundness(path, 60)
    assert found.complaint is not None


def test_damage_is_found_beside_a_collation_that_only_the_application_has(path: Path) -> None:
    application = apsw.Connection(str(path))
    application.createcollation("theirs", lambda a, b: (a > b) - (a < b))
    application.execute("CREATE TABLE own (id INTEGER PRIMARY KEY, name TEXT COLLATE theirs UNIQUE)")
    application.execute("INSERT INTO own VALUES (1, 'x'), (2, 'y')")
    application.close()
    filled(path, 2_000)
    assert inspect.soundness(path, 60).complaint is None
    damage(path)
    assert inspect.soundness(path, 60).complaint is not None


@pytest.mark.skipif(apsw.sqlitelibversion().startswith("3.40."), reason="this SQLite cannot be interrupted there")
def test_a_large_database_is_looked_at_for_a_bounded_time(path: Path) -> None:
    filled(path, 300_000)
    found = inspect.soundness(path, 0.02)
    assert found.complaint is None
    assert 0 <= found.looked_at < 1


def test_a_sqlite_that_does_not_let_go_reads_only_what_is_quick(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path, 2_000)
    monkeypatch.setattr(apsw, "sqlitelibversion", lambda: "3.40.1")
    assert inspect.soundness(path, 60).looked_at == 1
    assert inspect.soundness(path, 0.001).looked_at == 0
