"""Every row of a table that can lose rows unseen (evictions.py) gets a version: (0, 0), if nobody has written it since
the installation.

A few rows get theirs in the transaction that installs capture. Millions would keep the application from its lock for
seconds there: they get it afterwards, a piece at a time. Their keys come from a view of the database that is fixed
inside that transaction, so that a row gets its version even if it is evicted before its turn, and is then found to be
missing like any other. What was deleted in a way that triggers see has a version by then, or gets one when its log is
absorbed: whatever version there is stays.

One view for all of it, not a new one for each piece: a newer one does not have the rows that matter. While it lasts,
the write-ahead log cannot be reset, and grows by what is written: 20 MB for a million integer keys, and what the
application writes meanwhile. Only if that gets out of hand, or the disk is full, another view is taken. Which tables
are begun and which complete is noted in the database. A daemon that is killed in between begins again with the rows
that are left then. In both cases nobody here can know of an eviction if it was of a row that had no version yet. Other
nodes find it by the unique value of the row that took its place; in case that has changed, too, this node merges their
next snapshot, and has the row again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import apsw

from harmonylite.db import capture, sql, tables, unversioned
from harmonylite.db import rows as store
from harmonylite.db.capture import collate, key_columns, key_match
from harmonylite.db.outbox import decode_typed, typed_sql
from harmonylite.db.rows import bound, marker
from harmonylite.db.schema import Schema, Table
from harmonylite.db.sql import integer, normal, quote, rows, version_table
from harmonylite.model import RawText, Row

if TYPE_CHECKING:
    from harmonylite.db.replica import Replica

log = logging.getLogger(__name__)

# So many rows of all tables together get their version when capture is installed: about 10 ms on a small board.
AT_ONCE_ROWS = 2_000

# So many of one table are written in one transaction at first, and in any; it should hold the lock for about AIM_S.
FIRST_ROWS, LEAST_ROWS, MOST_ROWS = 500, 50, 5_000
AIM_S = 0.005

# The write-ahead log may become that long; looked at after so many pieces.
MOST_WAL_BYTES = 256 << 20
WAL_PIECES = 20

_STAMPED, _BEGUN = "stamped", "stamping"


def stamped(connection: apsw.Connection) -> frozenset[str]:
    """Tables (by normal name) in which every row has a version, as noted in the database."""
    return _noted(connection, _STAMPED)


def _noted(connection: apsw.Connection, what: str) -> frozenset[str]:
    noted = tables.get_meta(connection, what)
    return frozenset(json.loads(noted)) if isinstance(noted, str) else frozenset()


def note(connection: apsw.Connection, names: Collection[str]) -> None:
    """Inside a write transaction. See `stamped`."""
    if names != stamped(connection):
        tables.set_meta(connection, _STAMPED, json.dumps(sorted(names)))


@dataclass(frozen=True, slots=True)
class Piece:
    """Keys of rows of a table that had no version; last: it has no others."""

    table: Table
    keys: Sequence[Row]
    last: bool


class Stamping:
    """Gives the rows of some tables their versions, from one view of the database.

        while (piece := stamping.find()) is not None:
            stamping.write(replica, piece)

    Cancelled or failed anywhere, it goes on where it was. due: tables (by name) that are not complete; done: rows of
    the one that it is at; confirmed: the transaction that it was made in was committed.
    """

    def __init__(self, path: Path, due: Iterable[Table]) -> None:
        """Writer, inside the transaction that installs capture: nobody else can commit before the view is fixed."""
        self.due = {table.name: table for table in due}
        self.confirmed = False
        self.done = 0
        self._only_present: set[str] = set()
        self._piece: Piece | None = None
        self._cursor: apsw.Cursor | None = None
        self._at = ""
        self._written = 0
        self._size = FIRST_ROWS
        self._stopped = False
        self._view_lost = False
        self._connection = sql.open_reader(path)
        try:
            sql.ask_to_stop(self._connection, lambda: self._stopped)
            self._fix_view()
        except BaseException:
            self.close()
            raise

    def _fix_view(self) -> None:
        self._connection.execute("BEGIN")
        integer(self._connection, "SELECT count(*) FROM sqlite_schema")

    def _rewind(self) -> None:
        """To the beginning of the table: what has its version is passed over."""
        cursor, self._cursor = self._cursor, None
        if cursor is not None:
            cursor.close(True)

    def close(self) -> None:
        """Let go of the view. Twice is fine."""
        self._rewind()
        self._connection.close(True)

    def stop(self) -> None:
        """Any thread. What runs ends soon, with apsw.InterruptError; for good."""
        self._stopped = True

    def keep(self, unstamped: Mapping[str, Table]) -> None:
        """Writer. Only these tables are still to be completed, if they are what they were."""
        for name, table in list(self.due.items()):
            if name not in unstamped or capture.definition(unstamped[name]) != capture.definition(table):
                del self.due[name]

    def only_present(self, name: str) -> None:
        """Writer. Rows of this table were deleted here without a trace: the missing ones were not evicted."""
        self._only_present.add(name)

    def find(self) -> Piece | None:
        """Any one thread, never while `write` runs. The next piece, the same until it is written; None: all is done.

        Raises apsw.InterruptError after `stop`; what cannot be read is given up, and begun again at the next start.
        """
        while self._piece is None or self._piece.table.name not in self.due:
            table = next(iter(list(self.due.values())), None)
            if table is None:
                return None
            try:
                if self._cursor is None or self._at != table.name:
                    self._rewind()
                    self._cursor, self._at, self.done = self._missing(table), table.name, 0
                read = islice(self._cursor, self._size)
                keys = list(read if table.rowid_alias else map(decode_typed, read))
            except BaseException:
                self._rewind()
                if not self._stopped:
                    self.due.clear()  # or the view would be kept for good
                raise
            self._piece = Piece(table, keys, len(keys) < self._size)
        return self._piece

    def _missing(self, table: Table) -> apsw.Cursor:
        """Keys without a version (as `typed_sql`, unless they are integers), in the order of the key: in any other one
        each transaction would write to pages all over the version table."""
        connection, version = self._connection, version_table(table.name)
        conditions = [f"r.{quote(part.name)} IS NOT NULL" for part in table.key if part.nullable]
        columns = {row[1] for row in rows(connection, f"PRAGMA table_info({version})")}
        if columns.issuperset(key_columns(table).split(", ")):
            conditions.append(f"NOT EXISTS (SELECT 1 FROM {version} AS v WHERE {key_match(table, 'v', 'r')})")
        selected = [f"r.{quote(part.name)}" for part in table.key]
        listed = f"FROM {quote(table.name)} AS r WHERE {' AND '.join(conditions) or 'true'}"
        if table.rowid_alias:
            return connection.execute(f"SELECT {selected[0]} {listed} ORDER BY {selected[0]}")
        order = ", ".join(
            f"{name}{collate(part)}{direction}"
            for name, part, direction in zip(selected, table.key, _directions(connection, table), strict=True)
        )
        typed = ", ".join(map(typed_sql, selected))
        return connection.execute(f"SELECT {typed} {listed} ORDER BY {order}")

    def write(self, replica: Replica, piece: Piece) -> None:
        """Writer. One short write transaction. Raises apsw.BusyError, apsw.FullError, apsw.IOError with nothing
        changed: call it again."""
        name = piece.table.name
        try:
            with replica.transaction():
                started = time.perf_counter()
                if self._view_lost:
                    unversioned.forget_joined(replica.writer)
                if name in self.due:  # else the schema has changed
                    _insert(replica.writer, piece.table, self._there(replica, piece))
                    if piece.last:
                        note(replica.writer, stamped(replica.writer) | {normal(name)})
                        _note_begun(replica.writer, _noted(replica.writer, _BEGUN) - {normal(name)})
                took = time.perf_counter() - started
        except apsw.FullError:
            self._renew_view(replica)  # the write-ahead log may be all the room there is
            raise
        self._piece, self._view_lost = None, False
        self.done += len(piece.keys)
        if len(piece.keys) * 2 > self._size:
            self._size = max(LEAST_ROWS, min(MOST_ROWS, int(self._size * min(2.0, AIM_S / max(took, 1e-6)))))
        if piece.last:
            self._rewind()
            if self.due.pop(name, None) is not None:
                replica.unseen.evictions_known(name)

        self._written += 1
        if self._written % WAL_PIECES == 0 and _wal_bytes(replica.writer) > MOST_WAL_BYTES:
            self._renew_view(replica)

    def _renew_view(self, replica: Replica) -> None:
        log.debug("another view of the database is taken", extra={"fields": {"table": self._at, "rows": self.done}})
        self._rewind()
        self._view_lost = True
        if not self._connection.getautocommit():
            self._connection.execute("ROLLBACK")
        # A view that needs nothing of the write-ahead log lets it begin anew, if nobody else has one.
        replica.at_rest(last=True)
        _wal_bytes(replica.writer)
        self._fix_view()

    def _there(self, replica: Replica, piece: Piece) -> Sequence[Row]:
        table = replica.schema.table(piece.table.name)
        if table is None or table.name not in self._only_present:
            return piece.keys
        return [key for key in piece.keys if store.read(replica.writer, table, key) is not None]


class Stampings:
    """Those under way for one database."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._under_way: list[Stamping] = []

    def __bool__(self) -> bool:
        """Any thread. Whether there are any."""
        return bool(self._under_way)

    def follow(
        self, connection: apsw.Connection, schema: Schema, *, committed: bool, renamed: Collection[str]
    ) -> frozenset[str]:
        """Writer, inside the transaction that installed capture for a schema. Complete what has few rows, begin with
        the rest. Returns the names of tables that are not complete.

        committed: whether the installation before was; renamed: tables (by normal name) that had another one then.
        """
        for each in self._under_way:
            each.confirmed |= committed
        for undone in [each for each in self._under_way if not each.confirmed]:
            undone.close()
        self._under_way = [each for each in self._under_way if each.confirmed]
        complete = stamped(connection)
        unstamped = {
            table.name: table for name, table in schema.tables.items() if table.evicts_unseen and name not in complete
        }
        for each in self._under_way:
            each.keep({name: table for name, table in unstamped.items() if normal(name) not in renamed})
        # Not at once what is under way: by its view, evicted rows are found, too.
        begun = {name for each in self._under_way for name in each.due}
        _miss(connection, {normal(name) for name in unstamped if name not in begun} - frozenset(renamed))
        at_once = _stamp_few(connection, [table for name, table in unstamped.items() if name not in begun])
        if at_once:
            note(connection, complete | {normal(name) for name in at_once})
        if new := [table for name, table in unstamped.items() if name not in begun and name not in at_once]:
            self._under_way = [*self._under_way, Stamping(self._path, new)]
        _note_begun(connection, {normal(name) for name in frozenset(unstamped) - at_once})
        return frozenset(unstamped) - at_once

    def next(self) -> Stamping | None:
        """Writer, outside a transaction whose failure would undo the schema. One with something left to do."""
        for each in self._under_way:
            each.confirmed = True
        for ended in [each for each in self._under_way if not each.due]:
            ended.close()
        self._under_way = [each for each in self._under_way if each.due]
        return self._under_way[0] if self._under_way else None

    def only_present(self, name: str) -> None:
        """See Stamping.only_present."""
        for each in self._under_way:
            each.only_present(name)

    def stop(self) -> None:
        """See Stamping.stop."""
        for each in self._under_way:
            each.stop()

    def close(self) -> None:
        """When nothing runs any more."""
        for each in self._under_way:
            each.close()
        self._under_way = []


def _note_begun(connection: apsw.Connection, names: Collection[str]) -> None:
    if names != _noted(connection, _BEGUN):
        tables.set_meta(connection, _BEGUN, json.dumps(sorted(names)))


def _miss(connection: apsw.Connection, without_view: Collection[str]) -> None:
    """Tables (by normal name) that are not complete, and of which no view is held: those that were begun may have lost
    rows that had no version."""
    if lost := _noted(connection, _BEGUN).intersection(without_view):
        log.warning(
            "the daemon was killed before the rows of a table were known: one that OR REPLACE evicted then is taken"
            " from another node's next snapshot",
            extra={"fields": {"tables": ", ".join(sorted(lost))}},
        )
        unversioned.forget_joined(connection)


def _stamp_few(connection: apsw.Connection, candidates: Iterable[Table]) -> frozenset[str]:
    """Give the rows of tables their versions, as long as there are few. Returns the names of those tables."""
    left = AT_ONCE_ROWS
    complete: set[str] = set()
    for table in candidates:
        name = quote(table.name)
        size = integer(connection, f"SELECT count(*) FROM (SELECT 1 FROM {name} LIMIT {left + 1})")
        if size > left:
            continue
        left -= size
        version = version_table(table.name)
        theirs = ", ".join(f"r.{quote(part.name)}" for part in table.key)
        present = "".join(f" AND r.{quote(part.name)} IS NOT NULL" for part in table.key if part.nullable)
        connection.execute(
            f"INSERT INTO {version} ({key_columns(table)}, ts, node) SELECT {theirs}, 0, 0 FROM {name} AS r"
            f" WHERE NOT EXISTS (SELECT 1 FROM {version} AS v WHERE {key_match(table, 'v', 'r')}){present}"
        )
        complete.add(table.name)
    return frozenset(complete)


def _insert(connection: apsw.Connection, table: Table, keys: Sequence[Row]) -> None:
    """Versions (0, 0) for keys that have none."""

    def text(key: Row) -> str:
        return (
            f"INSERT INTO {version_table(table.name)} ({key_columns(table)}, ts, node)"
            f" VALUES ({', '.join(map(marker, key))}, 0, 0) ON CONFLICT DO NOTHING"
        )

    if any(isinstance(value, RawText) for key in keys for value in key):
        for key in keys:
            connection.execute(text(key), bound(key))
    elif keys:
        connection.executemany(text(keys[0]), keys)


def _wal_bytes(connection: apsw.Connection) -> int:
    """How long the write-ahead log is, after as much of it as possible was copied into the database; takes no lock that
    a writer would feel. 0 if it cannot be copied now."""
    try:
        _, frames, _ = rows(connection, "PRAGMA wal_checkpoint(PASSIVE)")[0]
    except (apsw.FullError, apsw.IOError):
        return 0  # whoever writes next is told
    return int(frames) * integer(connection, "PRAGMA page_size")


def _directions(connection: apsw.Connection, table: Table) -> list[str]:
    """Of the key's columns in its index: SQLite reads that in its own order, and would sort for any other one."""
    listed = rows(
        connection,
        "SELECT x.desc FROM pragma_index_list(?) AS l JOIN pragma_index_xinfo(l.name) AS x"
        " WHERE l.origin = 'pk' AND x.key ORDER BY x.seqno",
        (table.name,),
    )
    return [" DESC" if desc else "" for (desc,) in listed]
