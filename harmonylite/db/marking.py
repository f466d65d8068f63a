"""Everything is to be published again, because the log lost what it had acknowledged (docs/rules.md, Catching up).

Millions of marks in one transaction would lock the application out for many seconds: they are set a piece at a time.
The position moves last, so that a node that is killed half-way finds the same gap again and marks the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harmonylite.db.capture import key_columns
from harmonylite.db.outbox import decode_typed, typed_keys_sql
from harmonylite.db.rows import after, bound, marker
from harmonylite.db.schema import Table
from harmonylite.db.sql import integer, rows, version_table
from harmonylite.model import Position, Row

if TYPE_CHECKING:
    from harmonylite.db.replica import Replica

# So many rows are looked at in one write transaction: about 10 ms on a small board.
MARK_ROWS = 2_000


class Marking:
    """Marks every versioned row and tombstone of this node as pending, whoever wrote it, at the version it has.

    A mark is dropped again when that very version arrives from the log; a newer one takes its place. All methods
    are the writer's; each raises apsw.BusyError, apsw.FullError, apsw.IOError with nothing changed: call it again.

        marking = Marking(replica)
        while marking.step():
            ...
        marking.finish(position)
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._last: Row | None = None
        self._done_tables: set[str] = set()
        self.looked_at = 0
        self.marked = 0

    def step(self) -> bool:
        """One short write transaction. False: everything is marked, `finish` is due."""
        replica = self._replica
        with replica.transaction():
            table = next((t for t in replica.schema.tables.values() if t.name not in self._done_tables), None)
            if table is None or not replica.publishes:
                return False
            end, seen = self._piece(table)
            marked = self._mark(table, end)
        self.looked_at += seen
        self.marked += marked
        self._last = end
        if end is None:
            self._done_tables.add(table.name)
        return True

    def finish(self, position: Position) -> None:
        """Reading goes on at `position`."""
        self._replica.move_position(position)

    def _piece(self, table: Table) -> tuple[Row | None, int]:
        """The last key of the next MARK_ROWS rows after the one reached, None for the end of the table; how many."""
        connection = self._replica.writer
        beyond, bindings = after(table, self._last)
        listed = f"FROM {version_table(table.name)} {beyond} ORDER BY {key_columns(table)}"
        found = rows(connection, f"SELECT {typed_keys_sql(table)} {listed} LIMIT 1 OFFSET {MARK_ROWS - 1}", bindings)
        if found:
            return decode_typed(found[0]), MARK_ROWS
        counted = f"SELECT count(*) FROM (SELECT 1 FROM {version_table(table.name)} {beyond} LIMIT {MARK_ROWS})"
        return None, integer(connection, counted, bindings)

    def _mark(self, table: Table, end: Row | None) -> int:
        """Mark what is not pending after the key reached, up to `end`; in a batch of its own."""
        replica = self._replica
        beyond, bindings = after(table, self._last)
        where = f"{beyond} AND" if beyond else "WHERE"
        if end is not None:
            where += f" ({key_columns(table)}) <= ({', '.join(map(marker, end))}) AND"
            bindings = (*bindings, *bound(end))
        replica.writer.execute(
            f"UPDATE {version_table(table.name)} SET batch = {replica.next_batch}, settled_ms = NULL {where}"
            # Not (0,0), which a row has that nobody has written since the installation (evictions.py).
            f" (batch IS NULL OR batch <= {replica.published_batch}) AND (ts > 0 OR rank > 0)",
            bindings,
        )
        marked = replica.writer.changes()
        if marked:
            replica.use_batch()
        return marked
