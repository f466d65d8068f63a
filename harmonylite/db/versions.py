"""Versions: who wrote each row last, and when. `absorb` turns the change log into versions.

A version's timestamp is max(time of writing, own floor, the version it replaces + 1). The floor keeps one node's
writes in order when its clock steps back; it is made of this node's own times only, or one fast clock would drag
everybody's. "+ 1" makes an edit beat what its node had seen (I6), and does not raise the floor.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

import apsw

from harmonylite.db import capture, sparse, tables
from harmonylite.db.boundaries import Boundaries
from harmonylite.db.capture import DELETED, MAYBE_EVICTED, key_columns, key_match
from harmonylite.db.evictions import Evictions
from harmonylite.db.held import HELD, is_held, reach
from harmonylite.db.outbox import decode_typed, typed_keys_sql
from harmonylite.db.rows import identity
from harmonylite.db.schema import Schema, Table
from harmonylite.db.sql import integer, log_table, quote, rows, version_table
from harmonylite.db.tables import State
from harmonylite.model import Row

# No upper bound known: the server's time has not been seen since the start.
UNBOUNDED_MS = (1 << 62) - 1

# One absorb transaction takes at most about this many log rows, so that its write lock stays short.
ABSORB_ROWS = 5_000

# What a write made here has seen: the version it replaces, or, if nobody else can have seen that, what that one had.
_SEEN_BASE = (
    "base_ts = CASE WHEN batch > :published THEN base_ts ELSE ts END,"
    " base_node = CASE WHEN batch > :published THEN base_node ELSE node END"
)


@dataclass(frozen=True, slots=True)
class Correction:
    """Times up to `until_ms` were logged by a clock that was `delta_ms` behind the true one (docs/rules.md, Clocks)."""

    delta_ms: int = 0
    until_ms: int = UNBOUNDED_MS


NO_CORRECTION = Correction()


@dataclass(frozen=True, slots=True)
class Absorb:
    """The statements that absorb one table's log; built once per schema change."""

    table: Table
    joined: str
    upsert: str
    clear: str
    clear_through: str
    last_ts: str
    end: str

    @classmethod
    def of(cls, table: Table) -> Absorb:
        log, version, keys = log_table(table.name), version_table(table.name), key_columns(table)
        ours = " AND ".join(f"v.k{i} = l.k{i}" for i in range(len(table.key)))
        gone = f"NOT EXISTS (SELECT 1 FROM {quote(table.name)} AS r WHERE {key_match(table, 'l', 'r')})"
        logged = "l.ts + CASE WHEN l.ts <= :until THEN :delta ELSE 0 END"
        newest = f"max({logged})"
        if table.uniques:
            # A statement that might have evicted a row and did not is no write of that row, at no time. What is gone
            # without a delete, one of the statements evicted that no trigger watches.
            written = f"max(CASE WHEN l.op < {MAYBE_EVICTED} THEN {logged} END)"
            last_delete = f"max(CASE WHEN l.op = {DELETED} THEN l.seq END)"
            evicted = f"CASE WHEN max(l.seq) IS {last_delete} THEN {newest} ELSE :newest END"
            newest = f"CASE WHEN {gone} THEN {evicted if table.evicts_unseen else newest} ELSE {written} END"
        return cls(
            table=table,
            joined=(
                f"SELECT min(v.batch) FROM {log} AS l CROSS JOIN {version} AS v ON {ours}"
                f" WHERE v.batch > ?1 AND v.batch < {HELD} AND l.seq <= ?2"
            ),
            upsert=(
                f"INSERT INTO {version} ({keys}, ts, node, deleted, batch)"
                f" SELECT {keys}, min(max({newest}, :floor), :bound), :node, {gone}, :batch"
                f" FROM {log} AS l WHERE l.seq <= :end GROUP BY {keys}"
                f" HAVING min(l.op) < {MAYBE_EVICTED} OR {gone}"
                f" ON CONFLICT ({keys}) DO UPDATE SET ts = max(excluded.ts, ts + 1), node = excluded.node, rank = 0,"
                f" deleted = excluded.deleted, batch = excluded.batch, settled_ms = NULL, {_SEEN_BASE}"
            ),
            clear=f"DELETE FROM {log}",
            clear_through=f"DELETE FROM {log} WHERE seq <= ?",
            last_ts=f"SELECT max({logged}) FROM {log} AS l WHERE seq <= :end",
            end=f"SELECT max(seq) FROM {log}",
        )


@dataclass(frozen=True, slots=True)
class Absorbed:
    """rows: log rows taken; left: about how many there still are, 0: the logs are empty now; batch: the batch their
    versions belong to (0: nothing was absorbed); tables: those that got pending rows."""

    rows: int
    left: int
    batch: int
    tables: tuple[Table, ...]

    @property
    def drained(self) -> bool:
        return not self.left


NOTHING = Absorbed(0, 0, 0, ())

# Conditions in one statement (SQLite allows expressions 1000 deep).
_TERMS = 200


class Absorber:
    """Moves change logs into version tables, inside the caller's write transaction.

    captured: tables (by normal name) that were captured all the time since their logs were last absorbed; None: all.
    """

    def __init__(self, schema: Schema, node_id: int, captured: Container[str] | None = None) -> None:
        self._node_id = node_id
        self.boundaries = Boundaries()
        self._statements = tuple(Absorb.of(table) for table in schema.tables.values())
        self.evictions = Evictions(
            table for name, table in schema.tables.items() if captured is None or name in captured
        )
        names = [log_table(table.name) for table in schema.tables.values()]
        self._any_log = tuple(
            f"SELECT 1 WHERE {' OR '.join(f'EXISTS (SELECT 1 FROM {name})' for name in names[i : i + _TERMS])}"
            for i in range(0, len(names), _TERMS)
        )

    def has_log(self, connection: apsw.Connection) -> bool:
        """Whether any change log holds rows, in the view of the database that the connection has."""
        return any(integer(connection, sql) for sql in self._any_log)

    def absorb(
        self,
        connection: apsw.Connection,
        state: State,
        *,
        bound_ms: int,
        correction: Correction = NO_CORRECTION,
        limit: int = ABSORB_ROWS,
    ) -> tuple[Absorbed, State]:
        """Absorb up to about `limit` log rows. Returns what was done and the new state, which the caller saves.

        bound_ms: the latest time a write may claim to have been made. A log too large for one transaction is
        absorbed in several, whose batches are joined up to where a transaction is known to end.
        """
        if not self.has_log(connection):
            return NOTHING, state
        todo: list[tuple[Absorb, int]] = []
        ends = self._ends(connection)
        starts = {name: integer(connection, f"SELECT min(seq) FROM {log_table(name)}") - 1 for name in ends}
        boundary = self.boundaries.next(state.batch, starts, ends, limit)
        taken, whole = 0, True
        for each in self._statements:
            end = boundary.get(each.table.name, 0)
            if not end:
                continue
            start = starts[each.table.name]
            take = min(end, start + limit - taken)
            whole = whole and take == end
            if take > start:
                todo.append((each, take))
                taken += take - start
        batch = state.batch + 1
        joined: list[tuple[int, int]] = []
        for each, end in todo:
            joined.append(self._absorb_table(connection, state, each, end, batch, bound_ms, correction))
            # Not before the last piece: what a later one deletes is not unseen.
            if not integer(connection, each.end) and self.evictions.log(connection, each.table, joined[-1][1]):
                end = integer(connection, each.end)
                joined.append(self._absorb_table(connection, state, each, end, batch, bound_ms, NO_CORRECTION))
        lows = [low for low, _ in joined if low] + ([state.open_batch] if state.open_batch else [])
        if lows:
            join(connection, min(lows), batch)
        newest = max(state.open_floor_ms, *(min(newest, bound_ms) for _, newest in joined))
        # Not before the last piece: it would lift what other pieces logged earlier.
        after = replace(
            state,
            batch=batch,
            open_batch=0 if whole else state.open_batch or batch,
            floor_ms=max(state.floor_ms, newest) if whole else state.floor_ms,
            open_floor_ms=0 if whole else newest,
        )
        left = sum(end - starts[name] for name, end in ends.items()) - taken
        self.boundaries.absorbed(batch, {each.table.name: end for each, end in todo})
        return Absorbed(taken, left, batch, tuple(each.table for each, _ in todo)), after

    def _ends(self, connection: apsw.Connection) -> dict[str, int]:
        return {each.table.name: end for each in self._statements if (end := integer(connection, each.end))}

    def sight(self, connection: apsw.Connection) -> None:
        """On another thread than `absorb`'s, inside a read transaction: remember where transactions end now."""
        self.boundaries.sighted(integer(connection, tables.META_VALUE, ("batch",)), self._ends(connection))

    def _absorb_table(
        self,
        connection: apsw.Connection,
        state: State,
        each: Absorb,
        end: int,
        batch: int,
        bound_ms: int,
        correction: Correction,
    ) -> tuple[int, int]:
        """Returns the lowest pending batch that lost a row to this one (0: none), and the newest logged time."""
        published = state.published_batch
        low = 0
        if has_pending(connection, each.table, published):
            low = integer(connection, each.joined, (published, end))
        clock = {"end": end, "until": correction.until_ms, "delta": correction.delta_ms}
        newest = integer(connection, each.last_ts, clock)
        connection.execute(
            each.upsert,
            {
                **clock,
                "newest": newest,
                "floor": state.floor_ms,
                "bound": bound_ms,
                "node": self._node_id,
                "batch": batch,
                "published": published,
            },
        )
        self._forget_columns(connection, each.table, end)
        if end == integer(connection, each.end):
            connection.execute(each.clear)  # without WHERE: SQLite drops the pages at once
        else:
            connection.execute(each.clear_through, (end,))
        return low, newest

    @staticmethod
    def _forget_columns(connection: apsw.Connection, table: Table, end: int) -> None:
        """A write made here covers the whole row: none of its columns has an older version any more."""
        if table.name not in sparse.tables_with_entries(connection):
            return
        keys = typed_keys_sql(table)
        for row in rows(connection, f"SELECT DISTINCT {keys} FROM {log_table(table.name)} WHERE seq <= ?", (end,)):
            sparse.forget(connection, table.name, identity(table, decode_typed(row)))


def has_pending(connection: apsw.Connection, table: Table, published: int) -> bool:
    """Whether rows wait that are not held."""
    sql = f"SELECT 1 FROM {version_table(table.name)} WHERE batch > ? AND batch < {HELD} LIMIT 1"
    return any(True for _ in connection.execute(sql, (published,)))


def count_pending(connection: apsw.Connection, schema: Schema, published: int, *, held: bool = True) -> int:
    """held: whether held rows count."""
    pending = "batch > ?" if held else f"batch > ? AND batch < {HELD}"
    return sum(
        integer(connection, f"SELECT count(*) FROM {version_table(table.name)} WHERE {pending}", (published,))
        for table in schema.tables.values()
    )


def count_pending_up_to(connection: apsw.Connection, table: Table, after: int, limit: int) -> int:
    """Pending rows of batches after `after`, held ones or others (`held.reach`), counted no further than `limit`."""
    pending = f"SELECT 1 FROM {version_table(table.name)} WHERE batch > ? AND batch < ? LIMIT ?"
    return integer(connection, f"SELECT count(*) FROM ({pending})", (after, reach(after), limit))


def count_logged(connection: apsw.Connection, schema: Schema) -> int:
    """Changes in the logs of the given tables."""
    return sum(integer(connection, f"SELECT count(*) FROM {log_table(t.name)}") for t in schema.tables.values())


def count_logged_anywhere(connection: apsw.Connection) -> int:
    """Changes in all logs that are there, whatever the schema."""
    names = [name for name in capture.installed(connection).tables if name.endswith("_change_log")]
    return sum(integer(connection, f"SELECT count(*) FROM {quote(name)}") for name in names)


def join(connection: apsw.Connection, low: int, high: int) -> None:
    """Batches low..high must be published as one group: a transaction of the first lost a row to the last. A held batch
    lets it go."""
    if is_held(low):
        return
    overlapping = f"FROM {tables.JOIN} WHERE hi >= ?1 AND lo <= ?2"
    for lo, hi in rows(connection, f"SELECT min(lo), max(hi) {overlapping}", (low, high)):
        if lo is not None:
            low, high = min(lo, low), max(hi, high)
    connection.execute(f"DELETE {overlapping}", (low, high))
    connection.execute(f"INSERT INTO {tables.JOIN} VALUES (?, ?)", (low, high))


def forget_joins(connection: apsw.Connection, published: int) -> None:
    connection.execute(f"DELETE FROM {tables.JOIN} WHERE hi <= ?", (published,))


def recapture(connection: apsw.Connection, table: Table, *, node_id: int, batch: int, published: int) -> int:
    """After capture of a table was off for a while: everything may have changed, and nobody knows when.

    Missing rows become tombstones, rows without a version become new, all others "maybe changed"; each at the
    version it had + 1 and never at now, so that no edit made elsewhere in the meantime loses to a guess.
    Returns the number of rows that are pending because of it.
    """
    known = recapture_versions(connection, table, "true", (), node_id=node_id, batch=batch, published=published)
    return known + recapture_rows(connection, table, "true", (), node_id=node_id, batch=batch)


def recapture_versions(
    connection: apsw.Connection,
    table: Table,
    where: str,
    bindings: Row,
    *,
    node_id: int,
    batch: int,
    published: int,
) -> int:
    """`recapture` of the rows with a version for which a condition on the version table holds, whose parameters are
    plain question marks. What they leave behind in other batches is joined to them (I7)."""
    version = version_table(table.name)
    there = f"EXISTS (SELECT 1 FROM {quote(table.name)} AS r WHERE {key_match(table, 'v', 'r')})"
    # The plus sign: through the index on batches, every pending row of the table would be read.
    left = f"SELECT min(batch), max(batch) FROM {version} WHERE {where} AND +batch > ? AND +batch < {HELD}"
    for low, high in rows(connection, left, (*bindings, published)):
        if low is not None and (low, high) != (batch, batch):
            join(connection, min(low, batch), max(high, batch))
    seen = _SEEN_BASE.replace(":published", "?")
    connection.execute(
        f"UPDATE {version} AS v SET {seen}, ts = ts + 1, node = ?, rank = 0, deleted = NOT {there}, batch = ?,"
        f" settled_ms = NULL WHERE {where} AND (deleted = 0 OR {there})",
        (published, published, node_id, batch, *bindings),
    )
    return connection.changes()


def recapture_rows(
    connection: apsw.Connection, table: Table, where: str, bindings: Row, *, node_id: int, batch: int
) -> int:
    """The same for the rows without a version; the condition is on the application's table, `r`."""
    version, keys = version_table(table.name), key_columns(table)
    theirs = ", ".join(f"r.{quote(part.name)}" for part in table.key)
    present = " AND ".join(f"r.{quote(part.name)} IS NOT NULL" for part in table.key if part.nullable) or "true"
    connection.execute(
        f"INSERT INTO {version} ({keys}, ts, node, batch) SELECT {theirs}, 1, ?, ?"
        f" FROM {quote(table.name)} AS r WHERE {where} AND {present} AND NOT EXISTS"
        f" (SELECT 1 FROM {version} AS v WHERE {key_match(table, 'v', 'r')})",
        (node_id, batch, *bindings),
    )
    return connection.changes()


def newest_own(connection: apsw.Connection, schema: Schema, node_id: int) -> int:
    """The newest time of what was written here and not replaced by others since. Reads all of it."""
    names = [version_table(table.name) for table in schema.tables.values()]
    own = "WHERE batch IS NOT NULL AND node = ?"
    return max((integer(connection, f"SELECT max(ts) FROM {name} {own}", (node_id,)) for name in names), default=0)


def settle_tombstones(connection: apsw.Connection, table: Table, *, published: int, server_ms: int) -> None:
    """Tombstones that the cluster has now start their retention, by the server's clock."""
    connection.execute(
        f"UPDATE {version_table(table.name)} SET settled_ms = ? WHERE deleted = 1 AND settled_ms IS NULL"
        " AND (batch IS NULL OR batch <= ?)",
        (server_ms, published),
    )


def prune_tombstones(connection: apsw.Connection, table: Table, *, published: int, before_ms: int, limit: int) -> int:
    """Forget tombstones that settled before `before_ms`; never unpublished ones. Returns how many."""
    version, keys = version_table(table.name), key_columns(table)
    connection.execute(
        f"DELETE FROM {version} WHERE ({keys}) IN (SELECT {keys} FROM {version} WHERE deleted = 1"
        " AND settled_ms < ? AND (batch IS NULL OR batch <= ?) LIMIT ?)",
        (before_ms, published, limit),
    )
    return connection.changes()


def create_tables(connection: apsw.Connection, schema_tables: Iterable[Table], *, with_logs: bool) -> None:
    for table in schema_tables:
        if with_logs:
            connection.execute(capture.create_log_sql(table))
        for sql in capture.create_version_sql(table):
            connection.execute(sql)
