"""Tables that `[tables]` leaves out on this node although others replicate them.

Their changes are passed over: that is what was asked for, so nothing waits. Their names are kept, because two things
follow. A copy of this database does not hold what the others have of them, so it is of no use where they are wanted.
And once they are wanted here, what was passed over is asked for again: the log is read from its beginning, or a
snapshot merged if that is gone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable

import apsw

from harmonylite.db import tables
from harmonylite.db.sql import normal, rows

log = logging.getLogger(__name__)

_META = "left_out"


def load(connection: apsw.Connection) -> frozenset[str]:
    """The tables, as `normal` names, of which something was passed over."""
    stored = tables.get_meta(connection, _META)
    return frozenset(json.loads(str(stored))) if stored else frozenset()


def add(connection: apsw.Connection, names: Iterable[str]) -> None:
    """Inside a transaction: something of these tables is passed over."""
    known = load(connection)
    new = {normal(name) for name in names} - known
    if new:
        _save(connection, known | new)
        log.info(
            "other nodes replicate tables that [tables] leaves out here; their changes are passed over",
            extra={"fields": {"tables": ", ".join(sorted(new))}},
        )


def follow(connection: apsw.Connection, wants: Callable[[str], bool]) -> None:
    """Inside a transaction, when the daemon starts: what `[tables]` says may have changed.

    Rows that wait for a table which is left out now wait no longer. If a table is wanted from which something was
    passed over, the positions are forgotten, so that it arrives again.
    """
    waiting = [name for (name,) in rows(connection, f"SELECT DISTINCT tbl FROM {tables.PARKED}")]
    dropped = [name for name in waiting if not wants(name)]
    for name in dropped:
        connection.execute(f"DELETE FROM {tables.PARKED} WHERE tbl = ?", (name,))
    add(connection, dropped)
    known = load(connection)
    wanted = {name for name in known if wants(name)}
    if wanted:
        _save(connection, known - wanted)
        connection.execute(f"DELETE FROM {tables.POSITION}")
        log.warning(
            "a table is replicated from now on whose changes were passed over: all is read again",
            extra={"fields": {"tables": ", ".join(sorted(wanted))}},
        )


def _save(connection: apsw.Connection, names: Iterable[str]) -> None:
    tables.set_meta(connection, _META, json.dumps(sorted(names)))
