"""Brings our tables and triggers in line with the application's schema: at start, and whenever it changes.

Everything happens inside one write transaction of the caller, so that at no moment a trigger stands without its
log. Running it again changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import apsw

from harmonylite.db import capture, recapture, schema, stamping, tables, versions
from harmonylite.db.held import HELD
from harmonylite.db.schema import Schema, Table
from harmonylite.db.sql import PREFIX, integer, log_table, normal, quote, rows, version_table
from harmonylite.db.tables import State
from harmonylite.db.versions import Correction

log = logging.getLogger(__name__)

# The columns of version tables and change logs besides the key.
_VERSION_COLUMNS = ("ts", "node", "rank", "deleted", "batch", "base_ts", "base_node", "settled_ms")
_LOG_COLUMNS = ("ts", "op")


@dataclass(frozen=True, slots=True)
class Settings:
    """Which tables are replicated, and whether this node publishes (if not, it has no triggers at all)."""

    node_id: int
    publish: bool
    include: Sequence[str]
    exclude: Sequence[str]


def install(
    connection: apsw.Connection,
    settings: Settings,
    state: State,
    bound_ms: int = versions.UNBOUNDED_MS,
    correction: Correction = versions.NO_CORRECTION,
) -> tuple[Schema, State, frozenset[str]]:
    """Returns the schema as it is now replicated, the state to be saved, and the names (normal) that now mean other
    rows than before: of tables that were renamed, and of those that are gone through (recapture.py). The times are for
    what the logs hold."""
    found = schema.load(connection, settings.include, settings.exclude)
    everything = schema.load(connection)
    moved = _follow_renames(connection, everything)
    known = _known(connection, everything)
    first = not known
    _forget_dropped(connection, known, everything)
    lost_logs = _tables_without_log(connection, known, everything)
    # The old table of a new name says nothing of it.
    stamped = {name for name in stamping.stamped(connection) if _is_known(known, name)} - moved
    # What is missing there is not evicted.
    counted = stamped - recapture.names(connection)
    if moved or lost_logs or not settings.publish or not _is_as_installed(connection, found, known):
        state = _absorb_leftovers(connection, everything, known, counted, settings.node_id, state, bound_ms, correction)
    lost = _rebuild_damaged(connection, found, known)
    versions.create_tables(connection, found.tables.values(), with_logs=settings.publish)
    state = replace(state, batch=max([state.batch, *(_newest_batch(connection, t) for t in found.tables.values())]))
    off = _fix_triggers(connection, found if settings.publish else replace(found, tables={})) - moved
    if not settings.publish:
        off = frozenset()
        for table in everything.tables.values():
            capture.drop_log(connection, table.name)
    for table in found.tables.values():
        key = normal(table.name)
        # A table that came after the first installation has rows that nobody saw; at the first, nothing is stamped.
        if settings.publish and not first and (key in lost | off | lost_logs):
            state, done = _recapture(connection, table, settings.node_id, state, is_new=_name(known, table) is None)
            if done:
                stamped.add(key)
            else:
                stamped.discard(key)
                moved |= {key}
        connection.execute(
            f"INSERT INTO {tables.TABLE} VALUES (?, ?)"
            " ON CONFLICT (name) DO UPDATE SET definition = excluded.definition",
            (table.name, capture.definition(table)),
        )
    watched = {key for key, table in found.tables.items() if settings.publish and table.evicts_unseen}
    stamping.note(connection, stamped & watched)
    recapture.keep(connection, found.tables if settings.publish else ())
    if lost:
        # The versions are gone: only the stream can say again what they were.
        connection.execute(f"DELETE FROM {tables.POSITION}")
    return replace(found, cookie=schema.schema_cookie(connection)), state, moved


def _name(known: dict[str, str], table: Table) -> str | None:
    return next((name for name in known if normal(name) == normal(table.name)), None)


def _is_known(known: dict[str, str], name: str) -> bool:
    return any(normal(each) == name for each in known)


def _known(connection: apsw.Connection, everything: Schema) -> dict[str, str]:
    """Definition by name of the tables that were captured; an entry that was lost is made up from our tables."""
    known: dict[str, str] = dict(rows(connection, f"SELECT name, definition FROM {tables.TABLE}"))
    folded = {normal(name) for name in known}
    for key, table in everything.tables.items():
        if key not in folded and _has_columns(connection, version_table(table.name), table, _VERSION_COLUMNS):
            known[table.name] = capture.definition(table)
    return known


def _tables_without_log(connection: apsw.Connection, known: dict[str, str], everything: Schema) -> frozenset[str]:
    """Captured tables whose log is gone or damaged, with whatever it held."""
    captured = {on for _, (on, _) in capture.installed(connection).triggers.items()}
    return frozenset(
        normal(name)
        for name in known
        if (table := everything.table(name)) is not None
        and name in captured
        and not _has_columns(connection, log_table(name), table, _LOG_COLUMNS)
    )


def _follow_renames(connection: apsw.Connection, everything: Schema) -> frozenset[str]:
    """After ALTER TABLE .. RENAME our triggers are on the new table under the old name; move our tables along.

    Returns the new names. A new table of the old name, if there is one, is a new table.
    """
    moved = {
        old: on
        for name, (on, _) in capture.installed(connection).triggers.items()
        if (old := _table_of_trigger(name)) and normal(old) != normal(on) and everything.table(on) is not None
    }
    for old, new in moved.items():
        log.info("table renamed by the application", extra={"fields": {"from": old, "to": new}})
        capture.drop_triggers(connection, [f"{PREFIX}{old}_{kind}" for kind in capture.KINDS])
        for of in (log_table, version_table):
            if _exists(connection, of(old)) and not _exists(connection, of(new)):
                connection.execute(f"ALTER TABLE {of(old)} RENAME TO {of(new)}")
        for suffix in ("pending", "tombstones"):
            connection.execute(f"DROP INDEX IF EXISTS {quote(f'{PREFIX}{old}_{suffix}')}")
        connection.execute(f"UPDATE OR REPLACE {tables.TABLE} SET name = ? WHERE name = ?", (new, old))
        recapture.rename(connection, old, new)
    return frozenset(normal(new) for new in moved.values())


def _table_of_trigger(name: str) -> str | None:
    table, _, kind = name[len(PREFIX) :].rpartition("_")
    return table if kind in capture.KINDS else None


def _exists(connection: apsw.Connection, quoted: str) -> bool:
    return bool(rows(connection, f"PRAGMA table_info({quoted})"))


def _forget_dropped(connection: apsw.Connection, known: dict[str, str], everything: Schema) -> None:
    for name in list(known):
        if everything.table(name) is None:
            log.info("table no longer replicated: it was dropped, or changed", extra={"fields": {"table": name}})
            mine = [t for t in capture.installed(connection).triggers if _table_of_trigger(t) == name]
            capture.drop_triggers(connection, mine)
            _drop_tables_of(connection, name)
            connection.execute(f"DELETE FROM {tables.TABLE} WHERE name = ?", (name,))
            del known[name]


def _drop_tables_of(connection: apsw.Connection, name: str) -> None:
    connection.execute(f"DROP TABLE IF EXISTS {log_table(name)}")
    connection.execute(f"DROP TABLE IF EXISTS {version_table(name)}")


def _is_as_installed(connection: apsw.Connection, found: Schema, known: dict[str, str]) -> bool:
    """Whether capture is what it was at the last installation, as when the daemon was only off: the logs stay as they
    are, to be absorbed in short transactions."""
    if _parked_fit_maybe(connection):
        return False  # they are compared with what was written before, in this very transaction
    there = {name: (sql, normal(on)) for name, (on, sql) in capture.installed(connection).triggers.items()}
    wanted = {t.name: (t.sql, key) for key, table in found.tables.items() for t in capture.triggers(table)}
    # Tables that `[tables]` leaves out since a while stay known; without triggers, nothing is logged of them.
    chosen = {name: definition for name, definition in known.items() if normal(name) in found.tables}
    return (
        there == wanted
        and chosen == {table.name: capture.definition(table) for table in found.tables.values()}
        and all(
            _has_columns(connection, log_table(table.name), table, _LOG_COLUMNS)
            and _has_columns(connection, version_table(table.name), table, _VERSION_COLUMNS)
            for table in found.tables.values()
        )
    )


def _parked_fit_maybe(connection: apsw.Connection) -> bool:
    """Whether rows wait for the schema, and it is another one now; not while a table is gone through: they wait for
    that, too (Replica.recapture)."""
    return (
        tables.get_meta(connection, "definitions") != schema.schema_text(connection)
        and not recapture.is_due(connection)
        and bool(integer(connection, f"SELECT EXISTS (SELECT 1 FROM {tables.PARKED})"))
    )


def _absorb_leftovers(
    connection: apsw.Connection,
    everything: Schema,
    known: dict[str, str],
    stamped: Collection[str],
    node_id: int,
    state: State,
    bound_ms: int,
    correction: Correction,
) -> State:
    """Take over what the logs hold before any of them may be dropped."""
    intact = {
        key: table
        for key, table in everything.tables.items()
        if known.get(_name(known, table) or "") == capture.definition(table)
        and _has_columns(connection, log_table(table.name), table, _LOG_COLUMNS)
        and _has_columns(connection, version_table(table.name), table, _VERSION_COLUMNS)
    }
    triggers = capture.installed(connection).triggers
    captured = {
        key
        for key, table in intact.items()
        if all(f"{PREFIX}{table.name}_{kind}" in triggers for kind in capture.ESSENTIAL)
    }
    absorber = versions.Absorber(replace(everything, tables=intact), node_id, captured)
    absorber.evictions.leave_to_look(table.name for key, table in intact.items() if key not in stamped)
    _, state = absorber.absorb(connection, state, bound_ms=bound_ms, correction=correction, limit=versions.UNBOUNDED_MS)
    return state


def _has_columns(connection: apsw.Connection, quoted: str, table: Table, wanted: Iterable[str]) -> bool:
    there = {row[1] for row in rows(connection, f"PRAGMA table_info({quoted})")}
    return there >= {*wanted, *(f"k{i}" for i in range(len(table.key)))}


def _rebuild_damaged(connection: apsw.Connection, found: Schema, known: dict[str, str]) -> frozenset[str]:
    """Drop our tables that do not fit the table any more. Returns the tables whose versions are lost by that."""
    lost = set()
    for key, table in found.tables.items():
        name = _name(known, table)
        if name is None:
            _drop_tables_of(connection, table.name)  # leftovers of an earlier table of this name
            continue
        fits = known[name] == capture.definition(table)
        if not fits or not _has_columns(connection, version_table(table.name), table, _VERSION_COLUMNS):
            log.warning(
                "version table rebuilt: every row of the table is published again, at its lowest version",
                extra={"fields": {"table": table.name, "reason": "key changed" if not fits else "damaged"}},
            )
            _drop_tables_of(connection, table.name)
            lost.add(key)
        elif not _has_columns(connection, log_table(table.name), table, _LOG_COLUMNS):
            connection.execute(f"DROP TABLE IF EXISTS {log_table(table.name)}")
    return frozenset(lost)


def _newest_batch(connection: apsw.Connection, table: Table) -> int:
    return integer(connection, f"SELECT max(batch) FROM {version_table(table.name)} WHERE batch < {HELD}")


def _fix_triggers(connection: apsw.Connection, found: Schema) -> frozenset[str]:
    """Make our triggers exactly those that `found` needs. Returns the tables that had none or not all of them."""
    there = capture.installed(connection).triggers
    wanted = {t.name: (t, key) for key, table in found.tables.items() for t in capture.triggers(table)}
    capture.drop_triggers(
        connection, [name for name, (_, sql) in there.items() if name not in wanted or sql != wanted[name][0].sql]
    )
    off = set()
    for name, (trigger, key) in wanted.items():
        essential = name.rpartition("_")[2] in capture.ESSENTIAL
        if essential and (name not in there or normal(there[name][0]) != key):
            off.add(key)
        if name not in there or there[name][1] != trigger.sql:
            connection.execute(trigger.sql)
    return frozenset(off)


def _recapture(
    connection: apsw.Connection, table: Table, node_id: int, state: State, *, is_new: bool
) -> tuple[State, bool]:
    """is_new: nothing of it was ever captured. Returns whether all of it is done; if not, it is begun."""
    batch = state.batch + 1
    small = recapture.is_small(connection, table)
    if small:
        changed = versions.recapture(connection, table, node_id=node_id, batch=batch, published=state.published_batch)
        recapture.forget(connection, table)
        recapture.say(table, changed, is_new=is_new)
    else:
        recapture.begin(connection, table, batch=batch, is_new=is_new)
    return replace(state, batch=batch), small


def uninstall(connection: apsw.Connection, *, everything: bool) -> int:
    """Remove our triggers and change logs, which must have been absorbed; `everything`: every table of ours.

    Returns the number of tables that were captured.
    """
    there = capture.installed(connection)
    capture.drop_triggers(connection, list(there.triggers))
    names = [name for (name,) in rows(connection, f"SELECT name FROM {tables.TABLE}")]
    for name in names:
        capture.drop_log(connection, name)
    if everything:
        for name in capture.installed(connection).tables:
            connection.execute(f"DROP TABLE IF EXISTS {quote(name)}")
    return len(names)
