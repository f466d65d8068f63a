"""What triggers do not see: the ways through whole tables by which it is found.

They have a connection and a thread of their own, so that nothing that is published waits for them; whatever they write
is written in short transactions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial

import apsw

from harmonylite.db.schema import Table
from harmonylite.db.stamping import Stamping
from harmonylite.engine import Engine

log = logging.getLogger(__name__)

# Looking for rows that were evicted unseen takes no more than this part of the time.
LOOK_SHARE = 0.02

# So many vanished rows are logged in one transaction, which absorbs those of the one before.
LOG_ROWS = 200

# What takes longer is told, and again after pauses.
SAY_AFTER_S, SAY_AGAIN_S = 2.0, 30.0


class SecondLook:
    """One per daemon; the housekeeper calls its methods, never one of them twice at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._unlooked: set[str] = set()
        self._next_look: dict[str, float] = {}

    async def stamp(self) -> None:
        """Give versions to rows that have none and need one (db/stamping.py), if there are any."""
        engine = self._engine
        if engine.replica.unseen.has_stamping():
            while (stamping := await engine.write(engine.replica.unseen.stamping)) is not None:
                await self._stamp(stamping)

    async def _stamp(self, stamping: Stamping) -> None:
        engine = self._engine
        begun = time.monotonic()
        say_at = begun + SAY_AFTER_S
        while (piece := await engine.on_looker(stamping.find)) is not None:
            await engine.write_gently(partial(stamping.write, engine.replica, piece))
            now = time.monotonic()
            fields = {"table": piece.table.name, "rows": stamping.done, "seconds": round(now - begun, 1)}
            if piece.last:
                log.info("rows are known: one that OR REPLACE evicts is noticed", extra={"fields": fields})
                begun, say_at = now, now + SAY_AFTER_S
            elif now > say_at:
                log.info(
                    "rows become known, a few at a time; until then, one that OR REPLACE evicts is noticed late",
                    extra={"fields": fields},
                )
                say_at = now + SAY_AGAIN_S

    async def audit(self, names: Sequence[str] | None = None) -> int:
        """Look for rows that went unseen by triggers, in all tables or in some. Returns how many were found; they are
        published as deletes."""
        engine = self._engine
        found = 0
        for name in [table.name for table in engine.replica.schema.tables.values()] if names is None else names:
            await engine.absorb_all()  # a delete that is still in the log was seen: it need not be found here
            if (table := engine.replica.schema.table(name)) is not None:
                found += await self._look_through(table)
        return found

    async def _look_through(self, table: Table) -> int:
        engine, replica, clock = self._engine, self._engine.replica, self._engine.time
        pieces = replica.unseen.look_through(table)
        found = 0
        try:
            while (keys := await engine.on_looker(lambda: next(pieces, None))) is not None:
                for start in range(0, len(keys), LOG_ROWS):
                    chunk = partial(replica.unseen.log_vanished, table.name, keys[start : start + LOG_ROWS])
                    found += await engine.write_gently(partial(chunk, clock.bound_ms(), clock.correction))
        except apsw.SQLError:
            await engine.follow_schema()
            if replica.schema.table(table.name) == table:
                raise
            # The table is another one now, or gone: in what was installed for it, it has not been looked through.
        return found

    async def look_again(self) -> int:
        """`audit` of the tables that were written and not looked through. The larger a table, the more seldom: looking
        takes no more than LOOK_SHARE of the time."""
        replica = self._engine.replica
        if replica.unseen.has_unlooked():
            self._unlooked.update(await self._engine.write(replica.unseen.take_unlooked))
        found = 0
        for name in sorted(self._unlooked):
            if self._next_look.get(name, 0.0) > (started := time.monotonic()):
                continue
            found += await self.audit([name])
            self._unlooked.discard(name)
            ended = time.monotonic()
            self._next_look[name] = ended + (ended - started) / LOOK_SHARE
        return found
