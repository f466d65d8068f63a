"""The health endpoint: is the local job done?"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

from harmonylite.observe.http import Handler, Response
from harmonylite.observe.status import NodeStatus

# The promised keys; the rest of a node's status is for its own administrator (`harmonylite status`).
HEALTH_KEYS: Final = (
    *("status", "node_id", "version", "uptime_seconds", "db_connected", "nats_connected", "cdc_installed"),
    *("tables_tracked", "last_replicated_event_timestamp", "last_published_event_timestamp"),
    *("pending_rows", "parked_rows", "conflicts", "lag_seconds", "snapshot", "reasons"),
)


def health_handler(current: Callable[[], NodeStatus], *, detailed: bool) -> Handler:
    """Answers with the `HEALTH_KEYS` of `current()`, or with `status` alone unless `detailed`.

    200 also for `degraded`: a node that is offline for a week does its local job, and a supervisor that
    restarted it for that would help nobody. 503 for `unhealthy`.
    """
    keys = HEALTH_KEYS if detailed else ("status",)

    def handle() -> Response:
        node = current()
        document = node.to_json()
        body = json.dumps({key: document[key] for key in keys}).encode() + b"\n"
        return Response(503 if node.status == "unhealthy" else 200, "application/json", body)

    return handle
