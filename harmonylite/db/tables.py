"""Our own tables that are not per application table, and the small settings kept in `__harmonylite__meta`."""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields

import apsw

from harmonylite.db.sql import PREFIX, quote, rows, scalar
from harmonylite.model import Position

log = logging.getLogger(__name__)

META = quote(f"{PREFIX}meta")
POSITION = quote(f"{PREFIX}position")
TABLE = quote(f"{PREFIX}table")
JOIN = quote(f"{PREFIX}join")
SPARSE = quote(f"{PREFIX}sparse")
PARKED = quote(f"{PREFIX}parked")
CONFLICT = quote(f"{PREFIX}conflict")
UNDECODABLE = quote(f"{PREFIX}undecodable")
UNREAD = quote(f"{PREFIX}unread")

# Another shape of any of these tables is another format: a table that is not as CREATE says counts as damaged.
FORMAT = 1

META_VALUE = f"SELECT value FROM {META} WHERE name = ?"

CREATE = (
    f"CREATE TABLE IF NOT EXISTS {META} (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
    f"CREATE TABLE IF NOT EXISTS {POSITION} (stream TEXT PRIMARY KEY, created TEXT NOT NULL,"
    " sequence INTEGER NOT NULL, stored_ns INTEGER NOT NULL) WITHOUT ROWID",
    f"CREATE TABLE IF NOT EXISTS {TABLE} (name TEXT PRIMARY KEY, definition TEXT NOT NULL) WITHOUT ROWID",
    f"CREATE TABLE IF NOT EXISTS {JOIN} (lo INTEGER PRIMARY KEY, hi INTEGER NOT NULL)",
    f"CREATE TABLE IF NOT EXISTS {SPARSE} (tbl TEXT, key BLOB, col TEXT, ts INTEGER NOT NULL,"
    " node INTEGER NOT NULL, PRIMARY KEY (tbl, key, col)) WITHOUT ROWID",
    f"CREATE TABLE IF NOT EXISTS {PARKED} (tbl TEXT, id BLOB, key BLOB NOT NULL, key_names BLOB NOT NULL,"
    " ts INTEGER NOT NULL, node INTEGER NOT NULL, rank INTEGER NOT NULL,"
    " base_ts INTEGER NOT NULL, base_node INTEGER NOT NULL, deleted INTEGER NOT NULL,"
    " row BLOB NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL, parked_ms INTEGER NOT NULL,"
    " PRIMARY KEY (tbl, id)) WITHOUT ROWID",
    f"CREATE TABLE IF NOT EXISTS {CONFLICT} (id INTEGER PRIMARY KEY, tbl TEXT NOT NULL, key BLOB NOT NULL,"
    " ts INTEGER NOT NULL, node INTEGER NOT NULL, rank INTEGER NOT NULL, winner_ts INTEGER, winner_node INTEGER,"
    " reason TEXT NOT NULL, row BLOB, recorded_ms INTEGER NOT NULL)",
    f"CREATE INDEX IF NOT EXISTS {quote(f'{PREFIX}conflict_version')} ON {CONFLICT} (tbl, key, ts, node, rank)",
    f"CREATE TABLE IF NOT EXISTS {UNDECODABLE} (stream TEXT, sequence INTEGER, data BLOB NOT NULL,"
    " error TEXT NOT NULL, recorded_ms INTEGER NOT NULL, PRIMARY KEY (stream, sequence))",
    f"CREATE TABLE IF NOT EXISTS {UNREAD} (stream TEXT, created TEXT, sequence INTEGER, publisher INTEGER NOT NULL,"
    " joined INTEGER NOT NULL, data BLOB NOT NULL, error TEXT NOT NULL, stored_ms INTEGER NOT NULL,"
    " recorded_ms INTEGER NOT NULL, PRIMARY KEY (stream, created, sequence))",
)

# What is lost when a table of that name (without PREFIX) is made anew.
_LOST = {
    "meta": "what this node knew of itself: it counts as new, publishes again, and forgets what it had missed",
    "position": "how far the streams were read: they are read again",
    "table": "which tables were captured: they are looked through",
    "join": "which pending changes belong together: a transaction may arrive elsewhere in parts",
    "sparse": "which columns are older than their row: an older value may take the place of a newer one",
    "parked": "the rows that waited for the schema: the streams are read again for them",
    "conflict": "the list of discarded rows",
    "undecodable": "the messages that could not be read by any version",
    "unread": "the messages of a newer version: the streams are read again for them",
}

# What waited in these is in the streams, as far as they still have it.
_READ_AGAIN = frozenset({"parked", "unread"})


@dataclass(slots=True)
class State:
    """Settings that change while running. The copy in memory is what the last commit left in the database.

    batch: the newest absorb batch that was given out; open_batch: one that a large log is still being absorbed
    into (0: none); published_batch: everything up to it was acknowledged; floor_ms: the newest time this node
    itself has seen on its own clock or, while connected, on the server's; conflicts_total: ever recorded;
    boot_batch: the newest batch when this boot of the machine began; open_floor_ms: the newest time in the pieces
    of a log that is still being absorbed, which becomes part of the floor at its end.
    synced_at_ms: the server's time when this node had last read everything there was (0: never);
    tombstones_since_ms: no tombstone that the cluster had after this server time was forgotten here (0: none ever).
    unread, unread_bytes: messages kept because another version may read them, and the bytes of their data; hole: where
    reading went on although messages were missed (empty: nowhere); hole_ends: see `Completeness`. Either way changes
    are missing here that others may have.
    """

    batch: int = 0
    open_batch: int = 0
    published_batch: int = 0
    floor_ms: int = 0
    conflicts_total: int = 0
    boot_batch: int = 0
    open_floor_ms: int = 0
    synced_at_ms: int = 0
    tombstones_since_ms: int = 0
    unread: int = 0
    unread_bytes: int = 0
    hole: str = ""
    hole_ends: str = ""

    @property
    def incomplete(self) -> str | None:
        """What is missing here, and what to do about it, on one line; None if nothing is known to be."""
        if self.hole:
            return (
                f"messages were missed: {self.hole}; a snapshot of another node mends that ([snapshot] enabled = true)"
            )
        if self.unread:
            messages = "1 message" if self.unread == 1 else f"{self.unread:,} messages"
            text = f"{messages} could not be read by this version, harmonylite parked says why: upgrade this node"
            megabytes = self.unread_bytes // 1_000_000
            return text + (f"; until then they stay in its database, {megabytes:,} MB by now" if megabytes else "")
        return None


_STATE_DEFAULTS = {field.name: field.default for field in fields(State)}
_STATE_FIELDS = tuple(_STATE_DEFAULTS)


class ForeignDatabaseError(Exception):
    """The database holds our tables in a format that this version does not know."""


def create(connection: apsw.Connection) -> None:
    """Create what is missing, and anew what has another shape than it should.

    Raises ForeignDatabaseError, with nothing changed, if a newer version of this program was here.
    """
    shape = [column for column, *_ in _shape(connection, f"{PREFIX}meta")]
    known = get_meta(connection, "format") if {"name", "value"} <= set(shape) else None
    if known is None or known == FORMAT:
        damaged = _drop_damaged(connection)
        for sql in CREATE:
            connection.execute(sql)
        if damaged & _READ_AGAIN:
            connection.execute(f"DELETE FROM {POSITION}")
        if "unread" in damaged:
            set_meta(connection, "unread", 0)
            set_meta(connection, "unread_bytes", 0)
        known = get_meta(connection, "format")
    if known is None:
        set_meta(connection, "format", FORMAT)
        set_meta(connection, "instance_id", secrets.token_hex(16))
    elif known != FORMAT:
        raise ForeignDatabaseError(
            f"the database has tables of HarmonyLite format {known}, this version knows format {FORMAT};"
            " install the version that wrote them, or remove them with its `harmonylite cleanup --all`"
        )


def _drop_damaged(connection: apsw.Connection) -> frozenset[str]:
    """Names of our tables, without PREFIX, that were there in another shape."""
    damaged = set()
    for name, wanted in _shapes().items():
        there = _shape(connection, name)
        if there and there != wanted:
            short = name[len(PREFIX) :]
            damaged.add(short)
            log.warning(
                "a table of ours was damaged and is made anew",
                extra={"fields": {"table": name, "lost": _LOST[short], "columns": [column for column, *_ in there]}},
            )
            connection.execute(f"DROP TABLE {quote(name)}")
    return frozenset(damaged)


@functools.cache
def _shapes() -> Mapping[str, list[tuple[object, ...]]]:
    """What our tables should look like, by name."""
    connection = apsw.Connection(":memory:")
    for sql in CREATE:
        connection.execute(sql)
    names = rows(connection, "SELECT name FROM sqlite_schema WHERE type = 'table'")
    shapes = {name: _shape(connection, name) for (name,) in names}
    connection.close()
    return shapes


def _shape(connection: apsw.Connection, name: str) -> list[tuple[object, ...]]:
    """Name, type, NOT NULL and place in the key of each column; empty if there is no such table."""
    return rows(connection, "SELECT name, type, \"notnull\", pk FROM pragma_table_info(?, 'main')", (name,))


def get_meta(connection: apsw.Connection, name: str) -> object:
    return scalar(connection, META_VALUE, (name,))


def set_meta(connection: apsw.Connection, name: str, value: int | str) -> None:
    connection.execute(
        f"INSERT INTO {META} VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value)
    )


def load_state(connection: apsw.Connection) -> State:
    stored = dict(rows(connection, f"SELECT name, value FROM {META}"))
    kinds = {name: type(default) for name, default in _STATE_DEFAULTS.items()}
    return State(**{name: stored[name] for name, kind in kinds.items() if isinstance(stored.get(name), kind)})


def save_state(connection: apsw.Connection, before: State, after: State) -> None:
    """Write the fields that differ, inside the caller's transaction."""
    for name in _STATE_FIELDS:
        value = getattr(after, name)
        if value != getattr(before, name):
            set_meta(connection, name, value)


def load_position(connection: apsw.Connection, stream: str) -> Position | None:
    sql = f"SELECT created, sequence, stored_ns FROM {POSITION} WHERE stream = ?"
    for created, sequence, stored_ns in rows(connection, sql, (stream,)):
        return Position(stream, created, sequence, stored_ns)
    return None


def load_positions(connection: apsw.Connection) -> tuple[Position, ...]:
    """How far each stream was applied."""
    sql = f"SELECT stream, created, sequence, stored_ns FROM {POSITION} ORDER BY stream"
    return tuple(Position(*row) for row in rows(connection, sql))


def save_position(connection: apsw.Connection, position: Position) -> None:
    connection.execute(
        f"INSERT INTO {POSITION} VALUES (?, ?, ?, ?) ON CONFLICT (stream) DO UPDATE SET"
        " created = excluded.created, sequence = excluded.sequence, stored_ns = excluded.stored_ns",
        (position.stream, position.created, position.sequence, position.stored_ns),
    )
