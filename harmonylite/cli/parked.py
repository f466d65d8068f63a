"""`parked`: received rows that wait, and messages that could not be read, each with its reason."""

from __future__ import annotations

import argparse

from harmonylite.cli.command import (
    Command,
    add_json,
    add_table,
    json_value,
    load_config,
    local_time,
    print_json,
    print_line,
    rfc3339,
    sql_key,
    sql_row,
    writing,
)
from harmonylite.db import inspect
from harmonylite.db.conflicts import DOES_NOT_FIT, waits_for
from harmonylite.db.inspect import Parked, UnreadMessage


def run(arguments: argparse.Namespace) -> int:
    path = load_config(arguments).db_path
    found = inspect.parked(path, arguments.table)
    # Nobody knows of which tables they are.
    messages = inspect.unread(path) if arguments.table is None else []
    if arguments.json:
        print_json([*map(_as_json, found), *map(_message_as_json, messages)])
    elif not found and not messages:
        print("no parked rows")
    else:
        for row in found:
            _print(row)
        for message in messages:
            _print_message(message)
    return 0


def _print_message(message: UnreadMessage) -> None:
    print_line(
        f"{local_time(message.recorded_ms)}  message {message.sequence} of stream {message.stream}:"
        f" cannot be read by this version: {message.error}"
    )
    print_line(
        f"    sent by node {message.node} at {local_time(message.stored_ms)}; read again once this node is upgraded"
    )


def _message_as_json(message: UnreadMessage) -> dict[str, object]:
    return {
        "stream": message.stream,
        "sequence": message.sequence,
        "reason": "cannot be read by this version",
        "detail": message.error,
        "node_id": message.node,
        "stored_at": rfc3339(message.stored_ms),
        "parked_at": rfc3339(message.recorded_ms),
    }


def _print(parked: Parked) -> None:
    detail = f": {parked.detail}" if parked.detail else ""
    print_line(f"{local_time(parked.parked_ms)}  {parked.table} {sql_key(parked.key)}  {parked.reason}{detail}")
    print_line(f"    written {writing(parked.ts, parked.node)}")
    if parked.reason == DOES_NOT_FIT:
        print_line(f"    waits until {waits_for(parked.reason, parked.detail)}")
    if parked.deleted:
        print("    (a delete)")
    elif parked.row:
        print_line(f"    {sql_row(parked.row)}")


def _as_json(parked: Parked) -> dict[str, object]:
    row = parked.row
    return {
        "table": parked.table,
        "key": [json_value(value) for value in parked.key],
        "reason": parked.reason,
        "detail": parked.detail,
        "written_at": rfc3339(parked.ts),
        "timestamp_ms": parked.ts,
        "node_id": parked.node,
        "rank": parked.rank,
        "deleted": parked.deleted,
        "row": None if row is None else {name: json_value(value) for name, value in row.items()},
        "parked_at": rfc3339(parked.parked_ms),
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_table(parser)
    add_json(parser)


COMMAND = Command(
    name="parked",
    summary="received rows that wait, each with its reason",
    description=(
        "List the received rows that cannot be applied here yet, those that wait longest first: a table or column is\n"
        "missing, or a constraint of this node's schema forbids them. They are applied as soon as the schema allows\n"
        "it. Messages of a newer version, which this one cannot read, come last: they are read once it is upgraded."
    ),
    examples=("harmonylite parked", "harmonylite parked --table orders --json"),
    add_arguments=_add_arguments,
    run=run,
)
