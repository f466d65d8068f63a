"""Gathers what the operator sees: the facts of this node, kept fresh enough to answer at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping

import apsw

from harmonylite import __version__
from harmonylite.config import Config
from harmonylite.engine import Engine
from harmonylite.observe.log import rfc3339
from harmonylite.observe.status import NodeStatus, SkippedTable, StreamPosition, judge, summary
from harmonylite.progress import Progress
from harmonylite.snapshot.service import SnapshotService
from harmonylite.stream.server import BundledServer
from harmonylite.uplink import Uplink

log = logging.getLogger(__name__)

# So many children in a row that died within a minute: the server cannot help itself.
DYING = 3

# A lag is shown that long after the group it was measured with, or as long as there is something to read.
LAG_LASTS_S = 15.0

# So many held batches are named one by one.
MOST_HELD = 5


class Reporter:
    """`current` is cheap and may be a little old; `refresh` asks the database.

    database_error: why the database is not open; read_only: its file system is; fault: what makes this node unhealthy
    besides.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        progress: Progress,
        connection: Uplink,
        server: BundledServer | None,
        snapshots: SnapshotService,
    ) -> None:
        self._config = config
        self._engine = engine
        self._progress = progress
        self._connection = connection
        self._server = server
        self._snapshots = snapshots
        self._started = time.monotonic()
        self._pending = 0
        self._held: dict[int, int] = {}
        self._parked = 0
        self._unkeyed = 0
        self._opened = False
        self._said_skipped: dict[str, str] = {}
        self.database_error: str | None = "not opened yet"
        self.read_only = False
        self.fault: str | None = None

    @property
    def parked(self) -> int:
        """Rows that wait, as counted last."""
        return self._parked

    async def refresh(self) -> None:
        """Count pending and parked rows, if the database answers."""
        if self.database_error and not self._opened:
            return
        try:
            self._pending = await self._engine.pending()
            self._held = await self._engine.held()
            self._parked = await self._engine.parked()
            self._opened, self.database_error = True, None
            self._say_skipped()
        except (apsw.BusyError, apsw.LockedError):
            pass  # the application holds its lock: what was counted last is as good
        except apsw.Error as error:
            self.database_error = str(error)

    def _say_skipped(self) -> None:
        """Tables that cannot be replicated: at the start, and when the application makes another one."""
        schema = self._engine.replica.known_schema
        skipped = {each.table: each.reason for each in schema.skipped} if schema else self._said_skipped
        for table, reason in skipped.items():
            if self._said_skipped.get(table) != reason:
                log.warning("table is not replicated", extra={"fields": {"table": table, "reason": reason}})
        self._said_skipped = skipped

    async def count_unkeyed(self) -> None:
        """Rows that cannot be replicated: read from whole tables, so now and then. Raises apsw.Error."""
        self._unkeyed = await self._engine.unkeyed()
        self._engine.metrics.unkeyed_rows.set(self._unkeyed)

    def current(self) -> NodeStatus:
        """The state of this node, judged."""
        config, engine, connection = self._config, self._engine, self._connection
        offline = connection.offline_since
        schema = engine.replica.known_schema
        node = NodeStatus(
            node_id=config.node_id,
            version=__version__,
            uptime_seconds=int(time.monotonic() - self._started),
            db_path=str(config.db_path),
            db_connected=self.database_error is None,
            db_error=self.database_error,
            nats_connected=connection.connected,
            offline_since=None if offline is None else rfc3339(offline),
            nats_url=self._url(),
            nats_error=self._nats_error(),
            cdc_installed=config.publish and schema is not None,
            tables_tracked=len(schema.tables) if schema else 0,
            skipped_tables=tuple(
                SkippedTable(s.table, s.reason)
                for s in ((*schema.skipped, *engine.replica.unwritable) if schema else ())
            ),
            pending_rows=self._pending,
            published_rows=engine.metrics.published.value,
            applied_rows=engine.metrics.applied.value,
            parked_rows=self._parked,
            unkeyed_rows=self._unkeyed,
            conflicts=engine.replica.conflicts_total,
            lag_seconds=self._lag(),
            clock_offset_seconds=engine.time.offset_s(),
            positions=tuple(
                StreamPosition(stream, sequence, self._progress.ends.get(stream))
                for stream, sequence in sorted(self._progress.positions.items())
            ),
            catching_up=self._progress.catching_up,
            last_replicated_event_timestamp=_time(engine.last_applied_s),
            last_published_event_timestamp=_time(engine.last_published_s),
            catch_up=self._snapshots.state.catching_up,
            snapshot=self._snapshots.info(),
        )
        return judge(
            node,
            capture_wanted=config.publish,
            server_keeps_dying=self._server is not None and self._server.state.failures >= DYING,
            faults=[*self._faults()],
            concerns=[*self._concerns()],
        )

    def _faults(self) -> Iterator[str]:
        if self.read_only:
            yield (
                f"the file system of {self._config.db_path.parent} is read-only, nothing can be written: after errors"
                " (dmesg) it needs a check, fsck"
            )
        yield from filter(None, (self.fault, self._connection.duplicate, self._snapshots.state.damage))

    def _lag(self) -> float | None:
        positions, ends = self._progress.positions, self._progress.ends
        behind = any(ends.get(stream, 0) > sequence for stream, sequence in positions.items())
        return present_lag(self._engine.lag_s, time.monotonic() - self._engine.lag_measured, behind=behind)

    def line(self) -> str:
        """What `systemctl status` shows."""
        if self.database_error and not self._opened:
            return f"waiting for the database {self._config.db_path}: {self.database_error}"
        return summary(self.current())

    def _concerns(self) -> Iterator[str]:
        progress = self._progress
        yield from filter(None, (self._engine.replica.completeness.incomplete, progress.error, self._engine.last_error))
        if (due := self._engine.replica.recapturing.under_way) is not None:
            yield (
                f"table {due.table} was rebuilt, or is new: its rows are gone through ({due.rows:,} so far), and until"
                " that is done nothing is published or applied"
            )
        yield from held_rows(self._held, progress.refused)
        yield from self._snapshots.concerns()
        schema = self._engine.replica.known_schema
        if schema is not None and not schema.tables and not schema.skipped and self._parked:
            yield (
                f"the database has no tables, so what arrives waits; to fetch it whole, stop the daemon, move"
                f" {self._config.db_path} away and start again"
            )

    def fill_metrics(self) -> None:
        """The gauges, as they are now."""
        metrics = self._engine.metrics
        metrics.pending_publish.set(self._pending)
        metrics.held.set(sum(self._held.values()))
        metrics.parked.set(self._parked)
        metrics.nats_connected.set(int(self._connection.connected))
        metrics.messages_behind.set(self.current().messages_behind)
        metrics.clock_offset_seconds.set(self._engine.time.offset_s())
        metrics.schema_mismatch_paused.set(self._engine.replica.paused_tables)
        metrics.unread_messages.set(self._engine.replica.completeness.unread_messages)
        metrics.unread_bytes.set(self._engine.replica.completeness.unread_bytes)

    def _url(self) -> str:
        if self._config.external:
            return ", ".join(self._config.nats.urls)
        if self._config.nats.leaf_servers:
            return ", ".join(self._config.nats.leaf_servers)
        return (self._server.url if self._server else None) or "bundled server"

    def _nats_error(self) -> str | None:
        if self._server is not None:
            state = self._server.state
            known = state.last_error or state.storage_error or state.link_error
            if known:
                return known
        return self._connection.last_error


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else rfc3339(seconds)


def held_rows(held: Mapping[int, int], refused: Mapping[int, str]) -> Iterator[str]:
    """Why rows are held (db/held.py). held: held batches with their numbers of rows; refused: see Progress."""
    told = [refused[batch] for batch in held if batch in refused]
    yield from told[:MOST_HELD]
    if len(told) > MOST_HELD:
        yield f"{len(told) - MOST_HELD} more transactions are not published: each is larger than its stream"
    if unknown := sum(number for batch, number in held.items() if batch not in refused):
        yield (
            f"{unknown} rows of a transaction are not published: the stream could not hold it; it is tried again once"
            " connected"
        )


def present_lag(last_s: float | None, age_s: float, *, behind: bool) -> float | None:
    """The lag of the last group, measured `age_s` ago: once all has been read and no more comes, there is none."""
    if last_s is None or behind or age_s < LAG_LASTS_S:
        return last_s
    return 0.0
