"""The application of one replica: it knows its own tables and nothing of HarmonyLite.

What its transactions did is taken from the rows themselves, read before and after, and from the keys that its
statements name; never from triggers, logs or versions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import apsw

from harmonylite.model import RawText, Row, Value
from tests.sim.history import Delete, Insert, Operation, Rekey, Swap, Update, UpdateAll, Values
from tests.sim.reference import Place, Violation
from tests.sim.tables import TABLES, RowState, Table, quote, read_columns, read_rows, row_key

_DAY_MS = 86_400_000
# 1970 in milliseconds since SQLite's epoch, noon of 24 November 4714 BC.
_UNIX_EPOCH_MS = 210_866_760_000_000


@dataclass(frozen=True)
class Effect:
    """What a committed transaction did to one row; before and after are equal if it was only touched."""

    place: Place
    before: RowState | None
    after: RowState | None


class Application:
    """One connection to one replica's file, as an ORM would hold it for the application's lifetime."""

    def __init__(
        self, path: Path, tables: Sequence[str], clock_ms: Callable[[], int], next_serial: Callable[[], int]
    ) -> None:
        self._tables = [TABLES[name] for name in tables]
        self._clock_ms = clock_ms
        self._next_serial = next_serial
        self.connection = apsw.Connection(str(path))
        self.connection.execute("PRAGMA trusted_schema = OFF; PRAGMA foreign_keys = ON; PRAGMA synchronous = OFF")
        if any(table.full_text_index for table in self._tables):
            # Its own delete triggers must run for rows that REPLACE removes, or its index is wrong by itself.
            self.connection.execute("PRAGMA recursive_triggers = ON")
        self.set_clock(self.connection)

    def set_clock(self, connection: apsw.Connection) -> None:
        """SQLite's clock on this connection is the node's simulated one, computed as SQLite does."""

        def julianday(*_arguments: object) -> float:
            return (self._clock_ms() + _UNIX_EPOCH_MS) / _DAY_MS

        connection.create_scalar_function("julianday", julianday, flags=apsw.SQLITE_INNOCUOUS)

    def create(self) -> None:
        for table in self._tables:
            for sql in table.ddl:
                self.connection.execute(sql)

    def close(self) -> None:
        self.connection.close(True)

    def transaction(self, operations: Sequence[Operation], *, commit: bool = True) -> list[Effect]:
        """Runs the statements as one transaction. Raises apsw.BusyError if another writer holds the lock."""
        self.connection.execute("BEGIN IMMEDIATE")
        before = self._rows()
        touched: set[Place] = set()
        for operation in operations:
            try:
                touched |= self._run(operation)
            except apsw.ConstraintError as error:
                # The statement had no effect; the application reports it to its user and goes on.
                if "__harmonylite__" in str(error):
                    raise Violation(f"I1: {operation} failed because of us: {error}") from error
        after = self._rows()
        self.connection.execute("COMMIT" if commit else "ROLLBACK")
        if not commit:
            return []
        touched |= {place for place in {*before, *after} if before.get(place) != after.get(place)}
        return [Effect(place, before.get(place), after.get(place)) for place in sorted(touched, key=repr)]

    def _rows(self) -> dict[Place, RowState]:
        return {
            (table.name, key): row for table in self._tables for key, row in read_rows(self.connection, table).items()
        }

    # --- statements ---

    def _run(self, operation: Operation) -> set[Place]:
        """Runs one statement; returns the rows it wrote or removed. Raises apsw.ConstraintError."""
        table = TABLES[operation.table]
        if isinstance(operation, Insert):
            self._insert(table, operation)
        elif isinstance(operation, Update):
            self._update(table, operation.values, operation.key, operation.conflict)
        elif isinstance(operation, UpdateAll):
            self._update(table, operation.values, None, "")
            return self._named(table, None)
        elif isinstance(operation, Rekey):
            return self._rekey(table, operation)
        elif isinstance(operation, Delete):
            named = self._named(table, operation.key)
            self._execute("DELETE FROM", table, [], operation.key)
            return named
        else:
            return self._swap(table, operation)
        return self._named(table, operation.key) if self.connection.changes() else set()

    def _insert(self, table: Table, operation: Insert) -> None:
        values = [
            *zip(table.key, operation.key, strict=True),
            ("serial", self._next_serial()),
            *operation.values,
        ]
        verb, upsert = f"INSERT {operation.conflict} INTO", ""
        if operation.conflict == "DO UPDATE":
            verb = "INSERT INTO"
            sets = ", ".join(f"{quote(c)} = excluded.{quote(c)}" for c, _ in values[len(table.key) :])
            upsert = f" ON CONFLICT ({', '.join(map(quote, table.key))}) DO UPDATE SET {sets}"
        columns = ", ".join(quote(column) for column, _ in values)
        marks = ", ".join(_mark(value) for _, value in values)
        self.connection.execute(
            f"{verb} {quote(table.name)} ({columns}) VALUES ({marks}){upsert}", [_bound(v) for _, v in values]
        )

    def _update(self, table: Table, values: Values, key: Row | None, conflict: str) -> None:
        self._execute(f"UPDATE {conflict}", table, [("serial", self._next_serial()), *values], key)

    def _rekey(self, table: Table, operation: Rekey) -> set[Place]:
        named = self._named(table, operation.key)
        values = [*zip(table.key, operation.new_key, strict=True), ("serial", self._next_serial())]
        self._execute(f"UPDATE {operation.conflict}", table, values, operation.key)
        return named | self._named(table, operation.new_key) if self.connection.changes() else set()

    def _swap(self, table: Table, operation: Swap) -> set[Place]:
        """By way of NULL, because a plain exchange would clash half-way; a failure half-way leaves a NULL."""
        column = quote(operation.column)
        rows = [self._select(table, column, key) for key in (operation.key, operation.other)]
        if not all(rows) or operation.key == operation.other:
            return set()
        (mine,), (theirs,) = rows[0][0], rows[1][0]
        for key, value in ((operation.other, None), (operation.key, theirs), (operation.other, mine)):
            self._update(table, ((operation.column, value),), key, "")
        return self._named(table, operation.key) | self._named(table, operation.other)

    def _execute(self, verb: str, table: Table, values: Sequence[tuple[str, Value]], key: Row | None) -> None:
        sets = ", ".join(f"{quote(column)} = {_mark(value)}" for column, value in values)
        where, bindings = _where(table, key)
        self.connection.execute(
            f"{verb} {quote(table.name)}{' SET ' if sets else ''}{sets}{where}",
            [*(_bound(value) for _, value in values), *bindings],
        )

    def _select(self, table: Table, columns: str, key: Row | None) -> list[tuple[Value, ...]]:
        where, bindings = _where(table, key)
        return self.connection.execute(f"SELECT {columns} FROM {quote(table.name)}{where}", bindings).fetchall()

    def _named(self, table: Table, key: Row | None) -> set[Place]:
        """The rows with this key, or all, as places."""
        where, bindings = _where(table, key)
        found = read_columns(self.connection, table.name, table.key, where, bindings)
        return {(table.name, row_key(table, cells)) for cells in found if not any(kind == "null" for kind, _ in cells)}


def _mark(value: Value) -> str:
    return "CAST(? AS TEXT)" if isinstance(value, RawText) else "?"


def _bound(value: Value) -> Value:
    return bytes(value) if isinstance(value, RawText) else value


def _where(table: Table, key: Row | None) -> tuple[str, list[Value]]:
    if key is None:
        return "", []
    tests = " AND ".join(f"{quote(name)} IS {_mark(value)}" for name, value in zip(table.key, key, strict=True))
    return f" WHERE {tests}", [_bound(value) for value in key]
