"""Who copies the write-ahead log into the database: we do, and the application's commits do not wait for the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from harmonylite.db import checkpoint
from harmonylite.db.replica import Replica, ReplicaSettings
from harmonylite.model import Delivery, Position, ReceivedGroup
from tests.db.harness import stamp, wrote

PAGE = 4096
VFS = "counting"


class CountingVFS(apsw.VFS):
    """SQLite's own file system, which says how often a file was synced."""

    def __init__(self) -> None:
        self.synced: list[str] = []
        super().__init__(VFS, "")

    def xOpen(self, name: Any, flags: Any) -> CountingFile:  # noqa: N802 - apsw's name
        return CountingFile(self, name, flags)


class CountingFile(apsw.VFSFile):
    def __init__(self, vfs: CountingVFS, name: Any, flags: Any) -> None:
        self._vfs = vfs
        self._name = "" if name is None else name if isinstance(name, str) else name.filename()
        super().__init__("", name, flags)

    def xSync(self, flags: int) -> None:  # noqa: N802
        self._vfs.synced.append(self._name)
        super().xSync(flags)


class Beside:
    """A replica, and an application whose syncs are counted."""

    def __init__(self, folder: Path, vfs: CountingVFS) -> None:
        self.path = folder / "app.db"
        self.vfs = vfs
        self.app = apsw.Connection(str(self.path), vfs=VFS)
        self.app.execute("PRAGMA journal_mode=WAL")
        self.app.execute("PRAGMA synchronous=NORMAL")
        self.app.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT); CREATE TABLE own (id INTEGER PRIMARY KEY)")
        self.replica = Replica(self.path, ReplicaSettings(node_id=1))
        self.replica.open()
        self._sequence = 0

    def close(self) -> None:
        self.replica.close()
        self.app.close(True)

    def arrive(self, rows: int, size: int = 3_000) -> None:
        """As many rows as pages, nearly."""
        first = self._sequence * 1_000_000
        self._sequence += 1
        written = stamp(1_000 + self._sequence, 2)
        rows_and_stamps = (((first + number, "x" * size), written) for number in range(rows))
        group = wrote("t", ("id", "v"), *rows_and_stamps, number=self._sequence)
        received = ReceivedGroup(group, self._sequence, 2_000_000_000_000)
        self.replica.apply(Delivery(Position("s", "2026", self._sequence), (received,), ()))

    def insert(self, count: int = 1) -> list[str]:
        """Transactions of one row; returns which files the application synced."""
        self.vfs.synced.clear()
        for _ in range(count):
            self.app.execute("INSERT INTO own DEFAULT VALUES")
        return [name.rpartition("app.db")[2] or "database" for name in self.vfs.synced]

    def commit_while_copying(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """From now on the application commits when it is fixed up to where we copy; returns what grows each time."""
        copies: list[int] = []
        node = self

        class Writer:
            def __getattr__(self, name: str) -> Any:
                return getattr(node.replica.writer, name)

            def wal_checkpoint(self, **arguments: Any) -> tuple[int, int]:
                copied = node.replica.writer.wal_checkpoint(**arguments)
                node.app.execute("INSERT INTO own DEFAULT VALUES")
                copies.append(node.log_pages)
                return copied

        monkeypatch.setattr(self.replica._database.checkpoints, "_writer", Writer())
        return copies

    @property
    def log_pages(self) -> int:
        return self.path.with_name("app.db-wal").stat().st_size // PAGE


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Beside]:
    vfs = CountingVFS()
    node = Beside(tmp_path, vfs)
    yield node
    node.close()
    vfs.unregister()


def test_a_large_transaction_of_ours_is_not_copied_by_the_application(
    beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it when the application commits while we copy, so that we cannot copy to the end."""
    beside.commit_while_copying(monkeypatch)
    beside.arrive(1_500)
    for _ in range(4):
        beside.arrive(1_500)
        assert beside.insert(5) == []
    assert beside.log_pages > 5 * 1_500


def test_what_is_copied_to_its_end_begins_afresh(beside: Beside) -> None:
    for count in (1_500, 1_500, 1_000, 1_600, 950, 1_700):
        beside.arrive(count)
        beside.replica.absorb()
    assert beside.log_pages < 2_500
    assert "database" not in beside.insert(20)


def test_the_log_stops_growing_although_the_application_commits_all_the_time(
    beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each copy of ours leaves something behind."""
    monkeypatch.setattr(checkpoint, "MOST_PAGES", 4_000)
    copies = beside.commit_while_copying(monkeypatch)
    ours: list[Path] = []
    fdatasync = os.fdatasync

    def counted(descriptor: int) -> None:
        ours.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", counted)
    synced: list[str] = []
    for _ in range(12):
        beside.arrive(1_500)
        synced += beside.insert()
    assert beside.log_pages < 4_000 + 2 * 1_600
    assert sum(name == "database" for name in synced) <= 4
    assert len(copies) >= 12
    # So that the application, if it copies the rest, has little to wait for.
    assert ours == [beside.path] * len(copies)


def test_sqlite_hears_of_every_error_of_the_disk_and_keeps_its_locks(
    beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux tells of a failed write once per open file, and a closed descriptor takes the process's locks with it."""
    database = beside.path.stat()

    def of_database() -> set[int]:
        numbers = (int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        return {number for number in numbers if is_database(number)}

    def is_database(number: int) -> bool:
        try:
            return os.path.samestat(os.fstat(number), database)
        except OSError:
            return False

    synced: set[int] = set()
    monkeypatch.setattr(os, "fdatasync", synced.add)
    of_sqlite = of_database()
    beside.commit_while_copying(monkeypatch)
    for _ in range(2):
        beside.arrive(1_500)
    [ours] = synced
    assert is_database(ours)
    assert ours not in of_sqlite
    beside.replica.close()
    assert ours in of_database()
    locks = Path("/proc/locks").read_text()
    assert f":{database.st_ino} " in locks, "the application's"


def test_at_rest_nothing_is_in_the_way_of_the_log(beside: Beside) -> None:
    reader = apsw.Connection(str(beside.path))
    reader.execute("BEGIN; SELECT count(*) FROM t").fetchall()
    beside.arrive(1_500)
    assert not beside.replica.at_rest(last=False)  # somebody reads what is old
    assert beside.app.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()[0][0] == 1
    reader.close()
    assert beside.replica.at_rest(last=False)
    assert beside.app.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall() == [(0, 0, 0)]
    assert beside.log_pages == 0


def test_whoever_reads_what_is_old_for_long_is_not_waited_for(beside: Beside) -> None:
    reader = apsw.Connection(str(beside.path))
    reader.execute("BEGIN; SELECT count(*) FROM t").fetchall()
    beside.arrive(1_500)
    assert beside.replica.at_rest(last=True)
    reader.close()
    assert beside.app.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall() == [(0, 0, 0)]


def test_the_time_of_a_commit_is_time_of_the_lock(beside: Beside) -> None:
    """A large transaction is written into the log when it commits: that is felt like all the rest."""
    looked: list[float] = []

    def committing() -> bool:
        other = apsw.Connection(str(beside.path))
        other.setbusytimeout(60)
        with pytest.raises(apsw.BusyError):
            other.execute("BEGIN IMMEDIATE")
        other.close()
        looked.append(0.06)
        return False

    beside.replica.take_lock_seconds()
    beside.replica.writer.setcommithook(committing)
    beside.arrive(1)
    beside.replica.writer.setcommithook(None)
    assert looked
    assert beside.replica.last_held_s >= 0.05
    assert beside.replica.take_lock_seconds() >= beside.replica.last_held_s


def test_a_full_disk_keeps_nobody_from_committing(beside: Beside, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be copied now is copied later."""
    checkpoints = beside.replica._database.checkpoints
    full = True

    class Writer:
        def __getattr__(self, name: str) -> Any:
            return getattr(beside.replica.writer, name)

        def wal_checkpoint(self, **arguments: Any) -> tuple[int, int]:
            if full:
                raise apsw.FullError("database or disk is full")
            return beside.replica.writer.wal_checkpoint(**arguments)

    monkeypatch.setattr(checkpoints, "_writer", Writer())
    beside.arrive(1_500)
    full = False
    beside.arrive(1)
    assert beside.replica.at_rest(last=False)
    assert beside.app.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)[1] > 1_500


def test_a_log_that_is_still_read_goes_on_without_the_application(beside: Beside) -> None:
    """All of it is copied, but it cannot begin afresh."""
    beside.arrive(700)
    reader = apsw.Connection(str(beside.path))
    beside.arrive(400)
    reader.execute("BEGIN; SELECT count(*) FROM t").fetchall()
    for _ in range(10):
        beside.arrive(1)
        assert beside.insert() == []
    reader.close()
    assert beside.replica.at_rest(last=False)
    assert beside.insert() == ["-wal"]  # its header: the log has begun afresh


def test_closed_twice_it_closes_nobody_elses_file(beside: Beside) -> None:
    beside.arrive(1_500)
    beside.replica.close()
    descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
    beside.replica.close()
    for descriptor in descriptors:
        os.close(descriptor)
