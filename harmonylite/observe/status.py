"""What a node says of itself: the facts, the verdict over them, and the line for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, tzinfo
from typing import Any, Final, Literal

from harmonylite.observe.log import redact

Health = Literal["healthy", "degraded", "unhealthy"]

# Above this, replication is late enough that somebody should know. Ordinary lag is milliseconds.
LAG_LIMIT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class SkippedTable:
    """A table of the application that is not replicated, and why."""

    table: str
    reason: str


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """How far this node has applied a stream. `last_sequence`: the stream's end when last seen, if ever."""

    stream: str
    sequence: int
    last_sequence: int | None


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """The newest snapshot in the store. `taken_at`: RFC 3339; `node_id`: who took it; `size_bytes`: as stored;
    `in_mirror`: it is known from the mirror, which `store` then names: the store has none, or is away."""

    taken_at: str
    age_seconds: float
    node_id: int
    size_bytes: int
    store: str
    id: str = ""
    in_mirror: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """The state of one node. Timestamps: RFC 3339, None for never. Rows are counted since the daemon's start.

    pending_rows and parked_rows: how many wait now. conflicts: how many the conflict log has counted in all.
    lag_seconds: commit on the writer to commit here, of the last group applied; None before the first.
    clock_offset_seconds: this node's clock minus the server's; None when never measured.
    catch_up: what is being done about messages that this node missed, how far it is; None when it missed none.
    unkeyed_rows: with NULL in their primary key, as counted last. db_error: why the database is not connected.
    `status` and `reasons` are what `judge` says; before it has spoken, a node counts as unhealthy.
    """

    status: Health = "unhealthy"
    node_id: int
    version: str
    uptime_seconds: int
    db_path: str
    db_connected: bool
    nats_connected: bool
    offline_since: str | None
    nats_url: str
    nats_error: str | None
    cdc_installed: bool
    tables_tracked: int
    skipped_tables: tuple[SkippedTable, ...]
    pending_rows: int
    published_rows: int
    applied_rows: int
    parked_rows: int
    conflicts: int
    lag_seconds: float | None
    clock_offset_seconds: float | None
    positions: tuple[StreamPosition, ...]
    catching_up: bool
    catch_up: str | None = None
    last_replicated_event_timestamp: str | None
    last_published_event_timestamp: str | None
    snapshot: SnapshotInfo | None
    unkeyed_rows: int = 0
    db_error: str | None = None
    reasons: tuple[str, ...] = ("not judged yet",)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values, in the order above, passwords in URLs masked."""
        document = asdict(self)
        for name in ("skipped_tables", "positions"):
            document[name] = list(document[name])
        document["reasons"] = [redact(reason) for reason in self.reasons]
        document["nats_url"] = redact(self.nats_url)
        document["nats_error"] = self.nats_error and redact(self.nats_error)
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> NodeStatus:
        """What `to_json` made, for instance in a daemon of another version: keys unknown here are dropped.

        TypeError when one that is needed is missing.
        """
        values = _known(cls, document)
        for name, kind in (("skipped_tables", SkippedTable), ("positions", StreamPosition)):
            values[name] = tuple(kind(**_known(kind, one)) for one in values.get(name, ()))
        values["reasons"] = tuple(values.get("reasons", ()))
        if values.get("snapshot") is not None:
            values["snapshot"] = SnapshotInfo(**_known(SnapshotInfo, values["snapshot"]))
        return cls(**values)

    @property
    def messages_behind(self) -> int:
        """Messages of all streams, as far as their ends are known, that this node has not applied yet."""
        return sum(
            max(0, position.last_sequence - position.sequence)
            for position in self.positions
            if position.last_sequence is not None
        )


def _known(cls: type[Any], document: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    return {name: value for name, value in document.items() if name in names}


def judge(
    node: NodeStatus,
    *,
    capture_wanted: bool = True,
    server_keeps_dying: bool = False,
    faults: Sequence[str] = (),
    concerns: Sequence[str] = (),
    lag_limit_s: float = LAG_LIMIT_S,
) -> NodeStatus:
    """The same facts with `status` and `reasons` filled in, the graver reasons first.

    Unhealthy: the local job is not done (database unreachable, capture not installed although
    `capture_wanted`) or the node cannot help itself (the bundled server keeps dying, `faults` such as a
    second node with our id). Degraded: it does its local job, but others do not see it or it does not see
    them (offline, catching up, parked rows, lag, other `concerns`). Healthy: neither.
    """
    grave = []
    if not node.db_connected:
        why = f": {node.db_error}" if node.db_error else ""
        grave.append(f"database unreachable: {node.db_path}{why}")
    elif capture_wanted and not node.cdc_installed:
        grave.append("capture is not installed: local changes are not replicated")
    if server_keeps_dying:
        # Perhaps it never lived: its program may be missing.
        grave.append("the bundled nats-server does not run" + (f": {node.nats_error}" if node.nats_error else ""))
    grave += faults

    lesser = []
    if not node.nats_connected:
        since = f" since {node.offline_since}" if node.offline_since else ""
        why = f": {node.nats_error}" if node.nats_error and not server_keeps_dying else ""
        lesser.append(f"offline{since}{why}")
    if node.catch_up:
        lesser.append(f"catching up: {node.catch_up}")
    elif node.catching_up:
        lesser.append(f"catching up: {_count(node.messages_behind, 'message')} behind")
    if node.parked_rows:
        lesser.append(f"{_count(node.parked_rows, 'row')} parked (harmonylite parked says why)")
    if node.unkeyed_rows:
        rows = _count(node.unkeyed_rows, "row")
        lesser.append(f"{rows} not replicated: NULL in the primary key names no row (give it a value, or NOT NULL)")
    if node.lag_seconds is not None and node.lag_seconds > lag_limit_s:
        lesser.append(f"replication lags by {node.lag_seconds:.1f} s")
    lesser += concerns

    status: Health = "unhealthy" if grave else "degraded" if lesser else "healthy"
    return replace(node, status=status, reasons=(*grave, *lesser))


def summary(node: NodeStatus, *, now: datetime | None = None, zone: tzinfo | None = None) -> str:
    """One line for people: `online, 0 pending, lag 0.0 s`.

    Times are in the local zone unless `zone` says otherwise, with the date when it is not that of `now`.
    """
    if node.status == "unhealthy":
        return redact("unhealthy: " + "; ".join(node.reasons))
    if not node.nats_connected:
        since = f" since {_clock_time(node.offline_since, now, zone)}" if node.offline_since else ""
        pending = f"{_count(node.pending_rows, 'row')} pending"
        return redact(f"offline{since}, {pending}, retrying {node.nats_url}")
    parts = ["online", f"{node.pending_rows:,} pending"]
    if node.lag_seconds is not None:
        parts.append(f"lag {max(0.0, node.lag_seconds):.1f} s")
    if node.catch_up:
        parts.append(f"catching up, {node.catch_up}")
    elif node.catching_up:
        parts.append(f"catching up, {_count(node.messages_behind, 'message')} behind")
    if node.parked_rows:
        parts.append(f"{node.parked_rows:,} parked")
    return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _clock_time(timestamp: str, now: datetime | None, zone: tzinfo | None) -> str:
    try:
        # Python before 3.11 does not read the "Z" of RFC 3339.
        moment = datetime.fromisoformat(timestamp.replace("Z", "+00:00")).astimezone(zone)
    except ValueError:
        return timestamp
    today = (now or datetime.now(moment.tzinfo)).astimezone(zone).date()
    return f"{moment:%H:%M}" if moment.date() == today else f"{moment:%Y-%m-%d %H:%M}"
