"""`parked`: received rows that wait, each with its reason."""

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
)
from harmonylite.db import inspect
from harmonylite.db.inspect import Parked


def run(arguments: argparse.Namespace) -> int:
    found = inspect.parked(load_config(arguments).db_path, arguments.table)
    if arguments.json:
        print_json([_as_json(row) for row in found])
    elif not found:
        print("no parked rows")
    else:
        for row in found:
            _print(row)
    return 0


def _print(parked: Parked) -> None:
    detail = f": {parked.detail}" if parked.detail else ""
    print_line(f"{local_time(parked.parked_ms)}  {parked.table} {sql_key(parked.key)}  {parked.reason}{detail}")
    print_line(f"    written by node {parked.node} at {local_time(parked.ts)}")
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
        "missing, or a constraint of this node's schema forbids them. They are applied as soon as the schema allows it."
    ),
    examples=("harmonylite parked", "harmonylite parked --table orders --json"),
    add_arguments=_add_arguments,
    run=run,
)
