"""An application that writes large transactions without any pause, for ever: its rows are published all the while."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cluster import eventually, hub_and_leaves

SCHEMA = "CREATE TABLE reading (id INTEGER PRIMARY KEY, taken_at INTEGER, value REAL);"

# It updates the same rows again and again, so that the file does not grow with the time that the test takes. The first
# row of a transaction carries its number.
APPLICATION = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
number = 0
while True:
    number += 1
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(
        "INSERT INTO reading VALUES (?1, ?2, 0.5) ON CONFLICT (id) DO UPDATE SET taken_at = ?2",
        ((key, number) for key in range(10_000)),
    )
    connection.execute("COMMIT")
"""

# Each a look at another state of the application than the one before.
LOOKS = 5
SEEN = "SELECT count(*), min(taken_at), max(taken_at) FROM reading"


@pytest.mark.slow
def test_what_an_application_writes_that_never_rests_is_published_meanwhile(tmp_path: Path) -> None:
    cluster, _ = hub_and_leaves(tmp_path, SCHEMA, 1)
    with cluster:
        hub, leaf = cluster.start().nodes.values()
        application = subprocess.Popen([sys.executable, "-c", APPLICATION, str(leaf.db)])
        cluster.own(application)
        seen = [0]

        def newer() -> bool:
            [(count, oldest, newest)] = hub.execute(SEEN)
            assert count in (0, 10_000), f"half of a transaction: {count} rows"
            assert oldest == newest, f"half of a transaction: {oldest} and {newest}"
            return bool(newest and newest > seen[-1] and not seen.append(newest))

        for _ in range(LOOKS):
            eventually(newer, 20.0, f"something newer than {seen} from an application that never rests")
            assert application.poll() is None, "it rested"
        application.kill()
        application.wait()
        cluster.wait_settled()
