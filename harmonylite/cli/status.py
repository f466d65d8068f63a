"""`status`: what this node, or every node of the cluster, is doing."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from harmonylite import __version__
from harmonylite.cli.command import (
    Command,
    Failure,
    add_json,
    counted,
    duration,
    load_config,
    local_time,
    print_json,
    print_pairs,
    print_table,
    size,
)
from harmonylite.config import Config
from harmonylite.db import inspect
from harmonylite.db.inspect import Overview
from harmonylite.observe import control
from harmonylite.observe.control import ControlUnavailable
from harmonylite.observe.status import NodeStatus, StreamPosition

# The order in which the registry's columns are shown; others follow behind, as they come.
_CLUSTER_COLUMNS = ("node_id", "status", "last_seen", "version", "pending_rows", "lag_seconds", "address")


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments)
    return _cluster(arguments, config) if arguments.cluster else _node(arguments, config)


def _node(arguments: argparse.Namespace, config: Config) -> int:
    try:
        document = control.query(config.db_path, {"command": "status"})
    except ControlUnavailable:
        return _stopped(arguments, config)
    if arguments.json:
        print_json({"daemon_running": True, **document})
        return 0
    try:
        node = NodeStatus.from_json(document)
    except (TypeError, ValueError):
        raise Failure(
            f"the daemon is of another version ({document.get('version')}) than this command ({__version__});"
            " restart it, or use --json"
        ) from None
    print_pairs(_node_lines(node, config))
    return 0


def _stopped(arguments: argparse.Namespace, config: Config) -> int:
    """Without a daemon the database alone answers."""
    found = inspect.overview(config.db_path)
    if arguments.json:
        print_json(_stopped_document(found, config))
    else:
        print_pairs(_stopped_lines(found, config))
    return 0


def _stopped_document(found: Overview, config: Config) -> dict[str, Any]:
    positions = [
        {"stream": position.stream, "sequence": position.sequence, "last_sequence": None}
        for position in found.positions
    ]
    return {
        "daemon_running": False,
        "status": "stopped",
        "node_id": found.node_id or config.node_id,
        "version": __version__,
        "db_path": str(config.db_path),
        "db_connected": True,
        "nats_connected": False,
        "tables_tracked": len(found.tables),
        "pending_rows": found.pending_rows,
        "parked_rows": found.parked_rows,
        "conflicts": found.conflicts_total,
        "positions": positions,
        "reasons": ["daemon: not running", *filter(None, [found.incomplete])],
    }


def _stopped_lines(found: Overview, config: Config) -> Iterator[tuple[str, str]]:
    yield "node", str(found.node_id or config.node_id)
    yield "daemon", "not running"
    yield "database", f"{config.db_path}, {counted(len(found.tables), 'table')} replicated"
    waiting = "; published after the next start" if found.pending_rows else ""
    yield "pending", f"{counted(found.pending_rows, 'row')}{waiting}"
    yield from _waiting_lines(found.parked_rows, found.conflicts_total)
    if found.incomplete is not None:
        yield "missing", found.incomplete
    for position in found.positions:
        when = f", stored {local_time(position.stored_ns // 1_000_000)}" if position.stored_ns else ""
        yield "position", f"{position.stream} {position.sequence}{when}"


def _node_lines(node: NodeStatus, config: Config) -> Iterator[tuple[str, str]]:
    yield "node", str(node.node_id)
    yield "status", node.status
    for reason in node.reasons:
        yield "", reason
    yield "daemon", f"running for {duration(node.uptime_seconds)}, version {node.version}"
    yield "database", f"{node.db_path}, {_database(node)}"
    yield "nats", _connection(node)
    yield "pending", _pending(node, config)
    yield "published", counted(node.published_rows, "row") + _when(node.last_published_event_timestamp)
    yield "applied", counted(node.applied_rows, "row") + _when(node.last_replicated_event_timestamp)
    if node.lag_seconds is not None:
        yield "lag", f"{max(0.0, node.lag_seconds):.3f} s"
    yield from _waiting_lines(node.parked_rows, node.conflicts)
    for position in node.positions:
        yield "position", _position(position)
    if node.snapshot is not None:
        shot = node.snapshot
        where = f"the mirror ({shot.store})" if shot.in_mirror else shot.store
        text = f"{duration(shot.age_seconds)} old, by node {shot.node_id}, {size(shot.size_bytes)} in {where}"
        yield "snapshot", text
    elif config.snapshot.enabled:
        yield "snapshot", "none yet" if node.status == "healthy" else "none known"
    if node.clock_offset_seconds is not None:
        yield "clock", f"{node.clock_offset_seconds:+.3f} s against the server's"
    for table in node.skipped_tables:
        yield "skipped", f"{table.table}: {table.reason}"


def _database(node: NodeStatus) -> str:
    if not node.db_connected:
        return "not reachable"
    tables = counted(node.tables_tracked, "table")
    return f"{tables} replicated" if node.cdc_installed else f"{tables}, local changes not captured"


def _connection(node: NodeStatus) -> str:
    if node.nats_connected:
        behind = f", catching up: {counted(node.messages_behind, 'message')} behind" if node.catching_up else ""
        behind = f", catching up: {node.catch_up}" if node.catch_up else behind
        return f"connected to {node.nats_url}{behind}"
    since = ""
    if node.offline_since is not None:
        since = f" since {_moment(node.offline_since)}"
        seconds = _seconds_since(node.offline_since)
        since += f" ({duration(seconds)})" if seconds is not None else ""
    why = f": {node.nats_error}" if node.nats_error else ""
    return f"offline{since}{why}; keeps trying {node.nats_url}"


def _pending(node: NodeStatus, config: Config) -> str:
    rows = counted(node.pending_rows, "row")
    if not config.publish:
        return f"{rows}; this node publishes nothing (publish = false)"
    if node.pending_rows and not node.nats_connected:
        return f"{rows}; kept in the database, published once connected"
    return rows


def _waiting_lines(parked: int, conflicts: int) -> Iterator[tuple[str, str]]:
    yield "parked", counted(parked, "row") + ("; harmonylite parked says why" if parked else "")
    yield "conflicts", counted(conflicts, "row") + ("; harmonylite conflicts lists them" if conflicts else "")


def _position(position: StreamPosition) -> str:
    end = f" of {position.last_sequence}" if position.last_sequence is not None else ""
    return f"{position.stream} {position.sequence}{end}"


def _when(timestamp: str | None) -> str:
    return f", the last written {_moment(timestamp)}" if timestamp else ""


def _parsed(timestamp: str) -> datetime | None:
    try:
        # Python before 3.11 does not read the "Z" of RFC 3339.
        return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).astimezone()
    except ValueError:
        return None


def _moment(timestamp: str) -> str:
    moment = _parsed(timestamp)
    return timestamp if moment is None else moment.strftime("%Y-%m-%d %H:%M:%S")


def _seconds_since(timestamp: str) -> float | None:
    moment = _parsed(timestamp)
    return None if moment is None else time.time() - moment.timestamp()


def _cluster(arguments: argparse.Namespace, config: Config) -> int:
    try:
        answer = control.query(config.db_path, {"command": "cluster"}, timeout=10.0)
    except ControlUnavailable:
        raise Failure(
            f"{config.db_path}: no daemon runs on this database, and the cluster is asked through it; start it first"
        ) from None
    nodes = answer.get("nodes")
    if not isinstance(nodes, list):
        raise Failure("the daemon's answer holds no nodes: it is of another version than this command; restart it")
    if arguments.json:
        print_json(nodes)
    elif not nodes:
        print("no node is registered yet")
    else:
        _print_cluster(nodes)
    return 0


def _print_cluster(nodes: Sequence[Mapping[str, Any]]) -> None:
    present = dict.fromkeys(
        name for node in nodes for name, value in node.items() if not isinstance(value, (list, dict))
    )
    columns = [name for name in _CLUSTER_COLUMNS if name in present]
    columns += [name for name in present if name not in columns]
    print_table(
        [name.replace("_", " ") for name in columns], [[_cell(node.get(name)) for name in columns] for node in nodes]
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", action="store_true", help="every node that the cluster's registry knows")
    add_json(parser)


COMMAND = Command(
    name="status",
    summary="what this node, or the whole cluster, is doing",
    description=(
        "Show what this node is doing: online or offline, what waits to be published, how far it has applied the\n"
        "others' changes. The running daemon is asked; without one, the database alone answers."
    ),
    examples=("harmonylite status", "harmonylite status --json", "harmonylite status --cluster"),
    add_arguments=_add_arguments,
    run=run,
)
