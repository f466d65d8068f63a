"""`conflicts`: rows that were discarded, each with what it lost to."""

from __future__ import annotations

import argparse

from harmonylite.cli.command import (
    Command,
    WrongUsage,
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
    warn,
    writing,
)
from harmonylite.db import inspect
from harmonylite.db.inspect import Conflict

DEFAULT_LIMIT = 100


def run(arguments: argparse.Namespace) -> int:
    if arguments.limit < 1:
        raise WrongUsage(f"--limit must be 1 or more; it is {arguments.limit}")
    found = inspect.conflicts(load_config(arguments).db_path, arguments.table, arguments.limit)
    if arguments.json:
        print_json([_as_json(conflict) for conflict in found])
    elif not found:
        print("no conflicts")
    else:
        for conflict in found:
            _print(conflict)
    if len(found) == arguments.limit:
        warn(f"the newest {arguments.limit} are shown; --limit N shows more")
    return 0


def _print(conflict: Conflict) -> None:
    print_line(f"{local_time(conflict.recorded_ms)}  {conflict.table} {sql_key(conflict.key)}  {conflict.reason}")
    print_line(f"    written {writing(conflict.ts, conflict.node)}")
    if conflict.winner_ts is not None and conflict.winner_node is not None:
        print_line(f"    lost to the one written {writing(conflict.winner_ts, conflict.winner_node)}")
    print_line(
        f"    {sql_row(conflict.row)}" if conflict.row else "    (a delete, or a row of which only the key is known)"
    )


def _as_json(conflict: Conflict) -> dict[str, object]:
    row = conflict.row
    return {
        "id": conflict.id,
        "table": conflict.table,
        "key": [json_value(value) for value in conflict.key],
        "reason": conflict.reason,
        "written_at": rfc3339(conflict.ts),
        "timestamp_ms": conflict.ts,
        "node_id": conflict.node,
        "rank": conflict.rank,
        "winner_timestamp_ms": conflict.winner_ts,
        "winner_node_id": conflict.winner_node,
        "row": None if row is None else {name: json_value(value) for name, value in row.items()},
        "recorded_at": rfc3339(conflict.recorded_ms),
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_table(parser)
    parser.add_argument(
        "--limit", type=int, default=DEFAULT_LIMIT, metavar="N", help=f"at most so many (default {DEFAULT_LIMIT})"
    )
    add_json(parser)


COMMAND = Command(
    name="conflicts",
    summary="rows that were discarded by a conflict",
    description=(
        "List the rows that were discarded because another write won, the newest first, with all their columns,\n"
        "so that nothing is lost for good. Works with the daemon running or stopped."
    ),
    examples=(
        "harmonylite conflicts",
        "harmonylite conflicts --table orders --limit 20",
        "harmonylite conflicts --json",
    ),
    add_arguments=_add_arguments,
    run=run,
)
