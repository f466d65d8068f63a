"""The verdict over a node's facts, its JSON and the line for people."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from harmonylite.observe.health import HEALTH_KEYS, health_handler
from harmonylite.observe.status import (
    NodeStatus,
    SkippedTable,
    SnapshotInfo,
    StreamPosition,
    judge,
    summary,
)

WELL = NodeStatus(
    node_id=2**63 - 1,
    version="1.2.3",
    uptime_seconds=60,
    db_path="/var/lib/app/app.db",
    db_connected=True,
    nats_connected=True,
    offline_since=None,
    nats_url="nats://joe:hush@hub:4222",
    nats_error=None,
    cdc_installed=True,
    tables_tracked=3,
    skipped_tables=(SkippedTable("log", "no primary key"),),
    pending_rows=0,
    published_rows=10,
    applied_rows=20,
    parked_rows=0,
    conflicts=1,
    lag_seconds=0.004,
    clock_offset_seconds=-0.2,
    positions=(StreamPosition("changes-1", 90, 100), StreamPosition("changes-2", 5, None)),
    catching_up=False,
    last_replicated_event_timestamp="2024-05-03T12:00:00.000Z",
    last_published_event_timestamp=None,
    snapshot=SnapshotInfo("2024-05-03T00:00:00.000Z", 3600.0, 7, 1 << 20, "nats"),
)
OFFLINE = replace(
    WELL,
    nats_connected=False,
    offline_since="2024-05-03T12:02:00.000Z",
    nats_error="connection refused by nats://joe:hush@hub:4222",
    pending_rows=1203,
)
PLUS_TWO = timezone(timedelta(hours=2))
THAT_EVENING = datetime(2024, 5, 3, 20, 0, tzinfo=PLUS_TWO)


def test_healthy_without_a_reason() -> None:
    node = judge(WELL)
    assert (node.status, node.reasons) == ("healthy", ())
    assert replace(node, status=WELL.status, reasons=WELL.reasons) == WELL


def test_not_judged_is_not_healthy() -> None:
    assert WELL.status == "unhealthy"


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (OFFLINE, "offline since 2024-05-03T12:02:00.000Z: connection refused"),
        (replace(WELL, nats_connected=False), "offline"),
        (replace(WELL, catching_up=True), "catching up: 10 messages behind"),
        (replace(WELL, parked_rows=1), "1 row parked"),
        (replace(WELL, unkeyed_rows=2), "2 rows not replicated: NULL in the primary key"),
        (replace(WELL, lag_seconds=31.0), "replication lags by 31.0 s"),
    ],
)
def test_degraded_while_it_does_its_local_job(node: NodeStatus, reason: str) -> None:
    judged = judge(node)
    assert judged.status == "degraded"
    assert len(judged.reasons) == 1 and judged.reasons[0].startswith(reason)


def test_unhealthy_when_the_database_is_unreachable() -> None:
    judged = judge(replace(WELL, db_connected=False, cdc_installed=False))
    assert (judged.status, judged.reasons) == ("unhealthy", ("database unreachable: /var/lib/app/app.db",))
    told = judge(replace(WELL, db_connected=False, db_error="database disk image is malformed"))
    assert told.reasons == ("database unreachable: /var/lib/app/app.db: database disk image is malformed",)


def test_unhealthy_when_capture_is_not_installed_although_wanted() -> None:
    bare = replace(WELL, cdc_installed=False)
    judged = judge(bare)
    assert judged.status == "unhealthy" and judged.reasons[0].startswith("capture is not installed")
    assert judge(bare, capture_wanted=False).status == "healthy"


def test_unhealthy_when_the_bundled_server_does_not_run() -> None:
    judged = judge(replace(OFFLINE, nats_error="no nats-server found: install one"), server_keeps_dying=True)
    assert judged.status == "unhealthy"
    assert judged.reasons[0] == "the bundled nats-server does not run: no nats-server found: install one"
    assert judged.reasons[1].startswith("offline since") and "found" not in judged.reasons[1]  # said once


def test_faults_outweigh_concerns() -> None:
    assert judge(WELL, concerns=["disk nearly full"]).status == "degraded"
    judged = judge(WELL, faults=["node id 7 is in use elsewhere"], concerns=["disk nearly full"])
    assert judged.status == "unhealthy"
    assert judged.reasons == ("node id 7 is in use elsewhere", "disk nearly full")


def test_lag_up_to_the_limit_and_unknown_lag_are_healthy() -> None:
    assert judge(replace(WELL, lag_seconds=30.0)).status == "healthy"
    assert judge(replace(WELL, lag_seconds=None)).status == "healthy"
    assert judge(replace(WELL, lag_seconds=0.5), lag_limit_s=0.1).status == "degraded"


def test_json_keeps_every_fact_but_no_password() -> None:
    node = judge(OFFLINE)
    text = json.dumps(node.to_json())
    assert "hush" not in text
    document = json.loads(text)
    assert list(document)[:3] == ["status", "node_id", "version"]
    assert document["node_id"] == 2**63 - 1
    assert document["skipped_tables"] == [{"table": "log", "reason": "no primary key"}]
    assert document["positions"][1] == {"stream": "changes-2", "sequence": 5, "last_sequence": None}
    assert document["snapshot"]["size_bytes"] == 1 << 20
    back = NodeStatus.from_json(document)
    assert replace(back, nats_url="", nats_error="", reasons=()) == replace(
        node, nats_url="", nats_error="", reasons=()
    )
    assert NodeStatus.from_json(back.to_json()) == back


def test_json_of_another_version() -> None:
    document = json.loads(json.dumps(judge(WELL).to_json()))
    document["invented_later"] = 1
    document["positions"][0]["invented_later"] = 1
    assert NodeStatus.from_json(document).positions == WELL.positions
    del document["node_id"]
    with pytest.raises(TypeError, match="node_id"):
        NodeStatus.from_json(document)


def test_summary_online() -> None:
    assert summary(judge(WELL)) == "online, 0 pending, lag 0.0 s"
    assert summary(judge(replace(WELL, lag_seconds=None, pending_rows=12345))) == "online, 12,345 pending"
    assert summary(judge(replace(WELL, lag_seconds=-0.3))) == "online, 0 pending, lag 0.0 s"
    busy = judge(replace(WELL, catching_up=True, parked_rows=3))
    assert summary(busy) == "online, 0 pending, lag 0.0 s, catching up, 10 messages behind, 3 parked"


def test_summary_offline_in_local_time_without_password() -> None:
    line = summary(judge(OFFLINE), now=THAT_EVENING, zone=PLUS_TWO)
    assert line == "offline since 14:02, 1,203 rows pending, retrying nats://********@hub:4222"
    later = THAT_EVENING + timedelta(days=1)
    assert summary(judge(OFFLINE), now=later, zone=PLUS_TWO).startswith("offline since 2024-05-03 14:02, ")
    never = judge(replace(OFFLINE, offline_since=None, pending_rows=1))
    assert summary(never).startswith("offline, 1 row pending, ")


def test_summary_unhealthy_says_why() -> None:
    line = summary(judge(replace(OFFLINE, db_connected=False)))
    assert line.startswith("unhealthy: database unreachable: /var/lib/app/app.db; offline since")
    assert "hush" not in line


@pytest.mark.parametrize(
    ("node", "code", "status"),
    [
        (WELL, 200, "healthy"),
        (OFFLINE, 200, "degraded"),
        (replace(WELL, db_connected=False), 503, "unhealthy"),
    ],
)
def test_health_answers_with_exactly_the_promised_keys(node: NodeStatus, code: int, status: str) -> None:
    judged = judge(node)
    detailed = health_handler(lambda: judged, detailed=True)()
    assert detailed.status == code and detailed.content_type == "application/json"
    document = json.loads(detailed.body)
    assert set(document) == {
        *("status", "node_id", "version", "uptime_seconds", "db_connected", "nats_connected"),
        *("cdc_installed", "tables_tracked", "last_replicated_event_timestamp"),
        *("last_published_event_timestamp", "pending_rows", "parked_rows", "conflicts", "lag_seconds"),
        *("snapshot", "reasons"),
    }
    assert tuple(document) == HEALTH_KEYS
    assert document["status"] == status and document["reasons"] == judged.to_json()["reasons"]
    brief = health_handler(lambda: judged, detailed=False)()
    assert (brief.status, json.loads(brief.body)) == (code, {"status": status})
