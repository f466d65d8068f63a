"""The application's triggers on the receiving side (I8).

The connection that writes what other nodes published has the schema's triggers switched off: their effects on
replicated tables arrive as rows. What they keep in tables that are NOT replicated, an FTS5 index above all, would
go stale. TEMP triggers still fire on that connection, so those triggers are re-created there as TEMP triggers:

    writes                        on the receiver
    only tables not replicated    re-created
    only replicated tables        left out: the rows arrive by themselves
    nothing (RAISE, SELECT)       left out: it had its say where the row was written
    both kinds                    refused, with a warning: either choice would be wrong

A re-created trigger may write a table that has triggers of its own; those follow the same rule.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import apsw

from harmonylite.db.sql import PREFIX, normal, quote, rows, scalar
from harmonylite.db.trigger_sql import Declaration, parse

log = logging.getLogger(__name__)

TEMP_PREFIX = f"{PREFIX}side_"
_PROBE = f"{PREFIX}probe"


class Fate(Enum):
    """What becomes of a trigger on the receiving side."""

    RECREATED = "re-created"
    ROWS_ARRIVE = "left out, it writes replicated tables only"
    NO_WRITES = "left out, it writes nothing"
    REFUSED = "refused"


class Write(NamedTuple):
    """One kind of write of a trigger's body, as SQLite's authorizer names it. `column`: of an UPDATE."""

    event: str  # INSERT, UPDATE, DELETE
    table: str
    column: str | None


@dataclass(frozen=True, slots=True)
class SideTrigger:
    """A trigger of the application that changes from other nodes would fire, and what becomes of it.

    `reason` says why it is refused. `sql` creates the TEMP trigger; "" unless it is re-created.
    """

    name: str
    table: str
    fate: Fate
    event: str = ""
    columns: tuple[str, ...] = ()  # of UPDATE OF
    writes: frozenset[Write] = frozenset()
    reason: str = ""
    sql: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    triggers: tuple[SideTrigger, ...] = ()

    @property
    def recreated(self) -> tuple[SideTrigger, ...]:
        return tuple(trigger for trigger in self.triggers if trigger.fate is Fate.RECREATED)

    @property
    def refused(self) -> tuple[SideTrigger, ...]:
        return tuple(trigger for trigger in self.triggers if trigger.fate is Fate.REFUSED)


def install(connection: apsw.Connection, replicated: frozenset[str]) -> Report:
    """Replace the TEMP triggers of `connection` by those that the schema now asks for.

    To be called when the connection is opened and whenever `PRAGMA schema_version` has changed. Works inside a
    transaction and outside. Inside, the schema cannot change before the rows are written; a rollback takes the
    triggers back as well, and the caller has to install again. No statement of the connection may be half read.

    `replicated`: table names in any case. Raises ValueError if the schema's own triggers are on: they and the TEMP
    triggers would both fire.
    """
    _require_triggers_off(connection)
    with connection:  # a savepoint: the schema does not change in between
        remove(connection)
        report = Report(tuple(_judge_all(connection, replicated)))
        for trigger in report.recreated:
            connection.execute(trigger.sql)
    for trigger in report.refused:
        log.warning(
            "trigger does not run for rows from other nodes; what it maintains will be stale",
            extra={"fields": {"trigger": trigger.name, "table": trigger.table, "reason": trigger.reason}},
        )
    log.debug("triggers re-created", extra={"fields": {"triggers": [t.name for t in report.recreated]}})
    return report


def classify(connection: apsw.Connection, replicated: frozenset[str]) -> list[SideTrigger]:
    """What `install` would do, with the same conditions; the connection is left as it was."""
    _require_triggers_off(connection)
    connection.execute("SAVEPOINT classify")
    try:
        remove(connection)
        return list(_judge_all(connection, replicated))
    finally:
        connection.execute("ROLLBACK TO classify")
        connection.execute("RELEASE classify")


def remove(connection: apsw.Connection) -> None:
    """Drop the TEMP triggers that `install` made."""
    for name in _temp_triggers(connection):
        connection.execute(f"DROP TRIGGER IF EXISTS temp.{quote(name)}")
    if not _temp_triggers(connection):
        return
    # SQLite forgets a TEMP trigger whose table is gone but keeps its text: it would come back with a table of
    # that name, a second time beside the one made then. DROP TRIGGER does not find it.
    before = scalar(connection, "PRAGMA writable_schema")
    connection.execute("PRAGMA writable_schema=ON")
    try:
        connection.execute(
            "DELETE FROM sqlite_temp_schema WHERE type = 'trigger' AND substr(name, 1, ?) = ?",
            (len(TEMP_PREFIX), TEMP_PREFIX),
        )
    finally:
        connection.execute(f"PRAGMA writable_schema={before}")


def _temp_triggers(connection: apsw.Connection) -> list[str]:
    sql = "SELECT name FROM sqlite_temp_schema WHERE type = 'trigger' AND substr(name, 1, ?) = ?"
    return [name for (name,) in rows(connection, sql, (len(TEMP_PREFIX), TEMP_PREFIX))]


def _require_triggers_off(connection: apsw.Connection) -> None:
    if connection.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, -1):
        raise ValueError("side triggers need a connection whose schema triggers are switched off")


# Which triggers, and what becomes of them.


def _judge_all(connection: apsw.Connection, replicated: frozenset[str]) -> Iterator[SideTrigger]:
    """In the order in which the application made them."""
    by_table: dict[str, list[tuple[int, str, str, bytes]]] = {}
    listed = "SELECT rowid, name, tbl_name, CAST(sql AS BLOB) FROM main.sqlite_schema WHERE type = 'trigger'"
    for number, name, table, sql in rows(connection, listed):
        if not normal(name).startswith(PREFIX):
            by_table.setdefault(normal(table), []).append((number, name, table, sql))

    received = frozenset(map(normal, replicated))
    judged: dict[int, SideTrigger] = {}
    tables = sorted(received & by_table.keys())
    seen = set(tables)
    while tables:
        for number, name, table, sql in by_table.get(tables.pop(), ()):
            trigger = _judge(connection, name, table, sql, received)
            judged[number] = trigger
            if trigger.fate is Fate.RECREATED:
                written = {normal(write.table) for write in trigger.writes} - seen
                seen |= written
                tables.extend(sorted(written))
    for number in sorted(judged):
        yield _refuse_if_recursive(judged[number], list(judged.values()))


def _judge(connection: apsw.Connection, name: str, table: str, sql: bytes, received: frozenset[str]) -> SideTrigger:
    refused = SideTrigger(name, table, Fate.REFUSED)
    try:
        declaration = parse(sql.decode())
    except ValueError as error:  # a UnicodeDecodeError is one
        return replace(refused, reason=f"its definition cannot be read: {error}")
    statement = _firing_statement(connection, declaration, table)
    if statement is None:
        return replace(refused, fate=Fate.NO_WRITES)
    probed = _probe(connection, declaration.temp_sql(_PROBE, table), statement)
    trigger = replace(refused, event=declaration.event, columns=declaration.columns, writes=frozenset(probed.writes))
    inside = sorted({write.table for write in probed.writes if normal(write.table) in received})
    outside = sorted({write.table for write in probed.writes if normal(write.table) not in received})
    if probed.error:
        return replace(trigger, reason=f"it cannot be prepared here: {probed.error}")
    if not probed.writes:
        return replace(trigger, fate=Fate.NO_WRITES)
    if not outside:
        return replace(trigger, fate=Fate.ROWS_ARRIVE)
    if inside:
        both = f"replicated tables ({', '.join(inside)}) and others ({', '.join(outside)})"
        return replace(trigger, reason=f"it writes {both}; split it in two")
    if probed.missing_functions:
        return replace(
            trigger, reason=f"it calls what only the application has: {', '.join(sorted(probed.missing_functions))}"
        )
    if declaration.raises():
        return replace(trigger, reason="it can RAISE, which would keep rows out; split it in two")
    temp_sql = declaration.temp_sql(TEMP_PREFIX + name, table)
    return replace(trigger, fate=Fate.RECREATED, sql=temp_sql)


def _refuse_if_recursive(trigger: SideTrigger, triggers: Sequence[SideTrigger]) -> SideTrigger:
    """A trigger that fires itself, directly or through others, ends in an error on this connection.

    By default SQLite does not fire a trigger that is already running. Here recursive_triggers is on, so that
    REPLACE fires delete triggers (https://sqlite.org/pragma.html#pragma_recursive_triggers).
    """
    if trigger.fate is not Fate.RECREATED:
        return trigger
    running = [other for other in triggers if other.fate is Fate.RECREATED]
    reached: list[SideTrigger] = []
    pending = [trigger]
    while pending:
        source = pending.pop()
        fired = [other for other in running if _fires(source, other) and other not in reached]
        reached += fired
        pending += fired
    if trigger not in reached:
        return trigger
    return replace(trigger, fate=Fate.REFUSED, sql="", reason="it fires itself again")


def _fires(source: SideTrigger, other: SideTrigger) -> bool:
    columns = set(map(normal, other.columns))
    return any(
        normal(write.table) == normal(other.table)
        and write.event == other.event
        and (not columns or write.column is None or normal(write.column) in columns)
        for write in source.writes
    )


# Asking SQLite what a trigger does.


@dataclass(frozen=True, slots=True)
class _Probed:
    writes: tuple[Write, ...]
    missing_functions: tuple[str, ...] = ()
    error: str = ""


_WRITES = {apsw.SQLITE_INSERT: "INSERT", apsw.SQLITE_UPDATE: "UPDATE", apsw.SQLITE_DELETE: "DELETE"}
_NO_SUCH_FUNCTION = re.compile(r"no such function: (.+)", re.DOTALL)


def _probe(connection: apsw.Connection, create: str, statement: str) -> _Probed:
    """Create the trigger alone, and prepare the statement that fires it. Nothing is written.

    Functions of the application get a stand-in, so that what the trigger writes is known all the same.
    """
    missing: list[str] = []
    try:
        while True:
            writes: list[Write] = []
            try:
                _prepare(connection, create, statement, writes)
                return _Probed(tuple(writes), tuple(missing))
            except apsw.Error as error:
                text = str(error).removeprefix(f"{type(error).__name__}: ")  # older apsw puts it there
                unknown = _NO_SUCH_FUNCTION.search(text)
                if unknown is None or unknown[1] in missing:
                    return _Probed(tuple(writes), tuple(missing), text)
                missing.append(unknown[1])
                connection.createscalarfunction(unknown[1], _stand_in)
    finally:
        for name in missing:
            connection.createscalarfunction(name, None)


def _stand_in(*_: object) -> None:
    """Never called: statements are only prepared."""


def _prepare(connection: apsw.Connection, create: str, statement: str, writes: list[Write]) -> None:
    """Append to `writes` what the body of the probing trigger writes. Raises apsw.Error if it does not compile."""

    def authorize(code: int, first: str | None, second: str | None, _schema: str | None, source: str | None) -> int:
        if source == _PROBE and code in _WRITES and first is not None:
            writes.append(Write(_WRITES[code], first, second))
        return apsw.SQLITE_OK

    connection.execute(create)
    before = connection.authorizer
    connection.authorizer = authorize
    try:
        connection.execute(f"EXPLAIN {statement}").fetchall()
    finally:
        connection.authorizer = before
        connection.execute(f"DROP TRIGGER temp.{quote(_PROBE)}")


def _firing_statement(connection: apsw.Connection, declaration: Declaration, table: str) -> str | None:
    """A statement that fires the trigger. None: none does, as no column that it names exists."""
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
