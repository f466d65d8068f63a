"""What this node publishes: its pending rows as groups, read from pinned snapshots within the limits of the moment, and
what becomes of them: published, held, apart."""

from __future__ import annotations

from collections.abc import Iterator

import apsw

from harmonylite.db import held, sql, versions
from harmonylite.db.absorbing import Absorbing
from harmonylite.db.database import Database, ReplicaSettings
from harmonylite.db.outbox import Outbox, OutgoingGroup
from harmonylite.db.schema import Schema
from harmonylite.db.versions import NO_CORRECTION, Correction


class Pinned:
    """Groups of one snapshot, which lasts until the last of them was read, or until `close`.

    Not a generator: one that was never advanced would not let go when closed.
    """

    def __init__(self, connection: apsw.Connection, groups: Iterator[OutgoingGroup]) -> None:
        self._connection = connection
        self._groups = groups

    def __iter__(self) -> Pinned:
        return self

    def __next__(self) -> OutgoingGroup:
        try:
            return next(self._groups)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the snapshot."""
        sql.rollback(self._connection)


class Outgoing:
    """Owns the limits of groups. Methods say which connection they use."""

    def __init__(self, database: Database, absorbing: Absorbing, settings: ReplicaSettings) -> None:
        self._database = database
        self._absorbing = absorbing
        self._node_id = settings.node_id
        self._limits = settings.group_rows, settings.max_transaction_bytes
        self._group_bytes = 0
        self._apart: tuple[tuple[int, int], ...] = ()

    def follow(self, schema: Schema) -> None:
        """Writer, inside the transaction that installed capture for it."""
        group_rows, max_bytes = self._limits
        self._outbox = Outbox(
            schema, self._node_id, numbers=self._database.numbers, group_rows=group_rows, max_bytes=max_bytes
        )

    # -- limits that change while running

    def change_limits(self, *, group_rows: int, max_transaction_bytes: int) -> None:
        """Any thread. Other values for these settings, for what is read from now on."""
        self._limits = group_rows, max_transaction_bytes

    def limit_groups(self, group_bytes: int) -> None:
        """Any thread. Groups are cut to that size where that tears no transaction, so that they fit into their stream;
        0: no such limit."""
        self._group_bytes = group_bytes

    def keep_apart(self, lo: int, hi: int) -> None:
        """Any thread. Batches lo..hi, which are joined, do not fit into the stream together: from now on each is a
        group of its own. Forgotten at the next start, or by `keep_together`."""
        published = self._database.published()
        self._apart = (*(span for span in self._apart if span[1] > published), (lo, hi))

    def keep_together(self) -> None:
        """Any thread. What did not fit may fit now."""
        self._apart = ()

    # -- reading

    def pending_at_most(self, after: int, limit: int) -> bool:
        """Writer. Whether no more than `limit` absorbed rows of batches after `after`, as `read` understands it, are
        pending."""
        after = max(after, self._database.published())
        counted = 0
        for table in self._database.installed().tables.values():
            counted += versions.count_pending_up_to(self._database.writer, table, after, limit + 1 - counted)
            if counted > limit:
                return False
        return True

    def read(self, after: int = 0, *, on_writer: bool = False) -> Pinned | None:
        """Reader (or writer). Pending groups of one pinned snapshot, read as the iterator advances; close it to let go.

        after: batches up to this one were read before; from HELD on, held ones are read, and no others. None: the
        change logs were not empty in the snapshot, or the schema had changed; absorb and try again.
        """
        connection = self._database.writer if on_writer else self._database.reader
        connection.execute("BEGIN")
        try:
            clean = not self._absorbing.has_log(connection)
        except BaseException:
            sql.rollback(connection)
            raise
        if not clean:
            sql.rollback(connection)
            return None
        return Pinned(connection, self._groups(connection, after))

    def read_locked(
        self,
        after: int = 0,
        bound_ms: int | None = None,
        correction: Correction = NO_CORRECTION,
        limit: int = 2_000,
    ) -> list[OutgoingGroup]:
        """Writer. Absorb and read about `limit` pending rows under the write lock: for an application that commits
        so fast that no snapshot with empty logs is ever seen. Empty: the log was too large, call again."""
        self._absorbing.know_time(bound_ms, correction)
        with self._database.transaction():
            found: list[OutgoingGroup] = []
            if self._absorbing.piece(bound_ms, correction).drained:
                for group in self._groups(self._database.writer, after):
                    found.append(group)
                    if sum(len(each.group) for each in found) >= limit and not group.torn:
                        break
            return found

    def _groups(self, connection: apsw.Connection, after: int) -> Iterator[OutgoingGroup]:
        """All that is pending in the connection's view, by the limits as they are now."""
        outbox = self._outbox
        outbox.group_rows, outbox.max_bytes = self._limits
        outbox.group_bytes, outbox.apart = self._group_bytes, self._apart
        return outbox.groups(connection, max(after, self._database.published()))

    # -- what became of them

    def mark_published(self, through: int) -> None:
        """Any thread. The stream has everything up to batch `through`, but for what is held; durable with the next
        write transaction."""
        if held.is_held(through):
            raise ValueError(f"batch {through} is held")  # else everything would count as published
        self._database.mark_published(through)

    def hold(self, batch: int) -> int:
        """Writer. The stream cannot hold a batch: its rows stay pending, and what lies behind them does not wait.
        Returns how many are left in it."""
        with self._database.transaction():
            return held.hold(self._database.writer, self._database.installed(), batch)

    def release(self, batch: int) -> bool:
        """Writer. The stream has a held batch. One short write transaction; True: call it again, there may be more."""
        database = self._database
        with database.transaction():
            return held.release(database.writer, database.installed(), batch, database.state.published_batch)

    def held(self) -> dict[int, int]:
        """Reader. The held batches, with their numbers of rows."""
        schema = self._database.schema
        return held.sizes(self._database.reader, schema) if schema else {}
