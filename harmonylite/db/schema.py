"""What the application's tables, keys and columns are, as far as replication cares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import apsw

from harmonylite.db import index_sql
from harmonylite.db.index_sql import IndexText
from harmonylite.db.sql import PREFIX, integer, normal, quote, rows, scalar

# Collations that every SQLite has; a key with another one cannot be indexed by our tables.
BUILT_IN_COLLATIONS = frozenset({"BINARY", "NOCASE", "RTRIM"})


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

    terms: what is indexed, as SQL, each with its collation; where: of a partial index, else empty; columns: the
    table's columns that either mentions; settable: none of them is generated. Without terms its definition could not
    be read.
    """

    name: str
    terms: tuple[tuple[str, str], ...]
    where: str
    columns: tuple[str, ...]
    settable: bool


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
        if include and not _matches(name, include):
            continue
        if _matches(name, exclude):
            continue
        found = _load_table(connection, name, bool(without_rowid), bool(strict))
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            tables[normal(name)] = found
    return Schema(cookie, tables, tuple(skipped))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(normal(name), normal(pattern)) for pattern in patterns)


def _load_table(connection: apsw.Connection, name: str, without_rowid: bool, strict: bool) -> Table | Skipped:
    columns: list[Column] = []
    key_positions: dict[int, KeyColumn] = {}
    every_column: dict[str, bool] = {}
    indexes = rows(connection, "SELECT name, \"unique\", origin FROM pragma_index_list(?, 'main')", (name,))
    key_index = next((row[0] for row in indexes if row[2] == "pk"), None)
    collations = _collations(connection, key_index) if key_index else {}
    for column, declared, not_null, default, position, hidden in rows(
        connection, "SELECT name, type, \"notnull\", dflt_value, pk, hidden FROM pragma_table_xinfo(?, 'main')", (name,)
    ):
        every_column[column] = bool(hidden)
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
    uniques = tuple(
        _unique_index(connection, index, every_column) for index, unique, origin in indexes if unique and origin != "pk"
    )
    return Table(name, tuple(columns), key, key_index is None, uniques)


def _collations(connection: apsw.Connection, index: str) -> dict[str, str]:
    found = rows(connection, "SELECT name, coll FROM pragma_index_xinfo(?, 'main') WHERE key", (index,))
    return {normal(name): coll for name, coll in found if name is not None}


def _unique_index(connection: apsw.Connection, index: str, every_column: Mapping[str, bool]) -> UniqueIndex:
    """every_column: whether it is generated, by name."""
    found = rows(connection, "SELECT name, coll FROM pragma_index_xinfo(?, 'main') WHERE key ORDER BY seqno", (index,))
    collations = [coll for _, coll in found]
    text = scalar(connection, "SELECT sql FROM main.sqlite_schema WHERE type = 'index' AND name = ?", (index,))
    if text is None:  # made by a UNIQUE constraint: columns only
        parsed = IndexText(tuple(quote(name) for name, _ in found), "")
    else:
        try:
            parsed = index_sql.parse(text)
        except ValueError:
            return UniqueIndex(index, (), "", (), False)
    words = parsed.words()
    columns = tuple(name for name in every_column if normal(name) in words)
    return UniqueIndex(
        index,
        tuple(zip(parsed.terms, collations, strict=True)),
        parsed.where,
        columns,
        not any(every_column[name] for name in columns),
    )


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
