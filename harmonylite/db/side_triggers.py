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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import apsw

from harmonylite.db.sql import PREFIX, normal, quote, rows, scalar
from harmonylite.db.trigger_probe import Write, compile_error, firing_statement, probe
from harmonylite.db.trigger_sql import Declaration, Reference, parse

log = logging.getLogger(__name__)

TEMP_PREFIX = f"{PREFIX}side_"

# The schema of an attached database in memory. (TEMP triggers of TEMP tables do not fire where the schema's
# triggers are switched off, in SQLite 3.40 and 3.46.)
_RELAY_SCHEMA = f"{PREFIX}relay"
_RELAYS = quote(_RELAY_SCHEMA)


class Fate(Enum):
    """What becomes of a trigger on the receiving side."""

    RECREATED = "re-created"
    ROWS_ARRIVE = "left out, it writes replicated tables only"
    NO_WRITES = "left out, it writes nothing"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class SideTrigger:
    """A trigger of the application that changes from other nodes would fire, and what becomes of it.

    `reason` says why it is refused. `statements` re-create it; none unless that is its fate.
    """

    name: str
    table: str
    fate: Fate
    event: str = ""
    columns: tuple[str, ...] = ()  # of UPDATE OF
    writes: frozenset[Write] = frozenset()
    reason: str = ""
    statements: tuple[str, ...] = ()


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
        report = Report(tuple(_Judge(connection, replicated).all()))
        for trigger in report.recreated:
            for sql in trigger.statements:
                connection.execute(sql)
    for trigger in report.refused:
        log.warning(
            "trigger does not run for rows from other nodes; what it maintains will be stale",
            extra={"fields": {"trigger": trigger.name, "table": trigger.table, "reason": trigger.reason}},
        )
    log.debug("triggers re-created", extra={"fields": {"triggers": [t.name for t in report.recreated]}})
    return report


def classify(connection: apsw.Connection, replicated: frozenset[str]) -> list[SideTrigger]:
    """What `install` would do, with the same conditions; nothing is left behind."""
    _require_triggers_off(connection)
    connection.execute("SAVEPOINT classify")
    try:
        remove(connection)
        return list(_Judge(connection, replicated).all())
    finally:
        connection.execute("ROLLBACK TO classify")
        connection.execute("RELEASE classify")


def remove(connection: apsw.Connection) -> None:
    """Drop what `install` made."""
    with connection:
        # Makes SQLite notice that the schema has changed, which may bring TEMP triggers back or take them away.
        rows(connection, "SELECT 1 FROM main.sqlite_schema LIMIT 1")
        for name in _temp_triggers(connection):
            connection.execute(f"DROP TRIGGER IF EXISTS temp.{quote(name)}")
        if _relays_attached(connection):
            for (name,) in rows(connection, f"SELECT name FROM {_RELAYS}.sqlite_schema WHERE type = 'table'"):
                connection.execute(f"DROP TABLE {_RELAYS}.{quote(name)}")
        if _temp_triggers(connection):
            _remove_orphans(connection)


def _remove_orphans(connection: apsw.Connection) -> None:
    """SQLite forgets a TEMP trigger whose table is gone but keeps its text: it would come back with a table of
    that name, a second time beside the one made then. DROP TRIGGER does not find it."""
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


class _Judge:
    """The schema's triggers, and what becomes of each that changes from other nodes reach."""

    def __init__(self, connection: apsw.Connection, replicated: frozenset[str]) -> None:
        self._connection = connection
        self._received = frozenset(map(normal, replicated))
        self._on_table: dict[str, list[tuple[int, str, str, bytes]]] = {}
        triggers = "SELECT rowid, name, tbl_name, CAST(sql AS BLOB) FROM main.sqlite_schema WHERE type = 'trigger'"
        for number, name, table, sql in rows(connection, triggers):
            if not normal(name).startswith(PREFIX):
                self._on_table.setdefault(normal(table), []).append((number, name, table, sql))
        resolving = (
            "SELECT name FROM main.sqlite_schema WHERE type = 'table' AND instr(upper(CAST(sql AS BLOB)), 'CONFLICT')"
        )
        self._resolving = frozenset(normal(name) for (name,) in rows(connection, resolving))

    def all(self) -> Iterator[SideTrigger]:
        """In the order in which the application made them."""
        judged: dict[int, SideTrigger] = {}
        tables = sorted(self._received & self._on_table.keys())
        seen = set(tables)
        while tables:
            for number, name, table, sql in self._on_table.get(tables.pop(), ()):
                trigger = self._judge(name, table, sql)
                judged[number] = trigger
                if trigger.fate is Fate.RECREATED:
                    written = {normal(write.table) for write in trigger.writes} - seen
                    seen |= written
                    tables.extend(sorted(written))
        for number in sorted(judged):
            yield _refuse_if_recursive(judged[number], list(judged.values()))

    def _judge(self, name: str, table: str, sql: bytes) -> SideTrigger:
        refused = SideTrigger(name, table, Fate.REFUSED)
        try:
            declaration = parse(sql.decode())
        except ValueError as error:  # a UnicodeDecodeError is one
            return replace(refused, reason=f"its definition cannot be read: {error}")
        statement = firing_statement(self._connection, declaration, table)
        if statement is None:
            return replace(refused, fate=Fate.NO_WRITES)
        probed = probe(self._connection, declaration, table, statement)
        trigger = replace(refused, event=declaration.event, columns=declaration.columns, writes=probed.writes)
        inside = sorted({write.table for write in probed.writes if normal(write.table) in self._received})
        outside = sorted({write.table for write in probed.writes if normal(write.table) not in self._received})
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
            names = ", ".join(sorted(probed.missing_functions))
            return replace(trigger, reason=f"it calls what only the application has: {names}")
        if declaration.raises():
            return replace(trigger, reason="it can RAISE, which would keep rows out; split it in two")
        return self._recreated(trigger, declaration, statement)

    def _recreated(self, trigger: SideTrigger, declaration: Declaration, firing: str) -> SideTrigger:
        table, received = trigger.table, normal(trigger.table) in self._received
        if received and (declaration.timing, declaration.event) == ("BEFORE", "INSERT"):
            declaration = only_for_new_rows(self._connection, declaration, table)
        written = {normal(write.table) for write in trigger.writes}
        resolves = declaration.resolves_conflicts() or written & (self._resolving | self._on_table.keys())
        # One that another trigger fires gets the conflict clause that it gets in the application.
        if received and resolves:
            statements = relayed(self._connection, declaration, trigger.name, table)
        else:
            statements = (declaration.temp_sql(TEMP_PREFIX + trigger.name, table),)
        error = compile_error(self._connection, statements, firing)
        if error:
            return replace(trigger, reason=f"it cannot be re-created: {error}")
        return replace(trigger, fate=Fate.RECREATED, statements=statements)


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
    return replace(trigger, fate=Fate.REFUSED, statements=(), reason="it fires itself again")


def _fires(source: SideTrigger, other: SideTrigger) -> bool:
    columns = set(map(normal, other.columns))
    return any(
        normal(write.table) == normal(other.table)
        and write.event == other.event
        and (not columns or write.column is None or normal(write.column) in columns)
        for write in source.writes
    )


# What the connection's own way of writing would do to them.


def only_for_new_rows(connection: apsw.Connection, declaration: Declaration, table: str) -> Declaration:
    """An UPSERT that updates fires BEFORE INSERT triggers first (https://sqlite.org/lang_upsert.html); where the
    row was written, an UPDATE did not."""
    keys = rows(connection, "SELECT name FROM pragma_table_xinfo(?, 'main') WHERE pk ORDER BY pk", (table,))
    same = " AND ".join(f"r.{quote(name)} = NEW.{quote(name)}" for (name,) in keys)
    new = f"NOT EXISTS (SELECT 1 FROM {quote(table)} AS r WHERE {same})"
    condition = f"({declaration.condition}\n) AND {new}" if declaration.condition else new
    return replace(declaration, condition=condition)


def relayed(connection: apsw.Connection, declaration: Declaration, name: str, table: str) -> tuple[str, ...]:
    """The same trigger, out of reach of the conflict clause of the statement that fires it.

    An OR clause, and the UPDATE of an UPSERT, take the place of every conflict clause in the triggers they fire
    (https://sqlite.org/lang_createtrigger.html): the body's INSERT OR REPLACE would fail on a duplicate. A DELETE
    has none, and passes none on. So the trigger hands its values over to a table in memory and deletes them
    there again; the body runs as the trigger of that deletion.
    """
    relay = quote(f"{PREFIX}relay_{name}")
    if not _relays_attached(connection):
        connection.execute(f"ATTACH ':memory:' AS {_RELAYS}")
    rowid = _rowid_names(connection, table)
    columns: list[str] = []
    values: list[str] = []
    used: dict[Reference, str] = {}
    for i, reference in enumerate(declaration.references()):
        values.append(f"{reference.row}.{quote(reference.column)}")
        # NEW and OLD compare by the collation of the column and without its affinity, except for the rowid's.
        if reference.column in rowid:
            columns.append(f"c{i}")
            used[reference] = f"CAST(OLD.c{i} AS INTEGER)"
        else:
            columns.append(f"c{i} COLLATE {quote(_collation(connection, table, reference.column))}")
            used[reference] = f"OLD.c{i}"
    hand_over = f"BEGIN INSERT INTO {relay} VALUES ({', '.join(values or ['NULL'])}); DELETE FROM {relay}; END"
    return (
        f"CREATE TABLE {_RELAYS}.{relay} ({', '.join(columns or ['c0'])})",
        f"CREATE TEMP TRIGGER {relay} AFTER DELETE ON {_RELAYS}.{relay} {declaration.body_with(used)}",
        replace(declaration, body=hand_over).temp_sql(TEMP_PREFIX + name, table),
    )


def _relays_attached(connection: apsw.Connection) -> bool:
    return bool(scalar(connection, "SELECT 1 FROM pragma_database_list WHERE name = ?", (_RELAY_SCHEMA,)))


def _rowid_names(connection: apsw.Connection, table: str) -> set[str]:
    """By which normalized names the table's rowid goes: that of an INTEGER PRIMARY KEY, and the built-in ones."""
    columns = rows(connection, "SELECT name, pk FROM pragma_table_xinfo(?, 'main')", (table,))
    indexed = scalar(connection, "SELECT 1 FROM pragma_index_list(?, 'main') WHERE origin = 'pk'", (table,))
    alias = {normal(name) for name, position in columns if position and not indexed}
    return alias | {"rowid", "oid", "_rowid_"} - {normal(name) for name, _ in columns}


def _collation(connection: apsw.Connection, table: str, column: str) -> str:
    """No pragma tells a column's collation, but the program of a comparison names it: `NOCASE-8`."""
    program = rows(connection, f"EXPLAIN SELECT {quote(column)} > ? FROM main.{quote(table)}", (None,))
    found = [row[5] for row in program if row[1] in ("Gt", "Lt", "Ge", "Le") and row[5]]
    return str(found[0]).rsplit("-", 1)[0] if found else "BINARY"
