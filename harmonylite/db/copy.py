"""Whole copies of a database: a snapshot taken while the application writes, and what becomes of one elsewhere.

A copy keeps versions, pending marks and parked rows, so that nodes that merge it can take all of them over
(docs/rules.md, Catching up). The view that is copied is one in which every change log is empty: no row in it is newer
than its version. It is made with the backup API from a pinned reader: VACUUM INTO cannot run inside a transaction, and
fails on collations that only the application has."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import apsw

from harmonylite.db import capture, conflicts, install, sql, tables, unversioned, versions
from harmonylite.db.versions import NO_CORRECTION, Correction
from harmonylite.model import Position

if TYPE_CHECKING:
    from harmonylite.db.replica import Replica

log = logging.getLogger(__name__)

# Told how many bytes are done, of how many.
Report = Callable[[int, int], None]

# Of a database's file, and of what SQLite keeps beside it.
DATABASE_SUFFIXES = ("", "-journal", "-wal", "-shm")

# A copy waits for a moment without unabsorbed changes; so often it is tried.
PIN_ATTEMPTS = 50

# Pages copied between two looks at `cancelled`: 2 MB of a usual database.
STEP_PAGES = 512

# While a copy is checked, so often `cancelled` is asked.
CHECK_LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class CopyInfo:
    """What a finished copy holds, read from inside the very view that was copied.

    positions: how far each stream was applied; fingerprint: of the replicated tables; tombstones_since_ms,
    synced_at_ms, incomplete: see `tables.State`; pending, parked: rows that wait in it; size: the file's bytes.
    """

    positions: tuple[Position, ...]
    fingerprint: str
    tombstones_since_ms: int
    synced_at_ms: int
    pending: int
    parked: int
    size: int
    incomplete: str | None = None


class CopyCancelledError(Exception):
    """The copy was given up because its caller said so; nothing of it is left."""


class DamagedCopyError(Exception):
    """The file is no intact SQLite database, or not a copy made by `Copy`. detail: what is wrong with it."""

    def __init__(self, path: Path, detail: object) -> None:
        super().__init__(f"{path}: {detail}")
        self.detail = str(detail)


class DamagedDatabaseError(Exception):
    """The database of this node itself is damaged. One line for the operator."""

    def __init__(self, path: Path, detail: object) -> None:
        super().__init__(
            f"this node's database {path} is damaged: {detail}; docs/disaster-recovery.md says what to do"
            " (a card is corrupt)"
        )


class Copy:
    """One copy being made; from `start_copy`, on a connection of its own.

    It holds a read transaction from the start: the application goes on writing, but the write-ahead log cannot be
    reset until `run` has ended or `close` was called.
    """

    def __init__(self, source: Path, target: Path) -> None:
        """Opens the source; nothing is pinned and no file is made yet. An older file at `target` is removed."""
        remove_database(target)
        self._target = target
        self._source = sql.open_reader(source)
        self._known: CopyInfo | None = None

    def pin(self, fingerprint: str, pending: int) -> None:
        """Fix what is copied: the database as it is now. Called by the writer while nobody can commit."""
        self._source.execute("BEGIN")
        state = tables.load_state(self._source)
        self._known = CopyInfo(
            positions=tables.load_positions(self._source),
            fingerprint=fingerprint,
            tombstones_since_ms=state.tombstones_since_ms,
            synced_at_ms=state.synced_at_ms,
            pending=pending,
            parked=sql.integer(self._source, conflicts.COUNT_WAITING),
            incomplete=state.incomplete,
            size=0,
        )

    def run(
        self, progress: Report = lambda done, total: None, cancelled: Callable[[], bool] = lambda: False
    ) -> CopyInfo:
        """Any one thread. Write the copy; takes no lock that the application could feel.

        Afterwards the file is on the disk to stay, and everything is closed. On any failure the file is gone.
        Raises CopyCancelledError, apsw.FullError (disk full), apsw.IOError, apsw.CantOpenError.
        """
        assert self._known is not None, "pin() first"
        try:
            self._write(progress, cancelled)
            self.close()
            _settle(self._target)
        except BaseException:
            self.close()
            remove_database(self._target)
            raise
        known = self._known
        return replace(known, size=self._target.stat().st_size)

    def _write(self, progress: Report, cancelled: Callable[[], bool]) -> None:
        page_bytes = sql.integer(self._source, "PRAGMA page_size")
        with contextlib.closing(apsw.Connection(str(self._target))) as target, _to_disk(self._target) as flush:
            # A torn copy is thrown away, whatever tore it: it needs no journal.
            target.execute("PRAGMA journal_mode=OFF")
            target.execute("PRAGMA synchronous=OFF")
            backup = target.backup("main", self._source, "main")
            try:
                done = False
                while not done:
                    if cancelled():
                        raise CopyCancelledError("the copy was given up")
                    done = backup.step(STEP_PAGES)
                    flush()
                    progress((backup.pagecount - backup.remaining) * page_bytes, backup.pagecount * page_bytes)
            finally:
                backup.close(True)

    def close(self) -> None:
        """Let go of the view and the connection. Twice is fine."""
        self._source.close(True)


def start_copy(
    replica: Replica, target: Path, bound_ms: int | None = None, correction: Correction = NO_CORRECTION
) -> Copy | None:
    """Writer. Fix a view of the database in which every change log is empty, to be written to `target` by
    `Copy.run` on any other thread, or given up by `Copy.close`.

    None: the application commits too fast just now; try again later. Raises apsw.BusyError.
    """
    copy, writer = Copy(replica.path, target), replica.writer
    try:
        for _ in range(PIN_ATTEMPTS):
            replica.judge(lambda context: None, bound_ms, correction)
            with sql.locked(writer):
                if not replica.absorbing.has_log(writer):
                    pending = versions.count_pending(writer, replica.schema, replica.published_batch)
                    copy.pin(replica.schema.fingerprint(), pending)
                    return copy
    except BaseException:
        copy.close()
        raise
    copy.close()
    return None


def clean_copy(path: Path) -> None:
    """Take all of ours out of a copy: a plain database for any application (`snapshot restore --to`).

    It is left in rollback-journal mode, a single file. Raises DamagedCopyError.
    """
    with _opened(path) as connection, sql.write_transaction(connection):
        install.uninstall(connection, everything=True)
        # Tables that lost their entry, whatever the reason.
        for name in capture.installed(connection).tables:
            connection.execute(f"DROP TABLE IF EXISTS {sql.quote(name)}")
        # No VACUUM: it numbers the rows of tables without an INTEGER PRIMARY KEY anew, to which FTS5 may refer.
    _check(path)
    _settle(path)


def adopt_copy(
    path: Path,
    node_id: int,
    *,
    latest_ms: int = versions.UNBOUNDED_MS,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Make a copy the first database of a new node: its own node id and instance id; versions, pending marks, parked
    rows, positions and the conflict log stay. Raises DamagedCopyError, CopyCancelledError; apsw.FullError and
    apsw.IOError leave the file as it was.

    What waits in it to be published was written elsewhere, and keeps its versions, which the stream has not bounded
    yet: none may claim a time after `latest_ms`, when the copy was made plus the tolerance (docs/rules.md, Clocks).
    """
    with _opened(path) as connection, sql.write_transaction(connection):
        tables.set_meta(connection, "node_id", node_id)
        tables.set_meta(connection, "instance_id", secrets.token_hex(16))
        tables.set_meta(connection, "boot_id", "")
        tables.set_meta(connection, "machine_id", "")
        # Times that another node has seen on its own clock are no floor for this one's (docs/rules.md, Versions).
        tables.set_meta(connection, "floor_ms", 0)
        unversioned.set_copy_joined(connection)
        published = tables.load_state(connection).published_batch
        for (name,) in sql.rows(connection, f"SELECT name FROM {tables.TABLE}"):
            connection.execute(
                f"UPDATE {sql.version_table(name)} SET ts = max(?1, base_ts + 1) WHERE batch > ?2"
                " AND ts > max(?1, base_ts + 1)",
                (latest_ms, published),
            )
    _check(path, cancelled=cancelled)
    _settle(path)


def check_copy(
    path: Path, progress: Report = lambda done, total: None, cancelled: Callable[[], bool] = lambda: False
) -> None:
    """Any one thread. Whether a file is an intact database, indexes compared only in size; reads all of it.

    Raises DamagedCopyError, CopyCancelledError.
    """
    _check(path, progress, cancelled, pragma="quick_check")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[apsw.Connection]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        if tables.META.strip('"') not in capture.installed(connection).tables:
            raise DamagedCopyError(path, "not a copy of a replicated database")
        yield connection
    except (apsw.NotADBError, apsw.CorruptError) as error:
        raise DamagedCopyError(path, error) from error
    finally:
        connection.close(True)


def _check(
    path: Path,
    progress: Report = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
    *,
    pragma: str = "integrity_check",
) -> None:
    if cancelled():
        raise CopyCancelledError("the check was given up")
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        with _interrupting(connection, cancelled):
            _tell_progress(connection, progress)
            found = integrity(connection, pragma)
    except apsw.InterruptError:
        raise CopyCancelledError("the check was given up") from None
    except (apsw.NotADBError, apsw.CorruptError) as error:
        raise DamagedCopyError(path, error) from error
    finally:
        connection.close(True)
    if found:
        raise DamagedCopyError(path, found)


def _tell_progress(connection: apsw.Connection, progress: Report) -> None:
    """By the pages that were read. SQLite before 3.41 tells nothing while it goes through a table."""
    pages, page_bytes = (sql.integer(connection, f"PRAGMA {name}") for name in ("page_count", "page_size"))

    def tell() -> bool:
        read = connection.status(apsw.SQLITE_DBSTATUS_CACHE_MISS, False)[0]
        progress(min(read, pages) * page_bytes, pages * page_bytes)
        return False

    sql.ask_to_stop(connection, tell)


@contextlib.contextmanager
def _interrupting(connection: apsw.Connection, cancelled: Callable[[], bool]) -> Iterator[None]:
    """What runs on the connection ends with apsw.InterruptError soon after `cancelled`."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(CHECK_LOOK_S):
            if cancelled():
                connection.interrupt()

    watcher = threading.Thread(target=watch, name="check")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def integrity(connection: apsw.Connection, pragma: str) -> str | None:
    """What is damaged, if anything."""
    with contextlib.suppress(apsw.SQLError):
        return _complaint(connection, f"{pragma}(1)")
    # Something uses a collation or a function that only the application has: all the others can be looked at.
    for (name,) in sql.rows(connection, "SELECT name FROM sqlite_schema WHERE type = 'table'"):
        with contextlib.suppress(apsw.SQLError):
            if complaint := _complaint(connection, f"{pragma}({sql.quote(name)})"):
                return complaint
    return None


def _complaint(connection: apsw.Connection, pragma: str) -> str | None:
    found = str(sql.scalar(connection, f"PRAGMA {pragma}"))
    return None if found == "ok" else " ".join(found.removeprefix("*** in database main ***").split())


@contextlib.contextmanager
def _to_disk(path: Path) -> Iterator[Callable[[], None]]:
    """Writes back what a file got since the last call. At the end, all in one go, the disk would be busy for so long
    that the application's own commits wait, when they copy the write-ahead log into the database.

    Closing the descriptor drops SQLite's locks on the file: only for one that nobody else opens.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield lambda: os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _settle(path: Path) -> None:
    """A single file, on the disk to stay."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.execute("PRAGMA journal_mode=DELETE")
    finally:
        connection.close(True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_database(path: Path) -> None:
    """A database file and what SQLite keeps beside it."""
    for suffix in DATABASE_SUFFIXES:
        path.with_name(path.name + suffix).unlink(missing_ok=True)
