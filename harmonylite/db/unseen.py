"""Rows that went by a way that no trigger sees: looking for them in whole tables, and the versions that this needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harmonylite.db import evictions
from harmonylite.db.absorbing import Absorbing
from harmonylite.db.database import Database, ReplicaSettings
from harmonylite.db.schema import Schema, Table
from harmonylite.db.stamping import Stamping, Stampings
from harmonylite.db.versions import NO_CORRECTION, Correction
from harmonylite.model import Row


class Unseen:
    """Owns what goes through whole tables (see `evictions` and `stamping`). Methods say which connection they use."""

    def __init__(self, database: Database, absorbing: Absorbing, settings: ReplicaSettings) -> None:
        self._database = database
        self._absorbing = absorbing
        self._publishes = settings.publish
        self._stampings = Stampings(database.path)

    def follow(self, schema: Schema) -> None:
        """Writer, inside the transaction that installed capture for it."""
        if self._publishes:
            database = self._database
            unstamped = self._stampings.follow(
                database.writer, schema, committed=database.reinstalling, renamed=database.renamed
            )
            self._absorbing.evictions.leave_to_look(unstamped)

    def close(self) -> None:
        """When nothing runs any more."""
        self._stampings.close()

    # -- a second look

    def look_is_due(self) -> bool:
        """Reader. Whether a log holds writes that may have evicted rows unseen: absorbed soon, such a row's delete gets
        the time of its eviction, or little more."""
        return self._publishes and self._absorbing.evictions.is_due(self._database.reader)

    def has_unlooked(self) -> bool:
        """Any thread."""
        return self._publishes and bool(self._absorbing.evictions.unlooked)

    def take_unlooked(self) -> list[str]:
        """Writer. Tables that may have lost rows unseen, and that `absorb` did not look through: because they are large
        or the schema has just changed. Each is named once."""
        unlooked = self._absorbing.evictions.unlooked
        taken = list(unlooked)
        unlooked.clear()
        return taken

    def look_through(self, table: Table) -> Iterator[list[Row]]:
        """Looker. Rows of one table that went by a way no trigger sees, or whose delete is still logged,
        piece by piece; reads all of its versions."""
        look = evictions.Look(self._database.looker, table)
        while self._publishes and not look.ended:
            yield look.step()

    def log_vanished(
        self, name: str, keys: Sequence[Row], bound_ms: int | None = None, correction: Correction = NO_CORRECTION
    ) -> int:
        """Writer. Have them absorbed as deletes, if they are gone although no logged delete says so. Returns how many
        of them are."""

        def log() -> int:
            table = self._database.installed().table(name)
            if table is None or not self._publishes:
                return 0
            return sum(evictions.log(self._database.writer, table, key) for key in keys)

        return self._absorbing.before(log, bound_ms, correction)

    # -- versions for rows that have none (see Stamping)

    def stamping(self) -> Stamping | None:
        """Writer. What is to be done, or goes on; None: nothing, for now."""
        if self._database.schema is None or self._absorbing.recapturing.is_due(self._database.writer):
            return None  # a row with a version (0, 0) is not taken for one that nobody has published (recapture.py)
        return self._stampings.next()

    def has_stamping(self) -> bool:
        """Any thread. Whether `stamping` may be other than None."""
        return bool(self._stampings)

    def stop_stamping(self) -> None:
        """Any thread. What runs of it ends soon, for good."""
        self._stampings.stop()

    def evictions_known(self, name: str) -> None:
        """Writer. Every row of a table has a version now."""
        self._absorbing.evictions.complete(name)

    def deleted_without_trace(self, name: str) -> None:
        """Writer, inside a transaction. Rows of a table are gone, and have no version: nobody evicted them."""
        self._stampings.only_present(name)
