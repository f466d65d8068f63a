"""Held batches: what a stream refused because it is larger than the stream.

Their rows have the batch HELD + b instead of b. So they are pending wherever that is asked (`batch > published_batch`),
although the watermark passes b; what lies behind them is acknowledged once and for all, and no later write is joined to
them: a row that is written again leaves them with its new version. They are tried again when a connection begins, or
something has changed that lets them through.
"""

from __future__ import annotations

import apsw

from harmonylite.db.capture import key_columns
from harmonylite.db.schema import Schema
from harmonylite.db.sql import integer, rows, version_table

# Every number above this is that of a held batch: a node that absorbs a thousand times a second gets there in 30 years.
HELD = 1 << 40
_NO_BATCH = (1 << 62) - 1

# So many rows are released in one write transaction: about 10 ms on a small board.
RELEASE_ROWS = 2_000


def is_held(batch: int) -> bool:
    return batch > HELD


def reach(after: int) -> int:
    """Batches after `after` are read up to before this one: ordinary ones by themselves, held ones too."""
    return HELD if after < HELD else _NO_BATCH


def hold(connection: apsw.Connection, schema: Schema, batch: int) -> int:
    """The rows that are still in a batch wait until it fits. Returns how many."""
    if is_held(batch):
        names = [version_table(table.name) for table in schema.tables.values()]
        return sum(integer(connection, f"SELECT count(*) FROM {name} WHERE batch = ?", (batch,)) for name in names)
    return renumber(connection, schema, batch, HELD + batch)


def release(connection: apsw.Connection, schema: Schema, batch: int, published: int) -> bool:
    """The stream has a held batch: up to RELEASE_ROWS rows that are still in it are no longer pending. Returns whether
    there may be more; until they had their turn, they are only held as before."""
    left = RELEASE_ROWS
    for table in schema.tables.values():
        version, keys = version_table(table.name), key_columns(table)
        connection.execute(
            f"UPDATE {version} SET batch = ? WHERE ({keys}) IN (SELECT {keys} FROM {version} WHERE batch = ? LIMIT ?)",
            (published, batch, left),
        )
        left -= connection.changes()
    return left == 0


def renumber(connection: apsw.Connection, schema: Schema, batch: int, to: int) -> int:
    """The rows of a batch get another one. Returns how many."""
    moved = 0
    for table in schema.tables.values():
        connection.execute(f"UPDATE {version_table(table.name)} SET batch = ? WHERE batch = ?", (to, batch))
        moved += connection.changes()
    return moved


def numbers(connection: apsw.Connection, schema: Schema) -> list[int]:
    """The held batches; reads no more than one version of each."""
    found: set[int] = set()
    for table in schema.tables.values():
        following = f"SELECT min(batch) FROM {version_table(table.name)} WHERE batch > ?"
        batch = HELD
        while batch := integer(connection, following, (batch,)):
            found.add(batch)
    return sorted(found)


def sizes(connection: apsw.Connection, schema: Schema) -> dict[int, int]:
    """The held batches with their numbers of rows."""
    found: dict[int, int] = {}
    for table in schema.tables.values():
        counted = f"SELECT batch, count(*) FROM {version_table(table.name)} WHERE batch > ? GROUP BY batch"
        for batch, number in rows(connection, counted, (HELD,)):
            found[batch] = found.get(batch, 0) + number
    return found
