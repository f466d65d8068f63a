"""Rows of the live database that may not stand beside a row of a snapshot, found by the unique indexes here.

Applying lets SQLite find them, by trying to write (clash.py); a merge looks for them before, without a lock. So a
partial index's condition and an indexed expression are evaluated for the snapshot's row, as its definition says them,
and looked up in that index.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import dropwhile

import apsw

from harmonylite.db.capture import collate
from harmonylite.db.outbox import decode_typed, typed_sql
from harmonylite.db.rows import bound, marker
from harmonylite.db.schema import Table
from harmonylite.db.sql import quote, rows
from harmonylite.db.tokens import Token, tokens
from harmonylite.model import Row


@dataclass(frozen=True, slots=True)
class _Definition:
    """parts: what is indexed, in order, as written (with its COLLATE, without ASC or DESC); where: the condition of a
    partial index, empty for any other."""

    parts: tuple[str, ...]
    where: str

    @classmethod
    def of(cls, sql: str) -> _Definition:
        """From CREATE INDEX (https://sqlite.org/lang_createindex.html)."""
        read = dropwhile(lambda token: token.keyword != "ON", tokens(sql))
        parts: list[list[Token]] = [[]]
        depth = 0
        for token in read:
            depth += {"(": 1, ")": -1}.get(token.text, 0)
            if token.text == ")" and not depth:
                break
            if token.text == "," and depth == 1:
                parts.append([])
            elif depth and (depth, token.text) != (1, "("):
                parts[-1].append(token)
        condition = list(read)[1:]
        return cls(tuple(_text(sql, _without_order(part)) for part in parts), _text(sql, condition))


def _without_order(part: list[Token]) -> list[Token]:
    return part[:-1] if part[-1].keyword in ("ASC", "DESC") else part


def _text(sql: str, part: list[Token]) -> str:
    return sql[part[0].start : part[-1].end] if part else ""


@dataclass(frozen=True, slots=True)
class _Lookup:
    """One index. keys: of a row here, as typed values; here, there: the tables; parts: each with its collation."""

    keys: str
    here: str
    there: str
    parts: tuple[tuple[str, str], ...]
    where: str

    def sql(self, where_key: str) -> str:
        """Names mean the columns of the innermost table, so that one text is evaluated for both rows."""
        limit = f" AND ({self.where})" if self.where else ""
        same = [
            f"({part}) = (SELECT {part} FROM {self.there} WHERE {where_key}{limit}) COLLATE {collation}"
            for part, collation in self.parts
        ]
        return f"SELECT {self.keys} FROM {self.here} WHERE {' AND '.join(same)}{limit}"


class Rivals:
    """Reads on the connection that has the snapshot as `snap`. An index is passed over if the snapshot's table lacks a
    column of it, or if it needs a function or collation that only the application has: a clash there is settled by the
    rule for clashes alone."""

    def __init__(self, connection: apsw.Connection, theirs: Table, mine: Table) -> None:
        self._connection = connection
        self._theirs = theirs
        self._mine = mine
        listed = rows(
            connection,
            "SELECT i.name, s.sql FROM pragma_index_list(?, 'main') AS i"
            " JOIN main.sqlite_schema AS s ON s.type = 'index' AND s.name = i.name"
            " WHERE i.\"unique\" AND i.origin <> 'pk'",
            (mine.name,),
        )
        self._lookups = [found for index, sql in listed if (found := self._lookup(index, sql)) is not None]

    def of(self, key: Row) -> list[Row]:
        """Keys of the rows here that clash with the snapshot's row with this key, that row's own among them."""
        found: list[Row] = []
        for lookup in self._lookups:
            sql = lookup.sql(self._where_key(key))
            found += map(decode_typed, rows(self._connection, sql, bound(key) * len(lookup.parts)))
        return found

    def _where_key(self, key: Row) -> str:
        return " AND ".join(
            f"{quote(part.name)} = {marker(value)}{collate(part)}"
            for part, value in zip(self._theirs.key, key, strict=True)
        )

    def _lookup(self, index: str, sql: str | None) -> _Lookup | None:
        """sql: the index's definition; None for a constraint's."""
        columns = rows(
            self._connection, "SELECT name, coll FROM pragma_index_xinfo(?, 'main') WHERE key ORDER BY seqno", (index,)
        )
        definition = _Definition.of(sql) if sql else _Definition(tuple(quote(name) for name, _ in columns), "")
        lookup = _Lookup(
            keys=", ".join(typed_sql(quote(name)) for name in self._mine.key_names),
            here=f"main.{quote(self._mine.name)} INDEXED BY {quote(index)}",
            there=f"snap.{quote(self._theirs.name)}",
            parts=tuple(zip(definition.parts, (quote(coll) for _, coll in columns), strict=True)),
            where=definition.where,
        )
        return lookup if self._is_quick(lookup) else None

    def _is_quick(self, lookup: _Lookup) -> bool:
        """Whether SQLite can do that, in the index; not if a column is taken from here because there is none there."""
        key: Row = (None,) * len(self._theirs.key)
        sql = f"EXPLAIN QUERY PLAN {lookup.sql(self._where_key(key))}"
        try:
            plan = rows(self._connection, sql, key * len(lookup.parts))
        except apsw.SQLError:
            return False
        steps = [row[3] for row in plan]
        return steps[0].startswith("SEARCH") and not any("CORRELATED" in step for step in steps)
