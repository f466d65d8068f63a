"""Looking at a replica's database: the application's rows, and what the documented tables say of them."""

from __future__ import annotations

from collections.abc import Iterable

import apsw

from harmonylite import wire
from harmonylite.model import UNVERSIONED, Version
from tests.sim.reference import Observed, Place
from tests.sim.tables import TABLES, RowState, read_columns, read_rows, row_key

# In a change log: the row may have been removed by a REPLACE; it means nothing while the row is there.
MAYBE_EVICTED = 3


# Table, version and serial of a row in a conflict log.
Conflict = tuple[str, Version, tuple[int, ...]]


def conflicts_of(connection: apsw.Connection) -> list[Conflict]:
    """The conflict log."""
    found: list[Conflict] = []
    for table, ts, origin, rank, row in connection.execute(
        "SELECT tbl, ts, node, rank, row FROM __harmonylite__conflict"
    ):
        content = wire.unpack(row) if row is not None else {}
        serial = content.get("serial") if isinstance(content, dict) else None
        found.append((table, Version(ts, origin, rank), () if serial is None else (serial,)))
    return found


def observe(connection: apsw.Connection, tables: Iterable[str]) -> Observed:
    """Everything in the database that the rules speak about."""
    rows: dict[Place, RowState] = {}
    versions: dict[Place, tuple[Version, bool]] = {}
    logged: set[Place] = set()
    log_rows = 0
    existing = {str(name) for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    for name in tables:
        table = TABLES[name]
        for key, row in read_rows(connection, table).items():
            rows[name, key] = row
        keys = [f"k{i}" for i in range(len(table.key))]
        width = len(keys)
        if (version_table := f"__harmonylite__{name}_version") in existing:
            for cells in read_columns(connection, version_table, [*keys, "ts", "node", "rank", "deleted"]):
                ts, node, rank, deleted = (content for _, content in cells[width:])
                place = (name, row_key(table, cells[:width]))
                if (ts, node, rank) != UNVERSIONED:  # whether (0,0) is written down or not, it says the same
                    versions[place] = (Version(ts, node, rank), bool(deleted))  # type: ignore[arg-type]
        if (log_table := f"__harmonylite__{name}_change_log") in existing:
            for cells in read_columns(connection, log_table, [*keys, "op"]):
                place = (name, row_key(table, cells[:width]))
                log_rows += 1
                if cells[width][1] != MAYBE_EVICTED or place not in rows:
                    logged.add(place)
    sequences: dict[str, int] = {}
    if "__harmonylite__position" in existing:
        sequences.update(connection.execute("SELECT stream, sequence FROM __harmonylite__position"))
    return Observed(rows, versions, frozenset(logged), log_rows, sequences)
