"""What the transaction knows in which received changes take effect, and which errors it expects."""

from __future__ import annotations

from dataclasses import dataclass

import apsw

from harmonylite.db import versions
from harmonylite.db.conflicts import Recorder
from harmonylite.db.schema import Schema

# The errors that say: this row does not fit this table. Anything else (lock, disk, corruption) stops the apply.
MISFIT = (apsw.ConstraintError, apsw.MismatchError, apsw.TooBigError, apsw.SQLError, UnicodeError, OverflowError)


@dataclass(slots=True)
class Context:
    """What one apply transaction knows. `batch` is given out to rows that this node must publish itself."""

    schema: Schema
    recorder: Recorder
    node_id: int
    publish: bool
    published: int
    batch: int
    sparse_tables: frozenset[str]
    batch_used: bool = False
    applied: int = 0

    def pending(self, connection: apsw.Connection, previous: int | None) -> int | None:
        """The batch for a row whose outcome this node publishes; joined to the one it was pending in before."""
        if not self.publish:
            return None
        self.batch_used = True
        if previous is not None and previous > self.published:
            versions.join(connection, previous, self.batch)
        return self.batch
