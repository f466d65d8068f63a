"""What the application's tables, keys and columns are, as far as replication cares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import apsw

from harmonylite.db.sql import PREFIX, integer, normal, quote, rows

# Collations that every SQLite has; a key with another one cannot be indexed by our tables.
BUILT_IN_COLLATIONS = frozenset({"BINARY", "NOCASE", "RTRIM"})

# The widest rows that we read: two result columns for each column and again for each of the key's (outbox.typed_sql),
# behind this many of the version (difference.taking).
_VERSION_COLUMNS = 8

# Before 3.42 apsw ends the process when a statement fails that is too long for its cache: no row may need one.
LONGEST_SQL = 16_383 if tuple(map(int, apsw.apswversion().split(".")[:2])) < (3, 42) else None

# A column in the text of an INSERT or UPDATE of one row (db/rows), besides its quoted name; and the text around that.
_SQL_PER_COLUMN, _SQL_AROUND = 20, 200


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    affinity: str
    not_null: bool
    default: str | None


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """A column of the primary key with the affinity and collation by which SQLite tells keys apart."""

    name: str
    affinity: str
    collation: str
    nullable: bool


@dataclass(frozen=True, slots=True)
class UniqueIndex:
    """A UNIQUE constraint or index besides the primary key.

    columns: of a constraint over columns that are not generated, each with its collation. Such a column cannot be
    dropped, so that a trigger may name it. Empty for every other index: the application may drop it together with
    its columns in one migration (a trigger that names them would make that fail), and what a BEFORE UPDATE trigger sees
    of a generated column is not what will be stored.
    """

    name: str
    columns: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Table:
    name: str
    columns: tuple[Column, ...]  # without generated columns
    key: tuple[KeyColumn, ...]
    rowid_alias: bool  # the key is an INTEGER PRIMARY KEY, that is the rowid
    uniques: tuple[UniqueIndex, ...]

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    @property
    def key_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.key)

    @property
    def evicts_unseen(self) -> bool:
        """Whether OR REPLACE can remove rows of this table in a way that no trigger of ours sees."""
        return not all(index.columns for index in self.uniques)

    def column(self, name: str) -> Column | None:
        wanted = normal(name)
        return next((column for column in self.columns if normal(column.name) == wanted), None)

    def fingerprint(self) -> str:
        """The same on two nodes exactly when their tables have the same columns and key, in any order."""
        described = {
            "columns": sorted((normal(c.name), c.affinity) for c in self.columns),
            "key": [(normal(k.name), k.affinity, k.collation) for k in self.key],
        }
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A table that is not replicated although its owner may think so."""

    table: str
    reason: str


@dataclass(frozen=True, slots=True)
class Schema:
    cookie: int  # PRAGMA schema_version, when this was read
    tables: Mapping[str, Table]  # by normal(name)
    skipped: tuple[Skipped, ...]

    def table(self, name: str) -> Table | None:
        return self.tables.get(normal(name))

    def fingerprint(self) -> str:
        parts = sorted((name, table.fingerprint()) for name, table in self.tables.items())
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def schema_cookie(connection: apsw.Connection) -> int:
    """Changes with every change of the schema, by anyone (https://sqlite.org/pragma.html#pragma_schema_version)."""
    return integer(connection, "PRAGMA schema_version")


def schema_text(connection: apsw.Connection) -> str:
    """A hash of the application's own definitions, to the letter."""
    mine = f"{PREFIX}%".replace("_", "\\_")
    found = rows(
        connection,
        "SELECT type, name, sql FROM main.sqlite_schema WHERE name NOT LIKE ? ESCAPE '\\' ORDER BY type, name",
        (mine,),
    )
    return hashlib.sha256(repr(found).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def load(connection: apsw.Connection, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Schema:
    """Read the schema. `include` and `exclude` are glob patterns over table names; empty `include` means all."""
    cookie = schema_cookie(connection)
    tables: dict[str, Table] = {}
    skipped: list[Skipped] = []
    listed = rows(
        connection,
        "SELECT name, wr, strict FROM pragma_table_list WHERE schema = 'main' AND type = 'table' ORDER BY name",
    )
    for name, without_rowid, strict in listed:
        if normal(name).startswith(("sqlite_", PREFIX)):
            continue
        if not is_chosen(name, include, exclude):
            continue
        found = _load_table(connection, name, bool(without_rowid), bool(strict))
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            tables[normal(name)] = found
    return Schema(cookie, tables, tuple(skipped))


def is_chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether the patterns of `load` let a table of that name in."""
    return (not include or _matches(name, include)) and not _matches(name, exclude)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(normal(name), normal(pattern)) for pattern in patterns)


def _load_table(connection: apsw.Connection, name: str, without_rowid: bool, strict: bool) -> Table | Skipped:
    columns: list[Column] = []
    key_positions: dict[int, KeyColumn] = {}
    indexes = rows(connection, "SELECT name, \"unique\", origin FROM pragma_index_list(?, 'main')", (name,))
    key_index = next((row[0] for row in indexes if row[2] == "pk"), None)
    collations = _collations(connection, key_index) if key_index else {}
    for column, declared, not_null, default, position, hidden in rows(
        connection, "SELECT name, type, \"notnull\", dflt_value, pk, hidden FROM pragma_table_xinfo(?, 'main')", (name,)
    ):
        if hidden:  # generated (2, 3)
            continue
        kind = affinity(declared, strict)
        columns.append(Column(column, kind, bool(not_null), default))
        if position:
            nullable = bool(key_index) and not not_null and not without_rowid and not strict
            collation = collations.get(normal(column), "BINARY")
            key_positions[position] = KeyColumn(column, kind, collation, nullable)
    key = tuple(key_positions[position] for position in sorted(key_positions))
    if not key:
        return Skipped(name, "it has no primary key; add one to have it replicated")
    foreign = [part.collation for part in key if part.collation.upper() not in BUILT_IN_COLLATIONS]
    if foreign:
        return Skipped(name, f"its key uses the application's own collation {foreign[0]}")
    if reason := _too_wide(connection, name, columns, key):
        return Skipped(name, reason)
    stored = frozenset(column.name for column in columns)
    uniques = tuple(
        _unique_index(connection, index, origin == "u", stored)
        for index, unique, origin in indexes
        if unique and origin != "pk"
    )
    return Table(name, tuple(columns), key, key_index is None, uniques)


def _too_wide(
    connection: apsw.Connection, name: str, columns: Sequence[Column], key: Sequence[KeyColumn]
) -> str | None:
    """Why the statements for rows of so many columns cannot be run; None if they can."""
    # Conditions join two terms for each column of the key by AND, in one nested expression.
    deepest = connection.limit(apsw.SQLITE_LIMIT_EXPR_DEPTH) // 2 - 20
    if len(key) > deepest:
        return f"its key has {len(key):,} columns, with {deepest:,} of them it could be replicated"
    most = (connection.limit(apsw.SQLITE_LIMIT_COLUMN) - _VERSION_COLUMNS) // 2 - len(key)
    if len(columns) > most:
        return f"it has {len(columns):,} columns, {most:,} can be replicated with such a key; put some in another table"
    if LONGEST_SQL is not None:
        text = sum(len(quote(column.name).encode()) + _SQL_PER_COLUMN for column in columns)
        text += sum(len(quote(part.name).encode()) + len(part.collation) + _SQL_PER_COLUMN for part in key)
        if text + len(quote(name).encode()) + _SQL_AROUND > LONGEST_SQL:
            return (
                f"the names of its {len(columns):,} columns are together too long for apsw {apsw.apswversion()};"
                " install apsw 3.42 or newer (Debian 13), or put some of them in another table"
            )
    return None


def unwritable(connection: apsw.Connection, found: Schema) -> tuple[Skipped, ...]:
    """Tables to which no row of another node can be written, with the reason: an index, CHECK or generated column needs
    a collation or function that only the application has. A connection that only reads sees no CHECK."""
    told = []
    for table in found.tables.values():
        columns = ", ".join(map(quote, table.column_names))
        nulls = ", ".join("NULL" for _ in table.columns)
        insert = f"INSERT OR REPLACE INTO main.{quote(table.name)} ({columns}) VALUES ({nulls})"
        try:
            # Prepared anew: an EXPLAIN that is cached is not looked at again when the schema changes.
            connection.execute(f"EXPLAIN QUERY PLAN {insert}", can_cache=False).fetchall()
        except apsw.SQLError as error:
            if is_applications_own(str(error)):
                reason = f"what other nodes write to it waits, as only the application has what it needs: {error}"
                told.append(Skipped(table.name, reason))
    return tuple(told)


def is_applications_own(error: str) -> bool:
    """Whether SQLite misses a collation or function, which the application has registered for itself."""
    return any(text in error for text in ("no such collation sequence", "unknown function", "no such function"))


def _collations(connection: apsw.Connection, index: str) -> dict[str, str]:
    found = rows(connection, "SELECT name, coll FROM pragma_index_xinfo(?, 'main') WHERE key", (index,))
    return {normal(name): coll for name, coll in found if name is not None}


def _unique_index(connection: apsw.Connection, index: str, constraint: bool, stored: frozenset[str]) -> UniqueIndex:
    """stored: the columns that are not generated."""
    found = rows(connection, "SELECT name, coll FROM pragma_index_xinfo(?, 'main') WHERE key ORDER BY seqno", (index,))
    return UniqueIndex(index, tuple(found) if constraint and all(name in stored for name, _ in found) else ())


def affinity(declared: str | None, strict: bool = False) -> str:
    """The affinity of a declared type (https://sqlite.org/datatype3.html#determination_of_column_affinity)."""
    text = (declared or "").upper()
    if strict and text == "ANY":
        return "BLOB"  # a STRICT table's ANY keeps every value as it is
    if "INT" in text:
        return "INTEGER"
    if any(part in text for part in ("CHAR", "CLOB", "TEXT")):
        return "TEXT"
    if not text or "BLOB" in text:
        return "BLOB"
    if any(part in text for part in ("REAL", "FLOA", "DOUB")):
        return "REAL"
    return "NUMERIC"
