"""Asking SQLite what a trigger does, without firing it.

The trigger is created alone, as a TEMP trigger, and a statement that fires it is prepared: SQLite's authorizer
callback is told of every write that the body compiles to (https://sqlite.org/c3ref/set_authorizer.html).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import apsw

from harmonylite.db.sql import PREFIX, normal, quote, rows
from harmonylite.db.trigger_sql import Declaration

_PROBE = f"{PREFIX}probe"

_SAVEPOINT = f"{PREFIX}probing"

_EVENTS = {apsw.SQLITE_INSERT: "INSERT", apsw.SQLITE_UPDATE: "UPDATE", apsw.SQLITE_DELETE: "DELETE"}
_NO_SUCH_FUNCTION = re.compile(r"no such function: (.+)", re.DOTALL)

# These say something of the moment, not of the trigger.
_PASSING = (
    apsw.BusyError,
    apsw.LockedError,
    apsw.IOError,
    apsw.FullError,
    apsw.NoMemError,
    apsw.InterruptError,
    apsw.CantOpenError,
)


class Write(NamedTuple):
    """One kind of write of a trigger's body. column: of an UPDATE."""

    event: str  # INSERT, UPDATE, DELETE
    table: str
    column: str | None


@dataclass(frozen=True, slots=True)
class Probed:
    """error: why the trigger does not compile here; `writes` is then not complete."""

    writes: frozenset[Write]
    missing_functions: tuple[str, ...] = ()
    error: str = ""


def firing_statement(connection: apsw.Connection, declaration: Declaration, table: str) -> str | None:
    """A statement that fires the trigger. None: nothing does, as no column that it names exists."""
    target = f"main.{quote(table)}"
    if declaration.event == "INSERT":
        return f"INSERT INTO {target} DEFAULT VALUES"
    if declaration.event == "DELETE":
        return f"DELETE FROM {target}"
    named = set(map(normal, declaration.columns))
    columns = "SELECT name FROM pragma_table_xinfo(?, 'main') WHERE hidden = 0"
    for (name,) in rows(connection, columns, (table,)):
        if not named or normal(name) in named:
            return f"UPDATE {target} SET {quote(name)} = {quote(name)}"
    return None


def probe(connection: apsw.Connection, declaration: Declaration, table: str, statement: str) -> Probed:
    """What the trigger writes when `statement` fires it. The connection's schema triggers have to be off.

    Functions that only the application has get a stand-in, so that the writes are known all the same.
    Raises apsw.Error for what has nothing to do with the trigger (SQLITE_BUSY, a full disk).
    """
    create = declaration.temp_sql(_PROBE, table)
    missing: list[str] = []
    try:
        while True:
            writes: set[Write] = set()
            try:
                _prepare(connection, create, statement, writes)
                return Probed(frozenset(writes), tuple(missing))
            except _PASSING:
                raise
            except apsw.Error as error:
                text = _text(error)
                unknown = _NO_SUCH_FUNCTION.search(text)
                if unknown is None or unknown[1] in missing:
                    return Probed(frozenset(writes), tuple(missing), text)
                missing.append(unknown[1])
                connection.createscalarfunction(unknown[1], _stand_in)
    finally:
        for name in missing:
            connection.createscalarfunction(name, None)


def compile_error(connection: apsw.Connection, statements: Sequence[str], firing: str) -> str:
    """Why the program of `firing` does not compile once `statements` have run; "" if it does. Both are undone."""
    connection.execute(f"SAVEPOINT {_SAVEPOINT}")
    try:
        for sql in statements:
            connection.execute(sql)
        rows(connection, f"EXPLAIN {firing}")
    except _PASSING:
        raise
    except apsw.Error as error:
        return _text(error)
    finally:
        # An error may have ended the whole transaction (disk full): then there is nothing to roll back to.
        if not connection.getautocommit():
            connection.execute(f"ROLLBACK TO {_SAVEPOINT}")
            connection.execute(f"RELEASE {_SAVEPOINT}")
    return ""


def _text(error: apsw.Error) -> str:
    return str(error).removeprefix(f"{type(error).__name__}: ")  # older apsw puts it there


def _stand_in(*_: object) -> None:
    """Never called: statements are only prepared."""


def _prepare(connection: apsw.Connection, create: str, statement: str, writes: set[Write]) -> None:
    """Add to `writes` what the body of the probing trigger writes. Raises apsw.Error if it does not compile."""

    def authorize(code: int, first: str | None, second: str | None, _schema: str | None, source: str | None) -> int:
        if source == _PROBE and code in _EVENTS and first is not None:
            writes.add(Write(_EVENTS[code], first, second))
        return apsw.SQLITE_OK

    connection.execute(create)
    before = connection.authorizer
    connection.authorizer = authorize
    try:
        rows(connection, f"EXPLAIN {statement}")
    finally:
        connection.authorizer = before
        connection.execute(f"DROP TRIGGER temp.{quote(_PROBE)}")
