"""Read-only questions to a database, for `status`, `conflicts`, `parked` and `doctor`.

They work while the daemon and the application write, and with the daemon stopped. Nothing is written or created, not
even the -wal and -shm files that SQLite would make; a database without our tables answers with zeros.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote as quote_url

import apsw

from harmonylite.db import capture, schema
from harmonylite.db.conflicts import COUNT_WAITING
from harmonylite.db.copy import integrity
from harmonylite.db.sql import PREFIX, ask_to_stop, integer, log_table, normal, rows, scalar, snapshot, version_table
from harmonylite.db.tables import CONFLICT, META, META_VALUE, PARKED, POSITION, TABLE, UNREAD, load_state
from harmonylite.model import Position, Row, Value
from harmonylite.wire import WireError, unpack

T = TypeVar("T")

BUSY_TIMEOUT_MS = 2_000

# Before this version SQLite does not let go in the middle of a table that it checks (https://sqlite.org/changes.html):
# then only a file is looked through that a slow card reads in the time there is.
_INTERRUPTIBLE_CHECK = (3, 41)
_SLOW_CARD_BYTES_PER_S = 20 << 20


class DatabaseUnreadable(Exception):  # noqa: N818
    """The file cannot be read as a SQLite database; the text says which, why and what to do.

    damaged: its content is not what SQLite wrote, or was never a database.
    """

    def __init__(self, text: str, *, damaged: bool = False) -> None:
        super().__init__(text)
        self.damaged = damaged


@dataclass(frozen=True, slots=True)
class Soundness:
    """What a look for damage found. complaint: SQLite's words, None for no damage in what was looked at; looked_at: how
    much of the file that is, 0 to 1; size: of the database, bytes."""

    complaint: str | None
    looked_at: float
    size: int


@dataclass(frozen=True, slots=True)
class Overview:
    """What the database alone tells of this node.

    node_id: None before the first start; tables: the replicated ones; pending_rows: rows and logged changes that no
    stream has acknowledged, where a row that changed again after its absorption counts once more; conflicts_total:
    rows ever discarded; incomplete: see `tables.State`.
    """

    node_id: int | None
    tables: tuple[str, ...]
    pending_rows: int
    parked_rows: int
    conflicts_total: int
    positions: tuple[Position, ...]
    incomplete: str | None = None


@dataclass(frozen=True, slots=True)
class Conflict:
    """A discarded row. ts, node, rank: its version; winner_*: what it lost to, if one row; times in ms since 1970.

    key: values in key order; row: its columns, None when only the key is known.
    """

    id: int
    table: str
    key: Row
    ts: int
    node: int
    rank: int
    winner_ts: int | None
    winner_node: int | None
    reason: str
    row: Mapping[str, Value] | None
    recorded_ms: int


@dataclass(frozen=True, slots=True)
class Parked:
    """A received row that waits. ts, node, rank: its version; key and row as in `Conflict`; times in ms."""

    table: str
    key: Row
    ts: int
    node: int
    rank: int
    deleted: bool
    row: Mapping[str, Value] | None
    reason: str
    detail: str
    parked_ms: int


@dataclass(frozen=True, slots=True)
class UnreadMessage:
    """A message that this version could not read, and another may. node: who may have sent it; times in ms."""

    stream: str
    sequence: int
    node: int
    error: str
    stored_ms: int
    recorded_ms: int


@dataclass(frozen=True, slots=True)
class Health:
    """journal_mode: as PRAGMA journal_mode says; tables: what could be replicated; uncaptured: those of them whose
    triggers are not all there; skipped: what cannot be replicated, and why; unwritable: see schema.unwritable."""

    journal_mode: str
    tables: tuple[str, ...]
    uncaptured: tuple[str, ...]
    skipped: tuple[schema.Skipped, ...]
    unwritable: tuple[schema.Skipped, ...] = ()


def overview(path: Path) -> Overview:
    """Raises DatabaseUnreadable."""
    return _ask(path, _overview)


def node_id(path: Path) -> int | None:
    """Whose database this was at the last start; None before the first. Raises DatabaseUnreadable."""
    return _ask(path, _node_id)


def conflicts(path: Path, table: str | None = None, limit: int | None = None) -> list[Conflict]:
    """Discarded rows, the newest first, of one table or of all. Raises DatabaseUnreadable."""
    return _ask(path, lambda connection: _conflicts(connection, table, limit))


def parked(path: Path, table: str | None = None) -> list[Parked]:
    """Rows that wait, those that wait longest first, of one table or of all. Raises DatabaseUnreadable."""
    return _ask(path, lambda connection: _parked(connection, table))


def unread(path: Path) -> list[UnreadMessage]:
    """Messages that wait for another version, in the streams' order. Raises DatabaseUnreadable."""
    return _ask(path, _unread)


def health(path: Path, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Health:
    """include, exclude: glob patterns over table names, as in the configuration. Raises DatabaseUnreadable."""
    found = _ask(path, lambda connection: _health(connection, include, exclude))
    # An immutable connection (see `_ask`) knows no WAL and says "delete".
    in_wal_mode = found.journal_mode == "delete" and (_has_wal(path) or _in_wal_mode(path))
    return replace(found, journal_mode="wal") if in_wal_mode else found


def soundness(path: Path, seconds: float) -> Soundness:
    """Look through the file for damage, for about that long. Raises DatabaseUnreadable."""
    return _ask(path, lambda connection: _soundness(connection, seconds))


def _soundness(connection: apsw.Connection, seconds: float) -> Soundness:
    pages, page_bytes = (integer(connection, f"PRAGMA {name}") for name in ("page_count", "page_size"))
    size = pages * page_bytes
    version = tuple(map(int, apsw.sqlitelibversion().split(".")[:2]))
    if version < _INTERRUPTIBLE_CHECK and size > seconds * _SLOW_CARD_BYTES_PER_S:
        return Soundness(None, 0.0, size)
    deadline = time.monotonic() + seconds
    ask_to_stop(connection, lambda: time.monotonic() > deadline)
    try:
        complaint, looked_at = integrity(connection, "quick_check"), 1.0
    except apsw.InterruptError:
        # Each page is read once, and hardly any is cached before.
        read = connection.status(apsw.SQLITE_DBSTATUS_CACHE_MISS, False)[0]
        complaint, looked_at = None, min(0.99, read / max(1, pages))
    except (apsw.CorruptError, apsw.NotADBError) as error:
        complaint, looked_at = str(error), 1.0
    return Soundness(complaint, looked_at, size)


def _overview(connection: apsw.Connection) -> Overview:
    ours = capture.installed(connection).tables

    def count(sql: str, *needed: str, bindings: Sequence[object] = ()) -> int:
        return integer(connection, sql, bindings) if all(name in ours for name in needed) else 0

    meta = dict(rows(connection, f"SELECT name, value FROM {META}")) if f"{PREFIX}meta" in ours else {}
    published = meta.get("published_batch") or 0
    tracked = _tracked(connection, ours)
    pending = 0
    for table in tracked:
        name = normal(f"{PREFIX}{table}")
        pending += count(f"SELECT count(*) FROM {log_table(table)}", f"{name}_change_log")
        pending += count(
            f"SELECT count(*) FROM {version_table(table)} WHERE batch > ?", f"{name}_version", bindings=(published,)
        )
    positions: list[Position] = []
    if f"{PREFIX}position" in ours:
        found = rows(connection, f"SELECT stream, created, sequence, stored_ns FROM {POSITION} ORDER BY stream")
        positions = [Position(*row) for row in found]
    return Overview(
        node_id=meta.get("node_id"),
        tables=tracked,
        pending_rows=pending,
        parked_rows=count(COUNT_WAITING, f"{PREFIX}parked"),
        conflicts_total=meta.get("conflicts_total") or 0,
        positions=tuple(positions),
        incomplete=load_state(connection).incomplete if meta else None,
    )


def _tracked(connection: apsw.Connection, ours: frozenset[str]) -> tuple[str, ...]:
    if f"{PREFIX}table" not in ours:
        return ()
    return tuple(name for (name,) in rows(connection, f"SELECT name FROM {TABLE} ORDER BY name"))


_CONFLICTS = f"""
SELECT id, tbl, key, ts, node, rank, winner_ts, winner_node, reason, row, recorded_ms FROM {CONFLICT}
WHERE ?1 IS NULL OR tbl = ?1 COLLATE NOCASE ORDER BY id DESC LIMIT ?2
"""
_PARKED = f"""
SELECT tbl, key, ts, node, rank, deleted, row, reason, detail, parked_ms FROM {PARKED}
WHERE ?1 IS NULL OR tbl = ?1 COLLATE NOCASE ORDER BY parked_ms, tbl, key
"""


def _conflicts(connection: apsw.Connection, table: str | None, limit: int | None) -> list[Conflict]:
    if f"{PREFIX}conflict" not in capture.installed(connection).tables:
        return []
    found = rows(connection, _CONFLICTS, (table, -1 if limit is None else limit))
    return [
        Conflict(id_, tbl, _key(key), ts, node, rank, winner_ts, winner_node, reason, _row(row), recorded)
        for id_, tbl, key, ts, node, rank, winner_ts, winner_node, reason, row, recorded in found
    ]


def _parked(connection: apsw.Connection, table: str | None) -> list[Parked]:
    if f"{PREFIX}parked" not in capture.installed(connection).tables:
        return []
    return [
        Parked(tbl, _key(key), ts, node, rank, bool(deleted), _row(row), reason, detail, parked_ms)
        for tbl, key, ts, node, rank, deleted, row, reason, detail, parked_ms in rows(connection, _PARKED, (table,))
    ]


def _unread(connection: apsw.Connection) -> list[UnreadMessage]:
    if f"{PREFIX}unread" not in capture.installed(connection).tables:
        return []
    columns = "stream, sequence, publisher, error, stored_ms, recorded_ms"
    found = rows(connection, f"SELECT {columns} FROM {UNREAD} ORDER BY stream, created, sequence")
    return [UnreadMessage(*row) for row in found]


def _key(data: bytes) -> Row:
    """The values of a key. Bytes that are not one are shown as they are: a listing must not fail over them."""
    try:
        values = unpack(data)
    except WireError:
        return (data,)
    return tuple(values) if isinstance(values, list) else (data,)


def _row(data: bytes | None) -> Mapping[str, Value] | None:
    try:
        values = unpack(data) if data is not None else None
    except WireError:
        return {"unreadable": data}
    return values if isinstance(values, dict) and values else None


def _node_id(connection: apsw.Connection) -> int | None:
    try:
        found = scalar(connection, META_VALUE, ("node_id",))
    except apsw.SQLError:  # no such table
        return None
    return found if isinstance(found, int) else None


def _health(connection: apsw.Connection, include: Sequence[str], exclude: Sequence[str]) -> Health:
    found = schema.load(connection, include, exclude)
    present = capture.installed(connection).triggers
    uncaptured = [
        table.name
        for table in found.tables.values()
        if any(trigger.name not in present for trigger in capture.triggers(table))
    ]
    mode = str(rows(connection, "PRAGMA journal_mode")[0][0])
    connection.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0)  # the application's run in the application
    unwritable = schema.unwritable(connection, found)
    names = tuple(table.name for table in found.tables.values())
    return Health(mode, names, tuple(uncaptured), found.skipped, unwritable)


def _ask(path: Path, question: Callable[[apsw.Connection], T]) -> T:
    """Answer the question from one consistent view of the database.

    In WAL mode even a read-only connection creates the -wal and -shm files when nobody has the database open, and
    leaves them. Then `immutable` is right, which reads the main file alone; if somebody opened the database
    meanwhile, the answer may be torn, and the question is asked again the ordinary way.
    """
    before = _resting(path)
    if before is not None:
        try:
            answer = _answer(path, question, immutable=True)
        except DatabaseUnreadable:
            if _resting(path) == before:
                raise
        else:
            if _resting(path) == before:
                return answer
    return _answer(path, question, immutable=False)


def _resting(path: Path) -> tuple[int, int, int] | None:
    """Identity, size and time of a WAL database that nobody has open; None for any other file."""
    if _has_wal(path) or not _in_wal_mode(path):
        return None
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _has_wal(path: Path) -> bool:
    return Path(f"{path}-wal").exists()


def _in_wal_mode(path: Path) -> bool:
    """What the file's header says: https://sqlite.org/fileformat2.html#file_format_version_numbers.

    Not for a file that this process has open in SQLite: closing any descriptor of a file drops all its POSIX locks.
    Hence always after `_has_wal`; the daemon's database has one.
    """
    try:
        with path.open("rb") as file:
            return file.read(20)[18:] == b"\x02\x02"
    except OSError:
        return False


def _answer(path: Path, question: Callable[[apsw.Connection], T], *, immutable: bool) -> T:
    uri = f"file:{quote_url(str(path.absolute()))}?mode=ro" + ("&immutable=1" if immutable else "")
    try:
        connection = apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
        try:
            connection.setbusytimeout(BUSY_TIMEOUT_MS)
            with snapshot(connection):
                return question(connection)
        finally:
            connection.close()
    except apsw.Error as error:
        damaged = isinstance(error, (apsw.CorruptError, apsw.NotADBError))
        raise DatabaseUnreadable(f"{path}: {_why(path, error)}", damaged=damaged) from error


def _why(path: Path, error: apsw.Error) -> str:
    # SQLite says "unable to open database file" for all of these.
    try:
        path.stat()
    except FileNotFoundError:
        return "there is no such file: the application makes it, or the daemon of a new node fetches a copy"
    except OSError as reason:
        return f"cannot be opened: {reason.strerror}"
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        return f"cannot be opened: {os.strerror(errno.EACCES)}"
    if isinstance(error, apsw.NotADBError):
        return "is not a SQLite database (or is encrypted)"
    if isinstance(error, apsw.CantOpenError):
        return "cannot be opened: its directory or its -wal and -shm files are closed to this user"
    if isinstance(error, apsw.BusyError):
        return "is locked by another program; try again"
    return f"cannot be read: {error}"
