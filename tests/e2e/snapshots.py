"""What tests with snapshots share."""

from __future__ import annotations

import os
from typing import Any

from harmonylite.observe.control import query
from tests.e2e import writers
from tests.e2e.cluster import Cluster, Node, eventually

# Beside the rows that the writers' ledgers know: few rows, much to carry.
BULK = "CREATE TABLE bulk (id INTEGER PRIMARY KEY, data BLOB NOT NULL);"
SCHEMA = writers.SCHEMA + BULK


def churn(node: Node, mbytes: float) -> None:
    """Twenty rows, written again and again until the stream has taken so much that does not compress."""
    with node.open_db() as connection:
        for _ in range(round(mbytes * 1e6 / (20 * 10_000))):
            before = published(node)
            connection.execute("BEGIN IMMEDIATE")
            rows = [(number, os.urandom(10_000)) for number in range(20)]
            connection.executemany("INSERT OR REPLACE INTO bulk VALUES (?, ?)", rows)
            connection.execute("COMMIT")
            wait_published(node, before + len(rows))


def wait_published(node: Node, rows: int) -> None:
    eventually(lambda: published(node) >= rows, 30, f"{rows} rows are published", pause_s=0.01)


def published(node: Node) -> int:
    return int((node.status() or {"published_rows": 0})["published_rows"])


def save(node: Node, *, force: bool = False, timeout_s: float = 60) -> str:
    """Take a snapshot now; its id."""
    query(node.db, {"command": "snapshot-save", "force": force})
    answer: dict[str, Any] = {}

    def done() -> bool:
        answer.update(query(node.db, {"command": "snapshot-progress"}))
        return not answer["running"]

    eventually(done, timeout_s, "the snapshot is taken")
    assert "error" not in answer, answer
    return str(answer["snapshot"]["id"])


def wait_same(cluster: Cluster, timeout_s: float) -> None:
    """Wait until all nodes have published everything and are identical."""
    cluster.wait_settled(timeout_s)
